//! PEFT's configuration of an adapter, which gives the alphas of files without `alpha` tensors. diffusers writes it into
//! the file's metadata, PEFT into `adapter_config.json`.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::Part;
use crate::model::weights::open::{ADAPTER, Weights};

/// PEFT's default alpha.
const ALPHA: f64 = 8.0;
/// Tensors whose first axis is the rank of LoRA, LoHa and LoKr.
const RANKS: [&str; 4] = ["lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"];

/// Configurations by network; `None` applies to all networks.
#[derive(Default)]
pub(crate) struct Peft(Vec<(Option<Part>, PeftConfig)>);

/// PEFT's `LoraConfig`, as far as it is used.
#[derive(Default, Deserialize)]
struct PeftConfig {
    /// `alpha` in LoHa and LoKr.
    #[serde(alias = "alpha")]
    lora_alpha: Option<f64>,
    /// True if alpha is divided by the square root of the rank: Kalajdzievski 2023, <https://arxiv.org/abs/2312.03732>.
    use_rslora: Option<bool>,
    /// Alphas by the end of layer names.
    alpha_pattern: Option<BTreeMap<String, f64>>,
}

impl Peft {
    /// # Errors
    /// `model_unsupported` for invalid metadata, `model_corrupt` for an invalid configuration file.
    pub(crate) fn read(file: &ComponentFile, weights: &Weights) -> Result<Self> {
        let mut all = Vec::new();
        if let Some(config) = file.peft::<PeftConfig>()? {
            all.push((None, config));
        }
        if let Some(text) = weights.metadata(ADAPTER) {
            let refuse = |error: serde_json::Error| Error::ModelUnsupported {
                name: file.name.clone(),
                message: format!("its metadata `{ADAPTER}` cannot be parsed: {error}"),
            };
            let values: BTreeMap<String, serde_json::Value> = serde_json::from_str(text).map_err(refuse)?;
            for part in [Part::Unet, Part::TextEncoder, Part::TextEncoder2] {
                let own = |(key, value): (&String, &serde_json::Value)| {
                    Some((key.strip_prefix(part.name())?.strip_prefix('.')?.to_owned(), value.clone()))
                };
                let own: serde_json::Map<_, _> = values.iter().filter_map(own).collect();
                if !own.is_empty() {
                    all.push((Some(part), serde_json::from_value(own.into()).map_err(refuse)?));
                }
            }
        }
        Ok(Self(all))
    }

    /// The alpha of a layer, to be divided by its rank. `shape` gives the shape of a part.
    pub(crate) fn alpha<'s>(
        &self,
        part: Part,
        layer: &str,
        shape: impl Fn(&str) -> Option<&'s [usize]>,
    ) -> Option<f64> {
        let rank = RANKS.iter().find_map(|name| shape(name)?.first().copied())?;
        let mut of_part = self.0.iter().filter(|(own, _)| own.is_none_or(|own| own == part));
        let (_, config) = of_part.next_back()?;
        let matches = |end: &str| layer.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        let own = config.alpha_pattern.iter().flatten().find(|(end, _)| matches(end)).map(|(_, alpha)| *alpha);
        let alpha = own.or(config.lora_alpha).unwrap_or(ALPHA);
        Some(if config.use_rslora == Some(true) { alpha * (rank as f64).sqrt() } else { alpha })
    }
}

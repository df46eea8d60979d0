//! What PEFT says of an adapter beside its tensors: the alphas of files whose keys have none. It stands in the file's
//! metadata where diffusers wrote it, and in `adapter_config.json` in a folder of PEFT's own.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::Part;
use crate::model::weights::open::{ADAPTER, Weights};

/// The alpha of a configuration that says none.
const ALPHA: f64 = 8.0;
/// Tensors whose first axis is the rank of LoRA, LoHa and LoKr.
const RANKS: [&str; 4] = ["lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"];

/// Configurations by network; one without a network is for all.
#[derive(Default)]
pub(crate) struct Peft(Vec<(Option<Part>, Config)>);

/// What is left out has PEFT's default.
#[derive(Default, Deserialize)]
struct Config {
    /// What LoHa and LoKr call `alpha`.
    #[serde(alias = "alpha")]
    lora_alpha: Option<f64>,
    /// Whether the alpha is divided by the root of the rank, Kalajdzievski 2023, <https://arxiv.org/abs/2312.03732>.
    use_rslora: Option<bool>,
    /// Alphas of layers whose names end so.
    alpha_pattern: Option<BTreeMap<String, f64>>,
}

impl Peft {
    /// # Errors
    /// `model_unsupported` for metadata that cannot be understood, `model_corrupt` for such a configuration.
    pub(crate) fn read(file: &ComponentFile, weights: &Weights) -> Result<Self> {
        let mut all = Vec::new();
        if let Some(config) = file.peft::<Config>()? {
            all.push((None, config));
        }
        if let Some(text) = weights.metadata(ADAPTER) {
            let refuse = |error: serde_json::Error| Error::ModelUnsupported {
                name: file.name.clone(),
                message: format!("its metadata `{ADAPTER}` cannot be understood: {error}"),
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

    /// The alpha of a layer, which its rank divides. `shape` is that of a part of the layer's change.
    pub(crate) fn alpha<'s>(
        &self,
        part: Part,
        layer: &str,
        shape: impl Fn(&str) -> Option<&'s [usize]>,
    ) -> Option<f64> {
        let rank = RANKS.iter().find_map(|name| shape(name)?.first().copied())?;
        let mut of_part = self.0.iter().filter(|(own, _)| own.is_none_or(|own| own == part));
        let (_, config) = of_part.next_back()?;
        let ends = |end: &str| layer.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        let own = config.alpha_pattern.iter().flatten().find(|(end, _)| ends(end)).map(|(_, alpha)| *alpha);
        let alpha = own.or(config.lora_alpha).unwrap_or(ALPHA);
        Some(if config.use_rslora == Some(true) { alpha * (rank as f64).sqrt() } else { alpha })
    }
}

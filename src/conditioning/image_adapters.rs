//! Image adapters: T2I-Adapters, which add features of edges or depth maps, and IP-Adapters, which take images as prompts.

use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::conditioning::instructor::ConditioningInstructor;
use crate::conditioning::manager::ConditioningResources;
use crate::conditioning::workers::image_adapters::{
    EncodeImagePrompt, EncodeImagePromptTask, ExtractFeatures, ExtractFeaturesTask,
};
use crate::context::{Context, Stage as ContextStage};
use crate::device::instructor::Placement;
use crate::error::{Error, Result, StageContext};
use crate::image::source::{ImageFile, ImageSource};
use crate::layers::OneOrMany;
use crate::model::catalog::Catalog;
use crate::model::catalog::component_file::ComponentFile;
use crate::model::managers::{Adapter, shapes};
use crate::model::networks::clip_vision::ClipVisionConfig;
use crate::model::networks::ip_adapter::{IpAdapter, IpAdapterLayout};
use crate::model::networks::t2i_adapter::T2iAdapterConfig;
use crate::units::{Bytes, ImageSize};

/// Most adapters of one kind, and most images of one adapter.
const MOST_ADAPTERS: usize = 8;
const MOST_IMAGES: usize = 16;
/// Most bytes of all image files of a request together, which stay in memory until it is answered.
const MOST_BYTES: u64 = 256 * Bytes::MIB;

/// A T2I-Adapter and its image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct T2iAdapterOptions {
    /// A folder in diffusers' layout under the configured model roots.
    pub model: String,
    /// Edges, a depth map or whatever the adapter was trained on; resized to the size of the image.
    pub image: ImageSource,
    /// Multiplier for its features, -10 to 10. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Share of the steps, from the first, in which it acts, 0 to 1. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<f64>,
}

/// An IP-Adapter, its images, and the image encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct IpAdapterOptions {
    /// A safetensors file under the configured model roots.
    pub model: String,
    /// One image or up to 16.
    pub image: OneOrMany<ImageSource>,
    /// A folder with `config.json` and weights of a `CLIPVisionModelWithProjection`, under the configured model roots.
    pub image_encoder: String,
    /// Multiplier for its attention, -10 to 10. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Share of the steps before it acts, 0 to 1. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<f64>,
    /// Share of the steps after which it stops acting, 0 to 1. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<f64>,
}

/// How many tensors of an adapter's file were applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct AdapterFacts {
    /// `t2i_adapter` or `ip_adapter`
    pub kind: &'static str,
    /// The name in the request.
    pub model: String,
    /// Tensors of the file that were applied.
    pub applied: usize,
    /// Tensors of the file that do not belong to such an adapter.
    pub unused: usize,
}

/// The adapters of a generation, decided, without weights.
#[derive(Default)]
pub struct AdapterPlan {
    t2i_adapters: Vec<T2iAdapterPlan>,
    ip_adapters: Vec<IpAdapterPlan>,
}

struct T2iAdapterPlan {
    file: ComponentFile,
    config: T2iAdapterConfig,
    image: ImageFile,
    weight: f64,
    end: f64,
}

struct IpAdapterPlan {
    file: ComponentFile,
    field: String,
    images: Vec<ImageFile>,
    encoder: ComponentFile,
    config: ClipVisionConfig,
    weight: f64,
    /// Shares of the steps at which it starts and stops acting.
    share: [f64; 2],
}

/// The output of the adapters for their images.
#[derive(Default)]
pub struct Adaptation {
    pub features: Vec<Features>,
    pub pictures: Vec<PictureTokens>,
    pub facts: Vec<AdapterFacts>,
}

/// Features that a T2I-Adapter adds to the UNet's down blocks.
pub struct Features {
    /// One for each block, `[1, H, W, C]`, multiplied by the weight.
    pub maps: Vec<Tensor>,
    /// Share of the steps in which they are added.
    pub end: f64,
}

/// Image tokens that the UNet attends to through an IP-Adapter.
pub struct PictureTokens {
    pub adapter: Arc<Adapter<IpAdapter>>,
    /// `[R, T, D]`: with guidance first the tokens for the negative prompt, which show no image; then the images'.
    pub tokens: Tensor,
    pub weight: f64,
    /// Shares of the steps at which it starts and stops acting.
    pub share: [f64; 2],
}

/// One run of the adapters.
pub struct AdaptTask<'a> {
    pub plan: &'a AdapterPlan,
    /// Size of the generated image.
    pub size: ImageSize,
    /// True if the negative prompt is evaluated too.
    pub guided: bool,
    pub placement: &'a Placement,
}

impl AdapterPlan {
    /// The names of the networks in the request.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let features = self.t2i_adapters.iter().map(|one| one.file.name.as_str());
        features.chain(self.ip_adapters.iter().flat_map(|one| [one.file.name.as_str(), one.encoder.name.as_str()]))
    }

    /// The networks, each with its manager's kind.
    pub fn networks(&self) -> impl Iterator<Item = (&'static str, &ComponentFile)> {
        let features = self.t2i_adapters.iter().map(|one| ("t2i_adapter", &one.file));
        let pictures = self.ip_adapters.iter();
        features.chain(pictures.flat_map(|one| [("ip_adapter", &one.file), ("image_encoder", &one.encoder)]))
    }
}

impl ConditioningInstructor {
    /// Decides what the options leave open, and writes the decisions into them. `sizes` are those of the passes that use
    /// adapters.
    ///
    /// # Errors
    /// `invalid_parameter` for a value out of its range, those of the catalog for the models, those of
    /// [`ImageSource::read`] for the images; `image_too_large` for more than 256 MiB of them.
    pub fn plan_adapters(
        &self,
        features: Option<&mut OneOrMany<T2iAdapterOptions>>,
        pictures: Option<&mut OneOrMany<IpAdapterOptions>>,
        sizes: &[ImageSize],
        catalog: &Catalog,
    ) -> Result<AdapterPlan> {
        let (mut plan, mut budget) = (AdapterPlan::default(), ImageBudget(MOST_BYTES));
        if let Some(OneOrMany(entries)) = features {
            check_count("t2i_adapter", entries.len(), 0..=MOST_ADAPTERS)?;
            for (index, options) in entries.iter_mut().enumerate() {
                let field = format!("t2i_adapter.{index}");
                let planned = self.plan_t2i_adapter(options, &field, catalog, &mut budget)?;
                check_sizes(&planned, sizes)?;
                plan.t2i_adapters.push(planned);
            }
        }
        if let Some(OneOrMany(entries)) = pictures {
            check_count("ip_adapter", entries.len(), 0..=MOST_ADAPTERS)?;
            for (index, options) in entries.iter_mut().enumerate() {
                let field = format!("ip_adapter.{index}");
                plan.ip_adapters.push(self.plan_ip_adapter(options, field, catalog, &mut budget)?);
            }
        }
        Ok(plan)
    }

    fn plan_t2i_adapter(
        &self,
        options: &mut T2iAdapterOptions,
        field: &str,
        catalog: &Catalog,
        budget: &mut ImageBudget,
    ) -> Result<T2iAdapterPlan> {
        let weight = value_or_default(&mut options.weight, field, "weight", 1.0, [-10.0, 10.0])?;
        let end = value_or_default(&mut options.end, field, "end", 1.0, [0.0, 1.0])?;
        let file = catalog.component_file(&options.model, &format!("{field}.model"))?;
        let config: T2iAdapterConfig = required_config(&file, "a T2I-Adapter")?;
        config.check(&options.model)?;
        let image = budget.take(options.image.read(&self.roots, &format!("{field}.image"))?)?;
        Ok(T2iAdapterPlan { file, config, image, weight, end })
    }

    fn plan_ip_adapter(
        &self,
        options: &mut IpAdapterOptions,
        field: String,
        catalog: &Catalog,
        budget: &mut ImageBudget,
    ) -> Result<IpAdapterPlan> {
        let weight = value_or_default(&mut options.weight, &field, "weight", 1.0, [-10.0, 10.0])?;
        let start = value_or_default(&mut options.start, &field, "start", 0.0, [0.0, 1.0])?;
        let end = value_or_default(&mut options.end, &field, "end", 1.0, [0.0, 1.0])?;
        if start > end {
            return Err(Error::invalid(format!("{field}.start"), format!("must be at most `end`, {end}, got {start}")));
        }
        let file = catalog.component_file(&options.model, &format!("{field}.model"))?;
        let encoder = catalog.component_file(&options.image_encoder, &format!("{field}.image_encoder"))?;
        let config: ClipVisionConfig = required_config(&encoder, "an image encoder")?;
        config.check(&options.image_encoder)?;
        let OneOrMany(sources) = &options.image;
        check_count(&format!("{field}.image"), sources.len(), 1..=MOST_IMAGES)?;
        let mut images = Vec::with_capacity(sources.len());
        for (index, source) in sources.iter().enumerate() {
            let field = format!("{field}.image.{index}");
            let image = budget.take(source.read(&self.roots, &field)?)?;
            let (long, short) = (image.width.max(image.height), image.width.min(image.height).max(1));
            if long / short >= MOST_ASPECT_RATIO {
                let message =
                    format!("must be less than {MOST_ASPECT_RATIO} times as long as wide, got {long} × {short}");
                return Err(Error::invalid(&field, message));
            }
            images.push(image);
        }
        Ok(IpAdapterPlan { file, field, images, encoder, config, weight, share: [start, end] })
    }

    /// Runs the adapters on their images.
    ///
    /// # Errors
    /// `unsupported_feature` and `model_unsupported` for files of other kinds, `image_decode_failed`; those of loading;
    /// those of the device.
    pub fn adapt(
        &self,
        task: AdaptTask<'_>,
        resources: &mut ConditioningResources,
        ctx: &Context,
    ) -> Result<Adaptation> {
        let AdaptTask { plan, size, guided, placement } = task;
        let mut adaptation = Adaptation::default();
        // Refuses unusable files before anything is loaded.
        let layouts = (plan.ip_adapters.iter())
            .map(|one| {
                let field = format!("{}.model", one.field);
                IpAdapterLayout::of(&shapes(&one.file, ctx)?, &one.file.name, &field)
            })
            .collect::<Result<Vec<_>>>()?;
        let manager = &mut resources.model.adapters;
        for one in &plan.t2i_adapters {
            let adapter = manager.features(&one.file, &one.config, placement, ctx)?;
            let maps = ctx.stage(ContextStage::Encode, || {
                let (network, channels) = (&adapter.network, one.config.in_channels);
                let task = ExtractFeaturesTask { network, image: &one.image.decode()?, size, channels, placement };
                ctx.perform(&ExtractFeatures, task)
            })?;
            let maps = maps.iter().map(|map| map * one.weight).collect();
            let maps: candle_core::Result<Vec<Tensor>> = maps;
            adaptation.features.push(Features { maps: maps.stage("t2i adapter")?, end: one.end });
            adaptation.facts.push(facts("t2i_adapter", &one.file, &adapter));
        }
        for (one, layout) in plan.ip_adapters.iter().zip(&layouts) {
            let adapter = manager.pictures(&one.file, layout, placement, ctx)?;
            let encoder = manager.encoder(&one.encoder, &one.config, placement, ctx)?;
            let (wanted, given) = (adapter.network.inputs(), encoder.channels(adapter.network.wants()));
            if wanted != given {
                let message = format!(
                    "it reads {wanted} channels of an image encoder, and `{}` has {given}: use the encoder that it was trained with",
                    one.encoder.name
                );
                return Err(Error::ModelUnsupported { name: one.file.name.clone(), message });
            }
            let tokens = ctx.stage(ContextStage::Encode, || {
                let (network, images) = (&adapter.network, &one.images);
                let task = EncodeImagePromptTask { network, encoder: &encoder, images, guided, placement };
                ctx.perform(&EncodeImagePrompt, task)
            })?;
            adaptation.facts.push(facts("ip_adapter", &one.file, &adapter));
            adaptation.pictures.push(PictureTokens { adapter, tokens, weight: one.weight, share: one.share });
        }
        Ok(adaptation)
    }
}

fn check_sizes(plan: &T2iAdapterPlan, sizes: &[ImageSize]) -> Result<()> {
    let factor = plan.config.downscale_factor;
    let mut sides = sizes.iter().flat_map(|size| [("width", size.width), ("height", size.height)]);
    match sides.find(|(_, side)| !side.is_multiple_of(factor)) {
        None => Ok(()),
        Some((field, side)) => {
            let message = format!("must be a multiple of {factor} for `{}`, got {side}", plan.file.name);
            Err(Error::invalid(field, message))
        }
    }
}

/// Bytes that remain for image files.
struct ImageBudget(u64);

impl ImageBudget {
    fn take(&mut self, image: ImageFile) -> Result<ImageFile> {
        let Some(left) = self.0.checked_sub(image.bytes.len() as u64) else {
            let most = MOST_BYTES / Bytes::MIB;
            let message = format!("the images of the adapters together are more than {most} MiB");
            return Err(Error::ImageTooLarge { message });
        };
        self.0 = left;
        Ok(image)
    }
}

/// Images of this aspect ratio and above are refused, because scaling their shorter side would make them huge.
const MOST_ASPECT_RATIO: usize = 64;

fn facts<N>(kind: &'static str, file: &ComponentFile, adapter: &Adapter<N>) -> AdapterFacts {
    AdapterFacts { kind, model: file.name.clone(), applied: adapter.applied, unused: adapter.unused }
}

/// The `config.json` of a folder.
fn required_config<T: serde::de::DeserializeOwned>(file: &ComponentFile, what: &str) -> Result<T> {
    file.config()?.ok_or_else(|| Error::ModelUnsupported {
        name: file.name.clone(),
        message: format!("{what} is a folder with weights and a `config.json`"),
    })
}

fn check_count(field: &str, count: usize, range: std::ops::RangeInclusive<usize>) -> Result<()> {
    if range.contains(&count) {
        return Ok(());
    }
    Err(Error::invalid(field, format!("must be {} to {}, got {count}", range.start(), range.end())))
}

/// The value, or the default, which is then written into the options.
fn value_or_default(
    options: &mut Option<f64>,
    field: &str,
    name: &str,
    default: f64,
    [low, high]: [f64; 2],
) -> Result<f64> {
    let value = *options.get_or_insert(default);
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(Error::invalid(format!("{field}.{name}"), format!("must be {low} to {high}, got {value}")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::ImageBudget;
    use crate::image::source::ImageSource;
    use crate::roots::Roots;

    #[test]
    fn images_beyond_the_budget_are_too_large() {
        let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/steer/files");
        let source = ImageSource::Path(files.join("adapter_outline.png"));
        let read = || source.read(&Roots::new([files.clone()]), "image").unwrap();
        let mut budget = ImageBudget(2 * read().bytes.len() as u64);
        assert!(budget.take(read()).is_ok() && budget.take(read()).is_ok());
        assert_eq!(budget.take(read()).unwrap_err().code(), "image_too_large");
    }
}

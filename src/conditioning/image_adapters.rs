//! Pictures beside the prompt: T2I-Adapters, which are shown outlines and depths, and IP-Adapters, which are shown what
//! the image shall be like.

use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::conditioning::instructor::{ConditioningInstructor, ConditioningResources};
use crate::conditioning::workers::image_adapters::{Look, LookTask, Outline, OutlineTask};
use crate::context::{Context, Stage as Part};
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

/// The most adapters of one kind, and the most images of one adapter.
const MOST_ADAPTERS: usize = 8;
const MOST_IMAGES: usize = 16;
/// The most bytes that the files of all pictures of a request have together, which are held until it is answered.
const MOST_BYTES: u64 = 256 * Bytes::MIB;

/// A T2I-Adapter and the picture that it is shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct T2iAdapterOptions {
    /// A folder in diffusers' layout beneath the configured model roots.
    pub model: String,
    /// Edges, a depth map or what else the adapter was trained on; brought to the size of the image.
    pub image: ImageSource,
    /// Times which its features count, -10 to 10. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Share of the steps, from the first, in which it counts, 0 to 1. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<f64>,
}

/// An IP-Adapter, the images that it is shown, and the encoder that sees them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct IpAdapterOptions {
    /// A safetensors file beneath the configured model roots.
    pub model: String,
    /// One image or up to 16.
    pub image: OneOrMany<ImageSource>,
    /// A folder with `config.json` and weights of a `CLIPVisionModelWithProjection`, beneath the configured model roots.
    pub image_encoder: String,
    /// Times which what it reads counts beside the text, -10 to 10. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Share of the steps that are over before it counts, 0 to 1. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<f64>,
    /// Share of the steps after which it no longer counts, 0 to 1. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<f64>,
}

/// What an adapter did with its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct AdapterFacts {
    /// `t2i_adapter` or `ip_adapter`
    pub kind: &'static str,
    /// As the request named it.
    pub model: String,
    /// Tensors of the file that were applied.
    pub applied: usize,
    /// Tensors of the file that are no part of such an adapter.
    pub unused: usize,
}

/// The adapters of a generation, decided; no weights are read yet.
#[derive(Default)]
pub struct AdapterPlan {
    features: Vec<FeaturePlan>,
    pictures: Vec<PicturePlan>,
}

struct FeaturePlan {
    found: ComponentFile,
    config: T2iAdapterConfig,
    image: ImageFile,
    weight: f64,
    end: f64,
}

struct PicturePlan {
    found: ComponentFile,
    field: String,
    images: Vec<ImageFile>,
    encoder: ComponentFile,
    config: ClipVisionConfig,
    weight: f64,
    share: [f64; 2],
}

/// What adapters made of their pictures.
#[derive(Default)]
pub struct Adaptation {
    pub features: Vec<Features>,
    pub pictures: Vec<PictureTokens>,
    pub facts: Vec<AdapterFacts>,
}

/// What a T2I-Adapter adds to the UNet's way down.
pub struct Features {
    /// One a block, `[1, H, W, C]`, times their weight.
    pub maps: Vec<Tensor>,
    /// Share of the steps in which they are added.
    pub end: f64,
}

/// What an IP-Adapter has the UNet read beside the text.
pub struct PictureTokens {
    pub adapter: Arc<Adapter<IpAdapter>>,
    /// `[R, T, D]`: of no picture, for the negative prompt, where there is guidance; then of the pictures.
    pub tokens: Tensor,
    pub weight: f64,
    /// Shares of the steps between which they are read.
    pub share: [f64; 2],
}

impl AdapterPlan {
    /// What requests call the networks.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let features = self.features.iter().map(|one| one.found.name.as_str());
        features.chain(self.pictures.iter().flat_map(|one| [one.found.name.as_str(), one.encoder.name.as_str()]))
    }

    /// The networks, each with the kind under which it is kept.
    pub fn networks(&self) -> impl Iterator<Item = (&'static str, &ComponentFile)> {
        let features = self.features.iter().map(|one| ("t2i_adapter", &one.found));
        let pictures = self.pictures.iter();
        features.chain(pictures.flat_map(|one| [("ip_adapter", &one.found), ("image_encoder", &one.encoder)]))
    }
}

impl ConditioningInstructor {
    /// Decides what the wishes leave open, and fills it in. `sizes` are those of the runs that adapters steer.
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
        let (mut plan, mut room) = (AdapterPlan::default(), Room(MOST_BYTES));
        if let Some(OneOrMany(entries)) = features {
            few("t2i_adapter", entries.len(), 0..=MOST_ADAPTERS)?;
            for (index, options) in entries.iter_mut().enumerate() {
                plan.features.push(self.plan_features(
                    options,
                    &format!("t2i_adapter.{index}"),
                    sizes,
                    (catalog, &mut room),
                )?);
            }
        }
        if let Some(OneOrMany(entries)) = pictures {
            few("ip_adapter", entries.len(), 0..=MOST_ADAPTERS)?;
            for (index, options) in entries.iter_mut().enumerate() {
                plan.pictures.push(self.plan_pictures(options, format!("ip_adapter.{index}"), (catalog, &mut room))?);
            }
        }
        Ok(plan)
    }

    fn plan_features(
        &self,
        options: &mut T2iAdapterOptions,
        field: &str,
        sizes: &[ImageSize],
        (catalog, room): (&Catalog, &mut Room),
    ) -> Result<FeaturePlan> {
        let weight = settled(&mut options.weight, field, "weight", 1.0, [-10.0, 10.0])?;
        let end = settled(&mut options.end, field, "end", 1.0, [0.0, 1.0])?;
        let found = catalog.component_file(&options.model, &format!("{field}.model"))?;
        let config: T2iAdapterConfig = needed(&found, "a T2I-Adapter")?;
        config.check(&options.model)?;
        let factor = config.downscale_factor;
        let sides = sizes.iter().flat_map(|size| [("width", size.width), ("height", size.height)]);
        for (name, side) in sides {
            if !side.is_multiple_of(factor) {
                let message = format!("must be a multiple of {factor} for `{}`, got {side}", options.model);
                return Err(Error::invalid(name, message));
            }
        }
        let image = room.take(options.image.read(&self.roots, &format!("{field}.image"))?)?;
        Ok(FeaturePlan { found, config, image, weight, end })
    }

    fn plan_pictures(
        &self,
        options: &mut IpAdapterOptions,
        field: String,
        (catalog, room): (&Catalog, &mut Room),
    ) -> Result<PicturePlan> {
        let weight = settled(&mut options.weight, &field, "weight", 1.0, [-10.0, 10.0])?;
        let start = settled(&mut options.start, &field, "start", 0.0, [0.0, 1.0])?;
        let end = settled(&mut options.end, &field, "end", 1.0, [0.0, 1.0])?;
        if start > end {
            return Err(Error::invalid(format!("{field}.start"), format!("must be at most `end`, {end}, got {start}")));
        }
        let found = catalog.component_file(&options.model, &format!("{field}.model"))?;
        let encoder = catalog.component_file(&options.image_encoder, &format!("{field}.image_encoder"))?;
        let config: ClipVisionConfig = needed(&encoder, "an image encoder")?;
        config.check(&options.image_encoder)?;
        let OneOrMany(sources) = &options.image;
        few(&format!("{field}.image"), sources.len(), 1..=MOST_IMAGES)?;
        let mut images = Vec::with_capacity(sources.len());
        for (index, source) in sources.iter().enumerate() {
            let field = format!("{field}.image.{index}");
            let image = room.take(source.read(&self.roots, &field)?)?;
            let (long, short) = (image.width.max(image.height), image.width.min(image.height).max(1));
            if long / short >= MOST_OBLONG {
                let message = format!("must be less than {MOST_OBLONG} times as long as wide, got {long} × {short}");
                return Err(Error::invalid(&field, message));
            }
            images.push(image);
        }
        Ok(PicturePlan { found, field, images, encoder, config, weight, share: [start, end] })
    }

    /// What the adapters make of their pictures, for an image of `size`; `guided` where the negative prompt is evaluated
    /// too.
    ///
    /// # Errors
    /// `unsupported_feature` and `model_unsupported` for files of other kinds, `image_decode_failed`; those of loading;
    /// those of the device.
    pub fn adapt(
        &self,
        plan: &AdapterPlan,
        (size, guided): (ImageSize, bool),
        resources: &mut ConditioningResources,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Adaptation> {
        let mut made = Adaptation::default();
        // What cannot be used is refused before anything is loaded.
        let layouts = (plan.pictures.iter())
            .map(|one| {
                let field = format!("{}.model", one.field);
                IpAdapterLayout::of(&shapes(&one.found, ctx)?, &one.found.name, &field)
            })
            .collect::<Result<Vec<_>>>()?;
        let manager = &mut resources.model.adapters;
        for one in &plan.features {
            let adapter = manager.features(&one.found, &one.config, placement, ctx)?;
            let maps = ctx.stage(Part::Encode, || {
                let (network, channels) = (&adapter.network, one.config.in_channels);
                let task = OutlineTask { network, image: &one.image.decode()?, size, channels, placement };
                ctx.perform(&Outline, task)
            })?;
            let maps = maps.iter().map(|map| map * one.weight).collect();
            let maps: candle_core::Result<Vec<Tensor>> = maps;
            made.features.push(Features { maps: maps.stage("t2i adapter")?, end: one.end });
            made.facts.push(facts("t2i_adapter", &one.found, (adapter.applied, adapter.unused)));
        }
        for (one, layout) in plan.pictures.iter().zip(&layouts) {
            let adapter = manager.pictures(&one.found, layout, placement, ctx)?;
            let encoder = manager.encoder(&one.encoder, &one.config, placement, ctx)?;
            let (wanted, given) = (adapter.network.inputs(), encoder.channels(adapter.network.wants()));
            if wanted != given {
                let message = format!(
                    "it reads {wanted} channels of an image encoder, and `{}` gives {given}: take the encoder that it was trained with",
                    one.encoder.name
                );
                return Err(Error::ModelUnsupported { name: one.found.name.clone(), message });
            }
            let tokens = ctx.stage(Part::Encode, || {
                let (network, images) = (&adapter.network, &one.images);
                ctx.perform(&Look, LookTask { network, encoder: &encoder, images, guided, placement })
            })?;
            made.facts.push(facts("ip_adapter", &one.found, (adapter.applied, adapter.unused)));
            made.pictures.push(PictureTokens { adapter, tokens, weight: one.weight, share: one.share });
        }
        Ok(made)
    }
}

/// Bytes that the files of the pictures may still have.
struct Room(u64);

impl Room {
    fn take(&mut self, image: ImageFile) -> Result<ImageFile> {
        let Some(left) = self.0.checked_sub(image.bytes.len() as u64) else {
            let most = MOST_BYTES / Bytes::MIB;
            let message = format!("the pictures of the adapters together are more than {most} MiB");
            return Err(Error::ImageTooLarge { message });
        };
        self.0 = left;
        Ok(image)
    }
}

/// An image as many times as long as wide, or more, would be enlarged beyond bounds.
const MOST_OBLONG: usize = 64;

fn facts(kind: &'static str, found: &ComponentFile, (applied, unused): (usize, usize)) -> AdapterFacts {
    AdapterFacts { kind, model: found.name.clone(), applied, unused }
}

/// The `config.json` of a folder.
fn needed<T: serde::de::DeserializeOwned>(found: &ComponentFile, what: &str) -> Result<T> {
    found.config()?.ok_or_else(|| Error::ModelUnsupported {
        name: found.name.clone(),
        message: format!("{what} is a folder with a `config.json` beside the weights"),
    })
}

fn few(field: &str, count: usize, range: std::ops::RangeInclusive<usize>) -> Result<()> {
    if range.contains(&count) {
        return Ok(());
    }
    Err(Error::invalid(field, format!("must be {} to {}, got {count}", range.start(), range.end())))
}

/// The value, or the default, which is then filled in.
fn settled(options: &mut Option<f64>, field: &str, name: &str, default: f64, [low, high]: [f64; 2]) -> Result<f64> {
    let value = *options.get_or_insert(default);
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(Error::invalid(format!("{field}.{name}"), format!("must be {low} to {high}, got {value}")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::Room;
    use crate::image::source::ImageSource;
    use crate::roots::Roots;

    #[test]
    fn pictures_have_room_for_so_many_bytes_together() {
        let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/steer/files");
        let source = ImageSource::Path(files.join("adapter_outline.png"));
        let read = || source.read(&Roots::new([files.clone()]), "image").unwrap();
        let mut room = Room(2 * read().bytes.len() as u64);
        assert!(room.take(read()).is_ok() && room.take(read()).is_ok());
        assert_eq!(room.take(read()).unwrap_err().code(), "image_too_large");
    }
}

//! The blocks of the UNet: down, middle, up, and the skip connections between them.
//!
//! Legend: `B` batch, `H` `W` rows and columns, `C` channels, `T` width of the time embedding, `L` tokens of the text,
//! `D` their width.

use candle_core::{Result as CandleResult, Tensor};

use crate::error::{Error, Result, StageContext};
use crate::kernels::{Loader, Padding, concat_channels};
use crate::model::networks::attention::{KeysValues, SpatialTransformer, TextReader, TransformerShape};
use crate::model::networks::check::Check;
use crate::model::networks::config::Validator;
use crate::model::networks::interventions;
use crate::model::networks::resnet::{Downsample, ResnetBlock, ResnetShape, Upsample};
use crate::model::networks::unet_config::{BlockPlan, MidPlan, UnetSizes};

const STAGE: &str = "unet";

/// Conditioning of every block.
#[derive(Clone, Copy)]
pub(crate) struct Conditions<'a> {
    /// `[B, T]`, SiLU already applied.
    pub(crate) time: &'a Tensor,
    pub(crate) text: &'a TextReader<'a>,
    /// FreeU's factors for this up block.
    pub(crate) freeu: Option<interventions::FreeUFactors>,
    pub(crate) check: Check<'a>,
}

/// Skip connections of the down blocks; each is freed when an up block has taken it.
pub(crate) struct Skips<'a> {
    kept: Vec<Tensor>,
    /// A ControlNet's residuals, one for each skip connection, in the order of evaluation.
    residuals: Option<&'a [Tensor]>,
}

impl<'a> Skips<'a> {
    pub(crate) fn new(residuals: Option<&'a [Tensor]>) -> Self {
        Self { kept: Vec::new(), residuals }
    }

    pub(crate) fn keep(&mut self, x: &Tensor) {
        self.kept.push(x.clone());
    }

    /// Skip connections that were not taken, in the order of evaluation.
    pub(crate) fn left(self) -> Vec<Tensor> {
        self.kept
    }

    /// The latest one, with its residual.
    fn take(&mut self) -> Result<Tensor> {
        let Some(skip) = self.kept.pop() else {
            return Err(Error::bug("the up blocks take more skip connections than the down blocks have"));
        };
        let Some(residuals) = self.residuals else { return Ok(skip) };
        let Some(residual) = residuals.get(self.kept.len()) else {
            return Err(Error::bug(format!("{} residuals are too few", residuals.len())));
        };
        residual.to_dtype(skip.dtype()).and_then(|residual| skip + residual).stage(STAGE)
    }

    /// Height and width of the next one, by which latents come back to their size if their sides are no multiples of the
    /// network's total reduction.
    fn next_size(&self) -> Result<(usize, usize)> {
        match self.kept.last().map(Tensor::dims) {
            Some(&[_, height, width, _]) => Ok((height, width)),
            _ => Err(Error::bug("no feature map is left for the next level")),
        }
    }
}

/// A residual block, and a transformer where the level has them.
#[derive(Clone, Debug)]
struct UnetLayer {
    resnet: ResnetBlock,
    attention: Option<SpatialTransformer>,
}

impl UnetLayer {
    fn forward(&self, x: Tensor, given: Conditions) -> Result<Tensor> {
        (given.check)()?;
        let x = self.resnet.forward(x, Some(given.time)).stage(STAGE)?;
        match &self.attention {
            Some(attention) => attention.forward(&x, given.text, given.check),
            None => Ok(x),
        }
    }
}

/// Adds the transformers' keys and values of `context`, `[B, L, D]`, to `read` in their order.
fn read_text(layers: &[UnetLayer], context: &Tensor, check: Check, read: &mut Vec<KeysValues>) -> Result<()> {
    layers.iter().filter_map(|layer| layer.attention.as_ref()).try_for_each(|one| one.read(context, check, read))
}

fn load_layers(loader: &Loader, plan: &BlockPlan, sizes: UnetSizes) -> CandleResult<Vec<UnetLayer>> {
    let UnetSizes { groups, eps, time, context } = sizes;
    let outputs = plan.outputs;
    let shape = TransformerShape { channels: outputs, heads: plan.heads, context };
    let (resnets, attentions) = (loader.pp("resnets"), loader.pp("attentions"));
    let layer = |(i, layer): (usize, &crate::model::networks::unet_config::LayerPlan)| -> CandleResult<UnetLayer> {
        let resnet = ResnetShape { inputs: layer.inputs, outputs, groups, eps, time: Some(time) };
        let attention = layer.depth.map(|depth| SpatialTransformer::load(&attentions.pp(i), shape, groups, depth));
        Ok(UnetLayer { resnet: ResnetBlock::load(&resnets.pp(i), resnet)?, attention: attention.transpose()? })
    };
    plan.layers.iter().enumerate().map(layer).collect()
}

#[derive(Clone, Debug)]
pub(crate) struct DownBlock {
    layers: Vec<UnetLayer>,
    downsampler: Option<Downsample>,
}

impl DownBlock {
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub(crate) fn load(loader: &Loader, plan: &BlockPlan, sizes: UnetSizes) -> CandleResult<Self> {
        let downsampler = plan
            .resamples
            .then(|| Downsample::load(&loader.pp("downsamplers").pp("0"), plan.outputs, Padding::same(1)))
            .transpose()?;
        Ok(Self { layers: load_layers(loader, plan, sizes)?, downsampler })
    }

    /// # Errors
    /// The errors of [`SpatialTransformer::read`].
    pub(crate) fn read(&self, context: &Tensor, check: Check, read: &mut Vec<KeysValues>) -> Result<()> {
        read_text(&self.layers, context, check, read)
    }

    /// Count of transformer blocks that read the text.
    pub(crate) fn reads(&self) -> usize {
        self.layers.iter().filter_map(|layer| layer.attention.as_ref()).map(SpatialTransformer::reads).sum()
    }

    pub(crate) fn skips(&self) -> usize {
        self.layers.len() + usize::from(self.downsampler.is_some())
    }

    /// `feature` is added where diffusers adds it: after the last transformer, or at the end of a block without any.
    pub(crate) fn forward(
        &self,
        mut x: Tensor,
        given: Conditions,
        skips: &mut Skips,
        feature: Option<&Tensor>,
    ) -> Result<Tensor> {
        let attends = self.layers.iter().any(|layer| layer.attention.is_some());
        let early = feature.filter(|_| attends || self.downsampler.is_none());
        let late = feature.filter(|_| early.is_none());
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(x, given)?;
            if let Some(feature) = early.filter(|_| i + 1 == self.layers.len()) {
                x = add_feature(&x, feature)?;
            }
            skips.keep(&x);
        }
        if let Some(downsampler) = &self.downsampler {
            x = downsampler.forward(&x).stage(STAGE)?;
            if let Some(feature) = late {
                x = add_feature(&x, feature)?;
            }
            skips.keep(&x);
        }
        Ok(x)
    }
}

/// A feature map with a T2I-Adapter's feature.
///
/// # Errors
/// `model_unsupported` where the feature is for another network's map; device errors.
pub(crate) fn add_feature(x: &Tensor, feature: &Tensor) -> Result<Tensor> {
    let (own, given) = (x.dims(), feature.dims());
    let alike = own.len() == given.len() && own.iter().zip(given).skip(1).all(|(a, b)| a == b);
    if !alike || !(given.first() == Some(&1) || given.first() == own.first()) {
        let message = format!("a t2i adapter's feature is {given:?} where its own map is {own:?}");
        return Err(Validator { name: STAGE }.refuse(message));
    }
    feature.to_dtype(x.dtype()).and_then(|feature| x.broadcast_add(&feature)).stage(STAGE)
}

#[derive(Clone, Debug)]
pub(crate) struct MidBlock {
    before: ResnetBlock,
    after: Option<(SpatialTransformer, ResnetBlock)>,
}

impl MidBlock {
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub(crate) fn load(loader: &Loader, plan: MidPlan, sizes: UnetSizes) -> CandleResult<Self> {
        let MidPlan { channels, heads, depth } = plan;
        let UnetSizes { groups, eps, time, context } = sizes;
        let shape = ResnetShape { inputs: channels, outputs: channels, groups, eps, time: Some(time) };
        let resnet = |i: usize| ResnetBlock::load(&loader.pp("resnets").pp(i), shape);
        let after = depth.map(|depth| -> CandleResult<_> {
            let shape = TransformerShape { channels, heads, context };
            Ok((SpatialTransformer::load(&loader.pp("attentions").pp(0), shape, groups, depth)?, resnet(1)?))
        });
        Ok(Self { before: resnet(0)?, after: after.transpose()? })
    }

    /// Count of transformer blocks that read the text.
    pub(crate) fn reads(&self) -> usize {
        self.after.as_ref().map_or(0, |(attention, _)| attention.reads())
    }

    /// # Errors
    /// The errors of [`SpatialTransformer::read`].
    pub(crate) fn read(&self, context: &Tensor, check: Check, read: &mut Vec<KeysValues>) -> Result<()> {
        self.after.as_ref().map_or(Ok(()), |(attention, _)| attention.read(context, check, read))
    }

    pub(crate) fn forward(&self, x: Tensor, given: Conditions) -> Result<Tensor> {
        (given.check)()?;
        let x = self.before.forward(x, Some(given.time)).stage(STAGE)?;
        let Some((attention, resnet)) = &self.after else { return Ok(x) };
        let x = attention.forward(&x, given.text, given.check)?;
        resnet.forward(x, Some(given.time)).stage(STAGE)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct UpBlock {
    layers: Vec<UnetLayer>,
    upsampler: Option<Upsample>,
}

impl UpBlock {
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub(crate) fn load(loader: &Loader, plan: &BlockPlan, sizes: UnetSizes) -> CandleResult<Self> {
        let upsampler =
            plan.resamples.then(|| Upsample::load(&loader.pp("upsamplers").pp("0"), plan.outputs)).transpose()?;
        Ok(Self { layers: load_layers(loader, plan, sizes)?, upsampler })
    }

    /// # Errors
    /// The errors of [`SpatialTransformer::read`].
    pub(crate) fn read(&self, context: &Tensor, check: Check, read: &mut Vec<KeysValues>) -> Result<()> {
        read_text(&self.layers, context, check, read)
    }

    pub(crate) fn forward(&self, mut x: Tensor, given: Conditions, skips: &mut Skips) -> Result<Tensor> {
        for layer in &self.layers {
            let joined = {
                let skip = skips.take()?;
                match given.freeu {
                    Some(factors) => {
                        let (x, skip) = factors.apply(&x, &skip).stage(STAGE)?;
                        concat_channels(&x, &skip).stage(STAGE)?
                    }
                    None => concat_channels(&x, &skip).stage(STAGE)?,
                }
            };
            drop(x);
            x = layer.forward(joined, given)?;
        }
        match &self.upsampler {
            Some(upsampler) => {
                let (height, width) = skips.next_size()?;
                upsampler.forward(x, height, width).stage(STAGE)
            }
            None => Ok(x),
        }
    }
}

//! SDXL's UNet: `UNet2DConditionModel` with added conditioning (Podell et al. 2023, <https://arxiv.org/abs/2307.01952>).
//! Base, refiner, inpainting and the distilled relatives differ by their configuration alone.
//!
//! Legend: `B` batch, `H` `W` rows and columns of latents, `C` channels, `L` tokens of the text, `D` their width,
//! `P` channels of the pooled text, `T` width of the time embedding.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{DType, Result as CandleResult, Tensor};

use crate::error::{Error, Result, StageContext};
use crate::kernels::{Activation, Conv2d, GroupNorm, Loader};
use crate::model::networks::attention::{KeysValues, TextReader};
use crate::model::networks::check::Check;
use crate::model::networks::config::Validator;
use crate::model::networks::embeddings::{StepEmbedding, StepNumbers};
use crate::model::networks::interventions::Steering;
use crate::model::networks::ip_adapter::IpAdapter;
use crate::model::networks::load_error::load_error;
use crate::model::networks::resnet::load_same_conv;
use crate::model::networks::unet_blocks::{Conditions, DownBlock, MidBlock, Skips, UpBlock, add_feature};
pub use crate::model::networks::unet_config::UnetConfig;

const STAGE: &str = "unet";

/// The text of an evaluation.
#[derive(Clone, Copy)]
pub enum Text<'a> {
    /// `[B, L, D]`, read for this evaluation alone.
    Embedded(&'a Tensor),
    /// Read before, by [`Unet::read`] of the same network.
    Read(&'a ReadText),
}

/// Keys and values of the text for every transformer block, in the order of evaluation. The text is the same at every
/// step, and so are they.
#[derive(Clone, Debug)]
pub struct ReadText {
    pub(crate) blocks: Vec<KeysValues>,
    /// `B` and the dtype of the activations that they are for.
    pub(crate) samples: usize,
    pub(crate) dtype: DType,
}

impl ReadText {
    /// `B`
    #[must_use]
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Keys and values of `count` samples from `start` on.
    ///
    /// # Errors
    /// Samples out of range; device errors.
    pub fn rows(&self, start: usize, count: usize) -> Result<Self> {
        let blocks = self.blocks.iter().map(|block| block.rows(start, count)).collect::<CandleResult<_>>();
        Ok(Self { blocks: blocks.stage(STAGE)?, samples: count, dtype: self.dtype })
    }
}

/// Keys and values of an IP-Adapter's tokens for every transformer block, in the order of evaluation.
#[derive(Clone, Debug)]
pub struct ReadPictures {
    blocks: Vec<KeysValues>,
}

/// Image prompts of an evaluation, read in addition to the text.
#[derive(Clone, Copy)]
pub struct Pictures<'a> {
    /// Keys and values for as many samples as the evaluation has.
    pub read: &'a ReadPictures,
    /// Factor of their attention, which is added to the text's.
    pub weight: f64,
}

impl ReadPictures {
    /// Spreads the tokens over `samples` samples: the first `negatives` read the tokens' first sample, all others the last.
    ///
    /// # Errors
    /// Device errors.
    pub fn spread(&self, negatives: usize, samples: usize) -> Result<Self> {
        let spread = |block: &KeysValues| block.spread(negatives, samples);
        let blocks = self.blocks.iter().map(spread).collect::<CandleResult<_>>().stage(STAGE)?;
        Ok(Self { blocks })
    }

    /// Keys and values of some samples.
    ///
    /// # Errors
    /// Samples out of range; device errors.
    pub fn of(&self, samples: &Range<usize>) -> Result<Cow<'_, Self>> {
        if self.blocks.first().is_none_or(|block| block.samples() == samples.len()) {
            return Ok(Cow::Borrowed(self));
        }
        let blocks = self.blocks.iter().map(|block| block.rows(samples.start, samples.len()));
        Ok(Cow::Owned(Self { blocks: blocks.collect::<CandleResult<_>>().stage(STAGE)? }))
    }
}

/// One evaluation.
#[derive(Clone, Copy)]
pub struct UnetInput<'a> {
    /// `[B, H, W, C]`; activations have its dtype. `C` is 4, or 9 with the mask and masked image of inpainting.
    pub sample: &'a Tensor,
    /// 0 to 999, need not be whole. One for all samples, or one for each.
    pub timesteps: &'a [f64],
    pub text: Text<'a>,
    /// `[B, P]`: the pooled text.
    pub pooled: &'a Tensor,
    /// For each sample, in pixels: original height and width, top and left of the crop, target height and width;
    /// for the refiner an aesthetic score instead of the last two.
    pub time_ids: &'a [Vec<f64>],
    /// A ControlNet's residuals of the skip connections: [`Unet::skips`] tensors in the order of evaluation, each of the
    /// shape of its feature map `[B, H', W', C']`.
    pub down_residuals: Option<&'a [Tensor]>,
    /// A ControlNet's residual of the middle block.
    pub mid_residual: Option<&'a Tensor>,
    /// One for each IP-Adapter.
    pub pictures: &'a [Pictures<'a>],
    /// A T2I-Adapter's features, for the down blocks and then the middle block, as far as it has them: each is added to the
    /// block's result, and so to its last skip connection. `[1, H', W', C']`, or one for each sample.
    pub features: &'a [Tensor],
    pub steering: Steering<'a>,
    pub check: Check<'a>,
}

/// Predicts the noise (or velocity) in latents.
#[derive(Clone, Debug)]
pub struct Unet {
    step: StepEmbedding,
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    /// Channels of `sample`, `context` and of pooled text and time ids together.
    inputs: usize,
    context: usize,
    projection: usize,
}

impl Unet {
    /// True if the layer of this name, whose weight is `[O, I]` or `[O, C, K, K]`, can be quantised: layers of residual
    /// blocks, transformers and resamplers, which are nearly all of the work. Excluded are the time embedding, the text's
    /// keys and values, as a few of CLIP's channels are far greater than the others, and layers too narrow to gain.
    #[must_use]
    pub fn bears_int8(layer: &str, weight: &[usize]) -> bool {
        const LEAST_CHANNELS: usize = 64;
        let has = |part: &str| layer.split('.').any(|name| name == part);
        let of_text = has("attn2") && (has("to_k") || has("to_v"));
        let within = ["resnets", "attentions", "downsamplers", "upsamplers"].into_iter().any(has);
        let inside = within && !has("time_emb_proj") && !of_text;
        inside && weight.iter().take(2).all(|&side| side >= LEAST_CHANNELS)
    }

    /// # Errors
    /// `model_unsupported` for a configuration or weights of another network; device errors.
    pub fn load(loader: &Loader, config: &UnetConfig) -> Result<Self> {
        let plan = config.plan(STAGE)?;
        let sizes = plan.sizes;
        let width = plan.down.first().map_or(0, |block| block.outputs);
        let read = || -> CandleResult<Self> {
            let (down, up) = (loader.pp("down_blocks"), loader.pp("up_blocks"));
            Ok(Self {
                step: StepEmbedding::load(loader, config, &plan)?,
                conv_in: load_same_conv(&loader.pp("conv_in"), config.in_channels, width, config.conv_in_kernel)?,
                down_blocks: (plan.down.iter().enumerate())
                    .map(|(i, block)| DownBlock::load(&down.pp(i), block, sizes))
                    .collect::<CandleResult<_>>()?,
                mid_block: plan.mid.map(|mid| MidBlock::load(&loader.pp("mid_block"), mid, sizes)).transpose()?,
                up_blocks: (plan.up.iter().enumerate())
                    .map(|(i, block)| UpBlock::load(&up.pp(i), block, sizes))
                    .collect::<CandleResult<_>>()?,
                conv_norm_out: GroupNorm::load(&loader.pp("conv_norm_out"), sizes.groups, width, sizes.eps)?,
                conv_out: load_same_conv(&loader.pp("conv_out"), width, config.out_channels, config.conv_out_kernel)?,
                inputs: config.in_channels,
                context: sizes.context,
                projection: plan.projection,
            })
        };
        read().map_err(load_error(STAGE))
    }

    /// Count of skip connections, including the first convolution's.
    #[must_use]
    pub fn skips(&self) -> usize {
        1 + self.down_blocks.iter().map(DownBlock::skips).sum::<usize>()
    }

    /// Keys and values of the text, `[B, L, D]`, for every evaluation with it whose sample is of `dtype`: two of
    /// `[B, L, C]` a transformer block.
    ///
    /// # Errors
    /// The error of `check`, called before each transformer block; `model_unsupported` where the text is another network's;
    /// device errors.
    pub fn read(&self, context: &Tensor, dtype: DType, check: Check) -> Result<ReadText> {
        let &[samples, tokens, width] = context.dims() else {
            return Err(Error::bug(format!("text of shape {:?}", context.dims())));
        };
        if samples == 0 || tokens == 0 {
            return Err(Error::bug(format!("text of shape {:?}", context.dims())));
        }
        if width != self.context {
            let message = format!("it takes text of {} channels, got {width}", self.context);
            return Err(Validator { name: STAGE }.refuse(message));
        }
        let context = context.to_dtype(dtype).stage(STAGE)?;
        let mut blocks = Vec::new();
        for block in &self.down_blocks {
            block.read(&context, check, &mut blocks)?;
        }
        if let Some(block) = &self.mid_block {
            block.read(&context, check, &mut blocks)?;
        }
        for block in &self.up_blocks {
            block.read(&context, check, &mut blocks)?;
        }
        Ok(ReadText { blocks, samples, dtype })
    }

    /// Keys and values of an IP-Adapter's tokens, `[R, T, D]`, to match `text`, which this network read. The adapter's file
    /// numbers cross-attentions in the order in which diffusers lists them: down, up, middle.
    ///
    /// # Errors
    /// The error of `check`; `model_unsupported` where the adapter is for another UNet; device errors.
    pub fn pictures(
        &self,
        text: &ReadText,
        adapter: &IpAdapter,
        tokens: &Tensor,
        check: Check,
    ) -> Result<ReadPictures> {
        let down: usize = self.down_blocks.iter().map(DownBlock::reads).sum();
        let up = down + self.mid_block.as_ref().map_or(0, MidBlock::reads);
        let order: Vec<usize> = (0..down).chain(up..text.blocks.len()).chain(down..up).collect();
        let channels: Vec<usize> =
            order.iter().filter_map(|&index| text.blocks.get(index)).map(KeysValues::channels).collect();
        let tokens = tokens.to_dtype(text.dtype).stage(STAGE)?;
        let read = adapter.read(&tokens, &channels, check)?;
        let mut placed: Vec<(usize, KeysValues)> = order.into_iter().zip(read).collect();
        placed.sort_by_key(|(index, _)| *index);
        Ok(ReadPictures { blocks: placed.into_iter().map(|(_, read)| read).collect() })
    }

    /// Returns `[B, H, W, C]` in the dtype of the sample.
    ///
    /// # Errors
    /// The error of `check`; `model_unsupported` where text or latents are another network's; device errors.
    pub fn forward(&self, input: UnetInput) -> Result<Tensor> {
        let dtype = input.sample.dtype();
        self.validate(input)?;
        (input.check)()?;
        let time = self.embed_time(input)?.to_dtype(dtype).stage(STAGE)?;
        let own;
        let read = match input.text {
            Text::Read(read) => read,
            Text::Embedded(context) => {
                own = self.read(context, dtype, input.check)?;
                &own
            }
        };
        let pictures: Vec<_> = input.pictures.iter().map(|one| (one.read.blocks.as_slice(), one.weight)).collect();
        let text = TextReader::new(&read.blocks, &pictures, input.steering.perturbed);
        let given = Conditions { time: &time, text: &text, freeu: None, check: input.check };
        let mut skips = Skips::new(input.down_residuals);
        let mut x = self.conv_in.forward(input.sample).stage(STAGE)?;
        skips.keep(&x);
        let mut features = input.features.iter();
        for block in &self.down_blocks {
            x = block.forward(x, given, &mut skips, features.next())?;
        }
        if let Some(block) = &self.mid_block {
            x = block.forward(x, given)?;
        }
        if let Some(feature) = features.next() {
            x = add_feature(&x, feature)?;
        }
        if let Some(residual) = input.mid_residual {
            x = residual.to_dtype(dtype).and_then(|residual| x + residual).stage(STAGE)?;
        }
        for (step, block) in self.up_blocks.iter().enumerate() {
            let freeu = input.steering.freeu.and_then(|freeu| freeu.stages.get(step).copied());
            x = block.forward(x, Conditions { freeu, ..given }, &mut skips)?;
        }
        (input.check)()?;
        let normal = self.conv_norm_out.forward_silu(&x).stage(STAGE)?;
        drop(x);
        self.conv_out.forward(&normal).stage(STAGE)
    }

    /// `[B, T]`, f32, with the SiLU that every residual block begins with.
    fn embed_time(&self, input: UnetInput) -> Result<Tensor> {
        let UnetInput { timesteps, pooled, time_ids, .. } = input;
        let numbers = StepNumbers { timesteps, pooled, time_ids };
        let embedded = self.step.embed(numbers, input.sample.device());
        embedded.and_then(|time| Activation::Silu.apply(&time)).stage(STAGE)
    }

    /// Reports parts that do not fit together in terms of the caller.
    fn validate(&self, input: UnetInput) -> Result<()> {
        let validator = Validator { name: STAGE };
        let &[batch, height, width, channels] = input.sample.dims() else {
            return Err(Error::bug(format!("latents of shape {:?}", input.sample.dims())));
        };
        if batch == 0 || height == 0 || width == 0 {
            return Err(Error::bug(format!("latents of shape {:?}", input.sample.dims())));
        }
        if channels != self.inputs {
            return Err(validator.refuse(format!("it takes {} latent channels, got {channels}", self.inputs)));
        }
        let (samples, dtype) = match input.text {
            Text::Embedded(context) => (context.dims().first().copied().unwrap_or(0), input.sample.dtype()),
            Text::Read(read) => (read.samples(), read.dtype),
        };
        if samples != batch || dtype != input.sample.dtype() {
            let wanted = input.sample.dtype();
            return Err(Error::bug(format!("text of {samples} in {dtype:?} for {batch} latents in {wanted:?}")));
        }
        let ids = input.time_ids.first().map_or(0, Vec::len);
        let even = input.time_ids.len() == batch && input.time_ids.iter().all(|row| row.len() == ids);
        let counted = input.timesteps.len() == 1 || input.timesteps.len() == batch;
        match *input.pooled.dims() {
            [rows, pooled] if rows == batch && even && counted => {
                let width = pooled + ids * self.step.add_time_proj.width;
                if width != self.projection {
                    let wanted = self.projection;
                    return Err(validator.refuse(format!(
                        "its added conditioning has {wanted} channels, got {width}: {pooled} of pooled text and {ids} time ids"
                    )));
                }
            }
            ref other => {
                let (times, rows) = (input.timesteps.len(), input.time_ids.len());
                let message =
                    format!("pooled text {other:?}, {times} timesteps, {rows} rows of time ids for {batch} latents");
                return Err(Error::bug(message));
            }
        }
        let (count, places) = (input.features.len(), self.down_blocks.len() + 1);
        if count > places {
            return Err(validator.refuse(format!("it takes at most {places} features of a t2i adapter, got {count}")));
        }
        match input.down_residuals.map(<[Tensor]>::len) {
            Some(count) if count != self.skips() => {
                Err(validator.refuse(format!("it has {} skip connections, got {count} residuals", self.skips())))
            }
            _ => Ok(()),
        }
    }
}

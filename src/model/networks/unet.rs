//! SDXL's UNet: `UNet2DConditionModel` with added conditioning (Podell et al. 2023, <https://arxiv.org/abs/2307.01952>).
//! Base, refiner, inpainting and the distilled relatives differ by their configuration alone.
//!
//! Legend: `B` batch, `H` `W` rows and columns of latents, `C` channels, `L` tokens of the text, `D` their width,
//! `P` channels of the pooled text, `T` width of the time embedding.

use std::ops::Range;

use candle_core::{DType, Result as CandleResult, Tensor};
use candle_nn::VarBuilder;

use super::attention::{KeysValues, TextReader};
use super::embeddings::{Sinusoid, TimestepEmbedding};
use super::resnet::load_same_conv;
use super::steering::Steering;
use super::unet_blocks::{Conditions, DownBlock, MidBlock, Skips, UpBlock};
pub use super::unet_config::UnetConfig;
use super::{Check, Judge, loading};
use crate::error::{Error, Result, Stage};
use crate::kernels::{Activation, Conv2d, GroupNorm};

const STAGE: &str = "unet";

/// What the cross-attention of an evaluation reads.
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
    blocks: Vec<KeysValues>,
    /// `B` and the dtype of the activations that they are for.
    samples: usize,
    dtype: DType,
}

impl ReadText {
    /// `B`
    #[must_use]
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Those of some samples, in the same memory.
    ///
    /// # Errors
    /// Samples that there are not.
    pub fn of(&self, samples: &Range<usize>) -> Result<Self> {
        let blocks = self.blocks.iter().map(|one| one.of(samples)).collect::<CandleResult<_>>().stage(STAGE)?;
        Ok(Self { blocks, samples: samples.len(), dtype: self.dtype })
    }
}

/// One evaluation.
#[derive(Clone, Copy)]
pub struct UnetInput<'a> {
    /// `[B, H, W, C]`; its dtype is that of the activations. `C` is 4, or 9 with the mask and masked image of inpainting.
    pub sample: &'a Tensor,
    /// 0 to 999, need not be whole. One for all samples, or one for each.
    pub timesteps: &'a [f64],
    pub text: Text<'a>,
    /// `[B, P]`: the pooled text.
    pub pooled: &'a Tensor,
    /// For each sample, in pixels: original height and width, top and left of the crop, target height and width;
    /// for the refiner an aesthetic score instead of the last two.
    pub time_ids: &'a [Vec<f64>],
    /// A ControlNet's additions to the skip connections, [`Unet::skips`] of them in the order of the way down, each of
    /// the shape of its feature map `[B, H', W', C']`.
    pub down_residuals: Option<&'a [Tensor]>,
    /// A ControlNet's addition to the output of the middle block.
    pub mid_residual: Option<&'a Tensor>,
    pub steering: Steering<'a>,
    pub check: Check<'a>,
}

/// Predicts the noise (or velocity) in latents.
#[derive(Clone, Debug)]
pub struct Unet {
    time_proj: Sinusoid,
    time_embedding: TimestepEmbedding,
    add_time_proj: Sinusoid,
    add_embedding: TimestepEmbedding,
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
    /// Whether the layer of this name, whose weight is `[O, I]` or `[O, C, K, K]`, may multiply bytes: those within
    /// residual blocks, transformers and steps between resolutions, which are nearly all of the work. Left out are the time embedding, the text's
    /// keys and values, as a few of CLIP's channels are far greater than the others, and layers so narrow that they gain
    /// nothing.
    #[must_use]
    pub fn bears_int8(layer: &str, weight: &[usize]) -> bool {
        /// Inputs and outputs that a layer has at least.
        const LEAST: usize = 64;
        let has = |part: &str| layer.split('.').any(|name| name == part);
        let of_text = has("attn2") && (has("to_k") || has("to_v"));
        let within = ["resnets", "attentions", "downsamplers", "upsamplers"].into_iter().any(has);
        let inside = within && !has("time_emb_proj") && !of_text;
        inside && weight.iter().take(2).all(|&side| side >= LEAST)
    }

    /// # Errors
    /// `model_unsupported` for a configuration or weights that are not such a network's; those of the device.
    pub fn load(vb: &VarBuilder, config: &UnetConfig) -> Result<Self> {
        let plan = config.plan(STAGE)?;
        let shared = plan.shared;
        let width = plan.down.first().map_or(0, |block| block.outputs);
        let sinusoid =
            |width| Sinusoid { width, flip_sin_to_cos: config.flip_sin_to_cos, freq_shift: config.freq_shift };
        let read = || -> CandleResult<Self> {
            let (down, up) = (vb.pp("down_blocks"), vb.pp("up_blocks"));
            Ok(Self {
                time_proj: sinusoid(width),
                time_embedding: TimestepEmbedding::load(&vb.pp("time_embedding"), width, shared.time)?,
                add_time_proj: sinusoid(plan.addition),
                add_embedding: TimestepEmbedding::load(&vb.pp("add_embedding"), plan.projection, shared.time)?,
                conv_in: load_same_conv(&vb.pp("conv_in"), config.in_channels, width, config.conv_in_kernel)?,
                down_blocks: (plan.down.iter().enumerate())
                    .map(|(i, block)| DownBlock::load(&down.pp(i), block, shared))
                    .collect::<CandleResult<_>>()?,
                mid_block: plan.mid.map(|mid| MidBlock::load(&vb.pp("mid_block"), mid, shared)).transpose()?,
                up_blocks: (plan.up.iter().enumerate())
                    .map(|(i, block)| UpBlock::load(&up.pp(i), block, shared))
                    .collect::<CandleResult<_>>()?,
                conv_norm_out: GroupNorm::load(&vb.pp("conv_norm_out"), shared.groups, width, shared.eps)?,
                conv_out: load_same_conv(&vb.pp("conv_out"), width, config.out_channels, config.conv_out_kernel)?,
                inputs: config.in_channels,
                context: shared.context,
                projection: plan.projection,
            })
        };
        read().map_err(loading(STAGE))
    }

    /// How many feature maps the way down hands to the way up, the first convolution's included.
    #[must_use]
    pub fn skips(&self) -> usize {
        1 + self.down_blocks.iter().map(DownBlock::skips).sum::<usize>()
    }

    /// Keys and values of the text, `[B, L, D]`, for every evaluation with it whose sample is of `dtype`: two of
    /// `[B, L, C]` a transformer block.
    ///
    /// # Errors
    /// That of `check`, called before each transformer block; `model_unsupported` where the text is another network's;
    /// those of the device.
    pub fn read(&self, context: &Tensor, dtype: DType, check: Check) -> Result<ReadText> {
        let &[samples, tokens, width] = context.dims() else {
            return Err(Error::bug(format!("text of shape {:?}", context.dims())));
        };
        if samples == 0 || tokens == 0 {
            return Err(Error::bug(format!("text of shape {:?}", context.dims())));
        }
        if width != self.context {
            let message = format!("it takes text of {} channels, got {width}", self.context);
            return Err(Judge { name: STAGE }.refuse(message));
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

    /// Gives `[B, H, W, C]` in the dtype of the sample.
    ///
    /// # Errors
    /// That of `check`; `model_unsupported` where text or latents are another network's; those of the device.
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
        let text = TextReader::new(&read.blocks, input.steering.perturbed);
        let given = Conditions { time: &time, text: &text, freeu: None, check: input.check };
        let mut skips = Skips::new(input.down_residuals);
        let mut x = self.conv_in.forward(input.sample).stage(STAGE)?;
        skips.keep(&x);
        for block in &self.down_blocks {
            x = block.forward(x, given, &mut skips)?;
        }
        if let Some(block) = &self.mid_block {
            x = block.forward(x, given)?;
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
        let (device, batch) = (input.sample.device(), input.time_ids.len());
        let run = || -> CandleResult<Tensor> {
            let times = (0..batch).map(|i| match input.timesteps {
                [one] => std::slice::from_ref(one),
                each => each.get(i..=i).unwrap_or_default(),
            });
            let time = self.time_embedding.forward(&self.time_proj.embed(times, device)?)?;
            let sizes = self.add_time_proj.embed(input.time_ids.iter().map(Vec::as_slice), device)?;
            let added = Tensor::cat(&[&input.pooled.to_dtype(DType::F32)?, &sizes], 1)?; // [B, P + N·D]
            Activation::Silu.apply(&(time + self.add_embedding.forward(&added)?)?)
        };
        run().stage(STAGE)
    }

    /// What a caller can get wrong by joining parts that do not belong together is said in its terms.
    fn validate(&self, input: UnetInput) -> Result<()> {
        let judge = Judge { name: STAGE };
        let &[batch, height, width, channels] = input.sample.dims() else {
            return Err(Error::bug(format!("latents of shape {:?}", input.sample.dims())));
        };
        if batch == 0 || height == 0 || width == 0 {
            return Err(Error::bug(format!("latents of shape {:?}", input.sample.dims())));
        }
        if channels != self.inputs {
            return Err(judge.refuse(format!("it takes {} latent channels, got {channels}", self.inputs)));
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
                let width = pooled + ids * self.add_time_proj.width;
                if width != self.projection {
                    let wanted = self.projection;
                    return Err(judge.refuse(format!(
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
        match input.down_residuals.map(<[Tensor]>::len) {
            Some(count) if count != self.skips() => {
                Err(judge.refuse(format!("it has {} skip connections, got {count} residuals", self.skips())))
            }
            _ => Ok(()),
        }
    }
}

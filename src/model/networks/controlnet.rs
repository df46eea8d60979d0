//! ControlNet for SDXL: Zhang et al. 2023, <https://arxiv.org/abs/2302.05543>. A copy of the UNet's way down and middle,
//! shown an image, whose feature maps are added to the UNet's own.
//!
//! Legend: `B` batch, `H` `W` rows and columns of latents, `C` channels, `L` tokens of the text, `D` their width,
//! `P` channels of the pooled text, `T` width of the time embedding.

use candle_core::{DType, Result as CandleResult, Tensor};

use crate::error::{Error, Result, StageContext};
use crate::kernels::{Activation, Conv2d, ConvShape, Epilogue, Loader, Padding};
use crate::model::networks::attention::TextReader;
use crate::model::networks::check::Check;
use crate::model::networks::config::Validator;
pub use crate::model::networks::controlnet_config::ControlNetConfig;
pub use crate::model::networks::controlnet_union::ControlHint;
use crate::model::networks::controlnet_union::{Fused, Union};
use crate::model::networks::embeddings::{StepEmbedding, StepNumbers};
use crate::model::networks::load_error::load_error;
use crate::model::networks::resnet::load_same_conv;
use crate::model::networks::unet::ReadText;
use crate::model::networks::unet_blocks::{Conditions, DownBlock, MidBlock, Skips};

const STAGE: &str = "controlnet";

/// One evaluation.
#[derive(Clone, Copy)]
pub struct ControlInput<'a> {
    /// `[B, H, W, C]`: the latents as the UNet takes them. Of an inpainting UNet's nine channels the first four are used.
    pub sample: &'a Tensor,
    /// 0 to 999, need not be whole. One for all samples, or one for each.
    pub timesteps: &'a [f64],
    /// Read before, by [`ControlNet::read`] of the same network.
    pub text: &'a ReadText,
    /// `[B, P]`: the pooled text.
    pub pooled: &'a Tensor,
    /// As the UNet's.
    pub time_ids: &'a [Vec<f64>],
    /// One, or several for a union.
    pub hints: &'a [ControlHint<'a>],
    /// True if residuals are scaled from 0.1 at the first feature map to 1 in the middle block: section
    /// "guess mode" of the authors' repository, <https://github.com/lllyasviel/ControlNet>.
    pub guess: bool,
    pub check: Check<'a>,
}

/// Tensors that are added to the UNet's feature maps.
#[derive(Clone, Debug)]
pub struct Residuals {
    /// In the order of evaluation, each of the shape of its feature map.
    pub down: Vec<Tensor>,
    pub mid: Tensor,
}

impl Residuals {
    /// The sum of both.
    ///
    /// # Errors
    /// Residuals for another UNet; device errors.
    pub fn add(&self, other: &Self) -> Result<Self> {
        if self.down.len() != other.down.len() {
            return Err(Error::bug(format!("{} residuals and {}", self.down.len(), other.down.len())));
        }
        let down = self.down.iter().zip(&other.down).map(|(a, b)| a + b).collect::<CandleResult<_>>().stage(STAGE)?;
        Ok(Self { down, mid: (&self.mid + &other.mid).stage(STAGE)? })
    }

    /// With `count` samples of zeros before its own.
    ///
    /// # Errors
    /// Device errors.
    pub fn after_zeros(&self, count: usize) -> Result<Self> {
        let pad = |x: &Tensor| x.pad_with_zeros(0, count, 0);
        let down = self.down.iter().map(pad).collect::<CandleResult<_>>().stage(STAGE)?;
        Ok(Self { down, mid: pad(&self.mid).stage(STAGE)? })
    }
}

/// Convolutions, each second one of which halves the resolution, from pixels to latents.
#[derive(Clone, Debug)]
struct HintEmbedding {
    conv_in: Conv2d,
    blocks: Vec<Conv2d>,
    conv_out: Conv2d,
}

impl HintEmbedding {
    fn load(loader: &Loader, config: &ControlNetConfig, outputs: usize) -> CandleResult<Self> {
        let (first, last) = (config.hint.first(), config.hint.last());
        let (first, last) = (first.copied().unwrap_or(0), last.copied().unwrap_or(0));
        let blocks = loader.pp("blocks");
        let mut convs = Vec::new();
        for (i, pair) in config.hint.windows(2).enumerate() {
            let &[inputs, outputs] = pair else { continue };
            convs.push(load_same_conv(&blocks.pp(2 * i), inputs, inputs, 3)?);
            let shape = ConvShape { inputs, outputs, kernel: 3, stride: 2, padding: Padding::same(1) };
            convs.push(Conv2d::load(&blocks.pp(2 * i + 1), shape)?);
        }
        Ok(Self {
            conv_in: load_same_conv(&loader.pp("conv_in"), config.hint_inputs, first, 3)?,
            blocks: convs,
            conv_out: load_same_conv(&loader.pp("conv_out"), last, outputs, 3)?,
        })
    }

    fn forward(&self, pixels: &Tensor) -> CandleResult<Tensor> {
        let silu = Epilogue { activation: Some(Activation::Silu), ..Epilogue::default() };
        let mut x = self.conv_in.forward_with(pixels, silu)?;
        for conv in &self.blocks {
            x = conv.forward_with(&x, silu)?;
        }
        self.conv_out.forward(&x)
    }
}

/// Computes residuals for the feature maps of a UNet.
#[derive(Clone, Debug)]
pub struct ControlNet {
    step: StepEmbedding,
    conv_in: Conv2d,
    hint: HintEmbedding,
    union: Option<Union>,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    down_outputs: Vec<Conv2d>,
    mid_output: Conv2d,
    config: ControlNetConfig,
    /// Channels of the text.
    context: usize,
}

impl ControlNet {
    /// # Errors
    /// `model_unsupported` for a configuration or weights of another network; device errors.
    pub fn load(loader: &Loader, config: &ControlNetConfig) -> Result<Self> {
        let plan = config.plan(STAGE)?;
        let sizes = plan.sizes;
        let skips = plan.skips();
        let (width, last) = (skips.first().copied().unwrap_or(0), skips.last().copied().unwrap_or(0));
        let read = || -> CandleResult<Self> {
            let (down, outputs) = (loader.pp("down_blocks"), loader.pp("controlnet_down_blocks"));
            let union = config.union.map(|shape| Union::load(loader, shape, &config.trunk, &plan));
            Ok(Self {
                step: StepEmbedding::load(loader, &config.trunk, &plan)?,
                conv_in: load_same_conv(&loader.pp("conv_in"), config.trunk.in_channels, width, 3)?,
                hint: HintEmbedding::load(&loader.pp("controlnet_cond_embedding"), config, width)?,
                union: union.transpose()?,
                down_blocks: (plan.down.iter().enumerate())
                    .map(|(i, block)| DownBlock::load(&down.pp(i), block, sizes))
                    .collect::<CandleResult<_>>()?,
                mid_block: plan.mid.map(|mid| MidBlock::load(&loader.pp("mid_block"), mid, sizes)).transpose()?,
                down_outputs: (skips.iter().enumerate())
                    .map(|(i, &channels)| load_same_conv(&outputs.pp(i), channels, channels, 1))
                    .collect::<CandleResult<_>>()?,
                mid_output: load_same_conv(&loader.pp("controlnet_mid_block"), last, last, 1)?,
                config: config.clone(),
                context: sizes.context,
            })
        };
        read().map_err(load_error(STAGE))
    }

    #[must_use]
    pub fn config(&self) -> &ControlNetConfig {
        &self.config
    }

    /// Count of kinds of hints that a union distinguishes; `None` for an ordinary ControlNet.
    #[must_use]
    pub fn kinds(&self) -> Option<usize> {
        self.config.kinds()
    }

    /// Keys and values of the text, `[B, L, D]`, for every evaluation with it whose sample is of `dtype`.
    ///
    /// # Errors
    /// The error of `check`; `model_unsupported` where the text is another network's; device errors.
    pub fn read(&self, context: &Tensor, dtype: DType, check: Check) -> Result<ReadText> {
        let &[samples, _, width] = context.dims() else {
            return Err(Error::bug(format!("text of shape {:?}", context.dims())));
        };
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
        Ok(ReadText { blocks, samples, dtype })
    }

    /// Embeds a hint image, `[1, 8·H, 8·W, 3]` in `[0, 1]`, as `[1, H, W, C]` in `dtype`. The embedding is the same at
    /// every step.
    ///
    /// # Errors
    /// Device errors.
    pub fn embed(&self, pixels: &Tensor, dtype: DType) -> Result<Tensor> {
        let run = || -> CandleResult<Tensor> {
            let pixels = pixels.to_dtype(dtype)?;
            let pixels = if self.config.bgr { pixels.flip(&[3])? } else { pixels };
            self.hint.forward(&pixels)
        };
        run().stage(STAGE)
    }

    /// # Errors
    /// The error of `check`; device errors.
    pub fn forward(&self, input: ControlInput) -> Result<Residuals> {
        let ControlInput { text, check, hints, .. } = input;
        check()?;
        let dtype = input.sample.dtype();
        let enter = || -> CandleResult<(Tensor, Tensor)> {
            let wanted = self.config.trunk.in_channels;
            let sample = match input.sample.dim(3)? {
                channels if channels > wanted => &input.sample.narrow(3, 0, wanted)?.contiguous()?,
                _ => input.sample,
            };
            let device = sample.device();
            let numbers = StepNumbers { timesteps: input.timesteps, pooled: input.pooled, time_ids: input.time_ids };
            let time = self.step.embed(numbers, device)?;
            let x = self.conv_in.forward(sample)?;
            let (x, time) = match (&self.union, hints) {
                (Some(union), hints) => {
                    let Fused { addition, time: kinds } = union.fuse(&x, hints)?;
                    ((x + addition)?, time.broadcast_add(&kinds)?)
                }
                (None, [hint]) => (x.broadcast_add(hint.embedded)?, time),
                (None, hints) => candle_core::bail!("{} hints for a network of one", hints.len()),
            };
            Ok((x, Activation::Silu.apply(&time)?.to_dtype(dtype)?))
        };
        let (mut x, time) = enter().stage(STAGE)?;
        let reader = TextReader::new(&text.blocks, &[], &[]);
        let given = Conditions { time: &time, text: &reader, freeu: None, check };
        let mut skips = Skips::new(None);
        skips.keep(&x);
        for block in &self.down_blocks {
            x = block.forward(x, given, &mut skips, None)?;
        }
        if let Some(block) = &self.mid_block {
            x = block.forward(x, given)?;
        }
        check()?;
        let skips = skips.left();
        let scales = self.scales(skips.len(), hints, input.guess);
        let scaled = |conv: &Conv2d, x: &Tensor, scale: f64| {
            let y = conv.forward(x)?;
            if scale == 1.0 { Ok(y) } else { y * scale }
        };
        let down = self.down_outputs.iter().zip(&skips).zip(&scales);
        let down = down.map(|((conv, x), &scale)| scaled(conv, x, scale)).collect::<CandleResult<_>>();
        let last = scales.last().copied().unwrap_or(1.0);
        Ok(Residuals { down: down.stage(STAGE)?, mid: scaled(&self.mid_output, &x, last).stage(STAGE)? })
    }

    /// Factors of the residuals, the middle block's last. The weights of several images of a union apply to the images
    /// instead.
    fn scales(&self, count: usize, hints: &[ControlHint], guess: bool) -> Vec<f64> {
        let weight = match hints {
            [hint] => hint.weight,
            _ => 1.0,
        };
        let growth = |i: usize| if guess { 10f64.powf(i as f64 / count as f64 - 1.0) } else { 1.0 };
        (0..=count).map(|i| weight * growth(i)).collect()
    }
}

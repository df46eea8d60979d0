//! Attention within feature maps: the UNet's transformers.
//!
//! Legend: `B` batch, `H` `W` rows and columns, `C` channels, `L` tokens of the text, `D` width of a token.

use std::cell::Cell;
use std::ops::Range;

use candle_core::{Result as CandleResult, Tensor};

use crate::error::{Error, Result, StageContext};
use crate::kernels::{Epilogue, GroupNorm, LayerNorm, Linear, Loader, Mask, attention};
use crate::model::networks::check::Check;
use crate::model::networks::interventions::{Change, Perturbed, SelfAttention};

const STAGE: &str = "unet";
/// Epsilon of the transformer's group norm; the configuration's `norm_eps` applies to residual blocks only.
const GROUP_NORM_EPS: f64 = 1e-6;
const LAYER_NORM_EPS: f64 = 1e-5;

/// Sizes of one attention layer or transformer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TransformerShape {
    pub(crate) channels: usize,
    pub(crate) heads: usize,
    /// `D`: channels of the text.
    pub(crate) context: usize,
}

/// Keys and values of attention, both `[B, L, C]`, of the text or the feature map.
#[derive(Clone, Debug)]
pub(crate) struct KeysValues {
    keys: Tensor,
    values: Tensor,
}

impl KeysValues {
    pub(crate) fn new(keys: Tensor, values: Tensor) -> Self {
        Self { keys, values }
    }

    /// `B`
    pub(crate) fn samples(&self) -> usize {
        self.keys.dims().first().copied().unwrap_or(0)
    }

    /// `C`
    pub(crate) fn channels(&self) -> usize {
        self.keys.dims().last().copied().unwrap_or(0)
    }

    /// Repeats the first sample `first` times, then the last one up to `samples`.
    pub(crate) fn spread(&self, first: usize, samples: usize) -> CandleResult<Self> {
        let spread = |x: &Tensor| -> CandleResult<Tensor> {
            let (one, other) = (x.narrow(0, 0, 1)?, x.narrow(0, x.dim(0)?.saturating_sub(1), 1)?);
            let rows: Vec<&Tensor> = (0..samples).map(|row| if row < first { &one } else { &other }).collect();
            Tensor::cat(&rows, 0)
        };
        Ok(Self { keys: spread(&self.keys)?, values: spread(&self.values)? })
    }

    /// Keys and values of `count` samples from `start` on.
    pub(crate) fn rows(&self, start: usize, count: usize) -> CandleResult<Self> {
        Ok(Self { keys: self.keys.narrow(0, start, count)?, values: self.values.narrow(0, start, count)? })
    }
}

/// Keys and values of image prompts for every block, and their weight.
pub(crate) type ImagePromptLayers<'a> = (&'a [KeysValues], f64);

/// Hands each transformer block its keys and values of the text and its interventions. [`SpatialTransformer::read`] adds
/// keys and values in the order of evaluation.
pub(crate) struct TextReader<'a> {
    ahead: Cell<&'a [KeysValues]>,
    all: usize,
    /// One for each IP-Adapter.
    pictures: &'a [ImagePromptLayers<'a>],
    perturbed: &'a [Perturbed],
}

/// Keys and values for one block.
#[derive(Clone, Copy)]
struct Reading<'a> {
    text: &'a KeysValues,
    index: usize,
    pictures: &'a [ImagePromptLayers<'a>],
    /// First sample and count, if they are not for all samples.
    samples: Option<(usize, usize)>,
}

impl Reading<'_> {
    /// Limits them to some samples.
    fn of(self, samples: &Range<usize>) -> Self {
        Self { samples: Some((samples.start, samples.len())), ..self }
    }
}

impl<'a> TextReader<'a> {
    pub(crate) fn new(
        all: &'a [KeysValues],
        pictures: &'a [ImagePromptLayers<'a>],
        perturbed: &'a [Perturbed],
    ) -> Self {
        Self { ahead: Cell::new(all), all: all.len(), pictures, perturbed }
    }

    /// Interventions of the next block.
    fn changes(&self) -> Vec<(&'a Range<usize>, Change)> {
        let block = self.all - self.ahead.get().len();
        let change = |one: &'a Perturbed| Some((&one.samples, one.blocks.get(block).copied().flatten()?));
        self.perturbed.iter().filter_map(change).collect()
    }

    fn next(&self) -> Result<Reading<'a>> {
        let Some((text, rest)) = self.ahead.get().split_first() else {
            return Err(Error::bug("text was read by fewer blocks than there are"));
        };
        self.ahead.set(rest);
        Ok(Reading { text, index: self.all - rest.len() - 1, pictures: self.pictures, samples: None })
    }
}

/// Queries from the feature map, keys and values from it or from the text.
#[derive(Clone, Debug)]
struct MultiHeadAttention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl MultiHeadAttention {
    fn load(loader: &Loader, channels: usize, heads: usize, keys: usize) -> CandleResult<Self> {
        Ok(Self {
            to_q: Linear::load_no_bias(&loader.pp("to_q"), channels, channels)?,
            to_k: Linear::load_no_bias(&loader.pp("to_k"), keys, channels)?,
            to_v: Linear::load_no_bias(&loader.pp("to_v"), keys, channels)?,
            to_out: Linear::load(&loader.pp("to_out").pp("0"), channels, channels)?,
            heads,
        })
    }

    /// `source` is `[B, L, D]`.
    fn read(&self, source: &Tensor) -> CandleResult<KeysValues> {
        Ok(KeysValues { keys: self.to_k.forward(source)?, values: self.to_v.forward(source)? })
    }

    /// Returns `[B, HW, C]`, as `x` is.
    fn attend(&self, x: &Tensor, given: &KeysValues) -> CandleResult<Tensor> {
        attention(&self.to_q.forward(x)?, &given.keys, &given.values, self.heads, Mask::None)
    }

    /// [`Self::attend`] to the text, plus attention to each IP-Adapter's images times its weight.
    fn attend_all(&self, x: &Tensor, given: Reading) -> CandleResult<Tensor> {
        let q = self.to_q.forward(x)?;
        let read = |all: &KeysValues| -> CandleResult<Tensor> {
            match given.samples {
                None => attention(&q, &all.keys, &all.values, self.heads, Mask::None),
                Some((start, count)) => {
                    let KeysValues { keys, values } = all.rows(start, count)?;
                    attention(&q, &keys, &values, self.heads, Mask::None)
                }
            }
        };
        let mut attended = read(given.text)?;
        for (blocks, weight) in given.pictures {
            if let Some(block) = blocks.get(given.index) {
                attended = (attended + (read(block)? * *weight)?)?;
            }
        }
        Ok(attended)
    }

    /// `residual` plus the projection of `attended`, the result of [`Self::attend`].
    fn join(&self, attended: &Tensor, residual: &Tensor) -> CandleResult<Tensor> {
        self.to_out.forward_with(attended, Epilogue { residual: Some(residual), ..Epilogue::default() })
    }
}

/// Self-attention, cross-attention and a gated feed-forward layer, each with its norm before and a residual around.
#[derive(Clone, Debug)]
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: MultiHeadAttention,
    norm2: LayerNorm,
    attn2: MultiHeadAttention,
    norm3: LayerNorm,
    gate: Linear,
    narrow: Linear,
}

impl TransformerBlock {
    fn load(loader: &Loader, shape: TransformerShape) -> CandleResult<Self> {
        let TransformerShape { channels, heads, context } = shape;
        let norm = |name: &str| LayerNorm::load(&loader.pp(name), channels, LAYER_NORM_EPS);
        let feed_forward = loader.pp("ff").pp("net");
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: MultiHeadAttention::load(&loader.pp("attn1"), channels, heads, channels)?,
            norm2: norm("norm2")?,
            attn2: MultiHeadAttention::load(&loader.pp("attn2"), channels, heads, context)?,
            norm3: norm("norm3")?,
            gate: Linear::load(&feed_forward.pp("0").pp("proj"), channels, 8 * channels)?,
            narrow: Linear::load(&feed_forward.pp("2"), 4 * channels, channels)?,
        })
    }

    /// `x` is `[B, HW, C]`; `text` was read by `attn2`. `changes` are in the order of their samples.
    fn forward(&self, x: &Tensor, text: Reading, changes: &[(&Range<usize>, Change)]) -> CandleResult<Tensor> {
        const KEPT: Change = Change::Within { attention: SelfAttention::Kept, skips_feed_forward: false };
        if changes.is_empty() {
            return self.forward_changed(x, text, KEPT);
        }
        let of = |samples: Range<usize>, change: Change| {
            self.forward_changed(&x.narrow(0, samples.start, samples.len())?, text.of(&samples), change)
        };
        let mut parts = Vec::new();
        let mut done = 0;
        for &(samples, change) in changes {
            if done < samples.start {
                parts.push(of(done..samples.start, KEPT)?);
            }
            parts.push(of(samples.clone(), change)?);
            done = samples.end;
        }
        if done < x.dim(0)? {
            parts.push(of(done..x.dim(0)?, KEPT)?);
        }
        Tensor::cat(&parts, 0)
    }

    fn forward_changed(&self, x: &Tensor, text: Reading, change: Change) -> CandleResult<Tensor> {
        let Change::Within { attention, skips_feed_forward } = change else { return Ok(x.clone()) };
        let x = {
            let normal = self.norm1.forward(x)?;
            match attention {
                SelfAttention::Kept => {
                    let attended = self.attn1.attend(&normal, &self.attn1.read(&normal)?)?;
                    drop(normal);
                    self.attn1.join(&attended, x)?
                }
                // Every position keeps its own value.
                SelfAttention::Identity => self.attn1.join(&self.attn1.to_v.forward(&normal)?, x)?,
                SelfAttention::Skipped => (normal + x)?,
            }
        };
        let x = {
            let before = x;
            self.attn2.join(&self.attn2.attend_all(&self.norm2.forward(&before)?, text)?, &before)?
        };
        if skips_feed_forward {
            return self.norm3.forward(&x)? + x;
        }
        let gated = self.gate.forward_geglu(&self.norm3.forward(&x)?)?; // [B, HW, 4C]
        self.narrow.forward_with(&gated, Epilogue { residual: Some(&x), ..Epilogue::default() })
    }
}

/// A stack of transformer blocks over the positions of a feature map.
#[derive(Clone, Debug)]
pub(crate) struct SpatialTransformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<TransformerBlock>,
    proj_out: Linear,
}

impl SpatialTransformer {
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub(crate) fn load(loader: &Loader, shape: TransformerShape, groups: usize, depth: usize) -> CandleResult<Self> {
        let blocks = loader.pp("transformer_blocks");
        Ok(Self {
            norm: GroupNorm::load(&loader.pp("norm"), groups, shape.channels, GROUP_NORM_EPS)?,
            proj_in: Linear::load(&loader.pp("proj_in"), shape.channels, shape.channels)?,
            blocks: (0..depth).map(|i| TransformerBlock::load(&blocks.pp(i), shape)).collect::<CandleResult<_>>()?,
            proj_out: Linear::load(&loader.pp("proj_out"), shape.channels, shape.channels)?,
        })
    }

    /// Count of blocks that read the text.
    pub(crate) fn reads(&self) -> usize {
        self.blocks.len()
    }

    /// Adds each block's keys and values of `context`, `[B, L, D]`, to `read` in the blocks' order.
    ///
    /// # Errors
    /// The error of `check`, called before each block; shapes that do not fit; device errors.
    pub(crate) fn read(&self, context: &Tensor, check: Check, read: &mut Vec<KeysValues>) -> Result<()> {
        for block in &self.blocks {
            check()?;
            read.push(block.attn2.read(context).stage(STAGE)?);
        }
        Ok(())
    }

    /// `x` is `[B, H, W, C]`; the result has its shape. `text` hands out what [`Self::read`] added.
    ///
    /// # Errors
    /// The error of `check`, called before each block; shapes that do not fit; device errors.
    pub(crate) fn forward(&self, x: &Tensor, text: &TextReader, check: Check) -> Result<Tensor> {
        let enter = || -> CandleResult<(Tensor, Tensor)> {
            let (batch, height, width, channels) = x.dims4()?;
            let residual = x.reshape((batch, height * width, channels))?;
            let tokens = self.proj_in.forward(&self.norm.forward(&residual)?)?;
            Ok((residual, tokens))
        };
        let (residual, mut tokens) = enter().stage(STAGE)?;
        for block in &self.blocks {
            check()?;
            let changes = text.changes();
            tokens = block.forward(&tokens, text.next()?, &changes).stage(STAGE)?;
        }
        let epilogue = Epilogue { residual: Some(&residual), ..Epilogue::default() };
        self.proj_out.forward_with(&tokens, epilogue).and_then(|y| y.reshape(x.shape())).stage(STAGE)
    }
}

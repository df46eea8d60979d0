//! The parts of a ControlNet Union beyond a ControlNet: it is conditioned on the kind of each hint image, and fuses
//! several. Network and names follow <https://github.com/xinsir6/ControlNetPlus>.
//!
//! Legend: `B` batch, `H` `W` rows and columns of latents, `C` channels, `N` hints and the sample, `T` width of the time
//! embedding.

use candle_core::{DType, Result, Tensor};

use crate::kernels::{Activation, Epilogue, LayerNorm, Linear, Loader, Mask, attention};
use crate::model::networks::controlnet_config::UnionShape;
use crate::model::networks::embeddings::{Sinusoid, TimestepEmbedding};
use crate::model::networks::unet_config::{UnetConfig, UnetPlan};

const LAYER_NORM_EPS: f64 = 1e-5;

/// An image that steers a ControlNet.
#[derive(Clone, Copy)]
pub struct ControlHint<'a> {
    /// `[1, H, W, C]`, made by [`crate::model::networks::controlnet::ControlNet::embed`].
    pub embedded: &'a Tensor,
    /// The kind of image for a union, below [`crate::model::networks::controlnet::ControlNet::kinds`].
    pub kind: Option<usize>,
    /// 1 as trained.
    pub weight: f64,
}

/// Self-attention and a feed-forward layer, each with its norm before and a residual around.
#[derive(Clone, Debug)]
struct UnionBlock {
    ln_1: LayerNorm,
    in_proj: Linear,
    out_proj: Linear,
    ln_2: LayerNorm,
    c_fc: Linear,
    c_proj: Linear,
    heads: usize,
}

impl UnionBlock {
    fn load(loader: &Loader, shape: UnionShape) -> Result<Self> {
        let UnionShape { channels, heads, .. } = shape;
        let (attn, mlp) = (loader.pp("attn"), loader.pp("mlp"));
        let weight = attn.tensor("in_proj_weight", (3 * channels, channels))?;
        Ok(Self {
            ln_1: LayerNorm::load(&loader.pp("ln_1"), channels, LAYER_NORM_EPS)?,
            in_proj: Linear::new(weight, Some(attn.tensor("in_proj_bias", 3 * channels)?))?,
            out_proj: Linear::load(&attn.pp("out_proj"), channels, channels)?,
            ln_2: LayerNorm::load(&loader.pp("ln_2"), channels, LAYER_NORM_EPS)?,
            c_fc: Linear::load(&mlp.pp("c_fc"), channels, 4 * channels)?,
            c_proj: Linear::load(&mlp.pp("c_proj"), 4 * channels, channels)?,
            heads,
        })
    }

    /// `[N, B, C]` to `[N, B, C]`. The network was trained with the batch where attention looks for the sequence, so the
    /// samples of a batch attend to each other, each hint's and the sample's among themselves.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let channels = x.dim(2)?;
        let all = self.in_proj.forward(&self.ln_1.forward(x)?)?; // [N, B, 3C]
        let part = |i: usize| all.narrow(2, i * channels, channels)?.contiguous();
        let seen = attention(&part(0)?, &part(1)?, &part(2)?, self.heads, Mask::None)?;
        let x = self.out_proj.forward_with(&seen, Epilogue { residual: Some(x), ..Epilogue::default() })?;
        let activation = Some(Activation::QuickGelu);
        let inner = self.c_fc.forward_with(&self.ln_2.forward(&x)?, Epilogue { activation, ..Epilogue::default() })?;
        self.c_proj.forward_with(&inner, Epilogue { residual: Some(&x), ..Epilogue::default() })
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Union {
    /// `[K, C]`
    task_embedding: Tensor,
    blocks: Vec<UnionBlock>,
    spatial_ch_projs: Linear,
    control_type_proj: Sinusoid,
    control_add_embedding: TimestepEmbedding,
    kinds: usize,
}

/// Several hints, fused.
pub(crate) struct Fused {
    /// `[B, H, W, C]`, added to the first feature map.
    pub(crate) addition: Tensor,
    /// `[1, T]`, f32, added to the time embedding: which kinds there are.
    pub(crate) time: Tensor,
}

impl Union {
    pub(crate) fn load(loader: &Loader, shape: UnionShape, config: &UnetConfig, plan: &UnetPlan) -> Result<Self> {
        let UnionShape { kinds, channels, layers, .. } = shape;
        let width = plan.down.first().map_or(0, |block| block.outputs);
        let blocks = loader.pp("transformer_layes");
        let sinusoid =
            Sinusoid { width: plan.addition, flip_sin_to_cos: config.flip_sin_to_cos, freq_shift: config.freq_shift };
        Ok(Self {
            task_embedding: loader.tensor("task_embedding", (kinds, channels))?,
            blocks: (0..layers).map(|i| UnionBlock::load(&blocks.pp(i), shape)).collect::<Result<_>>()?,
            spatial_ch_projs: Linear::load(&loader.pp("spatial_ch_projs"), channels, width)?,
            control_type_proj: sinusoid,
            control_add_embedding: TimestepEmbedding::load(
                &loader.pp("control_add_embedding"),
                plan.addition * kinds,
                plan.sizes.time,
            )?,
            kinds,
        })
    }

    /// `x` is `[B, H, W, C]`, the first feature map.
    pub(crate) fn fuse(&self, x: &Tensor, hints: &[ControlHint]) -> Result<Fused> {
        let (batch, dtype, device) = (x.dim(0)?, x.dtype(), x.device());
        let mean = |map: &Tensor| map.to_dtype(DType::F32)?.mean((1, 2))?.to_dtype(dtype); // [B, C]
        // The weight of a single hint applies to the residuals.
        let weight = |hint: &ControlHint| if hints.len() == 1 { 1.0 } else { hint.weight };
        let mut used = vec![0.0; self.kinds];
        let mut tokens = Vec::with_capacity(hints.len() + 1);
        for hint in hints {
            let kind = hint.kind.unwrap_or(0);
            if let Some(used) = used.get_mut(kind) {
                *used = 1.0;
            }
            let task = self.task_embedding.narrow(0, kind, 1)?.to_dtype(dtype)?; // [1, C]
            let token = ((mean(hint.embedded)? + task)? * weight(hint))?;
            tokens.push(token.broadcast_as((batch, token.dim(1)?))?.contiguous()?);
        }
        tokens.push(mean(x)?);
        let mut tokens = Tensor::stack(&tokens, 0)?; // [N, B, C]
        for block in &self.blocks {
            tokens = block.forward(&tokens)?;
        }
        let mut addition: Option<Tensor> = None;
        for (i, hint) in hints.iter().enumerate() {
            let shift = self.spatial_ch_projs.forward(&tokens.get(i)?)?; // [B, C]
            let shift = (shift.unsqueeze(1)?.unsqueeze(1)? * weight(hint))?; // [B, 1, 1, C]
            let one = (hint.embedded * weight(hint))?.broadcast_add(&shift)?;
            addition = Some(match addition {
                Some(sum) => (sum + one)?,
                None => one,
            });
        }
        let Some(addition) = addition else { candle_core::bail!("a union without hints") };
        let kinds = self.control_type_proj.embed([used.as_slice()], device)?; // [1, K·D]
        Ok(Fused { addition, time: self.control_add_embedding.forward(&kinds)? })
    }
}

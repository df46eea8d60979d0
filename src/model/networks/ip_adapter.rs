//! IP-Adapter (Ye et al. 2023, <https://arxiv.org/abs/2308.06721>): the states of an image encoder become tokens that
//! every cross-attention of the UNet reads in addition to the text, through keys and values of their own. The plain one
//! projects the whole image's embedding; Plus resamples the patches with a perceiver (Alayrac et al. 2022,
//! <https://arxiv.org/abs/2204.14198>).
//!
//! Legend: `B` batch, `N` patches, `I` their channels, `T` tokens of an image, `D` their width, `H` width
//! inside the perceiver, `C` channels of a feature map.

use std::collections::BTreeMap;

use candle_core::{D, Result as CandleResult, Tensor};

use crate::error::{Error, Result, StageContext};
use crate::kernels::{Activation, Epilogue, LayerNorm, Linear, Loader, Mask, attention};
use crate::model::networks::attention::KeysValues;
use crate::model::networks::check::Check;
use crate::model::networks::clip_vision::Seen;
use crate::model::networks::config::{MAX_CHANNELS, MAX_LAYERS, Validator};
use crate::model::networks::load_error::load_error;

const STAGE: &str = "ip adapter";
const LAYER_NORM_EPS: f64 = 1e-5;
/// Channels of a head inside the perceiver, in every published file.
const HEAD: usize = 64;
/// Tokens of an image. Published files have 4 or 16.
const MOST_TOKENS: usize = 256;
/// Cross-attention layers of a UNet, at most.
const MOST_BLOCKS: usize = 1024;

/// Kind and sizes of an IP-Adapter, inferred from its tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpAdapterLayout {
    kind: ProjectionKind,
    /// `T`
    tokens: usize,
    /// `D`
    width: usize,
    /// `I`
    inputs: usize,
    /// Number in the file and `C` of each cross-attention, sorted by number.
    blocks: Vec<(usize, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProjectionKind {
    Plain,
    Plus { inner: usize, heads: usize, depth: usize, wide: usize },
}

impl IpAdapterLayout {
    /// Infers the layout. `name` is the file as its user knows it, `field` the field of the request that names it.
    ///
    /// # Errors
    /// `unsupported_feature` for variants conditioned on faces; `model_unsupported` for any other file that is no
    /// IP-Adapter.
    pub fn of(tensors: &BTreeMap<String, Vec<usize>>, name: &str, field: &str) -> Result<Self> {
        let validator = Validator { name };
        let has = |key: &str| tensors.contains_key(key);
        let lora = tensors.keys().any(|key| key.starts_with("ip_adapter.") && key.contains("_lora."));
        let face = if has("image_proj.proj.3.weight") {
            Some("IP-Adapter Full Face")
        } else if has("image_proj.perceiver_resampler.proj_in.weight") {
            Some("IP-Adapter FaceID Plus")
        } else if lora || (has("image_proj.norm.weight") && has("image_proj.proj.0.weight")) {
            Some("IP-Adapter FaceID")
        } else {
            None
        };
        if let Some(kind) = face {
            let hint = Some("plain IP-Adapter and IP-Adapter Plus for SDXL are supported".to_owned());
            return Err(Error::UnsupportedFeature { what: kind.to_owned(), hint, field: Some(field.to_owned()) });
        }
        let axes = |key: &str| -> Result<[usize; 2]> {
            match tensors.get(key).map(Vec::as_slice) {
                Some(&[a, b]) if (1..=8 * MAX_CHANNELS).contains(&a) && (1..=8 * MAX_CHANNELS).contains(&b) => {
                    Ok([a, b])
                }
                Some(other) => Err(validator.refuse(format!("`{key}` has the shape {other:?}"))),
                None => Err(validator.refuse(format!("it is no IP-Adapter: it has no tensor `{key}`"))),
            }
        };
        let blocks = blocks(tensors, validator)?;
        let (kind, tokens, width, inputs) = match tensors.get("image_proj.latents").map(Vec::as_slice) {
            Some(&[1, tokens, inner]) => {
                let [_, inputs] = axes("image_proj.proj_in.weight")?;
                let [width, _] = axes("image_proj.proj_out.weight")?;
                let [queries, _] = axes("image_proj.layers.0.0.to_q.weight")?;
                let [wide, _] = axes("image_proj.layers.0.1.1.weight")?;
                validator.divides("heads", HEAD, queries)?;
                let depth =
                    (0..=MAX_LAYERS).take_while(|i| has(&format!("image_proj.layers.{i}.0.to_q.weight"))).count();
                validator.within("layers", depth, 1..=MAX_LAYERS)?;
                for (key, channels) in [("hidden", inner), ("queries", queries), ("wide", wide)] {
                    validator.channels(key, channels)?;
                }
                (ProjectionKind::Plus { inner, heads: queries / HEAD, depth, wide }, tokens, width, inputs)
            }
            Some(other) => return Err(validator.refuse(format!("`image_proj.latents` has the shape {other:?}"))),
            None => {
                let [outputs, inputs] = axes("image_proj.proj.weight")?;
                let width = match tensors.get("image_proj.norm.weight").map(Vec::as_slice) {
                    Some(&[width]) if width > 0 && outputs.is_multiple_of(width) => width,
                    _ => return Err(validator.refuse("`image_proj.norm.weight` does not divide its projection")),
                };
                (ProjectionKind::Plain, outputs / width, width, inputs)
            }
        };
        validator.within("tokens", tokens, 1..=MOST_TOKENS)?;
        validator.channels("width", width)?;
        Ok(Self { kind, tokens, width, inputs, blocks })
    }

    /// Count of the network's tensors.
    #[must_use]
    pub fn tensors(&self) -> usize {
        let projection = match self.kind {
            ProjectionKind::Plain => 4,
            ProjectionKind::Plus { depth, .. } => 7 + 11 * depth,
        };
        projection + 2 * self.blocks.len()
    }
}

/// Cross-attentions for which a file has keys and values.
fn blocks(tensors: &BTreeMap<String, Vec<usize>>, validator: Validator) -> Result<Vec<(usize, usize)>> {
    let mut blocks = Vec::new();
    for (key, shape) in tensors {
        let number = key.strip_prefix("ip_adapter.").and_then(|rest| rest.strip_suffix(".to_k_ip.weight"));
        let (Some(number), &[channels, _]) = (number, shape.as_slice()) else { continue };
        match number.parse::<usize>() {
            Ok(number) if (1..=MAX_CHANNELS).contains(&channels) => blocks.push((number, channels)),
            _ => return Err(validator.refuse(format!("`{key}` has the shape {shape:?}"))),
        }
    }
    blocks.sort_unstable();
    if blocks.is_empty() || blocks.len() > MOST_BLOCKS {
        let message = format!("it is no IP-Adapter: it has keys for {} cross-attentions", blocks.len());
        return Err(validator.refuse(message));
    }
    Ok(blocks)
}

/// Resamples patches by cross-attention from learned queries.
#[derive(Clone, Debug)]
struct Perceiver {
    /// `[1, T, H]`
    latents: Tensor,
    proj_in: Linear,
    layers: Vec<PerceiverLayer>,
    proj_out: Linear,
    norm_out: LayerNorm,
    heads: usize,
}

#[derive(Clone, Debug)]
struct PerceiverLayer {
    norm1: LayerNorm,
    norm2: LayerNorm,
    to_q: Linear,
    to_kv: Linear,
    to_out: Linear,
    norm3: LayerNorm,
    widen: Linear,
    narrow: Linear,
}

#[derive(Clone, Debug)]
enum Projection {
    Plain { proj: Linear, norm: LayerNorm },
    Plus(Box<Perceiver>),
}

/// Projects states of an image encoder to tokens, and tokens to keys and values.
#[derive(Clone, Debug)]
pub struct IpAdapter {
    projection: Projection,
    /// `to_k_ip` and `to_v_ip`, in the order of the file.
    blocks: Vec<(Linear, Linear)>,
    layout: IpAdapterLayout,
}

impl IpAdapter {
    /// # Errors
    /// `model_unsupported` for weights that do not fit each other; device errors.
    pub fn load(loader: &Loader, layout: &IpAdapterLayout) -> Result<Self> {
        let (image, file) = (loader.pp("image_proj"), loader.pp("ip_adapter"));
        let &IpAdapterLayout { tokens, width, inputs, .. } = layout;
        let norm = |loader: &Loader, width| LayerNorm::load(loader, width, LAYER_NORM_EPS);
        let read = || -> CandleResult<Self> {
            let projection = match layout.kind {
                ProjectionKind::Plain => Projection::Plain {
                    proj: Linear::load(&image.pp("proj"), inputs, tokens * width)?,
                    norm: norm(&image.pp("norm"), width)?,
                },
                ProjectionKind::Plus { inner, heads, depth, wide } => {
                    let layer = |i: usize| -> CandleResult<PerceiverLayer> {
                        let (attends, feeds) = (image.pp("layers").pp(i).pp("0"), image.pp("layers").pp(i).pp("1"));
                        let across = heads * HEAD;
                        Ok(PerceiverLayer {
                            norm1: norm(&attends.pp("norm1"), inner)?,
                            norm2: norm(&attends.pp("norm2"), inner)?,
                            to_q: Linear::load_no_bias(&attends.pp("to_q"), inner, across)?,
                            to_kv: Linear::load_no_bias(&attends.pp("to_kv"), inner, 2 * across)?,
                            to_out: Linear::load_no_bias(&attends.pp("to_out"), across, inner)?,
                            norm3: norm(&feeds.pp("0"), inner)?,
                            widen: Linear::load_no_bias(&feeds.pp("1"), inner, wide)?,
                            narrow: Linear::load_no_bias(&feeds.pp("3"), wide, inner)?,
                        })
                    };
                    Projection::Plus(Box::new(Perceiver {
                        latents: image.tensor("latents", (1, tokens, inner))?,
                        proj_in: Linear::load(&image.pp("proj_in"), inputs, inner)?,
                        layers: (0..depth).map(layer).collect::<CandleResult<_>>()?,
                        proj_out: Linear::load(&image.pp("proj_out"), inner, width)?,
                        norm_out: norm(&image.pp("norm_out"), width)?,
                        heads,
                    }))
                }
            };
            let block = |&(number, channels): &(usize, usize)| {
                let loader = file.pp(number);
                let load = |name: &str| Linear::load_no_bias(&loader.pp(name), width, channels);
                Ok((load("to_k_ip")?, load("to_v_ip")?))
            };
            let blocks = layout.blocks.iter().map(block).collect::<CandleResult<_>>()?;
            Ok(Self { projection, blocks, layout: layout.clone() })
        };
        read().map_err(load_error(STAGE))
    }

    /// The image encoder's states that it takes.
    #[must_use]
    pub fn wants(&self) -> Seen {
        match self.projection {
            Projection::Plain { .. } => Seen::Whole,
            Projection::Plus(_) => Seen::Patches,
        }
    }

    /// `I`: channels of the states.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.layout.inputs
    }

    /// Tokens of images: from `[B, I]`, or for Plus `[B, N, I]`, to `[B, T, D]`.
    ///
    /// # Errors
    /// States of other channels; device errors.
    pub fn project(&self, seen: &Tensor) -> Result<Tensor> {
        let run = || -> CandleResult<Tensor> {
            match &self.projection {
                Projection::Plain { proj, norm } => {
                    let (tokens, width) = (self.layout.tokens, self.layout.width);
                    norm.forward(&proj.forward(seen)?.reshape((seen.dim(0)?, tokens, width))?)
                }
                Projection::Plus(perceiver) => perceiver.forward(seen),
            }
        };
        run().stage(STAGE)
    }

    /// Keys and values of `tokens`, `[B, T, D]`, for cross-attentions of `channels` channels, in the file's order.
    ///
    /// # Errors
    /// The error of `check`, called before each; `model_unsupported` where the adapter is for another UNet; device
    /// errors.
    pub(crate) fn read(&self, tokens: &Tensor, channels: &[usize], check: Check) -> Result<Vec<KeysValues>> {
        let own: Vec<usize> = self.layout.blocks.iter().map(|&(_, channels)| channels).collect();
        let odd = self.layout.blocks.iter().enumerate().all(|(i, &(number, _))| number == 2 * i + 1);
        if own != channels || !odd {
            let message = format!(
                "it is for another UNet: it has keys for {} cross-attentions of {} channels, and this one has {} of {}",
                own.len(),
                distinct(&own),
                channels.len(),
                distinct(channels)
            );
            return Err(Validator { name: STAGE }.refuse(message));
        }
        let mut read = Vec::with_capacity(self.blocks.len());
        for (to_k, to_v) in &self.blocks {
            check()?;
            let make = || Ok(KeysValues::new(to_k.forward(tokens)?, to_v.forward(tokens)?));
            read.push(make().stage(STAGE)?);
        }
        Ok(read)
    }
}

/// Every number once, as text.
fn distinct(all: &[usize]) -> String {
    let mut numbers = all.to_vec();
    numbers.sort_unstable();
    numbers.dedup();
    numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

impl Perceiver {
    fn forward(&self, seen: &Tensor) -> CandleResult<Tensor> {
        let x = self.proj_in.forward(seen)?; // [B, N, H]
        let (_, tokens, inner) = self.latents.dims3()?;
        let mut latents = self.latents.to_dtype(x.dtype())?.broadcast_as((x.dim(0)?, tokens, inner))?.contiguous()?; // [B, T, H]
        for layer in &self.layers {
            latents = layer.forward(&x, &latents, self.heads)?;
        }
        self.norm_out.forward(&self.proj_out.forward(&latents)?)
    }
}

impl PerceiverLayer {
    fn forward(&self, x: &Tensor, latents: &Tensor, heads: usize) -> CandleResult<Tensor> {
        let asking = self.norm2.forward(latents)?;
        let source = Tensor::cat(&[&self.norm1.forward(x)?, &asking], 1)?; // [B, N + T, H]
        let both = self.to_kv.forward(&source)?;
        let half = both.dim(D::Minus1)? / 2;
        let part = |from: usize| both.narrow(2, from, half)?.contiguous();
        let read = attention(&self.to_q.forward(&asking)?, &part(0)?, &part(half)?, heads, Mask::None)?;
        let latents = self.to_out.forward_with(&read, Epilogue { residual: Some(latents), ..Epilogue::default() })?;
        let activation = Some(Activation::Gelu);
        let wide = self.norm3.forward(&latents)?;
        let wide = self.widen.forward_with(&wide, Epilogue { activation, ..Epilogue::default() })?;
        self.narrow.forward_with(&wide, Epilogue { residual: Some(&latents), ..Epilogue::default() })
    }
}

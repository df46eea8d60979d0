//! CLIP text encoders: ViT-L and OpenCLIP ViT-bigG as transformers stores them (Radford et al. 2021).
//!
//! Legend: `B` batch, `L` tokens (77), `C` hidden size, `P` projected size.

use std::ops::Range;

use candle_core::{D, DType, Device, Result as CandleResult, Tensor};
use serde::Deserialize;

use crate::error::{Error, Result, StageContext};
use crate::kernels::{Activation, Epilogue, LayerNorm, Linear, Loader, Mask, attention};
use crate::model::networks::config::{MAX_CHANNELS, MAX_LAYERS, PerBlock, Validator};
use crate::model::networks::load_error::load_error;

const STAGE: &str = "text encoder";

/// The `eos_token_id` of configurations written before the right one was; it means the highest id of the text.
const LEGACY_EOS: u32 = 2;

/// `config.json` of a text encoder; missing keys have transformers' defaults.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct ClipConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub projection_dim: Option<usize>,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    pub hidden_act: String,
    pub layer_norm_eps: f64,
    pub eos_token_id: Option<PerBlock<u32>>,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: Some(512),
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".to_owned(),
            layer_norm_eps: 1e-5,
            eos_token_id: Some(PerBlock::Same(49407)),
        }
    }
}

impl ClipConfig {
    /// # Errors
    /// `model_unsupported` for a value that this network cannot compute.
    pub fn check(&self, name: &str) -> Result<()> {
        let validator = Validator { name };
        validator.within("vocab_size", self.vocab_size, 1..=1 << 22)?;
        validator.channels("hidden_size", self.hidden_size)?;
        validator.within("intermediate_size", self.intermediate_size, 1..=8 * MAX_CHANNELS)?;
        validator.within("num_hidden_layers", self.num_hidden_layers, 1..=2 * MAX_LAYERS)?;
        validator.divides("num_attention_heads", self.num_attention_heads, self.hidden_size)?;
        validator.within("max_position_embeddings", self.max_position_embeddings, 1..=1 << 16)?;
        validator.epsilon("layer_norm_eps", self.layer_norm_eps)?;
        self.activation(validator)?;
        self.eos(validator)?;
        match self.projection_dim {
            Some(projected) => validator.channels("projection_dim", projected),
            None => Ok(()),
        }
    }

    pub(crate) fn activation(&self, validator: Validator) -> Result<Activation> {
        validator.is("hidden_act", &self.hidden_act, &["quick_gelu", "gelu"])?;
        Ok(if self.hidden_act == "gelu" { Activation::Gelu } else { Activation::QuickGelu })
    }

    fn eos(&self, validator: Validator) -> Result<u32> {
        match self.eos_token_id.as_ref().map(PerBlock::values) {
            Some(&[id]) => Ok(id),
            _ => Err(validator.refuse("`eos_token_id` must be one id")),
        }
    }
}

/// Embeddings of texts.
#[derive(Clone, Debug)]
pub struct ClipOutput {
    /// `[B, L, C]`: the states after the chosen layer, without the final norm.
    pub hidden: Tensor,
    /// `[B, P]`: the projected end-of-text state. `None` without a projection.
    pub pooled: Option<Tensor>,
}

/// The first id that stands for a vector of [`ClipInput::vectors`], the next one for the next; far above every
/// vocabulary.
pub const FIRST_VECTOR: u32 = 1 << 30;

/// Texts of the same length.
#[derive(Clone, Copy)]
pub struct ClipInput<'a> {
    pub rows: &'a [ClipRow<'a>],
    /// Layers to skip below the second to last before `hidden` is taken: 0 returns `hidden_states[-2]`, as in SDXL.
    pub skip: usize,
    /// `[V, C]`: vectors in place of token embeddings.
    pub vectors: Option<&'a Tensor>,
    pub device: &'a Device,
}

/// One text.
#[derive(Clone)]
pub struct ClipRow<'a> {
    /// At most as many as there are positions.
    pub ids: &'a [u32],
    /// Positions that no other attends to; the first position is never one.
    pub hidden: Range<usize>,
}

/// A transformer layer, of text and image encoders alike.
#[derive(Clone, Debug)]
pub(crate) struct EncoderLayer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    activation: Activation,
}

impl EncoderLayer {
    pub(crate) fn load(loader: &Loader, config: &ClipConfig, activation: Activation) -> CandleResult<Self> {
        let (size, inner) = (config.hidden_size, config.intermediate_size);
        let (attn, mlp) = (loader.pp("self_attn"), loader.pp("mlp"));
        let norm = |name: &str| LayerNorm::load(&loader.pp(name), size, config.layer_norm_eps);
        let projection = |name: &str| Linear::load(&attn.pp(name), size, size);
        Ok(Self {
            layer_norm1: norm("layer_norm1")?,
            q_proj: projection("q_proj")?,
            k_proj: projection("k_proj")?,
            v_proj: projection("v_proj")?,
            out_proj: projection("out_proj")?,
            layer_norm2: norm("layer_norm2")?,
            fc1: Linear::load(&mlp.pp("fc1"), size, inner)?,
            fc2: Linear::load(&mlp.pp("fc2"), inner, size)?,
            heads: config.num_attention_heads,
            activation,
        })
    }

    /// `[B, L, C]` to `[B, L, C]`. `hidden` has for each text the positions that no other attends to.
    fn forward(&self, x: &Tensor, hidden: &[Range<usize>]) -> CandleResult<Tensor> {
        self.forward_by(x, |q, k, v| {
            if hidden.iter().all(Range::is_empty) {
                return attention(q, k, v, self.heads, Mask::Causal);
            }
            let one = |(i, hidden): (usize, &Range<usize>)| {
                let row = |t: &Tensor| t.narrow(0, i, 1)?.contiguous();
                self.attend(&row(q)?, &row(k)?, &row(v)?, hidden)
            };
            Tensor::cat(&hidden.iter().enumerate().map(one).collect::<CandleResult<Vec<_>>>()?, 0)
        })
    }

    /// `[B, L, C]` to `[B, L, C]`; every position attends to every other.
    pub(crate) fn forward_unmasked(&self, x: &Tensor) -> CandleResult<Tensor> {
        self.forward_by(x, |q, k, v| attention(q, k, v, self.heads, Mask::None))
    }

    fn forward_by(
        &self,
        x: &Tensor,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> CandleResult<Tensor>,
    ) -> CandleResult<Tensor> {
        let normal = self.layer_norm1.forward(x)?;
        let q = self.q_proj.forward(&normal)?;
        let k = self.k_proj.forward(&normal)?;
        let v = self.v_proj.forward(&normal)?;
        let seen = attend(&q, &k, &v)?;
        let x = self.out_proj.forward_with(&seen, Epilogue { residual: Some(x), ..Epilogue::default() })?;
        let normal = self.layer_norm2.forward(&x)?;
        let activation = Some(self.activation);
        let inner = self.fc1.forward_with(&normal, Epilogue { activation, ..Epilogue::default() })?;
        self.fc2.forward_with(&inner, Epilogue { residual: Some(&x), ..Epilogue::default() })
    }

    /// Attention within one text, `[1, L, C]`: positions `hidden` attend to those before them, and none attends to them.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, hidden: &Range<usize>) -> CandleResult<Tensor> {
        let (start, count, length) = (hidden.start, hidden.len(), q.dim(1)?);
        if count == 0 || start == 0 || start + count > length {
            return attention(q, k, v, self.heads, Mask::Causal);
        }
        let (end, rest) = (start + count, length - start - count);
        let around = |t: &Tensor| Tensor::cat(&[&t.narrow(1, 0, start)?, &t.narrow(1, end, rest)?], 1);
        let seen = attention(&around(q)?, &around(k)?, &around(v)?, self.heads, Mask::Causal)?;
        let part = |t: &Tensor, from: usize, count: usize| t.narrow(1, from, count)?.contiguous();
        let (before, own) = (|t: &Tensor| part(t, 0, start), part(q, start, count)?);
        let unseen = attention(&own, &before(k)?, &before(v)?, self.heads, Mask::None)?;
        Tensor::cat(&[&seen.narrow(1, 0, start)?, &unseen, &seen.narrow(1, start, rest)?], 1)
    }
}

/// Layers of the pooled output.
#[derive(Clone, Debug)]
struct Pooling {
    final_layer_norm: LayerNorm,
    text_projection: Linear,
}

/// OpenCLIP stores the transposed matrix, and without `.weight` in its name.
fn load_text_projection(loader: &Loader, size: usize, projected: usize) -> CandleResult<Linear> {
    let layer = loader.pp("text_projection");
    if !loader.contains("text_projection") {
        return Linear::load_no_bias(&layer, size, projected);
    }
    let weight = loader.tensor("text_projection", (size, projected))?.t()?.contiguous()?;
    Linear::from_tensors(&layer, &weight, None)
}

/// A text encoder.
#[derive(Clone, Debug)]
pub struct ClipTextModel {
    /// `[vocabulary, C]` and `[positions, C]`, in the dtype of the file.
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<EncoderLayer>,
    pooling: Option<Pooling>,
    eos: u32,
    compute: DType,
}

impl ClipTextModel {
    /// Reads the weights, with or without `text_model.` before their names. With `with_projection` the pooled
    /// output is made too, as SDXL's second encoder does. Activations are of dtype `compute`.
    ///
    /// # Errors
    /// `model_unsupported` for a configuration or weights of another network; device errors.
    pub fn load(loader: &Loader, config: &ClipConfig, with_projection: bool, compute: DType) -> Result<Self> {
        config.check(STAGE)?;
        let validator = Validator { name: STAGE };
        let (activation, eos) = (config.activation(validator)?, config.eos(validator)?);
        let projected = match (with_projection, config.projection_dim) {
            (false, _) => None,
            (true, Some(size)) => Some(size),
            (true, None) => return Err(validator.refuse("`projection_dim` is null, but the pooled output is needed")),
        };
        let prefixed = loader.pp("text_model");
        let model = if prefixed.contains("embeddings.token_embedding.weight") { &prefixed } else { loader };
        let read = || -> CandleResult<Self> {
            let size = config.hidden_size;
            let embeddings = model.pp("embeddings");
            let table = |name: &str, rows: usize| embeddings.pp(name).table((rows, size));
            let layers = model.pp("encoder").pp("layers");
            let pooling = projected.map(|projected| -> CandleResult<Pooling> {
                Ok(Pooling {
                    final_layer_norm: LayerNorm::load(&model.pp("final_layer_norm"), size, config.layer_norm_eps)?,
                    text_projection: load_text_projection(loader, size, projected)?,
                })
            });
            Ok(Self {
                token_embedding: table("token_embedding", config.vocab_size)?,
                position_embedding: table("position_embedding", config.max_position_embeddings)?,
                layers: (0..config.num_hidden_layers)
                    .map(|i| EncoderLayer::load(&layers.pp(i), config, activation))
                    .collect::<CandleResult<_>>()?,
                pooling: pooling.transpose()?,
                eos,
                compute,
            })
        };
        read().map_err(load_error(STAGE))
    }

    /// `ids` is `[B, L]`, u32, `L` at most the number of positions. `skip` is as in [`ClipInput`].
    ///
    /// # Errors
    /// The errors of [`Self::encode`].
    pub fn forward(&self, ids: &Tensor, skip: usize) -> Result<ClipOutput> {
        let rows = ids.to_vec2::<u32>().stage(STAGE)?;
        let rows: Vec<ClipRow> = rows.iter().map(|ids| ClipRow { ids, hidden: 0..0 }).collect();
        self.encode(ClipInput { rows: &rows, skip, vectors: None, device: ids.device() })
    }

    /// Encodes texts of the same length. Layers that no output needs are not computed.
    ///
    /// # Errors
    /// `invalid_parameter` for a `skip` that leaves nothing; ids outside the vocabulary; device errors.
    pub fn encode(&self, input: ClipInput) -> Result<ClipOutput> {
        let ClipInput { rows, skip, vectors, .. } = input;
        let Some(wanted) = self.layers.len().checked_sub(1).and_then(|last| last.checked_sub(skip)) else {
            let most = self.layers.len().saturating_sub(1);
            return Err(Error::invalid("clip_skip", format!("must be at most {most} for this model, got {skip}")));
        };
        let length = rows.first().map_or(0, |row| row.ids.len());
        let (vocabulary, positions) = (self.token_embedding.dims(), self.position_embedding.dims());
        if length == 0 || positions.first().is_none_or(|&most| length > most) {
            return Err(Error::bug(format!("a text of {length} tokens for {positions:?} positions")));
        }
        let more = vectors.and_then(|vectors| vectors.dims().first().copied()).unwrap_or(0);
        let known = |id: u32| match id.checked_sub(FIRST_VECTOR) {
            Some(vector) => (vector as usize) < more,
            None => vocabulary.first().is_some_and(|&n| (id as usize) < n),
        };
        if let Some(id) = rows.iter().flat_map(|row| row.ids).find(|&&id| !known(id)) {
            let message = format!("its vocabulary has no token {id}, which the tokenizer gave");
            return Err(Validator { name: STAGE }.refuse(message));
        }
        if rows.iter().any(|row| row.ids.len() != length) {
            return Err(Error::bug("texts of several lengths for the text encoder"));
        }
        self.run(input, length, wanted).stage(STAGE)
    }

    fn run(&self, input: ClipInput, length: usize, wanted: usize) -> CandleResult<ClipOutput> {
        let (rows, batch) = (input.rows, input.rows.len());
        let tokens = self.embed(input)?;
        let tokens = tokens.reshape((batch, length, self.token_embedding.dim(D::Minus1)?))?; // [B, L, C]
        let places = self.position_embedding.narrow(0, 0, length)?.to_dtype(self.compute)?;
        let hidden: Vec<Range<usize>> = rows.iter().map(|row| row.hidden.clone()).collect();
        let mut x = tokens.broadcast_add(&places)?;
        for layer in &self.layers[..wanted] {
            x = layer.forward(&x, &hidden)?;
        }
        let states = x.clone();
        let Some(pooling) = &self.pooling else { return Ok(ClipOutput { hidden: states, pooled: None }) };
        for layer in &self.layers[wanted..] {
            x = layer.forward(&x, &hidden)?;
        }
        let ends = rows.iter().enumerate().map(|(i, row)| {
            let state = x.narrow(0, i, 1)?.narrow(1, self.end_of_text(row.ids), 1)?; // [1, 1, C]
            state.squeeze(1)
        });
        let ends = Tensor::cat(&ends.collect::<CandleResult<Vec<_>>>()?, 0)?; // [B, C]
        let pooled = pooling.text_projection.forward(&pooling.final_layer_norm.forward(&ends)?)?;
        Ok(ClipOutput { hidden: states, pooled: Some(pooled) })
    }

    /// The embeddings of every id, one after another: `[B·L, C]`.
    fn embed(&self, input: ClipInput) -> CandleResult<Tensor> {
        let all = || input.rows.iter().flat_map(|row| row.ids.iter().copied());
        let index = |ids: Vec<u32>| {
            Tensor::from_vec(ids, input.rows.iter().map(|row| row.ids.len()).sum::<usize>(), input.device)
        };
        let of_vocabulary = |id: u32| if id < FIRST_VECTOR { id } else { 0 };
        let ids = index(all().map(of_vocabulary).collect())?;
        let tokens = self.token_embedding.index_select(&ids, 0)?.to_dtype(self.compute)?;
        let Some(vectors) = input.vectors.filter(|_| all().any(|id| id >= FIRST_VECTOR)) else { return Ok(tokens) };
        let count = tokens.dim(0)?;
        let place =
            |(i, id): (usize, u32)| id.checked_sub(FIRST_VECTOR).map_or(i, |vector| count + vector as usize) as u32;
        let order = index(all().enumerate().map(place).collect())?;
        Tensor::cat(&[&tokens, &vectors.to_dtype(self.compute)?], 0)?.index_select(&order, 0)
    }

    /// The position whose state stands for the whole text; the first if the text has no end.
    fn end_of_text(&self, row: &[u32]) -> usize {
        let highest = || row.iter().filter(|&&id| id < FIRST_VECTOR).max().copied();
        let wanted = if self.eos == LEGACY_EOS { highest() } else { Some(self.eos) };
        row.iter().position(|&id| Some(id) == wanted).unwrap_or(0)
    }
}

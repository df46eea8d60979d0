//! Textual inversion (Gal et al. 2022, <https://arxiv.org/abs/2208.01618>) for SDXL: vectors that replace token embeddings
//! of a prompt. `clip_l` holds them for the first text encoder and `clip_g` for the second, the same number in each.

use candle_core::{Device, Tensor};

use crate::context::Context;
use crate::device::interface::Dtype;
use crate::error::{Error, Result};
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::Checkpoint;
use crate::model::weights::read::{Read, ReadTask};

/// Most vectors of one embedding: the tokens of a prompt chunk.
const MOST: usize = 75;
const FIRST: &str = "clip_l";
const SECOND: &str = "clip_g";

/// The vectors of one file.
#[derive(Clone, Debug)]
pub struct Inversion {
    /// `[n, C₁]`, f32; `None` if the checkpoint has no first encoder.
    pub first: Option<Tensor>,
    /// `[n, C₂]`, f32.
    pub second: Tensor,
    /// `n`
    pub count: usize,
}

impl Inversion {
    /// Reads the vectors for the encoders of `checkpoint`.
    ///
    /// # Errors
    /// `model_unsupported` for an embedding of another model; `model_corrupt`.
    pub fn read(
        component_file: &ComponentFile,
        checkpoint: &Checkpoint,
        device: &Device,
        ctx: &Context,
    ) -> Result<Self> {
        let refuse = |message: String| Error::ModelUnsupported { name: component_file.name.clone(), message };
        let weights = component_file.open(ctx)?;
        let shape = |name: &str, width: usize| -> Result<(usize, Vec<usize>)> {
            let Some((_, stored)) = weights.tensors().find(|(known, _)| *known == name) else {
                let has: Vec<&str> = weights.tensors().map(|(name, _)| name).take(4).collect();
                let has = has.join("`, `");
                return Err(refuse(format!(
                    "an embedding for SDXL has the tensors `{FIRST}` and `{SECOND}`, and it has `{has}`"
                )));
            };
            match *stored.shape {
                [count, wide] if wide == width && (1..=MOST).contains(&count) => Ok((count, vec![count, wide])),
                [wide] if wide == width => Ok((1, vec![wide])),
                ref other => {
                    Err(refuse(format!("`{name}` must be 1 to {MOST} vectors of {width} numbers, got {other:?}")))
                }
            }
        };
        let first = checkpoint.text_encoder.as_ref().map(|config| shape(FIRST, config.hidden_size)).transpose()?;
        let (count, second) = shape(SECOND, checkpoint.text_encoder_2.hidden_size)?;
        if first.as_ref().is_some_and(|(other, _)| *other != count) {
            let other = first.map_or(0, |(other, _)| other);
            return Err(refuse(format!("`{FIRST}` has {other} vectors and `{SECOND}` {count}")));
        }
        let task = ReadTask { component: "embedding", weights: &weights, compute: Dtype::F32, device };
        ctx.perform(&Read, task)?.build(ctx, |source| {
            let vectors = |name: &str, shape: &[usize]| -> Result<Tensor> {
                let tensor = source.numbers(name, Some(shape))?;
                Ok(tensor.reshape((count, tensor.elem_count() / count))?)
            };
            let first = first.as_ref().map(|(_, shape)| vectors(FIRST, shape)).transpose()?;
            Ok(Self { first, second: vectors(SECOND, &second)?, count })
        })
    }
}

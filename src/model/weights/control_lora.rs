//! One network's weights over another's: a weight source around two weight sources, as a Control-LoRA lies over the UNet
//! that it was made for, <https://github.com/Stability-AI/stability-ComfyUI-nodes>.
//!
//! A tensor that the upper file has is taken from it. Otherwise it is the lower file's, to which, where the upper file has
//! the layer's `up` and `down`, their product is added: W + up · down, both flattened to matrices.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Error as CandleError, Result as CandleResult, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use crate::error::Result;
use crate::kernels::growing;
use crate::units::Bytes;

/// The tensor that marks a Control-LoRA, which holds what it changes of its UNet.
pub(crate) const MARK: &str = "lora_controlnet";

/// Builds a network from `upper` over `lower`. Gives it with the bytes of the tensors that it took.
///
/// # Errors
/// Those of `load`.
pub(crate) fn over<T>(
    upper: &VarBuilder,
    lower: &VarBuilder,
    load: impl FnOnce(&VarBuilder) -> Result<T>,
) -> Result<(T, Bytes)> {
    let taken = AtomicU64::new(0);
    let backend: Box<dyn SimpleBackend + '_> = Box::new(Over { upper, lower, taken: &taken });
    let (network, grown) = growing(|| load(&VarBuilder::from_backend(backend, lower.dtype(), lower.device().clone())));
    Ok((network?, Bytes(taken.load(Ordering::Relaxed) + grown as u64)))
}

struct Over<'a> {
    upper: &'a VarBuilder<'a>,
    lower: &'a VarBuilder<'a>,
    taken: &'a AtomicU64,
}

impl Over<'_> {
    /// A tensor that is not changed is given as its file gives it to whoever says `hint`.
    fn take(&self, name: &str, shape: Option<Shape>, hint: Init) -> CandleResult<Tensor> {
        let from = |source: &VarBuilder, hint| match &shape {
            Some(shape) => source.get_with_hints(shape.clone(), name, hint),
            None => source.get_unchecked(name),
        };
        let tensor = match (self.upper.contains_tensor(name), name.strip_suffix(".weight")) {
            (true, _) => from(self.upper, hint)?,
            (false, Some(layer)) if self.upper.contains_tensor(&format!("{layer}.up")) => {
                self.changed(&from(self.lower, Init::Const(0.0))?, layer)?
            }
            (false, _) => from(self.lower, hint)?,
        };
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.taken.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(tensor)
    }

    /// The sum is made in f32 and kept in the compute dtype: the file's own may be too coarse for it. Shapes are compared
    /// before anything is computed: the product of two small matrices may be as large as it likes.
    fn changed(&self, weight: &Tensor, layer: &str) -> CandleResult<Tensor> {
        let part = |part: &str| self.upper.get_unchecked(&format!("{layer}.{part}"));
        let (up, down) = (part("up")?, part("down")?);
        let fits = match (sides(weight), sides(&up), sides(&down)) {
            (Some((rows, columns)), Some((up_rows, rank)), Some((down_rows, down_columns))) => {
                (up_rows, down_columns) == (rows, columns) && rank == down_rows
            }
            _ => false,
        };
        if !fits {
            return Err(CandleError::UnexpectedShape {
                msg: format!("what `{layer}.up` times `{layer}.down`, {:?}, is added to", down.dims()),
                expected: weight.shape().clone(),
                got: up.shape().clone(),
            });
        }
        let matrix = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.flatten_from(1);
        let change = matrix(&up)?.matmul(&matrix(&down)?)?.reshape(weight.shape())?;
        (weight.to_dtype(DType::F32)? + change)?.to_dtype(self.lower.dtype())
    }
}

/// Rows and columns of a tensor as a matrix; `None` where it has none.
fn sides(tensor: &Tensor) -> Option<(usize, usize)> {
    match tensor.dims() {
        [rows, rest @ ..] if !rest.is_empty() => Some((*rows, rest.iter().product())),
        _ => None,
    }
}

impl SimpleBackend for Over<'_> {
    fn get(&self, shape: Shape, name: &str, hint: Init, _: DType, _: &Device) -> CandleResult<Tensor> {
        self.take(name, Some(shape), hint)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> CandleResult<Tensor> {
        self.take(name, None, Init::Const(0.0))
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.upper.contains_tensor(name) || self.lower.contains_tensor(name)
    }
}

//! Control-LoRA, <https://github.com/Stability-AI/stability-ComfyUI-nodes>: a ControlNet as changes of the UNet that it was
//! made for.
//!
//! A tensor that the Control-LoRA has is taken from it. Otherwise it is the UNet's, to which, where the Control-LoRA has
//! the layer's `up` and `down`, their product is added: W + up · down, both flattened to matrices.

use candle_core::{DType, Device, Error as CandleError, Result as CandleResult, Tensor};

use crate::kernels::{StoredWeight, WeightSource};

/// The tensor that marks a Control-LoRA.
pub(crate) const MARK: &str = "lora_controlnet";

/// The weights of a ControlNet.
pub(crate) struct ControlLora<'a> {
    pub(crate) changes: &'a dyn WeightSource,
    pub(crate) unet: &'a dyn WeightSource,
}

impl ControlLora<'_> {
    /// The sum is made in f32 and kept in the compute dtype: the file's own may be too coarse for it. Shapes are compared
    /// before anything is computed: the product of two small matrices may be as large as it likes.
    fn changed(&self, weight: &Tensor, layer: &str) -> CandleResult<Tensor> {
        let part = |part: &str| self.changes.numbers(&format!("{layer}.{part}"), None);
        let (up, down) = (part("up")?, part("down")?);
        let fits = match (sides(weight), sides(&up), sides(&down)) {
            (Some((rows, columns)), Some((up_rows, rank)), Some((down_rows, down_columns))) => {
                (up_rows, down_columns) == (rows, columns) && rank == down_rows
            }
            _ => false,
        };
        if !fits {
            return Err(CandleError::UnexpectedShape {
                msg: format!("`{layer}.up` times `{layer}.down`, {:?}, is added to it", down.dims()),
                expected: weight.shape().clone(),
                got: up.shape().clone(),
            });
        }
        let matrix = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.flatten_from(1);
        let change = matrix(&up)?.matmul(&matrix(&down)?)?.reshape(weight.shape())?;
        (weight.to_dtype(DType::F32)? + change)?.to_dtype(self.compute())
    }
}

/// Rows and columns of a tensor as a matrix; `None` where it has none.
fn sides(tensor: &Tensor) -> Option<(usize, usize)> {
    match tensor.dims() {
        [rows, rest @ ..] if !rest.is_empty() => Some((*rows, rest.iter().product())),
        _ => None,
    }
}

impl WeightSource for ControlLora<'_> {
    fn stored(&self, name: &str, shape: Option<&[usize]>) -> CandleResult<StoredWeight> {
        if self.changes.contains(name) {
            return self.changes.stored(name, shape);
        }
        let weight = self.unet.stored(name, shape)?;
        match name.strip_suffix(".weight") {
            Some(layer) if self.changes.contains(&format!("{layer}.up")) => {
                StoredWeight::of(self.changed(&weight.used(self.compute())?, layer)?)
            }
            _ => Ok(weight),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.changes.contains(name) || self.unet.contains(name)
    }

    fn compute(&self) -> DType {
        self.unet.compute()
    }

    fn device(&self) -> &Device {
        self.unet.device()
    }
}

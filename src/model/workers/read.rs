//! Reads the weights of one network onto the device, and hands them to the network as it asks for them.
//!
//! All of them are read first, in the order of the file, so that the work can be followed and cancelled; then the
//! network takes each tensor once, so that what it re-lays does not stay in memory twice.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use rayon::prelude::*;

use super::open::{Stored, StoredDtype, Weights};
use crate::context::{Context, Progress};
use crate::device::interface::Dtype;
use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::model::checkpoint::Part;
use crate::units::Bytes;

/// How much is read between two looks at cancellation.
const BATCH: u64 = 64 * Bytes::MIB;

/// The dtype in which a tensor is kept that is stored as `stored`, for a network that computes in `compute`: what is
/// narrower stays as it is, as kernels widen weights where they use them; anything else becomes the compute dtype. On a
/// GPU kernels take weights in the compute dtype only. `None` if the tensor is not a weight.
#[must_use]
pub(in crate::model) fn kept(stored: StoredDtype, compute: Dtype, device: &Device) -> Option<DType> {
    let stored = match stored {
        StoredDtype::F64 => DType::F64,
        StoredDtype::F32 => DType::F32,
        StoredDtype::F16 => DType::F16,
        StoredDtype::Bf16 => DType::BF16,
        StoredDtype::F8(_) | StoredDtype::Other(_) => return None,
    };
    let compute = compute.tensor();
    let narrower = stored.size_in_bytes() < compute.size_in_bytes();
    Some(if narrower && device.is_cpu() { stored } else { compute })
}

/// Bytes that the weights take on the device.
#[must_use]
pub(in crate::model) fn kept_bytes(weights: &Weights, compute: Dtype, device: &Device) -> Bytes {
    weights.tensors().map(|(_, stored)| tensor_bytes(stored, compute, device)).sum()
}

fn tensor_bytes(stored: &Stored, compute: Dtype, device: &Device) -> Bytes {
    let elements: u64 = stored.shape.iter().map(|&side| side as u64).product();
    Bytes(kept(stored.dtype, compute, device).map_or(0, |dtype| elements * dtype.size_in_bytes() as u64))
}

/// Reads every tensor of a network.
pub(in crate::model) struct Read;

pub(in crate::model) struct ReadTask<'a> {
    pub(in crate::model) part: Part,
    pub(in crate::model) weights: &'a Weights,
    pub(in crate::model) compute: Dtype,
    pub(in crate::model) device: &'a Device,
}

/// The tensors of one network, by the names that the networks use.
pub(in crate::model) struct Tensors {
    path: PathBuf,
    compute: Dtype,
    device: Device,
    tensors: HashMap<String, Tensor>,
}

impl Worker<ReadTask<'_>> for Read {
    type Output = Tensors;

    /// # Errors
    /// `model_unsupported` for eight-bit weights; `model_corrupt` if a file cannot be mapped; those of the device.
    fn run(&self, task: ReadTask, ctx: &Context) -> Result<Tensors> {
        let ReadTask { part, weights, compute, device } = task;
        let path = weights.path(0).to_owned();
        let order = weights.in_file_order();
        if let Some((name, shard, stored)) = order.iter().find(|(.., s)| matches!(s.dtype, StoredDtype::F8(_))) {
            return Err(Error::ModelUnsupported {
                name: weights.path(*shard).display().to_string(),
                message: format!(
                    "tensor `{name}` is stored as {}, and weights must be f32, f16 or bf16",
                    stored.dtype.name()
                ),
            });
        }
        let wanted: Vec<_> = order.into_iter().filter(|(.., s)| kept(s.dtype, compute, device).is_some()).collect();
        let bytes_total = Bytes(wanted.iter().map(|(.., s)| s.range.end - s.range.start).sum());
        let mut bytes_done = Bytes(0);
        let mut tensors = HashMap::with_capacity(wanted.len());
        let read = |&(name, shard, stored): &(&str, usize, &Stored)| -> Result<(String, Tensor)> {
            let span = weights.span(shard, stored)?;
            let tensor =
                tensor(&span, stored, compute, device).map_err(|source| Error::Compute { stage: "load", source })?;
            Ok((name.to_owned(), tensor))
        };
        let mut rest = wanted.as_slice();
        while !rest.is_empty() {
            ctx.checkpoint()?;
            let mut size = 0;
            let count = rest.iter().take_while(|(.., s)| {
                let first = size == 0;
                size += s.range.end - s.range.start;
                first || size <= BATCH
            });
            let (batch, after) = rest.split_at(count.count().max(1));
            // A GPU's stream belongs to this thread; only the CPU's copies may be shared out.
            let loaded: Vec<_> = match device.is_cpu() {
                true => batch.par_iter().map(read).collect::<Result<_>>()?,
                false => batch.iter().map(read).collect::<Result<_>>()?,
            };
            tensors.extend(loaded);
            bytes_done = bytes_done + Bytes(batch.iter().map(|(.., s)| s.range.end - s.range.start).sum());
            ctx.progress(Progress::ModelLoading { component: part.name(), bytes_done, bytes_total });
            rest = after;
        }
        Ok(Tensors { path, compute, device: device.clone(), tensors })
    }
}

fn tensor(bytes: &[u8], stored: &Stored, compute: Dtype, device: &Device) -> candle_core::Result<Tensor> {
    let dtype = match stored.dtype {
        StoredDtype::F64 => DType::F64,
        StoredDtype::F32 => DType::F32,
        StoredDtype::F16 => DType::F16,
        StoredDtype::Bf16 | StoredDtype::F8(_) | StoredDtype::Other(_) => DType::BF16,
    };
    let kept = kept(stored.dtype, compute, device).unwrap_or(dtype);
    // The cast is made where the bytes are, so that the wider copy never reaches the device.
    let here = Tensor::from_raw_buffer(bytes, dtype, &stored.shape, &Device::Cpu)?.to_dtype(kept)?;
    if device.is_cpu() { Ok(here) } else { here.to_device(device) }
}

/// What a network asked for and did not get; kept because candle's own error names neither file nor both shapes.
#[derive(Default)]
struct Taken {
    tensors: HashMap<String, Tensor>,
    bytes: u64,
    failure: Option<String>,
}

impl Tensors {
    /// Builds the network from the tensors. Gives it with the bytes of the tensors that it took.
    ///
    /// # Errors
    /// `model_corrupt` if a tensor is missing or has another shape; those of the device.
    pub(in crate::model) fn build<T>(self, load: impl FnOnce(&VarBuilder) -> Result<T>) -> Result<(T, Bytes)> {
        let taken = Mutex::new(Taken { tensors: self.tensors, ..Taken::default() });
        let backend: Box<dyn SimpleBackend + '_> = Box::new(Backend(&taken));
        let built = load(&VarBuilder::from_backend(backend, self.compute.tensor(), self.device.clone()));
        let taken = taken.into_inner().unwrap_or_else(PoisonError::into_inner);
        match (built, taken.failure) {
            (Ok(network), _) => {
                if let Some(name) = taken.tensors.keys().min() {
                    let (count, path) = (taken.tensors.len(), self.path.display());
                    tracing::debug!("{count} tensors of {path} belong to no part of the network, the first is {name}");
                }
                Ok((network, Bytes(taken.bytes)))
            }
            (Err(_), Some(message)) => Err(Error::ModelCorrupt { path: self.path, message }),
            (Err(error), None) => Err(error),
        }
    }
}

struct Backend<'a>(&'a Mutex<Taken>);

impl Backend<'_> {
    fn take(&self, name: &str, shape: Option<&Shape>) -> candle_core::Result<Tensor> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let failure = match taken.tensors.remove(name) {
            Some(tensor) if shape.is_none_or(|shape| shape == tensor.shape()) => {
                taken.bytes += (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
                return Ok(tensor);
            }
            Some(tensor) => format!(
                "tensor `{name}` must be of shape {:?}, and is of shape {:?}",
                shape.map_or(&[][..], Shape::dims),
                tensor.dims()
            ),
            None => format!("tensor `{name}` of shape {:?} is missing", shape.map_or(&[][..], Shape::dims)),
        };
        let error = candle_core::Error::Msg(failure.clone());
        taken.failure.get_or_insert(failure);
        Err(error)
    }
}

impl SimpleBackend for Backend<'_> {
    fn get(&self, shape: Shape, name: &str, _: candle_nn::Init, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        self.take(name, Some(&shape))
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        self.take(name, None)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).tensors.contains_key(name)
    }
}

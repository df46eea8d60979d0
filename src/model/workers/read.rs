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
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::open::{Stored, StoredDtype, Weights};
use crate::context::{Context, Progress};
use crate::device::interface::Dtype;
use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::model::checkpoint::Part;
use crate::units::Bytes;

/// How much is read between two looks at cancellation.
const BATCH: u64 = 128 * Bytes::MIB;
/// How much one thread reads at a time: whole huge pages, so that no two threads have the kernel make the same one.
const CHUNK: usize = 4 << 20;
/// Threads that read, however few cores there are: a disk is fast only while several reads are waiting for it.
const READERS: usize = 4;

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
    /// `model_unsupported` for eight-bit weights; `model_corrupt` if a file cannot be read; those of the device.
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
            let numbers = numbers(weights, batch)?;
            let finish = |(&(name, _, stored), numbers): (&Wanted, Numbers)| -> Result<(String, Tensor)> {
                let tensor = numbers.tensor(stored, compute, device);
                Ok((name.to_owned(), tensor.map_err(|source| Error::Compute { stage: "load", source })?))
            };
            // A GPU's stream belongs to this thread; only the CPU's casts may be shared out.
            let loaded: Vec<_> = match device.is_cpu() {
                true => batch.par_iter().zip(numbers).map(finish).collect::<Result<_>>()?,
                false => batch.iter().zip(numbers).map(finish).collect::<Result<_>>()?,
            };
            tensors.extend(loaded);
            bytes_done = bytes_done + Bytes(batch.iter().map(|(.., s)| s.range.end - s.range.start).sum());
            ctx.progress(Progress::ModelLoading { component: part.name(), bytes_done, bytes_total });
            rest = after;
        }
        Ok(Tensors { path, compute, device: device.clone(), tensors })
    }
}

/// A tensor's name, its file and its place there.
type Wanted<'a> = (&'a str, usize, &'a Stored);

/// The numbers of every tensor of a batch, as they are stored.
fn numbers(weights: &Weights, batch: &[Wanted]) -> Result<Vec<Numbers>> {
    let mut all: Vec<Numbers> = batch.iter().map(|(.., stored)| Numbers::zeros(stored)).collect();
    let size: u64 = batch.iter().map(|(.., stored)| stored.range.end - stored.range.start).sum();
    let chunks = batch.iter().zip(&mut all).flat_map(|(&(_, shard, stored), numbers)| {
        let parts = numbers.bytes().chunks_mut(CHUNK).enumerate();
        parts.map(move |(i, part)| (shard, stored.range.start + (i * CHUNK) as u64, part))
    });
    let chunks = Mutex::new(chunks);
    let read = || -> Result<()> {
        loop {
            let next = chunks.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((shard, offset, part)) = next else { return Ok(()) };
            weights.read(shard, offset, part)?;
        }
    };
    let helpers = usize::try_from(size / CHUNK as u64).unwrap_or(READERS).min(READERS - 1);
    std::thread::scope(|scope| {
        // Where the system has no thread left, this one reads alone.
        let thread = |_| std::thread::Builder::new().name("reader".to_owned()).spawn_scoped(scope, read).ok();
        let threads: Vec<_> = (0..helpers).filter_map(thread).collect();
        let own = read();
        let ended = |thread: std::thread::ScopedJoinHandle<Result<()>>| {
            thread.join().unwrap_or_else(|_| Err(Error::bug("a thread that reads weights panicked")))
        };
        threads.into_iter().map(ended).fold(own, Result::and)
    })?;
    Ok(all)
}

/// Numbers in one of the widths that weights are stored in.
enum Numbers {
    F64(Vec<f64>),
    F32(Vec<f32>),
    /// f16 or bf16
    Half(Vec<u16>),
}

impl Numbers {
    /// Memory that the system hands over zeroed and that is first touched by whoever reads into it.
    fn zeros(stored: &Stored) -> Self {
        let count = stored.shape.iter().product();
        match stored.dtype {
            StoredDtype::F64 => Self::F64(vec![0.0; count]),
            StoredDtype::F32 => Self::F32(vec![0.0; count]),
            StoredDtype::F16 | StoredDtype::Bf16 | StoredDtype::F8(_) | StoredDtype::Other(_) => {
                Self::Half(vec![0; count])
            }
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let (start, length) = match self {
            Self::F64(numbers) => (numbers.as_mut_ptr().cast(), size_of_val(numbers.as_slice())),
            Self::F32(numbers) => (numbers.as_mut_ptr().cast(), size_of_val(numbers.as_slice())),
            Self::Half(numbers) => (numbers.as_mut_ptr().cast(), size_of_val(numbers.as_slice())),
        };
        #[expect(unsafe_code, reason = "numbers are read as the bytes that they are")]
        // SAFETY: the bytes are those of the vector's elements, borrowed as long as `self` is. Every bit pattern is a valid
        // f64, f32 or u16, and a byte has no alignment.
        unsafe {
            std::slice::from_raw_parts_mut(start, length)
        }
    }

    /// The tensor on `device`, in the dtype in which it is kept.
    fn tensor(self, stored: &Stored, compute: Dtype, device: &Device) -> candle_core::Result<Tensor> {
        let (shape, cpu) = (stored.shape.as_slice(), &Device::Cpu);
        let here = match (self, stored.dtype) {
            (Self::F64(numbers), _) => Tensor::from_vec(numbers, shape, cpu),
            (Self::F32(numbers), _) => Tensor::from_vec(numbers, shape, cpu),
            (Self::Half(bits), StoredDtype::F16) => Tensor::from_vec(bits.reinterpret_into::<f16>(), shape, cpu),
            (Self::Half(bits), _) => Tensor::from_vec(bits.reinterpret_into::<bf16>(), shape, cpu),
        }?;
        // The cast is made where the bytes are, so that the wider copy never reaches the device.
        let here = kept(stored.dtype, compute, device).map_or(Ok(here.clone()), |dtype| here.to_dtype(dtype))?;
        if device.is_cpu() { Ok(here) } else { here.to_device(device) }
    }
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

//! Reads the weights of one network onto the device, as the network takes them.
//!
//! A tensor is read when it is first needed, together with its neighbours in the file, and moved out: a weight that is
//! packed is in memory twice only for a moment, and the memory of one batch serves the next. On the CPU a large tensor that
//! is kept as it is stored is mapped instead of read.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::context::{Context, Progress};
use crate::device::interface::Dtype;
use crate::error::{Error, Result};
use crate::kernels::{Coding, StoredWeight, WeightSource, bytes_held};
use crate::layers::Worker;
use crate::model::weights::fp8_scales::{is_in_eight_bits, scales_of};
use crate::model::weights::open::{Stored, StoredDtype, Weights};
use crate::units::Bytes;

/// Bytes read between two checks for cancellation.
const BATCH: u64 = 128 * Bytes::MIB;
/// Bytes that one thread reads at a time: whole huge pages, so that no two threads fault the same one.
const CHUNK: usize = 4 << 20;
/// Threads that read, even on fewer cores: a disk is fast only with several reads queued.
const READERS: usize = 4;

/// The coding in which a tensor stored as `stored` is kept, for a network that computes in `compute`. On the CPU, numbers
/// that are no wider stay as they are, as kernels widen and round weights where they use them; all others become the
/// compute dtype, as do all weights on a GPU. `None` if the tensor is not a weight.
#[must_use]
pub(crate) fn kept(stored: StoredDtype, compute: Dtype, device: &Device) -> Option<Coding> {
    let stays = match stored {
        StoredDtype::Other(_) => return None,
        StoredDtype::F64 => None,
        StoredDtype::F32 => Some(Coding::F32).filter(|_| compute == Dtype::F32),
        StoredDtype::F16 | StoredDtype::Bf16 | StoredDtype::Coded(_) => stored.coding(),
    };
    stays.filter(|_| device.is_cpu()).or(match compute.tensor() {
        DType::F16 => Some(Coding::F16),
        DType::BF16 => Some(Coding::Bf16),
        _ => Some(Coding::F32),
    })
}

/// Bytes on the device of the weights whose names `wanted` accepts.
#[must_use]
pub(crate) fn kept_bytes(weights: &Weights, wanted: impl Fn(&str) -> bool, compute: Dtype, device: &Device) -> Bytes {
    let tensors = weights.tensors().filter(|(name, _)| wanted(name));
    tensors.map(|(_, stored)| tensor_bytes(stored, compute, device)).sum()
}

fn tensor_bytes(stored: &Stored, compute: Dtype, device: &Device) -> Bytes {
    let elements = stored.shape.iter().product();
    let held = |coding: Coding| match device.is_cpu() {
        true => bytes_held(&stored.shape, coding, compute.tensor()),
        false => coding.bytes(elements),
    };
    let bytes = kept(stored.dtype, compute, device).and_then(held);
    // Partial blocks have been refused when the file was opened.
    Bytes(bytes.unwrap_or(0) as u64)
}

/// Finds every tensor of a network.
pub(crate) struct Read;

#[derive(Clone, Copy)]
pub(crate) struct ReadTask<'a> {
    /// The network's name in progress messages.
    pub(crate) component: &'static str,
    pub(crate) weights: &'a Weights,
    pub(crate) compute: Dtype,
    pub(crate) device: &'a Device,
}

/// The tensors of one network, by the names that the networks use.
pub(crate) struct Tensors<'a> {
    task: ReadTask<'a>,
    /// In the order of the file.
    wanted: Vec<Wanted<'a>>,
}

impl<'a> Worker<ReadTask<'a>> for Read {
    type Output = Tensors<'a>;

    /// # Errors
    /// None.
    fn run(&self, task: ReadTask<'a>, _: &Context) -> Result<Tensors<'a>> {
        let is_weight = |(.., stored): &Wanted| kept(stored.dtype, task.compute, task.device).is_some();
        let wanted = task.weights.in_file_order().into_iter().filter(is_weight).collect();
        Ok(Tensors { task, wanted })
    }
}

fn size_of_wanted(batch: &[Wanted]) -> u64 {
    batch.iter().map(|(.., stored)| stored.range.end - stored.range.start).sum()
}

/// A tensor's name, shard and location.
type Wanted<'a> = (&'a str, usize, &'a Stored);

/// The numbers of every tensor of a batch, as they are stored.
fn numbers(task: &ReadTask, batch: &[Wanted]) -> Result<Vec<StoredNumbers>> {
    let weights = task.weights;
    let begin = |wanted: &Wanted| {
        let mapped = StoredNumbers::mapped(task, wanted);
        let is_mapped = mapped.is_some();
        (mapped.unwrap_or_else(|| StoredNumbers::zeros(wanted.2)), is_mapped)
    };
    let mut all: Vec<(StoredNumbers, bool)> = batch.iter().map(begin).collect();
    let size = size_of_wanted(batch);
    let chunks = batch.iter().zip(&mut all).flat_map(|(&(_, shard, stored), (numbers, is_mapped))| {
        let parts = numbers.bytes().chunks_mut(CHUNK).enumerate();
        parts.map(move |(i, part)| (shard, stored.range.start + (i * CHUNK) as u64, part, *is_mapped))
    });
    let chunks = Mutex::new(chunks);
    let read = || -> Result<()> {
        loop {
            let next = chunks.lock().unwrap_or_else(PoisonError::into_inner).next();
            match next {
                None => return Ok(()),
                Some((shard, offset, part, true)) => weights.populate(shard, offset, part)?,
                Some((shard, offset, part, false)) => weights.read(shard, offset, part)?,
            }
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
    Ok(all.into_iter().map(|(numbers, _)| numbers).collect())
}

/// StoredNumbers as they are stored.
enum StoredNumbers {
    F64(Vec<f64>),
    F32(Vec<f32>),
    /// f16 or bf16
    Half(Vec<u16>),
    Coded(Vec<u8>),
}

impl StoredNumbers {
    /// Maps the numbers of a tensor that is kept on the CPU as it is stored.
    fn mapped(task: &ReadTask, &(_, shard, stored): &Wanted) -> Option<Self> {
        let kept = kept(stored.dtype, task.compute, task.device).filter(|_| task.device.is_cpu())?;
        if stored.dtype.coding() != Some(kept) {
            return None;
        }
        let (offset, count) = (stored.range.start, stored.shape.iter().product());
        match stored.dtype {
            StoredDtype::F32 => task.weights.map(shard, offset, count).map(Self::F32),
            StoredDtype::F16 | StoredDtype::Bf16 => task.weights.map(shard, offset, count).map(Self::Half),
            StoredDtype::Coded(_) => task.weights.map(shard, offset, size_of_stored(stored)).map(Self::Coded),
            StoredDtype::F64 | StoredDtype::Other(_) => None,
        }
    }

    /// Memory that the system zeroes when the reading thread first touches it.
    fn zeros(stored: &Stored) -> Self {
        let count = stored.shape.iter().product();
        match stored.dtype {
            StoredDtype::F64 => Self::F64(vec![0.0; count]),
            StoredDtype::F32 => Self::F32(vec![0.0; count]),
            StoredDtype::F16 | StoredDtype::Bf16 => Self::Half(vec![0; count]),
            StoredDtype::Coded(_) | StoredDtype::Other(_) => Self::Coded(vec![0; size_of_stored(stored)]),
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let (start, length) = match self {
            Self::F64(numbers) => (numbers.as_mut_ptr().cast(), size_of_val(numbers.as_slice())),
            Self::F32(numbers) => (numbers.as_mut_ptr().cast(), size_of_val(numbers.as_slice())),
            Self::Half(numbers) => (numbers.as_mut_ptr().cast(), size_of_val(numbers.as_slice())),
            Self::Coded(bytes) => return bytes,
        };
        #[expect(unsafe_code, reason = "numbers are read as the bytes that they are")]
        // SAFETY: the bytes belong to the vector's elements, borrowed as long as `self` is. Every bit pattern is a valid
        // f64, f32 or u16, and a byte has no alignment.
        unsafe {
            std::slice::from_raw_parts_mut(start, length)
        }
    }

    /// The weight on `device`, as it is kept there.
    fn weight(self, stored: &Stored, task: &ReadTask, scale: f32) -> candle_core::Result<StoredWeight> {
        let (shape, cpu) = (stored.shape.as_slice(), &Device::Cpu);
        let here = match (self, stored.dtype) {
            (Self::Coded(bytes), dtype) => {
                let coding = dtype.coding().ok_or_else(|| candle_core::Error::Msg("no weight".to_owned()))?;
                let count = bytes.len();
                StoredWeight::new(Tensor::from_vec(bytes, count, cpu)?, coding, scale, shape)?
            }
            (Self::F64(numbers), _) => StoredWeight::of(Tensor::from_vec(numbers, shape, cpu)?)?,
            (Self::F32(numbers), _) => StoredWeight::of(Tensor::from_vec(numbers, shape, cpu)?)?,
            (Self::Half(bits), StoredDtype::F16) => {
                StoredWeight::of(Tensor::from_vec(bits.reinterpret_into::<f16>(), shape, cpu)?)?
            }
            (Self::Half(bits), _) => StoredWeight::of(Tensor::from_vec(bits.reinterpret_into::<bf16>(), shape, cpu)?)?,
        };
        if task.device.is_cpu() && kept(stored.dtype, task.compute, task.device) == stored.dtype.coding() {
            return Ok(here);
        }
        // The cast is made on the host, so that the wider copy never reaches the device.
        let cast = here.numbers(task.compute.tensor())?;
        StoredWeight::of(if task.device.is_cpu() { cast } else { cast.to_device(task.device)? })
    }
}

/// Bytes of a tensor in its file.
fn size_of_stored(stored: &Stored) -> usize {
    usize::try_from(stored.range.end - stored.range.start).unwrap_or(usize::MAX)
}

/// Tensors that have been read, tensors still to be read, and the first error: candle's own names neither file nor both
/// shapes.
struct Reader<'a> {
    tensors: &'a Tensors<'a>,
    ctx: &'a Context,
    /// Index of each tensor in `tensors.wanted`, until it is read.
    unread: HashMap<&'a str, usize>,
    read: HashMap<&'a str, StoredWeight>,
    bytes_done: u64,
    failure: Option<Error>,
}

impl Tensors<'_> {
    /// Runs `build` with a source of the tensors, each of which can be taken once.
    ///
    /// # Errors
    /// `model_corrupt` if a tensor is missing, has another shape or cannot be read; the error of cancellation; device
    /// errors.
    pub(crate) fn build<T>(self, ctx: &Context, build: impl FnOnce(&dyn WeightSource) -> Result<T>) -> Result<T> {
        ctx.checkpoint()?;
        let ReadTask { component, weights, compute, device } = self.task;
        let bytes_total = Bytes(size_of_wanted(&self.wanted));
        let reader = Mutex::new(Reader {
            tensors: &self,
            ctx,
            unread: self.wanted.iter().enumerate().map(|(i, (name, ..))| (*name, i)).collect(),
            read: HashMap::new(),
            bytes_done: 0,
            failure: None,
        });
        let built = build(&FileSource { reader: &reader, compute: compute.tensor(), device });
        let reader = reader.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(failure) = reader.failure {
            return Err(failure);
        }
        let network = built?;
        if reader.bytes_done < bytes_total.0 {
            ctx.progress(Progress::ModelLoading { component, bytes_done: bytes_total, bytes_total });
        }
        let left = reader.read.len() + reader.unread.len();
        if let Some(name) = reader.read.keys().chain(reader.unread.keys()).min() {
            let path = weights.path(0).display();
            tracing::debug!("{left} tensors of {path} belong to no part of the network, the first is {name}");
        }
        Ok(network)
    }
}

impl Reader<'_> {
    /// Reads the tensor at `first` and those after it that are not read yet, up to a batch.
    fn fetch(&mut self, first: usize) -> Result<()> {
        self.ctx.checkpoint()?;
        let task = self.tensors.task;
        let ReadTask { component, device, .. } = task;
        let mut size = 0;
        let rest = self.tensors.wanted[first..].iter().filter(|(name, ..)| self.unread.contains_key(name));
        let batch: Vec<Wanted> = rest
            .take_while(|(.., stored)| {
                let first = size == 0;
                size += stored.range.end - stored.range.start;
                first || size <= BATCH
            })
            .copied()
            .collect();
        let numbers = numbers(&self.tensors.task, &batch)?;
        let finish = |(&(name, _, stored), numbers): (&Wanted<'_>, StoredNumbers)| -> Result<StoredWeight> {
            let scale = scale(&task, name, stored)?;
            let compute = |source| {
                tracing::debug!("tensor {name} could not be made");
                Error::of_tensors("load", source)
            };
            numbers.weight(stored, &task, scale).map_err(compute)
        };
        // A GPU's stream belongs to this thread; only the CPU's casts may be shared out.
        let loaded: Vec<_> = match device.is_cpu() {
            true => batch.par_iter().zip(numbers).map(finish).collect::<Result<_>>()?,
            false => batch.iter().zip(numbers).map(finish).collect::<Result<_>>()?,
        };
        for ((name, ..), tensor) in batch.iter().zip(loaded) {
            self.unread.remove(name);
            self.read.insert(name, tensor);
        }
        self.bytes_done += size_of_wanted(&batch);
        let bytes_total = Bytes(size_of_wanted(&self.tensors.wanted));
        self.ctx.progress(Progress::ModelLoading { component, bytes_done: Bytes(self.bytes_done), bytes_total });
        Ok(())
    }

    /// Takes a tensor out, of `shape` if it is given.
    fn take(&mut self, name: &str, shape: Option<&[usize]>) -> Result<StoredWeight> {
        let corrupt =
            |message: String| Error::ModelCorrupt { path: self.tensors.task.weights.path(0).to_owned(), message };
        let wanted = || shape.unwrap_or_default();
        let fits = |stored: &[usize]| shape.is_none_or(|shape| is_as(shape, stored));
        let misfit = |stored: &[usize]| {
            corrupt(format!("tensor `{name}` must be of shape {:?}, and is of shape {stored:?}", wanted()))
        };
        if let Some(&at) = self.unread.get(name) {
            // Before it is read: a hostile shape costs nothing.
            let stored = &self.tensors.wanted[at].2.shape;
            if !fits(stored) {
                return Err(misfit(stored));
            }
            self.fetch(at)?;
        }
        let weight = match self.read.remove(name) {
            Some(weight) if fits(weight.dims()) => weight,
            Some(weight) => return Err(misfit(weight.dims())),
            None => return Err(corrupt(format!("tensor `{name}` of shape {:?} is missing", wanted()))),
        };
        match shape {
            Some(shape) => weight.reshape(shape).map_err(|source| Error::of_tensors("load", source)),
            None => Ok(weight),
        }
    }
}

/// True if a tensor of shape `stored` serves as one of shape `wanted`: real files keep some matrices as convolutions of one
/// tap.
fn is_as(wanted: &[usize], stored: &[usize]) -> bool {
    wanted == stored || matches!(stored, [rows, columns, 1, 1] if wanted == [*rows, *columns])
}

/// Factor of the numbers of a tensor of eight-bit floats.
fn scale(task: &ReadTask, name: &str, stored: &Stored) -> Result<f32> {
    if !is_in_eight_bits(stored) {
        return Ok(1.0);
    }
    let mut found = scales_of(name).filter_map(|name| task.weights.tensor(&name).map(|found| (name, found)));
    let Some((name, (shard, scale))) = found.next() else { return Ok(1.0) };
    if scale.dtype != StoredDtype::F32 || scale.shape.iter().any(|&side| side != 1) {
        return Err(Error::ModelUnsupported {
            name: task.weights.path(shard).display().to_string(),
            message: format!(
                "tensor `{name}` must be one number in f32, and is of shape {:?} in {}",
                scale.shape,
                scale.dtype.name()
            ),
        });
    }
    let mut bytes = [0; 4];
    task.weights.read(shard, scale.range.start, &mut bytes)?;
    Ok(f32::from_le_bytes(bytes))
}

/// The tensors of one network's files.
struct FileSource<'m, 'a> {
    reader: &'m Mutex<Reader<'a>>,
    compute: DType,
    device: &'m Device,
}

impl WeightSource for FileSource<'_, '_> {
    fn stored(&self, name: &str, shape: Option<&[usize]>) -> candle_core::Result<StoredWeight> {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        reader.take(name, shape).map_err(|error| {
            let message = candle_core::Error::Msg(error.to_string());
            reader.failure.get_or_insert(error);
            message
        })
    }

    fn contains(&self, name: &str) -> bool {
        let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        reader.unread.contains_key(name) || reader.read.contains_key(name)
    }

    fn compute(&self) -> DType {
        self.compute
    }

    fn device(&self) -> &Device {
        self.device
    }
}

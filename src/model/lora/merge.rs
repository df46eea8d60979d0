//! Merges adapters into a network's weights while it is loaded, as a weight source around the checkpoint's. A changed
//! tensor is widened to f32, takes every change in the order of the request, and is passed on in the stored dtype, or in
//! f32 to a network that computes in f32, because the stored dtype may be too coarse for the sum.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use rayon::prelude::*;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::kernels::{StoredWeight, WeightSource};
use crate::model::lora::formats::format::AdapterFormat;
use crate::model::lora::formats::task::{MergeTask, Parts};
use crate::model::lora::fused;
use crate::units::Bytes;

/// Stored bytes that are merged at a time: enough for every core, and little compared with the network.
const BATCH: u64 = 64 * Bytes::MIB;

/// The change of one adapter to one layer.
pub(crate) struct LayerPatch {
    /// Index of the adapter in the stack.
    pub(crate) adapter: usize,
    /// Format of the change to the layer's `weight`.
    pub(crate) weight: Option<&'static AdapterFormat>,
    /// Format of the change to the layer's `bias`.
    pub(crate) bias: Option<&'static AdapterFormat>,
    /// On the CPU, as they are stored.
    pub(crate) parts: Parts,
    pub(crate) strength: f64,
}

/// All changes to one network, by layer.
pub(crate) struct Patches<'a> {
    /// Names of the adapter files, for messages.
    pub(crate) names: &'a [String],
    pub(crate) layers: BTreeMap<String, Vec<LayerPatch>>,
}

/// Builds a network from `lower`, with `patches` merged. Returns it with the merge time by adapter.
///
/// # Errors
/// `model_unsupported` for a change that does not fit its layer; the errors of `build`.
pub(crate) fn build_patched<T>(
    patches: &Patches,
    lower: &dyn WeightSource,
    ctx: &Context,
    build: impl FnOnce(&dyn WeightSource) -> Result<T>,
) -> Result<(T, Vec<Duration>)> {
    let spent = patches.names.iter().map(|_| AtomicU64::new(0)).collect();
    let state = Mutex::new(MergeState { pending: patches.tensors(), merged: HashMap::new(), failure: None });
    let patched = PatchedWeights { patches, lower, ctx, spent, state };
    let network = build(&patched);
    let state = patched.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(failure) = state.failure {
        return Err(failure);
    }
    let spent = patched.spent.into_iter().map(|nanos| Duration::from_nanos(nanos.into_inner())).collect();
    Ok((network?, spent))
}

struct PatchedWeights<'a> {
    patches: &'a Patches<'a>,
    lower: &'a dyn WeightSource,
    ctx: &'a Context,
    /// Nanoseconds by adapter.
    spent: Vec<AtomicU64>,
    state: Mutex<MergeState<'a>>,
}

struct MergeState<'a> {
    /// Tensors that are not merged yet, by name.
    pending: BTreeMap<String, TensorPatch<'a>>,
    merged: HashMap<String, Tensor>,
    /// The first failure; candle's own error would lose its code.
    failure: Option<Error>,
}

/// The changes to one tensor.
#[derive(Clone, Copy)]
struct TensorPatch<'a> {
    layer: &'a str,
    tensor: &'static str,
    patches: &'a [LayerPatch],
}

impl LayerPatch {
    fn format(&self, tensor: &str) -> Option<&'static AdapterFormat> {
        if tensor == "bias" { self.bias } else { self.weight }
    }
}

impl Patches<'_> {
    fn tensors(&self) -> BTreeMap<String, TensorPatch<'_>> {
        let mut all = BTreeMap::new();
        for (layer, patches) in &self.layers {
            for tensor in ["weight", "bias"] {
                if patches.iter().any(|patch| patch.format(tensor).is_some()) {
                    all.insert(format!("{layer}.{tensor}"), TensorPatch { layer, tensor, patches });
                }
            }
        }
        all
    }
}

impl PatchedWeights<'_> {
    /// Merges the tensor `first` and the following ones, up to a batch.
    fn merge_batch(&self, first: &str, state: &mut MergeState) -> Result<()> {
        self.ctx.checkpoint()?;
        let mut size = 0;
        let mut batch = Vec::new();
        for (name, patch) in state.pending.range(first.to_owned()..) {
            if size >= BATCH {
                break;
            }
            let base = self.lower.numbers(name, None)?;
            size += (base.elem_count() * base.dtype().size_in_bytes()) as u64;
            batch.push((name.clone(), *patch, base));
        }
        let begun = Instant::now();
        let each: Vec<AtomicU64> = self.spent.iter().map(|_| AtomicU64::new(0)).collect();
        let merge = |(_, patch, base): &(String, TensorPatch, Tensor)| self.merge(*patch, base, &each);
        // A GPU's stream belongs to this thread.
        let merged: Vec<Tensor> = match self.lower.device().is_cpu() {
            true => batch.par_iter().map(merge).collect::<Result<_>>()?,
            false => batch.iter().map(merge).collect::<Result<_>>()?,
        };
        // The threads work in parallel: the elapsed time is shared out in proportion to their work.
        let whole = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let sum = each.iter().map(|nanos| nanos.load(Ordering::Relaxed)).sum::<u64>().max(1);
        for (total, nanos) in self.spent.iter().zip(&each) {
            let share = whole as f64 * (nanos.load(Ordering::Relaxed) as f64 / sum as f64);
            total.fetch_add(share as u64, Ordering::Relaxed);
        }
        for ((name, ..), tensor) in batch.into_iter().zip(merged) {
            state.pending.remove(&name);
            state.merged.insert(name, tensor);
        }
        Ok(())
    }

    fn merge(&self, patch: TensorPatch, base: &Tensor, spent: &[AtomicU64]) -> Result<Tensor> {
        let TensorPatch { layer, tensor, patches } = patch;
        let dtype = if self.lower.compute() == DType::F32 { DType::F32 } else { base.dtype() };
        let begun = Instant::now();
        let changes = || patches.iter().filter(|patch| patch.format(tensor).is_some());
        if tensor == "weight"
            && let Some(merged) = fused::merge(base, dtype, changes().map(|patch| (&patch.parts, patch.strength)))?
        {
            let share = begun.elapsed() / u32::try_from(changes().count().max(1)).unwrap_or(u32::MAX);
            changes().for_each(|patch| self.add_time(patch, share, spent));
            return Ok(merged);
        }
        let mut wide = base.to_dtype(DType::F32)?;
        for patch in patches {
            let Some(format) = patch.format(tensor) else { continue };
            let begun = Instant::now();
            let part = |(name, part): (&String, &Tensor)| {
                Ok((name.clone(), part.to_device(base.device())?.to_dtype(DType::F32)?))
            };
            let parts: Parts = patch.parts.iter().map(part).collect::<CandleResult<_>>()?;
            let task = MergeTask { layer, tensor, base: &wide, parts: &parts, strength: patch.strength };
            let file = self.patches.names.get(patch.adapter).map_or("", String::as_str);
            let next = self.ctx.perform(format.merge, task).map_err(|error| with_file(error, file, &patch.parts))?;
            if next.shape() != wide.shape() {
                let message =
                    format!("`{layer}.{tensor}` is {:?}, and the change gives {:?}", wide.dims(), next.dims());
                return Err(Error::ModelUnsupported { name: file.to_owned(), message });
            }
            wide = next;
            self.add_time(patch, begun.elapsed(), spent);
        }
        Ok(wide.to_dtype(dtype)?)
    }

    fn add_time(&self, patch: &LayerPatch, time: Duration, spent: &[AtomicU64]) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        spent.get(patch.adapter).map(|total| total.fetch_add(nanos, Ordering::Relaxed));
    }
}

/// True if the shapes differ only by trailing axes of length 1.
fn is_same_matrix(a: &[usize], b: &[usize]) -> bool {
    let trimmed = |dims: &[usize]| dims.iter().rposition(|&side| side != 1).map_or(0, |last| last + 1);
    a != b && a.get(..trimmed(a)) == b.get(..trimmed(b))
}

/// Adds the adapter file and the parts' shapes to an error of a format, which knows the layer alone.
fn with_file(error: Error, file: &str, parts: &Parts) -> Error {
    match error {
        Error::ModelUnsupported { name, message } => {
            let parts: Vec<String> = parts.iter().map(|(name, part)| format!("`{name}` {:?}", part.dims())).collect();
            let message = format!("its parts for `{name}`, {}: {message}", parts.join(", "));
            Error::ModelUnsupported { name: file.to_owned(), message }
        }
        other => other,
    }
}

impl WeightSource for PatchedWeights<'_> {
    /// The merged tensor, or the stored one if no adapter changes it.
    fn stored(&self, name: &str, shape: Option<&[usize]>) -> CandleResult<StoredWeight> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.merged.contains_key(name)
            && state.pending.contains_key(name)
            && let Err(error) = self.merge_batch(name, &mut state)
        {
            let message = candle_core::Error::Msg(error.to_string());
            state.failure.get_or_insert(error);
            return Err(message);
        }
        let merged = state.merged.remove(name);
        drop(state);
        match (merged, shape) {
            (None, shape) => self.lower.stored(name, shape),
            // A linear layer may be stored as a 1×1 convolution, and the other way round.
            (Some(tensor), Some(shape)) if is_same_matrix(tensor.dims(), shape) => {
                StoredWeight::of(tensor.reshape(shape)?)
            }
            (Some(tensor), Some(shape)) if tensor.dims() != shape => {
                let (msg, expected, got) = (format!("tensor `{name}`"), shape.into(), tensor.shape().clone());
                Err(candle_core::Error::UnexpectedShape { msg, expected, got })
            }
            (Some(tensor), _) => StoredWeight::of(tensor),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.lower.contains(name)
    }

    fn compute(&self) -> DType {
        self.lower.compute()
    }

    fn device(&self) -> &Device {
        self.lower.device()
    }
}

//! Adapter files over a network's weights: a weight source around a weight source. A tensor that adapters change is
//! widened to f32, every change is made to it in the order of the request, and it is handed on in the dtype in which the
//! network's own is kept, or in f32 to a network that computes in f32: the file's own may be too coarse for the sum.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result as CandleResult, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::model::lora::formats::{Format, MergeTask, Parts};
use crate::model::lora::fused;
use crate::units::Bytes;

/// How much is changed at a time, counted in the network's own bytes: enough for every core, and little beside the network.
const BATCH: u64 = 64 * Bytes::MIB;

/// What one adapter does to one layer.
pub(crate) struct Touch {
    /// Its place among the adapters.
    pub(crate) adapter: usize,
    /// How it changes the layer's `weight`, if it does.
    pub(crate) weight: Option<&'static Format>,
    /// How it changes the layer's `bias`, if it does.
    pub(crate) bias: Option<&'static Format>,
    /// On the CPU, as they are stored.
    pub(crate) parts: Parts,
    pub(crate) strength: f64,
}

/// What adapters do to a network, by layer.
pub(crate) struct Touches<'a> {
    /// Their files, for messages.
    pub(crate) names: &'a [String],
    pub(crate) layers: BTreeMap<String, Vec<Touch>>,
}

/// A network that was built, and what it took.
pub(crate) struct Built<T> {
    pub(crate) network: T,
    /// By adapter.
    pub(crate) spent: Vec<Duration>,
    /// By how much the changed tensors are larger than they were.
    pub(crate) more: Bytes,
}

/// Builds a network from `lower`, changed by `touches`.
///
/// # Errors
/// `model_unsupported` for a change that does not fit its layer; those of `load`.
pub(crate) fn adapting<T>(
    touches: &Touches,
    lower: &VarBuilder,
    ctx: &Context,
    load: impl FnOnce(&VarBuilder) -> Result<T>,
) -> Result<Built<T>> {
    let spent = touches.names.iter().map(|_| AtomicU64::new(0)).collect();
    let state = Mutex::new(State { waiting: touches.tensors(), made: HashMap::new(), more: 0, failure: None });
    let adapted = Adapted { touches, lower, ctx, spent, state };
    let built = {
        let backend: Box<dyn SimpleBackend + '_> = Box::new(&adapted);
        load(&VarBuilder::from_backend(backend, lower.dtype(), lower.device().clone()))
    };
    let state = adapted.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(failure) = state.failure {
        return Err(failure);
    }
    let spent = adapted.spent.into_iter().map(|nanos| Duration::from_nanos(nanos.into_inner())).collect();
    Ok(Built { network: built?, spent, more: Bytes(state.more) })
}

struct Adapted<'a> {
    touches: &'a Touches<'a>,
    lower: &'a VarBuilder<'a>,
    ctx: &'a Context,
    /// Nanoseconds by adapter.
    spent: Vec<AtomicU64>,
    state: Mutex<State<'a>>,
}

struct State<'a> {
    /// Tensors that are still to be changed, by name.
    waiting: BTreeMap<String, Changed<'a>>,
    made: HashMap<String, Tensor>,
    more: u64,
    /// candle's own error says less.
    failure: Option<Error>,
}

/// A tensor that adapters change.
#[derive(Clone, Copy)]
struct Changed<'a> {
    layer: &'a str,
    tensor: &'static str,
    by: &'a [Touch],
}

impl Touch {
    fn format(&self, tensor: &str) -> Option<&'static Format> {
        if tensor == "bias" { self.bias } else { self.weight }
    }
}

impl Touches<'_> {
    fn tensors(&self) -> BTreeMap<String, Changed<'_>> {
        let mut all = BTreeMap::new();
        for (layer, by) in &self.layers {
            for tensor in ["weight", "bias"] {
                if by.iter().any(|touch| touch.format(tensor).is_some()) {
                    all.insert(format!("{layer}.{tensor}"), Changed { layer, tensor, by });
                }
            }
        }
        all
    }
}

impl Adapted<'_> {
    /// What is not changed is asked for as the network asked.
    fn take(&self, name: &str, asked: Option<(Shape, Init)>) -> CandleResult<Tensor> {
        let from = |asked: Option<(Shape, Init)>| match asked {
            Some((shape, hint)) => self.lower.get_with_hints(shape, name, hint),
            None => self.lower.get_unchecked(name),
        };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.made.contains_key(name) {
            if !state.waiting.contains_key(name) {
                drop(state);
                return from(asked);
            }
            if let Err(error) = self.change(name, &mut state) {
                let told = candle_core::Error::Msg(error.to_string());
                state.failure.get_or_insert(error);
                return Err(told);
            }
        }
        match (state.made.remove(name), asked) {
            // A matrix may be kept as a convolution of one tap, and the other way round.
            (Some(tensor), Some((expected, _))) if is_same_matrix(tensor.dims(), expected.dims()) => {
                tensor.reshape(expected)
            }
            (Some(tensor), Some((expected, _))) if *tensor.shape() != expected => {
                let msg = format!("tensor `{name}`");
                Err(candle_core::Error::UnexpectedShape { msg, expected, got: tensor.shape().clone() })
            }
            (Some(tensor), _) => Ok(tensor),
            (None, asked) => from(asked),
        }
    }

    /// Changes the tensor `first` and those after it, up to a batch.
    fn change(&self, first: &str, state: &mut State) -> Result<()> {
        self.ctx.checkpoint()?;
        let mut size = 0;
        let mut batch = Vec::new();
        for (name, changed) in state.waiting.range(first.to_owned()..) {
            if size >= BATCH {
                break;
            }
            let base = self.lower.get_unchecked(name)?;
            size += (base.elem_count() * base.dtype().size_in_bytes()) as u64;
            batch.push((name.clone(), *changed, base));
        }
        let begun = Instant::now();
        let each: Vec<AtomicU64> = self.spent.iter().map(|_| AtomicU64::new(0)).collect();
        let change = |(_, changed, base): &(String, Changed, Tensor)| self.changed(*changed, base, &each);
        // A GPU's stream belongs to this thread.
        let made: Vec<Tensor> = match self.lower.device().is_cpu() {
            true => batch.par_iter().map(change).collect::<Result<_>>()?,
            false => batch.iter().map(change).collect::<Result<_>>()?,
        };
        // Threads work at once: the time that passed is divided as their work was.
        let whole = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let sum = each.iter().map(|nanos| nanos.load(Ordering::Relaxed)).sum::<u64>().max(1);
        for (total, nanos) in self.spent.iter().zip(&each) {
            let share = whole as f64 * (nanos.load(Ordering::Relaxed) as f64 / sum as f64);
            total.fetch_add(share as u64, Ordering::Relaxed);
        }
        for ((name, _, base), tensor) in batch.into_iter().zip(made) {
            let grown = tensor.dtype().size_in_bytes().saturating_sub(base.dtype().size_in_bytes());
            state.more += (tensor.elem_count() * grown) as u64;
            state.waiting.remove(&name);
            state.made.insert(name, tensor);
        }
        Ok(())
    }

    fn changed(&self, changed: Changed, base: &Tensor, spent: &[AtomicU64]) -> Result<Tensor> {
        let Changed { layer, tensor, by } = changed;
        let dtype = if self.lower.dtype() == DType::F32 { DType::F32 } else { base.dtype() };
        let begun = Instant::now();
        let changes = || by.iter().filter(|touch| touch.format(tensor).is_some());
        if tensor == "weight"
            && let Some(made) = fused::changed(base, dtype, changes().map(|touch| (&touch.parts, touch.strength)))?
        {
            let share = begun.elapsed() / u32::try_from(changes().count().max(1)).unwrap_or(u32::MAX);
            changes().for_each(|touch| self.spend(touch, share, spent));
            return Ok(made);
        }
        let mut wide = base.to_dtype(DType::F32)?;
        for touch in by {
            let Some(format) = touch.format(tensor) else { continue };
            let begun = Instant::now();
            let part = |(name, part): (&String, &Tensor)| {
                Ok((name.clone(), part.to_device(base.device())?.to_dtype(DType::F32)?))
            };
            let parts: Parts = touch.parts.iter().map(part).collect::<CandleResult<_>>()?;
            let task = MergeTask { layer, tensor, base: &wide, parts: &parts, strength: touch.strength };
            let file = self.touches.names.get(touch.adapter).map_or("", String::as_str);
            let next = self.ctx.perform(format.merge, task).map_err(|error| told(error, file, &touch.parts))?;
            if next.shape() != wide.shape() {
                let message =
                    format!("`{layer}.{tensor}` is {:?}, and the change gives {:?}", wide.dims(), next.dims());
                return Err(Error::ModelUnsupported { name: file.to_owned(), message });
            }
            wide = next;
            self.spend(touch, begun.elapsed(), spent);
        }
        Ok(wide.to_dtype(dtype)?)
    }

    fn spend(&self, touch: &Touch, time: Duration, spent: &[AtomicU64]) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        spent.get(touch.adapter).map(|total| total.fetch_add(nanos, Ordering::Relaxed));
    }
}

/// Whether shapes differ by axes of length 1 at their end alone.
fn is_same_matrix(a: &[usize], b: &[usize]) -> bool {
    let trimmed = |dims: &[usize]| dims.iter().rposition(|&side| side != 1).map_or(0, |last| last + 1);
    a != b && a.get(..trimmed(a)) == b.get(..trimmed(b))
}

/// An error of a format, which knows the layer alone, with the adapter's file and what it has.
fn told(error: Error, file: &str, parts: &Parts) -> Error {
    match error {
        Error::ModelUnsupported { name, message } => {
            let parts: Vec<String> = parts.iter().map(|(name, part)| format!("`{name}` {:?}", part.dims())).collect();
            let message = format!("what it has for `{name}`, {}: {message}", parts.join(", "));
            Error::ModelUnsupported { name: file.to_owned(), message }
        }
        other => other,
    }
}

impl SimpleBackend for &Adapted<'_> {
    fn get(&self, shape: Shape, name: &str, hint: Init, _: DType, _: &Device) -> CandleResult<Tensor> {
        self.take(name, Some((shape, hint)))
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> CandleResult<Tensor> {
        self.take(name, None)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.lower.contains_tensor(name)
    }
}

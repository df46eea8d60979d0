//! Weights that stay away from where they are used, for devices with less memory than a network has weights: each layer's
//! are brought when its turn comes, and dropped behind it. Which networks are so is said around their load, so that the
//! networks need not know of it.
//!
//! From the host to a GPU they travel, as the file has them, and are widened before. On the CPU itself they lie in their
//! file, which is mapped, and what is laid for the kernels is laid anew at every use, rather than once beside the file.

use std::borrow::Cow;
use std::cell::RefCell;

use candle_core::{DType, Device, Result, Tensor};

use crate::kernels::conv_shape::ConvShape;
use crate::kernels::stored_weight::StoredWeight;
use crate::kernels::weight::Weight;

thread_local! {
    static TARGET: RefCell<Option<Device>> = const { RefCell::new(None) };
}

/// Ends a scope, also when a load panics.
struct Outer(Option<Device>);

impl Drop for Outer {
    fn drop(&mut self) {
        TARGET.set(self.0.take());
    }
}

/// Runs `load`, within which layers that are read on the host and compute on `device` keep their weights where they are.
/// Biases and norms, which are small, go there at once.
pub fn away<R>(device: &Device, load: impl FnOnce() -> R) -> R {
    let _outer = Outer(TARGET.replace(Some(device.clone())));
    load()
}

/// Whether layers that are made now keep their weights where they are.
pub(crate) fn is_chosen() -> bool {
    TARGET.with_borrow(Option::is_some)
}

/// What is small, where it is used.
pub(crate) fn brought(tensor: Tensor) -> Result<Tensor> {
    TARGET.with_borrow(|target| match target {
        Some(device) => tensor.to_device(device),
        None => Ok(tensor),
    })
}

/// A weight as the file has it, on the host.
#[derive(Clone, Debug)]
pub(crate) struct Away {
    /// `[O, I]` or `[O, C, K, K]`
    pub(crate) weight: StoredWeight,
    /// The dtype in which the network computes.
    pub(crate) compute: DType,
    /// Of a convolution.
    pub(crate) conv: Option<ConvShape>,
}

impl Weight {
    /// For the use with `x`: as it is, or brought for this one time.
    pub(crate) fn beside(&self, x: &Tensor) -> Result<Cow<'_, Self>> {
        let Self::Away(Away { weight, compute, conv }) = self else { return Ok(Cow::Borrowed(self)) };
        if x.device().is_cpu() {
            return Ok(Cow::Owned(Self::on_host(weight, *compute, *conv)?));
        }
        Ok(Cow::Owned(Self::on_device(&weight.numbers(x.dtype())?.to_device(x.device())?)?))
    }
}

/// Of what [`Weight::beside`] leaves where it was, which it never does.
pub(crate) fn still<T>() -> Result<T> {
    candle_core::bail!("a weight was used before it was brought")
}

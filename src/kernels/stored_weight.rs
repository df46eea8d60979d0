//! Weights as files have them, beside what networks make of them.
//!
//! A network asks for tensors through a `VarBuilder`, and every source behind one gives numbers. A layer that can do with
//! less says so by the hint [`WELCOME`]. A source that has the weight coded then gives its bytes, and says here how to read
//! them; one that changes the weight, or knows nothing of this, gives numbers as ever. A source around another hands the
//! hint on for tensors that it does not touch.

use std::cell::RefCell;

use candle_core::{DType, Device, Result, Shape, Tensor, TensorId, bail};
use candle_nn::{Init, VarBuilder};

use crate::kernels::block_format::Coding;

/// A weight in any coding.
#[derive(Clone, Debug)]
pub struct StoredWeight {
    /// The numbers themselves where the coding is a dtype's, bytes of it otherwise.
    tensor: Tensor,
    coding: Coding,
    /// Times which the weight counts.
    scale: f32,
    shape: Vec<usize>,
}

thread_local! {
    /// What was given last to whoever welcomed bytes.
    static GIVEN: RefCell<Option<(TensorId, Given)>> = const { RefCell::new(None) };
}

/// What bytes are.
#[derive(Clone, Debug)]
struct Given {
    coding: Coding,
    scale: f32,
    shape: Vec<usize>,
}

/// The hint by which a layer says that bytes are welcome. Sources that do not know it read it as what a new weight would
/// be filled with, and there are none here.
pub const WELCOME: Init = Init::Const(-8.0);

/// Whether `hint` is [`WELCOME`].
#[must_use]
pub fn welcomes(hint: Init) -> bool {
    matches!((hint, WELCOME), (Init::Const(hint), Init::Const(welcome)) if hint.to_bits() == welcome.to_bits())
}

impl StoredWeight {
    /// `tensor` has the bytes of as many numbers as `shape` says, or these numbers; they count `scale` times.
    ///
    /// # Errors
    /// Bytes that are not those of as many numbers.
    pub fn new(tensor: Tensor, coding: Coding, scale: f32, shape: &[usize]) -> Result<Self> {
        let count = shape.iter().try_fold(1_usize, |count, side| count.checked_mul(*side));
        let wanted = count.and_then(|count| coding.bytes(count));
        if wanted != Some(tensor.elem_count() * tensor.dtype().size_in_bytes()) {
            bail!("{:?} is not what {shape:?} takes as {}", tensor.dims(), coding.name());
        }
        Ok(Self { tensor, coding, scale, shape: shape.to_vec() })
    }

    /// A tensor of numbers.
    ///
    /// # Errors
    /// Those of a cast of what is no f32, f16 or bf16.
    pub fn of(tensor: Tensor) -> Result<Self> {
        let (tensor, coding) = match tensor.dtype() {
            DType::F16 => (tensor, Coding::F16),
            DType::BF16 => (tensor, Coding::Bf16),
            DType::F32 => (tensor, Coding::F32),
            _ => (tensor.to_dtype(DType::F32)?, Coding::F32),
        };
        let shape = tensor.dims().to_vec();
        Ok(Self { tensor, coding, scale: 1.0, shape })
    }

    /// That of the layer `vb`. `shape` is compared by whoever holds the weights.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn read(vb: &VarBuilder, shape: impl Into<Shape>) -> Result<Self> {
        GIVEN.set(None);
        let tensor = vb.get_with_hints(shape, "weight", WELCOME)?;
        match GIVEN.take() {
            Some((id, Given { coding, scale, shape })) if id == tensor.id() => Self::new(tensor, coding, scale, &shape),
            _ => Self::of(tensor),
        }
    }

    /// As [`Self::read`], of shape `[rows, columns]`. Some files keep such a matrix as a convolution of one tap, and not
    /// every source makes a matrix of it.
    ///
    /// # Errors
    /// As of [`Self::read`].
    pub fn matrix(vb: &VarBuilder, rows: usize, columns: usize) -> Result<Self> {
        // A source that gave the tensor away and refused it then has said all there is to say.
        let again = || if vb.contains_tensor("weight") { Some(vb.get_unchecked("weight")) } else { None };
        Self::read(vb, (rows, columns)).or_else(|error| match again() {
            Some(Ok(tensor)) if tensor.dims() == [rows, columns, 1, 1] => Self::of(tensor.reshape((rows, columns))?),
            _ => Err(error),
        })
    }

    /// What a source gives to whoever welcomes it, who takes it at once.
    #[must_use]
    pub fn give(self) -> Tensor {
        let Self { tensor, coding, scale, shape } = self;
        GIVEN.set(Some((tensor.id(), Given { coding, scale, shape })));
        tensor
    }

    /// The same numbers in another shape.
    ///
    /// # Errors
    /// A shape of another count.
    pub fn reshape(self, shape: &[usize]) -> Result<Self> {
        let tensor = if self.coding.dtype().is_some() { self.tensor.reshape(shape)? } else { self.tensor };
        Self::new(tensor, self.coding, self.scale, shape)
    }

    /// These numbers `factor` times as great.
    #[must_use]
    pub fn times(self, factor: f32) -> Self {
        Self { scale: self.scale * factor, ..self }
    }

    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.shape
    }

    #[must_use]
    pub fn device(&self) -> &Device {
        self.tensor.device()
    }

    /// What it takes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.tensor.elem_count() * self.tensor.dtype().size_in_bytes()
    }

    pub(crate) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    pub(crate) fn coding(&self) -> Coding {
        self.coding
    }

    pub(crate) fn scale(&self) -> f32 {
        self.scale
    }
}

//! Loads the layers of a network: a source of weights, the path of a layer within it, and the policy by which layers keep
//! their weights. Networks descend with [`Loader::pp`], as with candle's `VarBuilder`.

use std::cell::RefCell;
use std::rc::Rc;

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::VarBuilder;

use crate::kernels::conv_shape::ConvShape;
use crate::kernels::shared_layers::{LayerWeights, Layers, SharedLayer};
use crate::kernels::stored_weight::StoredWeight;
use crate::kernels::weight::{Weight, tensor_bytes};

/// Tensors of a network by name. Sources wrap each other: an adapter's source takes what it does not change from the
/// checkpoint's.
pub trait WeightSource: Sync {
    /// The tensor `name` as it is stored. A tensor of another shape than `shape` is an error, except that a convolution
    /// of one tap serves as a matrix.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    fn stored(&self, name: &str, shape: Option<&[usize]>) -> Result<StoredWeight>;

    /// The tensor `name` in the numbers that the network uses; otherwise as [`Self::stored`].
    ///
    /// # Errors
    /// The errors of [`Self::stored`].
    fn numbers(&self, name: &str, shape: Option<&[usize]>) -> Result<Tensor> {
        self.stored(name, shape)?.used(self.compute())
    }

    fn contains(&self, name: &str) -> bool;

    /// The dtype in which the network computes.
    fn compute(&self) -> DType;

    /// The device on which the tensors are.
    fn device(&self) -> &Device;
}

impl<S: WeightSource + ?Sized> WeightSource for &S {
    fn stored(&self, name: &str, shape: Option<&[usize]>) -> Result<StoredWeight> {
        (**self).stored(name, shape)
    }

    fn contains(&self, name: &str) -> bool {
        (**self).contains(name)
    }

    fn compute(&self) -> DType {
        (**self).compute()
    }

    fn device(&self) -> &Device {
        (**self).device()
    }
}

impl WeightSource for VarBuilder<'_> {
    fn stored(&self, name: &str, shape: Option<&[usize]>) -> Result<StoredWeight> {
        let Some(shape) = shape else { return StoredWeight::of(self.get_unchecked(name)?) };
        let tensor = self.get(shape, name).or_else(|error| match (shape, self.get_unchecked(name)) {
            (&[rows, columns], Ok(tensor)) if tensor.dims() == [rows, columns, 1, 1] => tensor.reshape(shape),
            _ => Err(error),
        });
        StoredWeight::of(tensor?)
    }

    fn contains(&self, name: &str) -> bool {
        self.contains_tensor(name)
    }

    fn compute(&self) -> DType {
        self.dtype()
    }

    fn device(&self) -> &Device {
        VarBuilder::device(self)
    }
}

/// Decides by a layer's name and the shape of its weight, outputs first, if it is quantised.
pub type Int8Rule = fn(&str, &[usize]) -> bool;

/// Policy by which layers keep their weights; by default packed for their device's kernels, and all read from the source.
#[derive(Clone, Debug, Default)]
pub struct LoadPolicy {
    /// Layers on the CPU that are kept as INT8.
    pub int8: Option<Int8Rule>,
    /// The device that computes, where layers keep their weights on the host as they are stored and bring them for each
    /// use. Biases and norms, which are small, are moved there at once.
    pub offload: Option<Device>,
    /// Layers of another network that are shared, by name, instead of being read.
    pub shared: Layers,
}

/// Bytes and layers of a network that was loaded.
#[derive(Clone, Debug, Default)]
pub struct LoadStats {
    /// Bytes of the tensors that were taken from the source.
    pub read: usize,
    /// Bytes by which layers are larger than the blocks or eight-bit floats of their weights.
    pub grown: usize,
    /// Bytes by which layers that were quantised are smaller than their weights.
    pub saved: usize,
    /// Every layer of the network, shared or read.
    pub layers: Layers,
}

impl LoadStats {
    /// Bytes that the layers hold, shared ones excepted.
    #[must_use]
    pub fn bytes(&self) -> usize {
        (self.read + self.grown).saturating_sub(self.saved)
    }
}

/// A place within a source of weights, from which layers are loaded. Clones share source, policy and statistics.
#[derive(Clone)]
pub struct Loader<'a> {
    load: Rc<Load<'a>>,
    prefix: String,
}

struct Load<'a> {
    source: Box<dyn WeightSource + 'a>,
    policy: LoadPolicy,
    stats: RefCell<LoadStats>,
}

impl<'a> Loader<'a> {
    #[must_use]
    pub fn new(source: impl WeightSource + 'a, policy: LoadPolicy) -> Self {
        let load = Load { source: Box::new(source), policy, stats: RefCell::default() };
        Self { load: Rc::new(load), prefix: String::new() }
    }

    /// The loader of the part `name`.
    #[must_use]
    pub fn pp(&self, name: impl ToString) -> Self {
        Self { load: Rc::clone(&self.load), prefix: self.path(&name.to_string()) }
    }

    /// Takes out the statistics of everything that was loaded from the source so far.
    #[must_use]
    pub fn take_stats(&self) -> LoadStats {
        self.load.stats.take()
    }

    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.load.source.contains(&self.path(name))
    }

    /// A tensor in the numbers that the network uses.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn tensor(&self, name: &str, shape: impl Into<Shape>) -> Result<Tensor> {
        let tensor = self.load.source.numbers(&self.path(name), Some(shape.into().dims()))?;
        self.load.stats.borrow_mut().read += tensor_bytes(&tensor);
        Ok(tensor)
    }

    /// The tensor `weight` as it is stored, for rows to be looked up in it.
    ///
    /// # Errors
    /// A missing tensor, or one of another shape.
    pub fn table(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let read = || Ok(LayerWeights { weight: Weight::tensor(self.tensor("weight", shape)?), bias: None });
        self.layer(read)?.weight.into_tensor()
    }

    /// The tensors `weight` and `bias` of a norm, in f32.
    pub(crate) fn affine(&self, channels: usize) -> Result<(Tensor, Tensor)> {
        let read = || {
            let (weight, bias) = (self.tensor("weight", channels)?, self.tensor("bias", channels)?);
            Ok(LayerWeights { weight: Weight::tensor(self.small(&weight)?), bias: Some(self.small(&bias)?) })
        };
        let LayerWeights { weight, bias } = self.layer(read)?;
        let bias = bias.ok_or_else(|| Error::Msg(format!("the norm `{}` has no bias", self.prefix)))?;
        Ok((weight.into_tensor()?, bias))
    }

    /// The tensor `weight`, of `shape`, as the policy keeps it, and, if there is one of `outputs` numbers, `bias`.
    /// `conv` is the geometry of a convolution.
    pub(crate) fn weights(
        &self,
        shape: &[usize],
        conv: Option<ConvShape>,
        outputs: Option<usize>,
    ) -> Result<LayerWeights> {
        self.layer(|| {
            let stored = self.load.source.stored(&self.path("weight"), Some(shape))?;
            self.load.stats.borrow_mut().read += stored.bytes();
            let weight = self.keep(&stored, conv)?;
            let bias = outputs.map(|outputs| self.small(&self.tensor("bias", outputs)?)).transpose()?;
            Ok(LayerWeights { weight, bias })
        })
    }

    /// The weight of a matrix or convolution as the policy keeps it.
    pub(crate) fn keep(&self, stored: &StoredWeight, conv: Option<ConvShape>) -> Result<Weight> {
        let (policy, compute) = (&self.load.policy, self.load.source.compute());
        if !stored.device().is_cpu() {
            return Weight::new(stored, compute, conv);
        }
        let int8 = policy.int8.is_some_and(|is_chosen| is_chosen(&self.prefix, stored.dims()));
        if !int8 && policy.offload.is_some() {
            return Ok(Weight::offloaded(stored.clone(), compute, conv));
        }
        let weight = if int8 { Weight::int8(&stored.used(compute)?)? } else { Weight::new(stored, compute, conv)? };
        let mut stats = self.load.stats.borrow_mut();
        if int8 {
            stats.saved += stored.bytes().saturating_sub(weight.bytes());
        }
        // Panels of plain numbers are as large as these, but for a margin.
        if stored.coding().dtype().is_none() {
            stats.grown += weight.bytes().saturating_sub(stored.bytes());
        }
        Ok(weight)
    }

    /// A small tensor in f32 on the device that computes.
    pub(crate) fn small(&self, tensor: &Tensor) -> Result<Tensor> {
        let wide = tensor.to_dtype(DType::F32)?;
        self.load.policy.offload.as_ref().map_or(Ok(wide.clone()), |device| wide.to_device(device))
    }

    /// The layer at this place: the shared one, or the one that `read` gives.
    fn layer(&self, read: impl FnOnce() -> Result<LayerWeights>) -> Result<LayerWeights> {
        let layer = match self.load.policy.shared.get(&self.prefix) {
            Some(shared) => shared.clone(),
            None => SharedLayer::new(read()?),
        };
        let weights = layer.weights().clone();
        self.load.stats.borrow_mut().layers.insert(&self.prefix, layer);
        Ok(weights)
    }

    fn path(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}

impl<'a> From<VarBuilder<'a>> for Loader<'a> {
    fn from(source: VarBuilder<'a>) -> Self {
        Self::new(source, LoadPolicy::default())
    }
}

//! Layers that one network has from another. Said around the load of a network, so that networks need not know of it: a
//! layer that is given is not read, and every layer is remembered by its name, to be given to a network that comes later.
//! What is shared are weights that are never changed; only the handles to them are copied.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};
use candle_nn::VarBuilder;

use crate::kernels::conv2d::Conv2d;
use crate::kernels::linear::Linear;
use crate::kernels::norm::{GroupNorm, LayerNorm};
use crate::kernels::weight::Weight;

/// Layers by name.
#[derive(Clone, Debug, Default)]
pub struct Layers(HashMap<String, Layer>);

/// A layer of one of the kinds that networks are made of. Clones are the same layer.
#[derive(Clone, Debug)]
pub struct Layer(Arc<Kind>);

#[derive(Debug)]
enum Kind {
    Linear(Linear),
    Conv2d(Conv2d),
    GroupNorm(GroupNorm),
    LayerNorm(LayerNorm),
    Table(Tensor),
}

impl Layer {
    /// Tells the layer from all others that are in memory at the same time.
    #[must_use]
    pub fn id(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }

    /// Bytes of its weights.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let tensor = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let weight = |weight: &Weight| match weight {
            Weight::Packed(packed) => packed.bytes(),
            Weight::Tensor(weight) => tensor(weight),
            Weight::Away(away) => away.weight.bytes(),
        };
        let bias = |bias: &Option<Tensor>| bias.as_ref().map_or(0, tensor);
        match &*self.0 {
            Kind::Linear(layer) => weight(&layer.weight) + bias(&layer.bias),
            Kind::Conv2d(layer) => weight(&layer.weight) + bias(&layer.bias),
            Kind::GroupNorm(layer) => tensor(&layer.weight) + tensor(&layer.bias),
            Kind::LayerNorm(layer) => tensor(&layer.weight) + tensor(&layer.bias),
            Kind::Table(table) => tensor(table),
        }
    }
}

impl Layers {
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Layer> {
        self.0.get(name)
    }

    pub fn insert(&mut self, name: &str, layer: Layer) {
        self.0.insert(name.to_owned(), layer);
    }

    /// Layers with their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Layer)> {
        self.0.iter().map(|(name, layer)| (name.as_str(), layer))
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

struct Scope {
    given: Layers,
    made: Layers,
}

thread_local! {
    static SCOPE: RefCell<Option<Scope>> = const { RefCell::new(None) };
}

/// Ends a scope, also when a load panics.
struct Outer(Option<Scope>);

impl Drop for Outer {
    fn drop(&mut self) {
        SCOPE.replace(self.0.take());
    }
}

/// Runs `load`, within which the layers `given` are not read. Gives what `load` gave, and every layer that it has.
pub fn sharing<R>(given: Layers, load: impl FnOnce() -> R) -> (R, Layers) {
    let _outer = Outer(SCOPE.replace(Some(Scope { given, made: Layers::default() })));
    let made = load();
    (made, SCOPE.take().map(|scope| scope.made).unwrap_or_default())
}

/// What can be shared.
pub(crate) trait Shared: Clone {
    fn kept(&self) -> Layer;
    fn given(layer: &Layer) -> Option<Self>;
}

macro_rules! shared {
    ($($kind:ident $type:ty),*) => {$(
        impl Shared for $type {
            fn kept(&self) -> Layer {
                Layer(Arc::new(Kind::$kind(self.clone())))
            }

            fn given(layer: &Layer) -> Option<Self> {
                match &*layer.0 {
                    Kind::$kind(layer) => Some(layer.clone()),
                    _ => None,
                }
            }
        }
    )*};
}

shared!(Linear Linear, Conv2d Conv2d, GroupNorm GroupNorm, LayerNorm LayerNorm, Table Tensor);

/// The layer `vb`: the one that was given, or what `load` makes.
pub(crate) fn layer<T: Shared>(vb: &VarBuilder, load: impl FnOnce() -> Result<T>) -> Result<T> {
    if SCOPE.with_borrow(Option::is_none) {
        return load();
    }
    let name = vb.prefix();
    let given = SCOPE.with_borrow(|scope| {
        let kept = scope.as_ref()?.given.get(&name)?;
        Some((T::given(kept)?, kept.clone()))
    });
    let (layer, kept) = match given {
        Some(given) => given,
        None => {
            let layer = load()?;
            let kept = layer.kept();
            (layer, kept)
        }
    };
    SCOPE.with_borrow_mut(|scope| {
        if let Some(scope) = scope {
            scope.made.0.insert(name, kept);
        }
    });
    Ok(layer)
}

/// The tensor `weight` of the layer `vb` as it is stored, for rows to be looked up in it.
///
/// # Errors
/// A missing tensor, or one of another shape.
pub fn table(vb: &VarBuilder, shape: impl Into<Shape>) -> Result<Tensor> {
    layer(vb, || vb.get(shape.into(), "weight"))
}

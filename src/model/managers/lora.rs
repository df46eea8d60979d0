//! Networks as they are kept: with their layers by name, so that one that adapters change in part shares the rest with the
//! one that they do not change, or with one that they change otherwise.

use std::collections::{HashMap, HashSet};
use std::ops::Deref;
use std::sync::Arc;

use candle_nn::VarBuilder;

use super::{Opened, Shelf, ShelfKey};
use crate::context::Context;
use crate::error::Result;
use crate::kernels::sharing::{Layers, sharing};
use crate::model::checkpoint::Part;
use crate::model::lora::Stack;
use crate::model::workers::adapting::{Built, adapting};
use crate::units::Bytes;

/// A network, its layers, and what tells the changes of each.
#[derive(Debug)]
pub struct Kept<T> {
    network: T,
    layers: Layers,
    marks: HashMap<String, u64>,
}

impl<T> Deref for Kept<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.network
    }
}

/// A network that is about to be built: what it shares, and what is changed of it.
pub(super) struct Adapting<'a> {
    stack: &'a Stack,
    part: Part,
    given: Layers,
    marks: HashMap<String, u64>,
}

impl<'a> Adapting<'a> {
    /// Takes from the networks `of` donors, which are of the same checkpoint, device and dtype, what is the same in them.
    pub(super) fn new<D, T>(
        stack: &'a Stack,
        part: Part,
        donors: &[Arc<D>],
        of: impl Fn(&D) -> Option<&Kept<T>>,
    ) -> Self {
        let marks = stack.marks(part);
        let mut given = Layers::default();
        for donor in donors.iter().filter_map(|donor| of(donor)) {
            for (name, layer) in donor.layers.iter() {
                if donor.marks.get(name) == marks.get(name) && given.get(name).is_none() {
                    given.insert(name, layer.clone());
                }
            }
        }
        Self { stack, part, given, marks }
    }

    /// Bytes that the weights will take which are not shared.
    pub(super) fn bytes(&self, opened: &Opened) -> Bytes {
        opened.bytes_of(|tensor| tensor.rsplit_once('.').is_none_or(|(layer, _)| self.given.get(layer).is_none()))
    }

    /// Builds the network. Gives it with the bytes that it holds alone.
    pub(super) fn load<T>(
        self,
        opened: &Opened,
        ctx: &Context,
        load: impl FnOnce(&VarBuilder) -> Result<T>,
    ) -> Result<(Kept<T>, Bytes)> {
        let Self { stack, part, given, marks } = self;
        let known: HashSet<&str> = given.names().collect();
        let touches = stack.touches(part, &known, ctx)?;
        drop(known);
        let (loaded, layers) = sharing(given, || {
            opened.load(ctx, |vb| match touches.layers.is_empty() {
                true => load(vb).map(|network| Built { network, spent: Vec::new(), more: Bytes(0) }),
                false => adapting(&touches, vb, ctx, load),
            })
        });
        let (Built { network, spent, more }, bytes) = loaded?;
        spent.into_iter().enumerate().for_each(|(adapter, time)| stack.took(adapter, time));
        Ok((Kept { network, layers, marks }, bytes + more))
    }
}

/// What of a shelf may give layers to a network of this key.
pub(super) fn donors<T: 'static>(shelf: &Shelf<T>, key: &ShelfKey) -> Vec<Arc<T>> {
    shelf.like(|other| ShelfKey { over: key.over, ..other.clone() } == *key)
}

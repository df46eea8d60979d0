//! Finds the field names of a type. serde passes a struct's names and aliases to the deserializer and refuses two names
//! of one field, so the codec keeps no list of names of its own.

use std::cell::Cell;

use serde::de::value::{Error as Stop, MapDeserializer, SeqDeserializer, StrDeserializer};
use serde::de::{DeserializeOwned, Error as _, IntoDeserializer, Visitor};
use serde::{Deserializer, forward_to_deserialize_any};

use crate::communication::workers::codec::path::PathStep;
use crate::communication::workers::codec::tagged::Tagged;

/// A struct's names, as serde knows them.
#[derive(Clone, Copy, Debug)]
pub struct StructShape {
    pub name: &'static str,
    /// Field names and aliases.
    pub fields: &'static [&'static str],
}

/// The struct at `path` of a `T`, or of the data of `T`'s variant `operation`.
#[must_use]
pub fn fields<T: DeserializeOwned>(operation: Option<&str>, path: &[PathStep]) -> Option<StructShape> {
    let shape = Cell::new(None);
    // The walk always fails; the shape is left in the cell.
    let _ = walk::<T>(operation, Probe { path, goal: Goal::Shape(&shape) });
    shape.get()
}

/// True if `a` and `b` are two names of one field of the struct at `path`.
#[must_use]
pub fn same_field<T: DeserializeOwned>(operation: Option<&str>, path: &[PathStep], a: &str, b: &str) -> bool {
    let refused = walk::<T>(operation, Probe { path, goal: Goal::Pair(a, b) }).err();
    refused.is_some_and(|stop| stop.to_string().starts_with("duplicate field"))
}

fn walk<T: DeserializeOwned>(operation: Option<&str>, probe: Probe<'_>) -> Result<(), Stop> {
    match operation {
        Some(operation) => T::deserialize(Tagged { operation, data: probe }).map(drop),
        None => T::deserialize(probe).map(drop),
    }
}

#[derive(Clone, Copy)]
enum Goal<'a> {
    Shape(&'a Cell<Option<StructShape>>),
    Pair(&'a str, &'a str),
}

/// An input that contains nothing but the way to `path`.
#[derive(Clone, Copy)]
struct Probe<'a> {
    path: &'a [PathStep],
    goal: Goal<'a>,
}

impl<'a> Probe<'a> {
    fn next(self) -> Option<(&'a PathStep, Self)> {
        self.path.split_first().map(|(step, path)| (step, Self { path, ..self }))
    }
}

impl<'de> IntoDeserializer<'de, Stop> for Probe<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Stop;

    /// A type with several forms is entered by the form that the path has.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        match self.next() {
            Some((PathStep::Index(_), inner)) => visitor.visit_seq(SeqDeserializer::new(std::iter::once(inner))),
            Some((PathStep::Key(key), inner)) => {
                visitor.visit_map(MapDeserializer::new(std::iter::once((key.as_str(), inner))))
            }
            // A type that is a struct or something simpler shows the struct this way.
            None => visitor.visit_newtype_struct(self),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        match self.next() {
            Some((PathStep::Index(_), inner)) => visitor.visit_seq(SeqDeserializer::new(std::iter::once(inner))),
            _ => Err(Stop::custom("no array is on the way")),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        match self.next() {
            Some((PathStep::Key(key), inner)) => {
                visitor.visit_map(MapDeserializer::new(std::iter::once((key.as_str(), inner))))
            }
            _ => Err(Stop::custom("no object is on the way")),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Stop> {
        if !self.path.is_empty() {
            return self.deserialize_map(visitor);
        }
        match self.goal {
            Goal::Shape(shape) => {
                shape.set(Some(StructShape { name, fields }));
                Err(Stop::custom("seen"))
            }
            Goal::Pair(a, b) => visitor.visit_map(MapDeserializer::new([(a, Zero), (b, Zero)].into_iter())),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        tuple tuple_struct enum identifier ignored_any
    }
}

/// The zero of any type that is expected.
#[derive(Clone, Copy)]
struct Zero;

impl<'de> IntoDeserializer<'de, Stop> for Zero {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Zero {
    type Error = Stop;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_unit()
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_none()
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_bool(false)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_i64(0)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_f64(0.0)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_str("")
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_seq(SeqDeserializer::new(std::iter::empty::<Self>()))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Stop> {
        visitor.visit_map(MapDeserializer::new(std::iter::empty::<(StrDeserializer<'_, Stop>, Self)>()))
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_i64(0)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_u64(0)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_u64(0)
    }

    forward_to_deserialize_any! {
        i8 i16 i128 u8 u16 u128 f32 char str bytes byte_buf unit unit_struct newtype_struct tuple tuple_struct map enum
        identifier ignored_any
    }
}

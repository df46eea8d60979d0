//! `data` into the type of its operation, with every fault named: where it is, what was wanted, what came.

use std::collections::BTreeMap;

use serde::de::value::StrDeserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, EnumAccess, IntoDeserializer, VariantAccess, Visitor};
use serde::{Deserializer, forward_to_deserialize_any};
use serde_json::value::RawValue;

use crate::communication::responses::{Warning, clip};
use crate::communication::workers::codec::probe;
use crate::communication::workers::codec::{Fault, Step, dotted, pointer};
use crate::error::{Error, nearest};

/// The `data` of one request.
#[derive(Clone, Copy)]
pub struct Body<'a> {
    pub operation: &'a str,
    /// JSON text.
    pub data: &'a str,
    /// Where `data` stands in the line.
    pub pointer: &'a str,
    /// Whether an unknown key is an error.
    pub strict: bool,
    /// Keys that are known and not supported yet.
    pub to_come: &'a [&'a str],
}

/// Longest text of a request that is quoted back.
const QUOTE: usize = 120;

impl Body<'_> {
    /// Reads the variant of `T` that the operation names.
    ///
    /// # Errors
    /// `invalid_parameter` or `unsupported_feature`, with the pointer.
    pub fn read<T: DeserializeOwned>(&self, warnings: &mut Vec<Warning>) -> Result<T, Fault> {
        let fields = |path: &[Step]| probe::fields::<T>(Some(self.operation), path);
        let same = |path: &[Step], a: &str, b: &str| probe::same_field::<T>(Some(self.operation), path, a, b);
        self.settle(self.parse::<T>(Some(self.operation)), &Names { fields: &fields, same: &same }, warnings)
    }

    /// Reads a `T` that is no operation's.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_plain<T: DeserializeOwned>(&self, warnings: &mut Vec<Warning>) -> Result<T, Fault> {
        let fields = |path: &[Step]| probe::fields::<T>(None, path);
        let same = |path: &[Step], a: &str, b: &str| probe::same_field::<T>(None, path, a, b);
        self.settle(self.parse::<T>(None), &Names { fields: &fields, same: &same }, warnings)
    }

    fn parse<T: DeserializeOwned>(&self, operation: Option<&str>) -> Parsed<T> {
        let mut json = serde_json::Deserializer::from_str(self.data);
        let mut track = serde_path_to_error::Track::new();
        let mut unknown = Vec::new();
        let mut note = |path: serde_ignored::Path<'_>| unknown.push(steps_of_ignored(&path));
        let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
        let noted = serde_ignored::Deserializer::new(tracked, &mut note);
        let value = match operation {
            Some(operation) => T::deserialize(Tagged { operation, data: noted }),
            None => T::deserialize(noted),
        };
        let value = value.map_err(|e| (e.to_string(), steps_of_error(&track.path())));
        Parsed { value, unknown }
    }

    fn settle<T>(&self, parsed: Parsed<T>, names: &Names<'_>, warnings: &mut Vec<Warning>) -> Result<T, Fault> {
        // serde would read an array as a struct without its names; on the wire a struct is an object.
        if let Some(path) = array_for_struct(self.data, &mut Vec::new(), names.fields) {
            return Err(self.fault("invalid type: sequence, expected a map", path, names));
        }
        // What is known and not done yet is said first: it explains more than the faults around it.
        for path in &parsed.unknown {
            if let Some(Step::Key(key)) = path.last().filter(|step| self.is_to_come(step)) {
                let error = Error::UnsupportedFeature {
                    what: format!("`{key}`"),
                    hint: Some("leave it out".to_owned()),
                    field: Some(dotted(path)),
                };
                return Err(Fault { error: error.into(), pointer: Some(pointer(self.pointer, path)) });
            }
        }
        let value = parsed.value.map_err(|(message, path)| self.fault(&message, path, names))?;
        for path in &parsed.unknown {
            let Some((Step::Key(key), parent)) = path.split_last() else { continue };
            // An object may stand alone where a list is wanted.
            let known = (names.fields)(parent).or_else(|| (names.fields)(&[parent, &[Step::Index(0)]].concat()));
            let near = known.and_then(|known| nearest(key, known.fields.iter().copied()));
            let shown = clip(key.clone(), QUOTE);
            let hint = near.map(|name| format!("did you mean `{name}`?"));
            if self.strict {
                let error = Error::InvalidParameter { field: shown, message: "is not a known key".to_owned(), hint };
                return Err(Fault { error: error.into(), pointer: Some(pointer(self.pointer, path)) });
            }
            let hint = hint.map(|hint| format!("; {hint}")).unwrap_or_default();
            warnings.push(Warning::new(
                format!("unknown key `{shown}` was ignored{hint}"),
                Some(pointer(self.pointer, path)),
            ));
        }
        Ok(value)
    }

    fn is_to_come(&self, step: &Step) -> bool {
        matches!(step, Step::Key(key) if self.to_come.contains(&key.as_str()))
    }

    /// serde's message and path as an error of the wire.
    fn fault(&self, message: &str, mut path: Vec<Step>, names: &Names<'_>) -> Fault {
        let explained = explain(message);
        let mut message = explained.message;
        if let Some(field) = explained.field {
            if let Some(twin) = explained.twice.then(|| self.twin(&field, &path, names)).flatten() {
                message = format!("and `{twin}` are two names of one field, give one of them");
            }
            path.push(Step::Key(field));
        }
        let field = if path.is_empty() { self.pointer.trim_start_matches('/').to_owned() } else { dotted(&path) };
        let field = if field.is_empty() { "the line".to_owned() } else { clip(field, QUOTE) };
        let error = Error::InvalidParameter { field, message, hint: explained.hint };
        Fault { error: error.into(), pointer: Some(pointer(self.pointer, &path)) }
    }

    /// The other name under which the request gives `field`.
    fn twin(&self, field: &str, path: &[Step], names: &Names<'_>) -> Option<String> {
        let keys = keys_at(self.data, path)?;
        let twins: Vec<&String> =
            keys.iter().filter(|key| *key != field && (names.same)(path, field, key)).take(2).collect();
        twins.first().map(|twin| (*twin).clone())
    }
}

/// What a type says of its field names.
struct Names<'a> {
    fields: &'a dyn Fn(&[Step]) -> Option<probe::Shape>,
    same: &'a dyn Fn(&[Step], &str, &str) -> bool,
}

struct Parsed<T> {
    value: Result<T, (String, Vec<Step>)>,
    unknown: Vec<Vec<Step>>,
}

/// A message of serde, retold.
pub(crate) struct Explained {
    /// Goes behind the name of the field.
    pub(crate) message: String,
    hint: Option<String>,
    /// A field named in the message itself, below the path.
    field: Option<String>,
    twice: bool,
}

/// Retells serde's message: what was wanted, what came.
pub(crate) fn explain(message: &str) -> Explained {
    let message = message.rfind(" at line ").and_then(|end| message.get(..end)).unwrap_or(message);
    let plain = |message: String| Explained { message, hint: None, field: None, twice: false };
    if let Some(field) = message.strip_prefix("missing field ") {
        let field = field.trim_matches('`').to_owned();
        return Explained { field: Some(field), ..plain("is missing".to_owned()) };
    }
    if let Some(field) = message.strip_prefix("duplicate field ") {
        let field = field.trim_matches('`').to_owned();
        return Explained { field: Some(field), twice: true, ..plain("is given twice".to_owned()) };
    }
    if let Some((got, wanted)) = message.strip_prefix("unknown variant ").and_then(|m| m.rsplit_once(", expected ")) {
        let got = got.trim_matches('`');
        let known: Vec<&str> = wanted.split('`').skip(1).step_by(2).collect();
        let hint = nearest(got, known.iter().copied()).map(|name| format!("did you mean `{name}`?"));
        let message = format!("must be {wanted}, got `{}`", clip(got.to_owned(), QUOTE));
        return Explained { hint, ..plain(message) };
    }
    for prefix in ["invalid type: ", "invalid value: ", "invalid length "] {
        if let Some((got, wanted)) = message.strip_prefix(prefix).and_then(|m| m.rsplit_once(", expected ")) {
            let got = if prefix == "invalid length " { format!("{got} elements") } else { came(got) };
            return plain(format!("must be {}, got {}", in_words(wanted), clip(got, QUOTE)));
        }
    }
    if message == "expected value" {
        return plain("must be one of the known names, got something else".to_owned());
    }
    plain(format!("cannot be read: {}", clip(message.to_owned(), QUOTE)))
}

/// The name of a Rust type, as a client knows it.
fn in_words(wanted: &str) -> String {
    match wanted {
        "i8" | "i16" | "i32" | "i64" | "isize" => "an integer".to_owned(),
        "u8" | "u16" | "u32" | "u64" | "usize" => "an integer of 0 or more".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "an array".to_owned(),
        "a map" => "an object".to_owned(),
        other if other.starts_with("struct ") => "an object".to_owned(),
        other => other.to_owned(),
    }
}

/// What came, as a client knows it.
fn came(got: &str) -> String {
    match got {
        "map" => "an object".to_owned(),
        "sequence" => "an array".to_owned(),
        "unit value" => "null".to_owned(),
        other => {
            let kinds = ["integer ", "floating point ", "boolean "];
            kinds.iter().find_map(|kind| other.strip_prefix(kind)).unwrap_or(other).to_owned()
        }
    }
}

/// The first place at or below `path` where an array stands for a struct.
fn array_for_struct(
    text: &str,
    path: &mut Vec<Step>,
    fields: &dyn Fn(&[Step]) -> Option<probe::Shape>,
) -> Option<Vec<Step>> {
    let inside = |path: &mut Vec<Step>, step: Step, text: &str| {
        path.push(step);
        let found = array_for_struct(text, path, fields);
        path.pop();
        found
    };
    match text.trim_start().as_bytes().first() {
        Some(b'[') if fields(path).is_some() => Some(path.clone()),
        Some(b'[') => {
            let array: Vec<&RawValue> = serde_json::from_str(text).ok()?;
            let nested = array.iter().enumerate().filter(|(_, raw)| raw.get().starts_with(['[', '{']));
            nested.into_iter().find_map(|(index, raw)| inside(path, Step::Index(index), raw.get()))
        }
        Some(b'{') => {
            let known = fields(path)?.fields;
            let object: BTreeMap<String, &RawValue> = serde_json::from_str(text).ok()?;
            let nested = object.iter().filter(|(key, _)| known.contains(&key.as_str()));
            nested.into_iter().find_map(|(key, raw)| inside(path, Step::Key(key.clone()), raw.get()))
        }
        _ => None,
    }
}

/// The keys of the object at `path` of `data`.
fn keys_at(data: &str, path: &[Step]) -> Option<Vec<String>> {
    match path.split_first() {
        None => {
            let object: BTreeMap<String, &RawValue> = serde_json::from_str(data).ok()?;
            Some(object.into_keys().collect())
        }
        Some((Step::Key(key), rest)) => {
            let object: BTreeMap<String, &RawValue> = serde_json::from_str(data).ok()?;
            keys_at(object.get(key)?.get(), rest)
        }
        Some((Step::Index(index), rest)) => {
            let array: Vec<&RawValue> = serde_json::from_str(data).ok()?;
            keys_at(array.get(*index)?.get(), rest)
        }
    }
}

fn steps_of_error(path: &serde_path_to_error::Path) -> Vec<Step> {
    use serde_path_to_error::Segment;
    path.iter()
        .filter_map(|segment| match segment {
            Segment::Seq { index } => Some(Step::Index(*index)),
            Segment::Map { key } => Some(Step::Key(key.clone())),
            Segment::Enum { .. } | Segment::Unknown => None,
        })
        .collect()
}

fn steps_of_ignored(path: &serde_ignored::Path<'_>) -> Vec<Step> {
    use serde_ignored::Path;
    let (parent, step) = match path {
        Path::Root => return Vec::new(),
        Path::Seq { parent, index } => (parent, Some(Step::Index(*index))),
        Path::Map { parent, key } => (parent, Some(Step::Key(key.clone()))),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => (parent, None),
    };
    let mut steps = steps_of_ignored(parent);
    steps.extend(step);
    steps
}

/// An operation's name and its data, shown to serde as an externally tagged enum.
pub(crate) struct Tagged<'a, D> {
    pub(crate) operation: &'a str,
    pub(crate) data: D,
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Tagged<'_, D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        visitor.visit_enum(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de, D: Deserializer<'de>> EnumAccess<'de> for Tagged<'_, D> {
    type Error = D::Error;
    type Variant = Data<D>;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Data<D>), D::Error> {
        let name: StrDeserializer<'_, D::Error> = self.operation.into_deserializer();
        Ok((seed.deserialize(name)?, Data(self.data)))
    }
}

pub(crate) struct Data<D>(D);

impl<'de, D: Deserializer<'de>> VariantAccess<'de> for Data<D> {
    type Error = D::Error;

    fn unit_variant(self) -> Result<(), D::Error> {
        serde::Deserialize::deserialize(self.0)
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, D::Error> {
        seed.deserialize(self.0)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_tuple(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_struct("", fields, visitor)
    }
}

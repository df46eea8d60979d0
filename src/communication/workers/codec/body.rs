//! Reads `data` into the type of its operation. Each fault says where it is, what was expected and what was found.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::communication::responses::{Warning, clip};
use crate::communication::workers::codec::fault::Fault;
use crate::communication::workers::codec::path::{PathStep, dotted, pointer};
use crate::communication::workers::codec::probe::{self, StructShape};
use crate::communication::workers::codec::tagged::Tagged;
use crate::error::{Error, nearest};

/// The `data` of one request.
#[derive(Clone, Copy)]
pub struct Body<'a> {
    pub operation: &'a str,
    /// JSON text.
    pub data: &'a str,
    /// JSON pointer to `data` in the line.
    pub pointer: &'a str,
    /// True if an unknown key is an error, false if it is a warning.
    pub strict: bool,
    pub foreign: &'a [ForeignField],
}

/// A field of another program for which this worker has a field of its own. It is refused even when not strict: an
/// image must not silently be made without it.
#[derive(Clone, Copy)]
pub struct ForeignField {
    pub name: &'static str,
    pub hint: &'static str,
}

/// Longest text of a request that is quoted back, in characters.
const QUOTE: usize = 120;

impl Body<'_> {
    /// Reads the variant of `T` that the operation names.
    ///
    /// # Errors
    /// `invalid_parameter` with the pointer.
    pub fn read<T: DeserializeOwned>(&self, warnings: &mut Vec<Warning>) -> Result<T, Fault> {
        let fields = |path: &[PathStep]| probe::fields::<T>(Some(self.operation), path);
        let same = |path: &[PathStep], a: &str, b: &str| probe::same_field::<T>(Some(self.operation), path, a, b);
        self.check(self.parse::<T>(Some(self.operation)), &FieldNames { fields: &fields, same: &same }, warnings)
    }

    /// Reads a `T` that belongs to no operation.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_plain<T: DeserializeOwned>(&self, warnings: &mut Vec<Warning>) -> Result<T, Fault> {
        let fields = |path: &[PathStep]| probe::fields::<T>(None, path);
        let same = |path: &[PathStep], a: &str, b: &str| probe::same_field::<T>(None, path, a, b);
        self.check(self.parse::<T>(None), &FieldNames { fields: &fields, same: &same }, warnings)
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

    fn check<T>(&self, parsed: Parsed<T>, names: &FieldNames<'_>, warnings: &mut Vec<Warning>) -> Result<T, Fault> {
        // serde would accept an array for a struct; on the wire a struct is an object.
        if let Some(path) = array_for_struct(self.data, &mut Vec::new(), names.fields) {
            return Err(self.fault("invalid type: sequence, expected a map", path, names));
        }
        // Foreign fields come first: their hint explains more than the faults around them.
        for path in &parsed.unknown {
            if let Some(hint) = self.foreign_hint(path) {
                return Err(self.unknown_key(path, dotted(path), Some(hint.to_owned())));
            }
        }
        let value = parsed.value.map_err(|(message, path)| self.fault(&message, path, names))?;
        for path in &parsed.unknown {
            let Some((PathStep::Key(key), parent)) = path.split_last() else { continue };
            // A single object may stand for a list.
            let known = (names.fields)(parent).or_else(|| (names.fields)(&[parent, &[PathStep::Index(0)]].concat()));
            let near = known.and_then(|known| nearest(key, known.fields.iter().copied()));
            let shown = clip(key.clone(), QUOTE);
            let hint = near.map(|name| format!("did you mean `{name}`?"));
            if self.strict {
                return Err(self.unknown_key(path, shown, hint));
            }
            let hint = hint.map(|hint| format!("; {hint}")).unwrap_or_default();
            warnings.push(Warning::new(
                format!("unknown key `{shown}` was ignored{hint}"),
                Some(pointer(self.pointer, path)),
            ));
        }
        Ok(value)
    }

    fn foreign_hint(&self, path: &[PathStep]) -> Option<&'static str> {
        let Some(PathStep::Key(key)) = path.last() else { return None };
        self.foreign.iter().find(|field| field.name == key.as_str()).map(|field| field.hint)
    }

    fn unknown_key(&self, path: &[PathStep], field: String, hint: Option<String>) -> Fault {
        let error = Error::InvalidParameter { field, message: "is not a known key".to_owned(), hint };
        Fault::new(error, Some(pointer(self.pointer, path)))
    }

    /// Turns serde's message and path into an error of the wire.
    fn fault(&self, message: &str, mut path: Vec<PathStep>, names: &FieldNames<'_>) -> Fault {
        let explained = explain(message);
        let mut message = explained.message;
        if let Some(field) = explained.field {
            if let Some(twin) = explained.twice.then(|| self.twin(&field, &path, names)).flatten() {
                message = format!("and `{twin}` are two names of one field, give one of them");
            }
            path.push(PathStep::Key(field));
        }
        let field = if path.is_empty() { self.pointer.trim_start_matches('/').to_owned() } else { dotted(&path) };
        let field = if field.is_empty() { "the line".to_owned() } else { clip(field, QUOTE) };
        let error = Error::InvalidParameter { field, message, hint: explained.hint };
        Fault::new(error, Some(pointer(self.pointer, &path)))
    }

    /// The other name under which the request gives `field`.
    fn twin(&self, field: &str, path: &[PathStep], names: &FieldNames<'_>) -> Option<String> {
        let keys = keys_at(self.data, path)?;
        let twins: Vec<&String> =
            keys.iter().filter(|key| *key != field && (names.same)(path, field, key)).take(2).collect();
        twins.first().map(|twin| (*twin).clone())
    }
}

/// The field names of the type that is read.
struct FieldNames<'a> {
    fields: &'a dyn Fn(&[PathStep]) -> Option<StructShape>,
    same: &'a dyn Fn(&[PathStep], &str, &str) -> bool,
}

struct Parsed<T> {
    value: Result<T, (String, Vec<PathStep>)>,
    unknown: Vec<Vec<PathStep>>,
}

/// One of serde's messages in the words of the wire.
pub(crate) struct Explained {
    /// Follows the name of the field.
    pub(crate) message: String,
    hint: Option<String>,
    /// The field that the message itself names, below the path.
    field: Option<String>,
    twice: bool,
}

/// Rewords serde's message: what was expected, what was found.
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
            let got = if prefix == "invalid length " { format!("{got} elements") } else { found(got) };
            return plain(format!("must be {}, got {}", in_words(wanted), clip(got, QUOTE)));
        }
    }
    if message == "expected value" {
        return plain("must be one of the known names, got something else".to_owned());
    }
    plain(format!("cannot be read: {}", clip(message.to_owned(), QUOTE)))
}

/// The expected type in a client's words.
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

/// The value found, in a client's words.
fn found(got: &str) -> String {
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

/// The path of the first array at or below `path` that stands for a struct.
fn array_for_struct(
    text: &str,
    path: &mut Vec<PathStep>,
    fields: &dyn Fn(&[PathStep]) -> Option<StructShape>,
) -> Option<Vec<PathStep>> {
    let inside = |path: &mut Vec<PathStep>, step: PathStep, text: &str| {
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
            nested.into_iter().find_map(|(index, raw)| inside(path, PathStep::Index(index), raw.get()))
        }
        Some(b'{') => {
            let known = fields(path)?.fields;
            let object: BTreeMap<String, &RawValue> = serde_json::from_str(text).ok()?;
            let nested = object.iter().filter(|(key, _)| known.contains(&key.as_str()));
            nested.into_iter().find_map(|(key, raw)| inside(path, PathStep::Key(key.clone()), raw.get()))
        }
        _ => None,
    }
}

/// The keys of the object at `path` of `data`.
fn keys_at(data: &str, path: &[PathStep]) -> Option<Vec<String>> {
    match path.split_first() {
        None => {
            let object: BTreeMap<String, &RawValue> = serde_json::from_str(data).ok()?;
            Some(object.into_keys().collect())
        }
        Some((PathStep::Key(key), rest)) => {
            let object: BTreeMap<String, &RawValue> = serde_json::from_str(data).ok()?;
            keys_at(object.get(key)?.get(), rest)
        }
        Some((PathStep::Index(index), rest)) => {
            let array: Vec<&RawValue> = serde_json::from_str(data).ok()?;
            keys_at(array.get(*index)?.get(), rest)
        }
    }
}

fn steps_of_error(path: &serde_path_to_error::Path) -> Vec<PathStep> {
    use serde_path_to_error::Segment;
    path.iter()
        .filter_map(|segment| match segment {
            Segment::Seq { index } => Some(PathStep::Index(*index)),
            Segment::Map { key } => Some(PathStep::Key(key.clone())),
            Segment::Enum { .. } | Segment::Unknown => None,
        })
        .collect()
}

fn steps_of_ignored(path: &serde_ignored::Path<'_>) -> Vec<PathStep> {
    use serde_ignored::Path;
    let (parent, step) = match path {
        Path::Root => return Vec::new(),
        Path::Seq { parent, index } => (parent, Some(PathStep::Index(*index))),
        Path::Map { parent, key } => (parent, Some(PathStep::Key(key.clone()))),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => (parent, None),
    };
    let mut steps = steps_of_ignored(parent);
    steps.extend(step);
    steps
}

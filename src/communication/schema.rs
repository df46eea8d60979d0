//! The JSON Schema (2020-12) of the wire, generated from the types: one document for both directions.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};

use crate::communication::interface::{Communication, HeadKeys, PROTOCOL};
use crate::communication::responses::{ErrorLine, EventLine, ResultLine};
use crate::communication::workers::codec::path::PathStep;
use crate::communication::workers::codec::probe::{self, StructShape};
use crate::conditioning::interface::Conditioning;
use crate::device::interface::Device;
use crate::error::{Error, Result};
use crate::inference::interface::Inference;
use crate::layers::Interface;
use crate::model::interface::Model;
use crate::postprocessing::interface::Postprocessing;
use crate::scheduler::interface::Scheduler;

/// Depth down to which structs within `data` are searched.
const NESTING: usize = 4;

/// Generates the document. `$defs/RequestLine` describes strict requests, `$defs/OutputLine` every line of stdout.
///
/// # Errors
/// `internal` if a schema has no JSON form.
pub fn document() -> Result<Box<RawValue>> {
    to_raw_value(&value()).map_err(|e| Error::bug(format!("the schema has no JSON form: {e}")))
}

fn value() -> Value {
    let mut schemas = SchemaSettings::draft2020_12().into_generator();
    let mut requests = Vec::new();
    let mut shapes = Vec::new();
    collect::<Inference>(&mut schemas, &mut requests, &mut shapes);
    collect::<Model>(&mut schemas, &mut requests, &mut shapes);
    collect::<Conditioning>(&mut schemas, &mut requests, &mut shapes);
    collect::<Scheduler>(&mut schemas, &mut requests, &mut shapes);
    collect::<Postprocessing>(&mut schemas, &mut requests, &mut shapes);
    collect::<Device>(&mut schemas, &mut requests, &mut shapes);
    collect::<Communication>(&mut schemas, &mut requests, &mut shapes);
    let head = plain::<HeadKeys>(&mut schemas);
    let outputs = [
        schemas.subschema_for::<ResultLine<'static>>(),
        schemas.subschema_for::<ErrorLine<'static>>(),
        schemas.subschema_for::<EventLine<'static>>(),
    ];
    let mut defs = schemas.take_definitions(true);
    for shape in &shapes {
        if let Some(schema) = defs.get_mut(shape.name).and_then(Value::as_object_mut) {
            add_aliases(schema, shape);
        }
    }
    let head = head.get("properties").and_then(Value::as_object).cloned().unwrap_or_default();
    let mut lines = vec![shorthand(&head, defs.get("GenerateRequest"))];
    lines.extend(requests.iter().map(|request| request.line(&head)));
    defs.insert("RequestLine".to_owned(), json!({ "anyOf": lines }));
    defs.insert("OutputLine".to_owned(), json!({ "anyOf": outputs }));
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": format!("The wire of sdxl-worker, protocol {PROTOCOL}"),
        "description": "One line is one object: `RequestLine` on stdin, `OutputLine` on stdout.",
        "anyOf": [{ "$ref": "#/$defs/RequestLine" }, { "$ref": "#/$defs/OutputLine" }],
        "$defs": defs,
    })
}

/// The request of one operation.
struct OperationSchema {
    worker_type: &'static str,
    operation: &'static str,
    data: Value,
}

impl OperationSchema {
    fn line(&self, head: &Map<String, Value>) -> Value {
        let mut properties = head.clone();
        properties.insert("worker_type".to_owned(), json!({ "const": self.worker_type }));
        properties.insert("operation".to_owned(), json!({ "const": self.operation }));
        properties.insert("data".to_owned(), self.data.clone());
        json!({
            "type": "object",
            "properties": properties,
            "required": ["worker_type", "operation"],
            "additionalProperties": false,
        })
    }
}

fn collect<I: Interface<Request: JsonSchema>>(
    schemas: &mut SchemaGenerator,
    requests: &mut Vec<OperationSchema>,
    shapes: &mut Vec<Aliased>,
) {
    let variants = plain::<I::Request>(schemas);
    let variants = variants.get("oneOf").and_then(Value::as_array).cloned().unwrap_or_default();
    for operation in I::OPERATIONS {
        let data = variants.iter().find_map(|variant| variant.get("properties")?.get(operation).cloned());
        requests.push(OperationSchema { worker_type: I::DOMAIN.name(), operation, data: data.unwrap_or(json!(true)) });
        find_aliases::<I>(operation, &mut Vec::new(), shapes);
    }
}

/// The schema of `T` itself, not a reference to it.
fn plain<T: JsonSchema>(schemas: &mut SchemaGenerator) -> Value {
    T::json_schema(schemas).to_value()
}

/// A struct and its aliases.
struct Aliased {
    name: &'static str,
    /// Pairs of names of the same field.
    pairs: Vec<(&'static str, &'static str)>,
}

/// Collects the structs of an operation's data and their aliases.
fn find_aliases<I: Interface>(operation: &'static str, path: &mut Vec<PathStep>, found: &mut Vec<Aliased>) {
    let Some(StructShape { name, fields }) = probe::fields::<I::Request>(Some(operation), path) else {
        // The elements of an array are one level deeper.
        if path.last() != Some(&PathStep::Index(0)) && !path.is_empty() && path.len() < 2 * NESTING {
            path.push(PathStep::Index(0));
            find_aliases::<I>(operation, path, found);
            path.pop();
        }
        return;
    };
    if found.iter().any(|known| known.name == name) {
        return;
    }
    let mut pairs = Vec::new();
    for (index, a) in fields.iter().enumerate() {
        for b in fields.iter().skip(index + 1) {
            if probe::same_field::<I::Request>(Some(operation), path, a, b) {
                pairs.push((*a, *b));
            }
        }
    }
    found.push(Aliased { name, pairs });
    for field in fields {
        path.push(PathStep::Key((*field).to_owned()));
        find_aliases::<I>(operation, path, found);
        path.pop();
    }
}

/// Adds every alias as a property that excludes its field.
fn add_aliases(schema: &mut Map<String, Value>, shape: &Aliased) {
    let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) else { return };
    let mut exclusive = Vec::new();
    for (a, b) in &shape.pairs {
        exclusive.push(json!({ "not": { "required": [a, b] } }));
        let (known, alias) = if properties.contains_key(*a) { (a, b) } else { (b, a) };
        if let Some(schema) = properties.get(*known).cloned() {
            properties.entry((*alias).to_owned()).or_insert(schema);
        }
    }
    if !exclusive.is_empty() {
        schema.insert("allOf".to_owned(), Value::Array(exclusive));
    }
}

/// The short form: a generation with its fields at the top of the line.
fn shorthand(head: &Map<String, Value>, generate: Option<&Value>) -> Value {
    let mut line = generate.and_then(Value::as_object).cloned().unwrap_or_default();
    if let Some(properties) = line.get_mut("properties").and_then(Value::as_object_mut) {
        properties.extend(head.clone());
        properties.remove("operation");
        properties.insert("worker_type".to_owned(), json!({ "const": "inference" }));
    }
    line.insert("description".to_owned(), json!("Shorthand for `inference.generate`."));
    line.insert("required".to_owned(), json!(["prompt"]));
    Value::Object(line)
}

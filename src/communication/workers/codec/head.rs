//! Reads the head of a request line: every key but `data`.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::communication::interface::{EventOptions, Head, MAX_ID_CHARS, MAX_PRIORITY, MAX_TIMEOUT_MS, operations};
use crate::communication::responses::Warning;
use crate::communication::workers::codec::body::{Body, explain};
use crate::communication::workers::codec::fault::Fault;
use crate::communication::workers::codec::path::{PathStep, pointer};
use crate::error::{Error, nearest};
use crate::layers::Domain;

/// Every key of a head. In a shorthand line all of them but `data` and `operation` act as head.
const KEYS: [&str; 9] =
    ["request_id", "worker_type", "operation", "data", "priority", "timeout_ms", "idempotency_key", "events", "strict"];

pub(crate) struct SplitLine {
    pub(crate) head: Head,
    /// The text of `data`.
    pub(crate) data: String,
    pub(crate) warnings: Vec<Warning>,
}

pub(crate) fn read(text: &str, fallback_id: &str) -> Result<SplitLine, Fault> {
    let mut line: LineKeys<'_> = serde_json::from_str(text)
        .map_err(|e| Fault::request(format!("the line {}", explain(&e.to_string()).message), Some(String::new())))?;
    let request_id = line.take::<String>("request_id")?;
    if let Some(id) = &request_id {
        check_id("request_id", id)?;
    }
    let strict = line.take::<bool>("strict")?.unwrap_or(true);
    let priority = line.number("priority", -MAX_PRIORITY, MAX_PRIORITY)?.unwrap_or(0);
    let timeout_ms = line.number("timeout_ms", 1, MAX_TIMEOUT_MS)?.map(i64::unsigned_abs);
    let idempotency_key = line.take::<String>("idempotency_key")?;
    if let Some(key) = &idempotency_key {
        check_id("idempotency_key", key)?;
    }
    let mut warnings = Vec::new();
    let events = line.0.remove("events").filter(|raw| raw.get() != "null");
    let events = events.map(|raw| read_events(raw, strict, &mut warnings)).transpose()?;
    let operation = line.take::<String>("operation")?;
    let worker_type = line.take::<String>("worker_type")?;
    let shorthand = operation.is_none()
        && worker_type.as_deref().is_none_or(|name| name == Domain::Inference.name())
        && line.0.contains_key("prompt");
    let (worker_type, operation, data) = if shorthand {
        (Domain::Inference, "generate".to_owned(), line.rest())
    } else {
        let data = line.0.remove("data").map_or_else(|| "{}".to_owned(), |raw| raw.get().to_owned());
        line.refuse_rest(strict, &mut warnings)?;
        let operation = operation.ok_or_else(|| missing("operation", "name one, or send an object with `prompt`"))?;
        (read_domain(worker_type, &operation)?, operation, data)
    };
    let request_id = request_id.unwrap_or_else(|| fallback_id.to_owned());
    let head =
        Head { request_id, worker_type, operation, priority, timeout_ms, idempotency_key, events, strict, shorthand };
    Ok(SplitLine { head, data, warnings })
}

/// Checks that an id has 1 to 256 characters and no control characters.
pub(crate) fn check_id(key: &str, id: &str) -> Result<(), Fault> {
    let count = id.chars().count();
    let blame = |what: String| Err(Fault::request(format!("`{key}` {what}"), Some(format!("/{key}"))));
    if count == 0 || count > MAX_ID_CHARS {
        return blame(format!("must have 1 to {MAX_ID_CHARS} characters, got {count}"));
    }
    if id.chars().any(char::is_control) {
        return blame("must have no control characters".to_owned());
    }
    Ok(())
}

/// The keys of the line that have not been read yet.
#[derive(serde::Deserialize)]
struct LineKeys<'a>(#[serde(borrow)] BTreeMap<String, &'a RawValue>);

impl LineKeys<'_> {
    /// Removes and reads a key; `None` if it is absent or null.
    fn take<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>, Fault> {
        let Some(raw) = self.0.remove(key) else { return Ok(None) };
        serde_json::from_str(raw.get()).map_err(|e| {
            Fault::request(format!("`{key}` {}", explain(&e.to_string()).message), Some(format!("/{key}")))
        })
    }

    fn number(&mut self, key: &str, low: i64, high: i64) -> Result<Option<i64>, Fault> {
        let number = self.take::<i64>(key)?;
        if let Some(number) = number.filter(|number| !(low..=high).contains(number)) {
            let message = format!("`{key}` must be between {low} and {high}, got {number}");
            return Err(Fault::request(message, Some(format!("/{key}"))));
        }
        Ok(number)
    }

    /// The remaining keys as one object.
    fn rest(&self) -> String {
        let mut text = String::from("{");
        for (key, raw) in &self.0 {
            if text.len() > 1 {
                text.push(',');
            }
            // A string always has a JSON form.
            text.push_str(&serde_json::to_string(key).unwrap_or_default());
            text.push(':');
            text.push_str(raw.get());
        }
        text.push('}');
        text
    }

    fn refuse_rest(&self, strict: bool, warnings: &mut Vec<Warning>) -> Result<(), Fault> {
        for key in self.0.keys() {
            let at = pointer("", &[PathStep::Key(key.clone())]);
            let hint = nearest(key, KEYS).map(|name| format!("did you mean `{name}`?"));
            if strict {
                let message = format!("a request line has no key `{key}`");
                return Err(Error::InvalidRequest { message, pointer: Some(at), hint }.into());
            }
            let message = format!("unknown key `{key}` was ignored");
            warnings.push(Warning::new(message, Some(at)));
        }
        Ok(())
    }
}

fn read_domain(worker_type: Option<String>, operation: &str) -> Result<Domain, Fault> {
    let owner = operations().find(|(_, name)| *name == operation);
    let Some(name) = worker_type else {
        let hint = owner.map_or_else(
            || "name one of the domains".to_owned(),
            |(domain, _)| format!("did you mean worker_type `{}`?", domain.name()),
        );
        return Err(missing("worker_type", &hint));
    };
    Domain::from_name(&name).ok_or_else(|| {
        let likely = nearest(&name, Domain::ALL.iter().map(|domain| domain.name()));
        let likely = likely.or_else(|| owner.map(|(domain, _)| domain.name().to_owned()));
        let hint = likely.map(|name| format!("did you mean worker_type `{name}`?"));
        let error = Error::UnknownOperation { worker_type: name, operation: operation.to_owned(), hint };
        Fault::new(error, Some("/worker_type".to_owned()))
    })
}

fn missing(key: &str, hint: &str) -> Fault {
    let (message, pointer) = (format!("`{key}` is missing"), Some(format!("/{key}")));
    Error::InvalidRequest { message, pointer, hint: Some(hint.to_owned()) }.into()
}

fn read_events(raw: &RawValue, strict: bool, warnings: &mut Vec<Warning>) -> Result<EventOptions, Fault> {
    let body = Body { operation: "", data: raw.get(), pointer: "/events", strict, foreign: &[] };
    let options: EventOptions = body.read_plain(warnings).map_err(into_request)?;
    if let Some(preview) = options.preview {
        let ranges = [("every", preview.every, 1, 1000), ("max_side", preview.max_side, 16, 2048)];
        for (key, got, low, high) in ranges {
            if !(low..=high).contains(&got) {
                let message = format!("`{key}` must be between {low} and {high}, got {got}");
                return Err(Fault::request(message, Some(format!("/events/preview/{key}"))));
            }
        }
    }
    Ok(options)
}

/// A fault in the head concerns the line, not a parameter.
fn into_request(fault: Fault) -> Fault {
    let hint = fault.error.hint();
    let message = fault.error.to_string();
    Error::InvalidRequest { message, pointer: fault.pointer, hint }.into()
}

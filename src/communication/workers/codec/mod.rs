//! One line of bytes to a head and a typed request.
//!
//! Three passes: [`scan`] proves the whole line to be sound JSON and finds its id, [`head`] reads what stands beside
//! `data`, [`body`] reads `data` into the type of the operation.

pub mod body;
pub(crate) mod head;
pub mod probe;
pub(crate) mod scan;

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::communication::interface::{self, Communication, Head, TABLE};
use crate::communication::responses::Warning;
use crate::conditioning::interface::Conditioning;
use crate::device::interface::Device;
use crate::error::{Error, nearest};
use crate::inference::interface::Inference;
use crate::layers::{Domain, Interface};
use crate::model::interface::Model;
use crate::postprocessing::interface::Postprocessing;
use crate::runtime::dispatch::Call;
use crate::scheduler::interface::Scheduler;
use body::Body;

/// Fields of AUTOMATIC1111 and diffusers that generation knows of and does not do yet: `unsupported_feature`, and not
/// an unknown key.
const FIELDS_TO_COME: &[&str] = &["control_image", "ip_adapter_image"];

/// A request line that was understood.
#[derive(Debug)]
pub struct Decoded {
    pub head: Head,
    pub ask: Ask,
    pub warnings: Vec<Warning>,
    /// Of operation and data: two requests with one idempotency key must agree in it.
    pub fingerprint: u64,
}

/// Above the lane, or below it.
#[derive(Debug)]
pub enum Ask {
    Control(Box<interface::Request>),
    Call(Box<Call>),
}

/// An error and where in the line it stands.
#[derive(Debug)]
pub struct Fault {
    pub error: Box<Error>,
    /// In place of the error's own.
    pub pointer: Option<String>,
}

impl Fault {
    pub(crate) fn request(message: impl Into<String>, pointer: Option<String>) -> Self {
        let error = Error::InvalidRequest { message: message.into(), pointer, hint: None };
        Self { error: error.into(), pointer: None }
    }
}

/// A line that was not understood, and whom to tell.
#[derive(Debug)]
pub struct Refused {
    pub request_id: String,
    pub fault: Fault,
}

/// `line` is without its newline; `fallback_id` is the answer's id where the line names none.
///
/// # Errors
/// What is wrong with the line, under the line's own id wherever that can be read.
pub fn decode(line: &[u8], fallback_id: &str) -> Result<Decoded, Refused> {
    let refuse = |request_id: &str, fault: Fault| Refused { request_id: request_id.to_owned(), fault };
    let text = std::str::from_utf8(line).map_err(|e| {
        let error = Error::InvalidUtf8 { offset: e.valid_up_to() };
        refuse(fallback_id, Fault { error: error.into(), pointer: None })
    })?;
    let scanned = scan::scan(text);
    let request_id = scanned.request_id.filter(|id| head::check_id("request_id", id).is_ok());
    let request_id = request_id.as_deref().unwrap_or(fallback_id);
    let sound = scanned.fault.map_or(Ok(()), Err);
    sound.and_then(|()| understand(text, fallback_id)).map_err(|fault| refuse(request_id, fault))
}

fn understand(text: &str, fallback_id: &str) -> Result<Decoded, Fault> {
    let head::Read { head, data, mut warnings } = head::read(text, fallback_id)?;
    check_operation(&head)?;
    let body = Body {
        operation: &head.operation,
        data: &data,
        pointer: if head.shorthand { "" } else { "/data" },
        strict: head.strict,
        to_come: if head.worker_type == Domain::Inference || head.operation == "estimate" {
            FIELDS_TO_COME
        } else {
            &[]
        },
    };
    let ask = match head.worker_type {
        Domain::Communication => match read::<Communication>(&body, &mut warnings)? {
            interface::Request::Estimate(request) => Ask::Call(Box::new(Call::Estimate(request))),
            request => Ask::Control(Box::new(request)),
        },
        Domain::Device => call(Call::Device(read::<Device>(&body, &mut warnings)?)),
        Domain::Scheduler => call(Call::Scheduler(read::<Scheduler>(&body, &mut warnings)?)),
        Domain::Model => call(Call::Model(read::<Model>(&body, &mut warnings)?)),
        Domain::Conditioning => call(Call::Conditioning(read::<Conditioning>(&body, &mut warnings)?)),
        Domain::Postprocessing => call(Call::Postprocessing(read::<Postprocessing>(&body, &mut warnings)?)),
        Domain::Inference => call(Call::Inference(read::<Inference>(&body, &mut warnings)?)),
    };
    let mut hasher = DefaultHasher::new();
    (head.worker_type, &head.operation, &data).hash(&mut hasher);
    Ok(Decoded { head, ask, warnings, fingerprint: hasher.finish() })
}

fn call(call: Call) -> Ask {
    Ask::Call(Box::new(call))
}

fn read<I: Interface>(body: &Body<'_>, warnings: &mut Vec<Warning>) -> Result<I::Request, Fault> {
    if !I::OPERATIONS.contains(&body.operation) {
        let what = format!("`{}.{}`", I::DOMAIN.name(), body.operation);
        let hint = format!("this worker performs {}", quoted(I::OPERATIONS));
        let error = Error::UnsupportedFeature { what, hint: Some(hint), field: None };
        return Err(Fault { error: error.into(), pointer: Some("/operation".to_owned()) });
    }
    body.read(warnings)
}

/// Whether the protocol knows the operation at all.
fn check_operation(head: &Head) -> Result<(), Fault> {
    let operations = TABLE.iter().find(|(domain, _)| *domain == head.worker_type).map_or(&[][..], |(_, names)| names);
    if operations.contains(&head.operation.as_str()) {
        return Ok(());
    }
    let elsewhere = TABLE.iter().find(|(_, names)| names.contains(&head.operation.as_str()));
    let hint = match (nearest(&head.operation, operations.iter().copied()), elsewhere) {
        (Some(name), _) => format!("did you mean `{name}`?"),
        (None, Some((domain, _))) => format!("did you mean worker_type `{}`?", domain.name()),
        (None, None) => format!("it has {}", quoted(operations)),
    };
    let error = Error::UnknownOperation {
        worker_type: head.worker_type.name().to_owned(),
        operation: head.operation.clone(),
        hint: Some(hint),
    };
    Err(Fault { error: error.into(), pointer: None })
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// One step into JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Key(String),
    Index(usize),
}

/// `path` as a JSON pointer (RFC 6901) below `start`.
fn pointer(start: &str, path: &[Step]) -> String {
    let mut pointer = start.to_owned();
    for step in path {
        pointer.push('/');
        match step {
            Step::Key(key) => pointer.push_str(&key.replace('~', "~0").replace('/', "~1")),
            Step::Index(index) => pointer.push_str(&index.to_string()),
        }
    }
    pointer
}

/// `path` for people: `requests.0.steps`.
fn dotted(path: &[Step]) -> String {
    let names = path.iter().map(|step| match step {
        Step::Key(key) => key.clone(),
        Step::Index(index) => index.to_string(),
    });
    names.collect::<Vec<_>>().join(".")
}

//! Turns one line of bytes into a head and a typed request.
//!
//! Three passes: `scan` checks that the whole line is sound JSON and finds its id, `head` reads every key but `data`,
//! and `body` reads `data` into the type of the operation.

pub mod body;
pub mod fault;
pub(crate) mod head;
pub mod path;
pub mod probe;
pub(crate) mod scan;
mod tagged;

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::communication::interface::{self, Communication, Head};
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
use body::{Body, ForeignField};
use fault::Fault;

/// Arguments of diffusers' pipelines that a generation takes under another name.
const FOREIGN_FIELDS: &[ForeignField] = &[
    ForeignField { name: "control_image", hint: "use `controlnet`, whose entries have a `model` and an `image`" },
    ForeignField { name: "ip_adapter_image", hint: "use `ip_adapter`, whose entries have a `model` and an `image`" },
];

/// A request line that was understood.
#[derive(Debug)]
pub struct Decoded {
    pub head: Head,
    pub request: RoutedRequest,
    pub warnings: Vec<Warning>,
    /// Hash of operation and data, in which two requests with one idempotency key must agree.
    pub fingerprint: u64,
}

/// A request, by the side of the lane boundary that carries it out.
#[derive(Debug)]
pub enum RoutedRequest {
    /// The event loop answers it at once.
    Control(Box<interface::Request>),
    /// A lane carries it out.
    Call(Box<Call>),
}

/// A line that was not understood, and the id to answer under.
#[derive(Debug)]
pub struct Refused {
    pub request_id: String,
    pub fault: Fault,
}

/// Decodes `line`, which has no newline. The answer gets `fallback_id` if the line names no id.
///
/// # Errors
/// The line's fault, under the line's own id wherever that can be read.
pub fn decode(line: &[u8], fallback_id: &str) -> Result<Decoded, Refused> {
    let refuse = |request_id: &str, fault: Fault| Refused { request_id: request_id.to_owned(), fault };
    let text = std::str::from_utf8(line).map_err(|e| {
        let error = Error::InvalidUtf8 { offset: e.valid_up_to() };
        refuse(fallback_id, error.into())
    })?;
    let scanned = scan::scan(text);
    let request_id = scanned.request_id.filter(|id| head::check_id("request_id", id).is_ok());
    let request_id = request_id.as_deref().unwrap_or(fallback_id);
    let sound = scanned.fault.map_or(Ok(()), Err);
    sound.and_then(|()| understand(text, fallback_id)).map_err(|fault| refuse(request_id, fault))
}

fn understand(text: &str, fallback_id: &str) -> Result<Decoded, Fault> {
    let head::SplitLine { head, data, mut warnings } = head::read(text, fallback_id)?;
    check_operation(&head)?;
    let body = Body {
        operation: &head.operation,
        data: &data,
        pointer: if head.shorthand { "" } else { "/data" },
        strict: head.strict,
        foreign: if head.worker_type == Domain::Inference || head.operation == "estimate" {
            FOREIGN_FIELDS
        } else {
            &[]
        },
    };
    let request = match head.worker_type {
        Domain::Communication => match read::<Communication>(&body, &mut warnings)? {
            interface::Request::Estimate(request) => RoutedRequest::Call(Box::new(Call::Estimate(request))),
            request => RoutedRequest::Control(Box::new(request)),
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
    Ok(Decoded { head, request, warnings, fingerprint: hasher.finish() })
}

fn call(call: Call) -> RoutedRequest {
    RoutedRequest::Call(Box::new(call))
}

fn read<I: Interface>(body: &Body<'_>, warnings: &mut Vec<Warning>) -> Result<I::Request, Fault> {
    if !I::OPERATIONS.contains(&body.operation) {
        let what = format!("`{}.{}`", I::DOMAIN.name(), body.operation);
        let hint = format!("this worker performs {}", quoted(I::OPERATIONS));
        let error = Error::UnsupportedFeature { what, hint: Some(hint), field: None };
        return Err(Fault::new(error, Some("/operation".to_owned())));
    }
    body.read(warnings)
}

/// Checks that the protocol names the operation.
fn check_operation(head: &Head) -> Result<(), Fault> {
    let own = interface::operations().filter(|(domain, _)| *domain == head.worker_type);
    let operations: Vec<&str> = own.map(|(_, name)| name).collect();
    if operations.contains(&head.operation.as_str()) {
        return Ok(());
    }
    let elsewhere = interface::operations().find(|(_, name)| *name == head.operation);
    let hint = match (nearest(&head.operation, operations.iter().copied()), elsewhere) {
        (Some(name), _) => format!("did you mean `{name}`?"),
        (None, Some((domain, _))) => format!("did you mean worker_type `{}`?", domain.name()),
        (None, None) => format!("it has {}", quoted(&operations)),
    };
    let error = Error::UnknownOperation {
        worker_type: head.worker_type.name().to_owned(),
        operation: head.operation.clone(),
        hint: Some(hint),
    };
    Err(error.into())
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

//! Fields that an operation requires, and fields that belong to another one.

use crate::error::{Error, Result};
use crate::inference::interface::{BatchRequest, Request};
use crate::inference::plan::GenerationPlan;
use crate::inference::plan::limits::refuse_given;
use crate::inference::request::generate::GenerateRequest;

/// Operations that make the images of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Generate,
    Text2image,
    Img2img,
    Inpaint,
    Controlnet,
    Lora,
}

impl Operation {
    /// The operation and its request, or a batch of several.
    ///
    /// # Errors
    /// The batch.
    pub(crate) fn of(request: Request) -> std::result::Result<(Self, Box<GenerateRequest>), BatchRequest> {
        match request {
            Request::Generate(request) => Ok((Self::Generate, request)),
            Request::Text2image(request) => Ok((Self::Text2image, request)),
            Request::Img2img(request) => Ok((Self::Img2img, request)),
            Request::Inpaint(request) => Ok((Self::Inpaint, request)),
            Request::Controlnet(request) => Ok((Self::Controlnet, request)),
            Request::Lora(request) => Ok((Self::Lora, request)),
            Request::Batch(batch) => Err(batch),
        }
    }

    /// Checks a request before it is planned.
    ///
    /// # Errors
    /// `invalid_parameter` for fields that are missing or belong to another operation.
    pub(super) fn check(self, request: &GenerateRequest) -> Result<()> {
        let init_image = ("init_image", request.init_image.is_some());
        let mask = ("mask", request.mask.is_some());
        match self {
            Self::Generate | Self::Lora => Ok(()),
            Self::Text2image => refuse_given(&[init_image, mask], "does not belong to `text2image`"),
            Self::Img2img => {
                require("img2img", init_image)?;
                refuse_given(&[mask], "does not belong to `img2img`")
            }
            Self::Inpaint => {
                require("inpaint", init_image)?;
                require("inpaint", ("mask", request.mask.is_some() || request.extend.is_some()))
            }
            Self::Controlnet => {
                let given = request.controlnet.as_ref().is_some_and(|entries| !entries.0.is_empty());
                require("controlnet", ("controlnet", given))
            }
        }
    }

    /// Checks the plan: prompts name LoRAs too.
    ///
    /// # Errors
    /// `invalid_parameter` if LoRAs are missing.
    pub(super) fn check_plan(self, plan: &GenerationPlan) -> Result<()> {
        match self {
            Self::Lora => require("lora", ("loras", !plan.loras.is_empty())),
            _ => Ok(()),
        }
    }
}

fn require(operation: &str, (field, given): (&str, bool)) -> Result<()> {
    if given { Ok(()) } else { Err(Error::invalid(field, format!("is missing: `{operation}` needs it"))) }
}

//! ControlNets of a request: which network gets which image, how strongly and when.

use std::sync::Arc;

use crate::conditioning::hints::HintOptions;
use crate::conditioning::instructor::ConditioningInstructor;
use crate::error::{Error, Result};
use crate::inference::plan::ControlNetPlan;
use crate::inference::plan::limits::within;
use crate::inference::request::controlnet::{ControlNetOptions, MAX_CONTROLNETS};
use crate::layers::OneOrMany;
use crate::model::catalog::Catalog;
use crate::model::networks::controlnet_config::kind;

/// Plans the ControlNets of a request in their order.
///
/// # Errors
/// A value that cannot be used, a network that cannot be found, an image that cannot be read.
pub(crate) fn controlnets(
    requested: Option<&OneOrMany<ControlNetOptions>>,
    conditioning: &ConditioningInstructor,
    catalog: &Catalog,
) -> Result<Vec<ControlNetPlan>> {
    let Some(OneOrMany(entries)) = requested else { return Ok(Vec::new()) };
    if entries.len() > MAX_CONTROLNETS {
        let message = format!("must hold at most {MAX_CONTROLNETS} networks, got {}", entries.len());
        return Err(Error::invalid("controlnet", message));
    }
    let mut plans: Vec<ControlNetPlan> = Vec::with_capacity(entries.len());
    for options in entries {
        let plan = controlnet(options, &plans, conditioning, catalog);
        plans.push(plan.map_err(|error| error.below(&format!("controlnet.{}", plans.len())))?);
    }
    Ok(plans)
}

/// Plans the entry after `earlier`.
fn controlnet(
    options: &ControlNetOptions,
    earlier: &[ControlNetPlan],
    conditioning: &ConditioningInstructor,
    catalog: &Catalog,
) -> Result<ControlNetPlan> {
    let missing = |field: &str, what: &str| Error::invalid(field, format!("is missing: {what}"));
    let name = options.model.as_deref().ok_or_else(|| missing("model", "name a ControlNet under the model roots"))?;
    let image = options.image.as_ref().ok_or_else(|| missing("image", "give what the ControlNet is shown"))?;
    let start = within("start", options.start.unwrap_or(0.0), 0.0, 1.0)?;
    let end = within("end", options.end.unwrap_or(1.0), 0.0, 1.0)?;
    if start >= end {
        return Err(Error::invalid("end", format!("must be above `start`, {start}, got {end}")));
    }
    let weight = within("weight", options.weight.unwrap_or(1.0), 0.0, 2.0)?;
    let control_type =
        options.control_type.as_deref().map(kind).transpose().map_err(|error| error.at("control_type"))?;
    let known = earlier.iter().find(|plan| plan.file.name == name).map(|plan| Arc::clone(&plan.file));
    let file = match known {
        Some(file) => file,
        None => Arc::new(catalog.component_file(name, "model")?),
    };
    let hint = conditioning.plan_hint(&HintOptions {
        image,
        preprocessor: options.preprocessor.as_deref(),
        parameters: &options.parameters.unwrap_or_default(),
        resize: options.resize_mode.unwrap_or_default(),
        fields: ["image", "preprocessor", "parameters"],
    })?;
    let guess_mode = options.guess_mode.unwrap_or(false);
    Ok(ControlNetPlan { index: earlier.len(), file, hint, control_type, weight, start, end, guess_mode })
}

//! ControlNets of a generation: from what a request says to a plan, and from the plan to networks that have seen their
//! images.

use std::sync::Arc;

use crate::conditioning::hints::{Hint, HintOptions};
use crate::conditioning::init_image::Cut;
use crate::conditioning::interface::CacheCount;
use crate::context::Context;
use crate::device::instructor::Placement;
use crate::error::{Error, Result};
use crate::inference::instructor::InferenceInstructor;
use crate::inference::interface::GenerateRequest;
use crate::inference::plan::build::within;
use crate::inference::plan::{ControlPlan, GenerationPlan};
use crate::inference::request::controlnet::{ControlNetOptions, MOST};
use crate::inference::workers::control::{Control, Controls, Shown};
use crate::layers::OneOrMany;
use crate::layers::Resident;
use crate::managers::Managers;
use crate::model::checkpoint::Checkpoint;
use crate::model::networks::controlnet::ControlNet;
use crate::model::networks::controlnet_config::kind;
use crate::units::ImageSize;

/// A run over latents that ControlNets may steer.
#[derive(Clone, Copy)]
pub(crate) struct ControlledRun<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) size: ImageSize,
    pub(crate) placement: &'a Placement,
    /// Whether it goes on from latents that are half denoised.
    pub(crate) refines: bool,
    /// What of the images is shown, where it is not all.
    pub(crate) cut: Option<Cut>,
}

impl InferenceInstructor {
    /// Decides what `request` leaves open of its ControlNets, and reads the headers of their images.
    ///
    /// # Errors
    /// A value that cannot be used, a network that cannot be found, an image that cannot be read.
    pub(crate) fn controls(&self, request: &GenerateRequest, resources: &mut Managers) -> Result<Vec<ControlPlan>> {
        let Some(OneOrMany(entries)) = &request.controlnet else { return Ok(Vec::new()) };
        if entries.len() > MOST {
            return Err(Error::invalid(
                "controlnet",
                format!("must hold at most {MOST} networks, got {}", entries.len()),
            ));
        }
        let mut plans: Vec<ControlPlan> = Vec::with_capacity(entries.len());
        for (index, options) in entries.iter().enumerate() {
            let plan = self.control(options, index, &plans, resources);
            plans.push(plan.map_err(|error| error.below(&format!("controlnet.{index}")))?);
        }
        Ok(plans)
    }

    fn control(
        &self,
        options: &ControlNetOptions,
        index: usize,
        before: &[ControlPlan],
        resources: &mut Managers,
    ) -> Result<ControlPlan> {
        let missing = |field: &str, what: &str| Error::invalid(field, format!("is missing: {what}"));
        let name =
            options.model.as_deref().ok_or_else(|| missing("model", "name a ControlNet beneath the model roots"))?;
        let image = options.image.as_ref().ok_or_else(|| missing("image", "give what the ControlNet is shown"))?;
        let (start, end) = (options.start.unwrap_or(0.0), options.end.unwrap_or(1.0));
        let (start, end) = (within("start", start, 0.0, 1.0)?, within("end", end, 0.0, 1.0)?);
        if start >= end {
            return Err(Error::invalid("end", format!("must be above `start`, {start}, got {end}")));
        }
        let weight = within("weight", options.weight.unwrap_or(1.0), 0.0, 2.0)?;
        let kind = options.control_type.as_deref().map(kind).transpose().map_err(|error| error.at("control_type"))?;
        let known = before.iter().find(|plan| plan.net.name == name).map(|plan| Arc::clone(&plan.net));
        let net = match known {
            Some(net) => net,
            None => Arc::new(resources.model().catalog.component_file(name, "model")?),
        };
        let hint = self.conditioning.plan_hint(&HintOptions {
            image,
            preprocessor: options.preprocessor.as_deref(),
            parameters: &options.parameters.unwrap_or_default(),
            resize: options.resize_mode.unwrap_or_default(),
            fields: ["image", "preprocessor", "parameters"],
        })?;
        Ok(ControlPlan { index, net, hint, kind, weight, start, end, guess: options.guess_mode.unwrap_or(false) })
    }

    /// Every ControlNet of the plan, loaded, having seen its images. A refiner's run has none.
    /// Networks of `earlier` runs are not loaded again.
    ///
    /// # Errors
    /// Those of loading; `invalid_parameter` for a union that is not told what its image is; those of the device.
    pub(crate) fn prepare_controls(
        &self,
        plan: &GenerationPlan,
        run: ControlledRun<'_>,
        (earlier, count): (&[&Controls], &mut CacheCount),
        resources: &mut Managers,
        ctx: &Context,
    ) -> Result<Controls> {
        let ControlledRun { checkpoint, size, placement, refines, cut } = run;
        if refines || checkpoint.key != plan.checkpoint.key {
            return Ok(Controls::default());
        }
        let mut controls: Vec<Control> = Vec::new();
        for options in &plan.controls {
            let key = options.net.key;
            let held = controls.iter().chain(earlier.iter().flat_map(|controls| &controls.0));
            let held = held.filter(|control| control.key == key).map(|control| Arc::clone(&control.net)).next();
            let net = match held {
                Some(net) => net,
                None => resources.model().controlnets.acquire(&options.net, checkpoint, placement, ctx)?,
            };
            let kind = place(options, &net, ctx)?;
            let Hint { image, cached } =
                self.conditioning.hint(&options.hint, (size, cut), &mut resources.conditioning, ctx)?;
            *(if cached { &mut count.hits } else { &mut count.misses }) += 1;
            let embedded = net.embed(&image.to_unit_tensor(&placement.device)?, placement.compute.tensor())?;
            let shown = Shown { embedded, kind, weight: options.weight, start: options.start, end: options.end };
            let is_shown_all = |control: &&mut Control| control.net.kinds().is_some() && control.guess == options.guess;
            match controls.iter_mut().filter(|control| control.key == key).find(is_shown_all) {
                Some(control) => control.shown.push(shown),
                None => controls.push(Control { net, key, shown: vec![shown], guess: options.guess }),
            }
        }
        Ok(Controls(controls))
    }
}

/// What a union is told of an image.
fn place(options: &ControlPlan, net: &ControlNet, ctx: &Context) -> Result<Option<usize>> {
    let field = format!("controlnet.{}.control_type", options.index);
    match (net.kinds(), options.kind) {
        (None, None) => Ok(None),
        (None, Some(_)) => {
            ctx.warn(format!("`{field}` has no effect: `{}` is no ControlNet Union", options.net.name));
            Ok(None)
        }
        (Some(_), None) => Err(Error::invalid(field, "is missing: a ControlNet Union must be told what its image is")),
        (Some(kinds), Some(kind)) if kind < kinds => Ok(Some(kind)),
        (Some(kinds), Some(_)) => {
            Err(Error::invalid(field, format!("is beyond the {kinds} types that `{}` knows", options.net.name)))
        }
    }
}

/// What a request says, with every value that was decided.
pub(crate) fn said(request: &GenerateRequest, plans: &[ControlPlan]) -> Option<OneOrMany<ControlNetOptions>> {
    let OneOrMany(entries) = request.controlnet.as_ref()?;
    let decided = |(options, plan): (&ControlNetOptions, &ControlPlan)| ControlNetOptions {
        preprocessor: Some(plan.hint.preprocessor.to_owned()),
        parameters: options.parameters.map(|_| plan.hint.parameters),
        weight: Some(plan.weight),
        start: Some(plan.start),
        end: Some(plan.end),
        guess_mode: Some(plan.guess),
        resize_mode: Some(plan.hint.resize),
        ..options.clone()
    };
    Some(OneOrMany(entries.iter().zip(plans).map(decided).collect()))
}

/// Whether something in memory is a network of the generation.
pub(crate) fn is_of(plan: &GenerationPlan, resident: &Resident) -> bool {
    let control = || plan.controls.iter().any(|control| control.net.name == resident.name);
    let adapter = || plan.adapters.names().any(|name| name == resident.name);
    let other = || plan.further.iter().any(|further| further.checkpoint.name == resident.name);
    resident.name == plan.checkpoint.name || other() || (resident.kind == "controlnet" && control()) || adapter()
}

/// A ControlNet in an image's text, as AUTOMATIC1111's extension has it.
pub(crate) fn told(plan: &ControlPlan) -> (&'static str, String) {
    const KEYS: [&str; MOST] = [
        "ControlNet 0",
        "ControlNet 1",
        "ControlNet 2",
        "ControlNet 3",
        "ControlNet 4",
        "ControlNet 5",
        "ControlNet 6",
        "ControlNet 7",
    ];
    let ControlPlan { net, hint, weight, start, end, guess, .. } = plan;
    let guess = if *guess { ", Guess Mode: True" } else { "" };
    let (preprocessor, name) = (hint.preprocessor, &net.name);
    let told = format!(
        "\"Module: {preprocessor}, Model: {name}, Weight: {weight}, Guidance Start: {start}, Guidance End: {end}{guess}\""
    );
    (KEYS.get(plan.index).copied().unwrap_or("ControlNet"), told)
}

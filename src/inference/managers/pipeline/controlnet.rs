//! Loads the ControlNets of a pass and embeds their images.

use std::sync::Arc;

use crate::conditioning::hints::{Hint, HintTarget};
use crate::conditioning::init_image::Cut;
use crate::conditioning::instructor::ConditioningInstructor;
use crate::conditioning::interface::CacheCount;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::inference::managers::Session;
use crate::inference::plan::{ControlNetPlan, GenerationPlan, PassPlan};
use crate::inference::workers::controlnet::{ControlImage, ControlNetUnit, ControlNets};
use crate::model::networks::controlnet::ControlNet;

pub(super) struct ControlNetTask<'a> {
    pub(super) plan: &'a GenerationPlan,
    pub(super) pass: &'a PassPlan,
    /// The region of the images that is shown; all of them for `None`.
    pub(super) cut: Option<Cut>,
    /// ControlNets of earlier passes, which are not loaded again.
    pub(super) earlier: Vec<&'a ControlNets>,
    pub(super) conditioning: &'a ConditioningInstructor,
}

#[derive(Default)]
pub(super) struct PreparedControlNets {
    pub(super) controlnets: ControlNets,
    /// Hints that earlier requests had made, and that this one made.
    pub(super) hints: CacheCount,
}

/// Every ControlNet of the plan, loaded, with its images embedded.
///
/// # Errors
/// Those of loading; `invalid_parameter` for a union without a control type; those of the device.
pub(super) fn prepare_controlnets(task: &ControlNetTask<'_>, session: &mut Session<'_>) -> Result<PreparedControlNets> {
    let ControlNetTask { plan, pass, cut, earlier, conditioning } = task;
    let Session { placement, managers, ctx } = session;
    let mut units: Vec<ControlNetUnit> = Vec::new();
    let mut hints = CacheCount::default();
    for options in &plan.controlnets {
        let key = options.file.key;
        let mut loaded = units.iter().chain(earlier.iter().flat_map(|controlnets| &controlnets.0));
        let controlnet = match loaded.find(|unit| unit.key == key) {
            Some(unit) => Arc::clone(&unit.controlnet),
            None => managers.model().controlnets.acquire(&options.file, &pass.checkpoint, placement, ctx)?,
        };
        let control_type = control_type(options, &controlnet, ctx)?;
        let Hint { image, cached } = conditioning.hint(
            &options.hint,
            HintTarget { size: pass.size, cut: *cut },
            &mut managers.conditioning,
            ctx,
        )?;
        *(if cached { &mut hints.hits } else { &mut hints.misses }) += 1;
        let image = ControlImage {
            embedded: controlnet.embed(&image.to_unit_tensor(&placement.device)?, placement.compute.tensor())?,
            control_type,
            weight: options.weight,
            start: options.start,
            end: options.end,
        };
        // A union takes all of its images at once.
        let guess_mode = options.guess_mode;
        let is_union = controlnet.kinds().is_some();
        let same = |unit: &&mut ControlNetUnit| is_union && unit.key == key && unit.guess_mode == guess_mode;
        match units.iter_mut().find(same) {
            Some(unit) => unit.images.push(image),
            None => units.push(ControlNetUnit { controlnet, key, images: vec![image], guess_mode }),
        }
    }
    Ok(PreparedControlNets { controlnets: ControlNets(units), hints })
}

/// The control type of an image, which a union needs and other ControlNets ignore.
fn control_type(options: &ControlNetPlan, controlnet: &ControlNet, ctx: &Context) -> Result<Option<usize>> {
    let field = format!("controlnet.{}.control_type", options.index);
    let name = &options.file.name;
    match (controlnet.kinds(), options.control_type) {
        (None, None) => Ok(None),
        (None, Some(_)) => {
            ctx.warn(format!("`{field}` has no effect: `{name}` is no ControlNet Union"));
            Ok(None)
        }
        (Some(_), None) => Err(Error::invalid(field, "is missing: a ControlNet Union must be told what its image is")),
        (Some(kinds), Some(kind)) if kind < kinds => Ok(Some(kind)),
        (Some(kinds), Some(_)) => {
            Err(Error::invalid(field, format!("is beyond the {kinds} types that `{name}` knows")))
        }
    }
}

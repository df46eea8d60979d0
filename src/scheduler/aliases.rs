//! Resolves the names of samplers and schedules in AUTOMATIC1111, ComfyUI, k-diffusion and diffusers.

use crate::error::{Error, Result, nearest};
use crate::scheduler::sampler::Sampler;
use crate::scheduler::workers::spacing::Spacing;
use crate::scheduler::workers::{SAMPLERS, SPACINGS};

#[derive(Clone, Copy)]
pub(crate) struct NamedSpacing {
    pub(crate) name: &'static str,
    pub(crate) spacing: &'static Spacing,
}

pub(crate) struct NamedSampler {
    pub(crate) name: &'static str,
    pub(crate) sampler: &'static dyn Sampler,
    /// The schedule at the end of the requested name, as in `DPM++ 2M Karras`.
    pub(crate) schedule: Option<NamedSpacing>,
}

/// Resolves `euler`, `Euler a`, `DPM++ 2M Karras`, `sample_dpmpp_2m`, `EulerDiscreteScheduler`.
///
/// # Errors
/// `unknown_name` at `sampler_name`, with the nearest name.
pub(crate) fn sampler(requested: &str) -> Result<NamedSampler> {
    let folded = fold(requested);
    if let Some((name, sampler)) = find_sampler(&folded) {
        return Ok(NamedSampler { name, sampler, schedule: None });
    }
    for (schedule, spacing) in SPACINGS.iter() {
        let suffixes = [schedule, spacing.label].into_iter().chain(spacing.aliases.iter().copied());
        for prefix in suffixes.filter_map(|suffix| folded.strip_suffix(&fold(suffix)).map(str::to_owned)) {
            if let Some((name, sampler)) = find_sampler(&prefix) {
                return Ok(NamedSampler { name, sampler, schedule: Some(NamedSpacing { name: schedule, spacing }) });
            }
        }
    }
    let labels = SAMPLERS.iter().map(|(_, sampler)| sampler.profile().label);
    Err(unknown("sampler", requested, SAMPLERS.names(), labels).at("sampler_name"))
}

/// Resolves `karras`, `SGM Uniform`; `None` for `auto` and `automatic`.
///
/// # Errors
/// `unknown_name` at `scheduler`, with the nearest name.
pub(crate) fn schedule(requested: &str) -> Result<Option<NamedSpacing>> {
    let folded = fold(requested);
    if matches!(folded.as_str(), "auto" | "automatic") {
        return Ok(None);
    }
    let matches = |(name, spacing): &(&'static str, &'static Spacing)| {
        [*name, spacing.label].iter().chain(spacing.aliases).any(|alias| fold(alias) == folded)
    };
    if let Some((name, spacing)) = SPACINGS.iter().find(matches) {
        return Ok(Some(NamedSpacing { name, spacing }));
    }
    let labels = SPACINGS.iter().map(|(_, spacing)| spacing.label);
    Err(unknown("schedule", requested, SPACINGS.names(), labels).at("scheduler"))
}

fn find_sampler(folded: &str) -> Option<(&'static str, &'static dyn Sampler)> {
    SAMPLERS.iter().find(|(name, sampler)| {
        let profile = sampler.profile();
        [*name, profile.label].iter().chain(profile.aliases).any(|alias| fold(alias) == folded)
    })
}

/// Ignores case, spaces, hyphens and underscores, and reads `+` as `p`.
fn fold(name: &str) -> String {
    let significant = name.chars().filter(|c| !matches!(c, ' ' | '_' | '-'));
    significant.flat_map(char::to_lowercase).map(|c| if c == '+' { 'p' } else { c }).collect()
}

fn unknown(
    kind: &'static str,
    name: &str,
    names: impl Iterator<Item = &'static str>,
    labels: impl Iterator<Item = &'static str>,
) -> Error {
    let nearest = nearest(name, names).or_else(|| nearest(name, labels));
    Error::UnknownName { kind, name: name.to_owned(), nearest, field: None }
}

//! The names of samplers and schedules that people use, resolved to those of the registries.

use crate::error::{Error, Result, nearest};
use crate::scheduler::workers::spacing::Spacing;
use crate::scheduler::workers::{SAMPLERS, SPACINGS, Sampler};

/// A sampler, and the schedule that its name ended with.
pub(crate) type Named = ((&'static str, &'static Sampler), Option<(&'static str, &'static Spacing)>);

/// Resolves `euler`, `Euler a`, `DPM++ 2M Karras`, `sample_dpmpp_2m`, `EulerDiscreteScheduler`.
///
/// # Errors
/// `unknown_name` at `sampler_name`, with the nearest name.
pub(crate) fn sampler(name: &str) -> Result<Named> {
    let folded = fold(name);
    if let Some(found) = SAMPLERS.iter().find(|(known, sampler)| names_sampler(&folded, known, *sampler)) {
        return Ok((found, None));
    }
    for (schedule, spacing) in SPACINGS.iter() {
        let ends = [schedule, spacing.label].into_iter().chain(spacing.aliases.iter().copied());
        for front in ends.filter_map(|end| folded.strip_suffix(&fold(end)).map(str::to_owned)) {
            if let Some(found) = SAMPLERS.iter().find(|(known, sampler)| names_sampler(&front, known, *sampler)) {
                return Ok((found, Some((schedule, spacing))));
            }
        }
    }
    let labels = SAMPLERS.iter().map(|(_, sampler)| sampler.profile().label);
    Err(unknown("sampler", name, SAMPLERS.names(), labels).at("sampler_name"))
}

/// Resolves `karras`, `SGM Uniform`; `None` for the names that leave the choice to the worker.
///
/// # Errors
/// `unknown_name` at `scheduler`, with the nearest name.
pub(crate) fn schedule(name: &str) -> Result<Option<(&'static str, &'static Spacing)>> {
    let folded = fold(name);
    if matches!(folded.as_str(), "auto" | "automatic") {
        return Ok(None);
    }
    let names = |(known, spacing): &(&'static str, &'static Spacing)| {
        [*known, spacing.label].iter().chain(spacing.aliases).any(|alias| fold(alias) == folded)
    };
    if let Some(found) = SPACINGS.iter().find(names) {
        return Ok(Some(found));
    }
    let labels = SPACINGS.iter().map(|(_, spacing)| spacing.label);
    Err(unknown("schedule", name, SPACINGS.names(), labels).at("scheduler"))
}

fn names_sampler(folded: &str, known: &str, sampler: &Sampler) -> bool {
    let profile = sampler.profile();
    [known, profile.label].iter().chain(profile.aliases).any(|alias| fold(alias) == folded)
}

/// Case, spaces, hyphens and underscores do not distinguish names, and `+` is `p`.
fn fold(name: &str) -> String {
    let kept = name.chars().filter(|c| !matches!(c, ' ' | '_' | '-'));
    kept.flat_map(char::to_lowercase).map(|c| if c == '+' { 'p' } else { c }).collect()
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

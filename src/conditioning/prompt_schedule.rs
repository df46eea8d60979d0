//! The embeddings of a prompt by step: prompt editing changes them during the run, and `AND` joins several.

use crate::conditioning::interface::{AppliedEmbedding, CacheCount};
use crate::conditioning::prompt_plan::{PromptPlan, PromptSpan};
use crate::conditioning::workers::encode::Embeddings;
use crate::error::{Error, Result};

/// The embeddings of one evaluation.
#[derive(Clone, Debug)]
pub struct PromptConditioning {
    /// The subprompts that `AND` joins; one without `AND`.
    pub positive: Vec<WeightedEmbeddings>,
    /// `None` without guidance. Several subprompts always need it.
    pub negative: Option<Embeddings>,
}

/// One subprompt.
#[derive(Clone, Debug)]
pub struct WeightedEmbeddings {
    pub embeddings: Embeddings,
    /// Its share in the guidance.
    pub weight: f64,
}

/// A range of steps with the same conditioning; it begins where the span before it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConditioningSpan {
    /// Number of completed steps at the end.
    pub(crate) until: usize,
    /// Index into [`PromptSchedule::conditionings`].
    pub(crate) index: usize,
}

/// The conditioning of every step of an image. All embeddings have the same number of tokens.
#[derive(Clone, Debug)]
pub struct PromptSchedule {
    /// Every distinct conditioning, once.
    pub conditionings: Vec<PromptConditioning>,
    /// In the order of the steps.
    pub(crate) spans: Vec<ConditioningSpan>,
    pub applied: Vec<AppliedEmbedding>,
    pub cache: CacheCount,
}

impl PromptSchedule {
    /// The index in `conditionings` for the step after `completed_steps`.
    #[must_use]
    pub fn at(&self, completed_steps: usize) -> usize {
        // AUTOMATIC1111 counts evaluations from 0 and compares them with the last step of a span, so that the first span
        // lasts one evaluation longer than its number says.
        let span = self.spans.iter().find(|span| completed_steps <= span.until).or(self.spans.last());
        span.map_or(0, |span| span.index)
    }
}

/// Maps the plan's texts to their embeddings. A negative prompt without text is zeros if `zeros` says so or if there are
/// several subprompts.
///
/// # Errors
/// `internal` for a text without embeddings; those of the device.
pub(crate) fn schedule(
    plan: &PromptPlan,
    embeddings: &[Embeddings],
    zeros: bool,
) -> Result<(Vec<PromptConditioning>, Vec<ConditioningSpan>)> {
    let of_text = |index: usize| {
        let found = embeddings.get(index).cloned();
        found.ok_or_else(|| Error::bug("a prompt was not encoded"))
    };
    let (mut conditionings, mut spans) = (Vec::new(), Vec::new());
    let mut known: Vec<&PromptSpan> = Vec::new();
    for span in &plan.spans {
        let same = |other: &&PromptSpan| other.positive == span.positive && other.negative == span.negative;
        let index = match known.iter().position(same) {
            Some(index) => index,
            None => {
                let weighted =
                    |&(index, weight): &(usize, f64)| Ok(WeightedEmbeddings { embeddings: of_text(index)?, weight });
                let positive = span.positive.iter().map(weighted).collect::<Result<Vec<_>>>()?;
                let negative = match (span.negative, positive.first()) {
                    (Some(index), _) => Some(of_text(index)?),
                    (None, Some(first)) if zeros || positive.len() > 1 => Some(first.embeddings.zeros()?),
                    (None, _) => None,
                };
                known.push(span);
                conditionings.push(PromptConditioning { positive, negative });
                conditionings.len() - 1
            }
        };
        spans.push(ConditioningSpan { until: span.until, index });
    }
    Ok((conditionings, spans))
}

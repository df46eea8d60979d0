//! What the UNet is told, step by step: a prompt may change on the way, and may have several parts.

use crate::conditioning::Embeddings;
use crate::conditioning::interface::{AppliedEmbedding, CacheCount};

/// What the UNet is told in one evaluation.
#[derive(Clone, Debug)]
pub struct Conditioning {
    /// The parts that `AND` joins; one where there is no `AND`.
    pub positive: Vec<Positive>,
    /// `None` without guidance. Parts need it, guided or not.
    pub negative: Option<Embeddings>,
}

/// One part of a prompt.
#[derive(Clone, Debug)]
pub struct Positive {
    pub embeddings: Embeddings,
    /// Its share in the guidance.
    pub weight: f64,
}

/// What is told from the end of the span before on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Steps that are done when it is told last.
    pub(crate) until: usize,
    /// Its place in [`PromptSchedule::told`].
    pub(crate) told: usize,
}

/// A prompt for a whole image. All that it tells has the same number of tokens.
#[derive(Clone, Debug)]
pub struct PromptSchedule {
    /// Each thing that is told at some step, once.
    pub told: Vec<Conditioning>,
    /// In the order of the steps.
    pub(crate) spans: Vec<Span>,
    pub applied: Vec<AppliedEmbedding>,
    pub cache: CacheCount,
}

impl PromptSchedule {
    /// The place in `told` of what the step after `done` steps is told.
    #[must_use]
    pub fn at(&self, done: usize) -> usize {
        // AUTOMATIC1111 counts evaluations from 0 and compares them with the step that a span ends at: the first span is
        // told once more than its number says.
        let span = self.spans.iter().find(|span| done <= span.until).or(self.spans.last());
        span.map_or(0, |span| span.told)
    }
}

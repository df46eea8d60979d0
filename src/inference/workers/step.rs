//! Position of a step within a generation.

use crate::scheduler::plan::Level;

/// Position of a pass among the steps over which prompt schedules and guidance run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSpan {
    /// Steps that earlier passes completed.
    pub before: usize,
    /// Steps of all passes together.
    pub steps: usize,
}

/// The time of one evaluation of the network.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EvaluationTime {
    pub(crate) level: Level,
    /// Completed steps of the pass, and all of its steps.
    pub(crate) step: usize,
    pub(crate) steps: usize,
    /// Completed evaluations of the pass, and all of them: samplers of second order make two a step.
    pub(crate) evaluation: usize,
    pub(crate) evaluations: usize,
    /// Completed steps of the span, and all of its steps.
    pub(crate) span_step: usize,
    pub(crate) span_steps: usize,
}

impl EvaluationTime {
    /// Share of the span: 0 at its first step, 1 at its last.
    pub(crate) fn progress(self) -> f64 {
        self.span_step as f64 / self.span_steps.saturating_sub(1).max(1) as f64
    }
}

//! The prompt of each step. Keys and values of a text are computed when its first step comes, and kept for the steps and
//! images after it.

use std::cell::RefCell;
use std::rc::Rc;

use crate::conditioning::prompt_schedule::{PromptConditioning, PromptSchedule};
use crate::error::{Error, Result};
use crate::inference::workers::prepare::PreparedPrompt;

/// Prepared prompts that are kept: alternating prompts return, and each takes up to a hundred megabytes.
const CAPACITY: usize = 4;

/// Prepares a text for one UNet.
pub type PreparePrompt<'a> = dyn Fn(&PromptConditioning) -> Result<PreparedPrompt> + 'a;

/// A prompt schedule, and its texts that are prepared for one UNet.
pub struct Prompts {
    pub schedule: PromptSchedule,
    /// By position in the schedule's texts, least recently used first.
    prepared: RefCell<Vec<(usize, Rc<PreparedPrompt>)>>,
}

impl Prompts {
    #[must_use]
    pub fn new(schedule: PromptSchedule) -> Self {
        Self { schedule, prepared: RefCell::default() }
    }

    /// The prompt of the step after `completed` steps.
    ///
    /// # Errors
    /// Those of `prepare`.
    pub fn at(&self, completed: usize, prepare: &PreparePrompt) -> Result<Rc<PreparedPrompt>> {
        let text = self.schedule.at(completed);
        let mut prepared = self.prepared.borrow_mut();
        let prompt = match prepared.iter().position(|(known, _)| *known == text) {
            Some(at) => prepared.remove(at).1,
            None => {
                let conditioning = self.schedule.conditionings.get(text);
                let excess = (prepared.len() + 1).saturating_sub(CAPACITY);
                prepared.drain(..excess);
                Rc::new(prepare(conditioning.ok_or_else(|| Error::bug("a step without a prompt"))?)?)
            }
        };
        prepared.push((text, Rc::clone(&prompt)));
        Ok(prompt)
    }
}

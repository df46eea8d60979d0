//! Hands an evaluation the prompt of its step. Keys and values of a text are made when it is first told, and kept for
//! the steps and the images after.

use std::cell::RefCell;
use std::rc::Rc;

use crate::conditioning::instructor::{Conditioning, PromptSchedule};
use crate::error::{Error, Result};
use crate::inference::workers::denoise::Prompt;

/// Prompts that stay prepared: alternatives come back in turn, and each takes up to a hundred megabytes.
const KEPT: usize = 4;

/// Makes of what is told what the UNet takes.
pub type PreparePrompt<'a> = dyn Fn(&Conditioning) -> Result<Prompt> + 'a;

/// A script, and what of it is prepared for one UNet.
pub struct Prompts {
    pub script: PromptSchedule,
    /// By the place among what the script tells, least recently used first.
    ready: RefCell<Vec<(usize, Rc<Prompt>)>>,
}

impl Prompts {
    #[must_use]
    pub fn new(script: PromptSchedule) -> Self {
        Self { script, ready: RefCell::default() }
    }

    /// The prompt of the step after `done` steps.
    ///
    /// # Errors
    /// Those of `prepare`.
    pub fn at(&self, done: usize, prepare: &PreparePrompt) -> Result<Rc<Prompt>> {
        let place = self.script.at(done);
        let mut ready = self.ready.borrow_mut();
        let prompt = match ready.iter().position(|(known, _)| *known == place) {
            Some(at) => ready.remove(at).1,
            None => {
                let told = self.script.told.get(place);
                let excess = (ready.len() + 1).saturating_sub(KEPT);
                ready.drain(..excess);
                Rc::new(prepare(told.ok_or_else(|| Error::bug("a step that is told nothing"))?)?)
            }
        };
        ready.push((place, Rc::clone(&prompt)));
        Ok(prompt)
    }
}

//! Cancellation within one evaluation of a network.

use crate::error::Result;

/// Called between the blocks of a network, so that cancellation and deadlines take effect within one evaluation.
pub type Check<'a> = &'a dyn Fn() -> Result<()>;

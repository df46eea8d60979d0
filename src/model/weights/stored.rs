//! Tensors as the headers of files describe them.

use std::ops::Range;

use crate::model::weights::dtype::StoredDtype;

/// Upper limit of a tensor's axes, more than any weight has.
pub(crate) const RANK_LIMIT: usize = 8;

/// A tensor in a file, which it occupies in `range`.
#[derive(Clone, Debug)]
pub struct Stored {
    pub dtype: StoredDtype,
    pub shape: Vec<usize>,
    pub range: Range<u64>,
}

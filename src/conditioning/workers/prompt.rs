//! From a text to rows of token ids, each as long as the encoder has positions.

use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::model::managers::{ClipTokenizer, Token};

/// Longest text in bytes. No prompt is near it, and what is longer would keep the worker busy for nothing.
const LONGEST: usize = 64 * 1024;
/// Most rows that a prompt may take.
pub(in crate::conditioning) const MOST_CHUNKS: usize = 32;

/// Splits a text into tokens.
pub(in crate::conditioning) struct Tokenize;

pub(in crate::conditioning) struct TokenizeTask<'a> {
    pub(in crate::conditioning) tokenizer: &'a ClipTokenizer,
    pub(in crate::conditioning) text: &'a str,
    /// The part of the request in which the text stood.
    pub(in crate::conditioning) field: &'static str,
}

impl Worker<TokenizeTask<'_>> for Tokenize {
    type Output = Vec<Token>;

    /// # Errors
    /// `invalid_parameter` for a text that is too long.
    fn run(&self, task: TokenizeTask, _ctx: &Context) -> Result<Vec<Token>> {
        let TokenizeTask { tokenizer, text, field } = task;
        if text.len() > LONGEST {
            return Err(Error::invalid(field, format!("must be at most {LONGEST} bytes, got {}", text.len())));
        }
        tokenizer.tokenize(text)
    }
}

/// Rows that `tokens` take, where each holds `positions` with start and end; at least one.
pub(in crate::conditioning) fn chunks(tokens: usize, positions: usize) -> usize {
    tokens.div_ceil(positions.saturating_sub(2).max(1)).max(1)
}

/// The ids as `chunks` rows of `positions`: start, tokens, end, padding. Rows beyond the text hold none.
pub(in crate::conditioning) fn rows(
    tokenizer: &ClipTokenizer,
    tokens: &[Token],
    chunks: usize,
    positions: usize,
) -> Vec<Vec<u32>> {
    let mut pieces = tokens.chunks(positions.saturating_sub(2).max(1));
    let row = |piece: &[Token]| {
        let mut row = Vec::with_capacity(positions);
        row.push(tokenizer.start);
        row.extend(piece.iter().map(|token| token.id));
        row.push(tokenizer.end);
        row.resize(positions, tokenizer.padding);
        row
    };
    (0..chunks).map(|_| row(pieces.next().unwrap_or_default())).collect()
}

//! Splits a prompt into chunks of token ids, each as long as the encoder has positions.

use crate::conditioning::workers::prompt_attention::Fragment;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::model::managers::{ClipTokenizer, Token};

/// Most bytes of a prompt: tokenizing more would keep the worker busy for nothing.
pub(crate) const MAX_PROMPT_BYTES: usize = 64 * 1024;
/// Most chunks of a prompt.
pub(crate) const MAX_CHUNKS: usize = 32;

/// Splits a text into tokens.
pub(crate) struct Tokenize;

pub(crate) struct TokenizeTask<'a> {
    pub(crate) tokenizer: &'a ClipTokenizer,
    pub(crate) text: &'a str,
    /// The request field of the text, for errors.
    pub(crate) field: &'static str,
}

impl Worker<TokenizeTask<'_>> for Tokenize {
    type Output = Vec<Token>;

    /// # Errors
    /// `invalid_parameter` for a text that is too long.
    fn run(&self, task: TokenizeTask, _ctx: &Context) -> Result<Vec<Token>> {
        let TokenizeTask { tokenizer, text, field } = task;
        check_length(text, field)?;
        tokenizer.tokenize(text)
    }
}

/// # Errors
/// `invalid_parameter` for a text that is too long.
pub(crate) fn check_length(text: &str, field: &str) -> Result<()> {
    if text.len() <= MAX_PROMPT_BYTES {
        return Ok(());
    }
    Err(Error::invalid(field, format!("must be at most {MAX_PROMPT_BYTES} bytes, got {}", text.len())))
}

/// Number of chunks that `tokens` fill, at least one; each has `positions` including start and end.
pub(crate) fn chunk_count(tokens: usize, positions: usize) -> usize {
    tokens.div_ceil(positions.saturating_sub(2).max(1)).max(1)
}

/// The input of one encoder for one chunk.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenChunk {
    /// Start, tokens, end, padding.
    pub(crate) ids: Vec<u32>,
    /// The weight of each position.
    pub(crate) weights: Vec<f64>,
    /// For each position the number of its fragment among those with a weight below 1, from 1; 0 for none.
    pub(crate) downweighted: Vec<u32>,
}

/// A text as the input of one encoder.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ChunkedText {
    pub(crate) chunks: Vec<TokenChunk>,
    /// The weights of the fragments whose weight is below 1.
    pub(crate) downweighted: Vec<f64>,
}

impl ChunkedText {
    pub(crate) fn is_weighted(&self) -> bool {
        self.chunks.iter().flat_map(|chunk| &chunk.weights).any(|&weight| weight != 1.0)
    }

    /// Adds empty chunks until there are `count`.
    pub(crate) fn pad(&mut self, count: usize, tokenizer: &ClipTokenizer, positions: usize) {
        while self.chunks.len() < count {
            self.chunks.push(token_chunk(tokenizer, &[], positions));
        }
    }
}

/// The ids of an empty chunk.
pub(crate) fn empty_chunk(tokenizer: &ClipTokenizer, positions: usize) -> Vec<u32> {
    token_chunk(tokenizer, &[], positions).ids
}

/// The word of a textual inversion, which stands for vectors.
#[derive(Clone, Debug)]
pub(crate) struct EmbeddingToken {
    pub(crate) token: String,
    /// The id of the first vector; the others follow.
    pub(crate) first: u32,
    pub(crate) count: usize,
}

/// Splits a text into chunks.
pub(crate) struct ChunkText;

pub(crate) struct ChunkTextTask<'a> {
    pub(crate) tokenizer: &'a ClipTokenizer,
    pub(crate) fragments: &'a [Fragment],
    pub(crate) embeddings: &'a [EmbeddingToken],
    /// The encoder's positions, including start and end.
    pub(crate) positions: usize,
    /// A full chunk ends at a comma if that is at most this many tokens back; 0 ends it where it is full.
    pub(crate) backtrack: usize,
    /// The request field of the text, for errors.
    pub(crate) field: &'static str,
}

/// One position of a chunk.
#[derive(Clone, Copy)]
struct TokenSlot {
    id: u32,
    weight: f64,
    downweighted: u32,
}

/// Fills chunks with tokens.
struct Chunker {
    capacity: usize,
    backtrack: usize,
    comma: Option<u32>,
    /// Index of the last comma in `current`.
    last_comma: Option<usize>,
    full: Vec<Vec<TokenSlot>>,
    current: Vec<TokenSlot>,
}

impl Chunker {
    fn close(&mut self) {
        self.full.push(std::mem::take(&mut self.current));
        self.last_comma = None;
    }

    /// If the chunk is full and a comma is near its end, moves the tokens after the comma to the next chunk.
    fn break_at_comma(&mut self) {
        if let Some(comma) = self.last_comma.filter(|_| self.current.len() == self.capacity)
            && self.capacity - comma <= self.backtrack
        {
            let moved = self.current.split_off((comma + 1).min(self.current.len()));
            self.close();
            self.current = moved;
        }
    }

    fn push(&mut self, slot: TokenSlot) {
        if self.comma == Some(slot.id) {
            self.last_comma = Some(self.current.len());
        } else {
            self.break_at_comma();
        }
        if self.current.len() == self.capacity {
            self.close();
        }
        self.current.push(slot);
    }

    /// Adds slots that must stay in one chunk.
    fn push_unbroken(&mut self, slots: impl ExactSizeIterator<Item = TokenSlot>) {
        self.break_at_comma();
        if self.current.len() + slots.len() > self.capacity {
            self.close();
        }
        self.current.extend(slots);
    }
}

impl Worker<ChunkTextTask<'_>> for ChunkText {
    type Output = ChunkedText;

    /// Chunks as AUTOMATIC1111 does (`modules/sd_hijack_clip.py`): `BREAK` ends a chunk, and the vectors of an embedding
    /// stay together.
    ///
    /// # Errors
    /// `invalid_parameter` for a text that is too long.
    fn run(&self, task: ChunkTextTask, ctx: &Context) -> Result<ChunkedText> {
        let ChunkTextTask { tokenizer, fragments, embeddings, positions, backtrack, field } = task;
        let comma = match backtrack {
            0 => None,
            _ => tokenizer.tokenize(",")?.first().map(|token| token.id),
        };
        let capacity = positions.saturating_sub(2).max(1);
        let (full, current) = (Vec::new(), Vec::new());
        let mut chunker = Chunker { capacity, backtrack, comma, last_comma: None, full, current };
        let (mut downweighted, mut count) = (Vec::new(), 0);
        for fragment in fragments {
            let Fragment::Text { text, weight } = fragment else {
                chunker.close();
                continue;
            };
            ctx.checkpoint()?;
            let weight = *weight;
            if weight < 1.0 {
                downweighted.push(weight);
            }
            let index = if weight < 1.0 { u32::try_from(downweighted.len()).unwrap_or(u32::MAX) } else { 0 };
            let slot = |id| TokenSlot { id, weight, downweighted: index };
            for piece in pieces(text, embeddings) {
                match piece {
                    TextPiece::Text(text) => {
                        let tokens = ctx.perform(&Tokenize, TokenizeTask { tokenizer, text, field })?;
                        count += tokens.len();
                        tokens.iter().for_each(|token| chunker.push(slot(token.id)));
                    }
                    TextPiece::Embedding(embedding) => {
                        count += embedding.count;
                        let ids: Vec<u32> = (embedding.first..).take(embedding.count).collect();
                        chunker.push_unbroken(ids.into_iter().map(slot));
                    }
                }
            }
        }
        let max_tokens = MAX_CHUNKS * 75;
        if count > max_tokens {
            return Err(Error::invalid(field, format!("must be at most {max_tokens} tokens, got {count}")));
        }
        if !chunker.current.is_empty() || chunker.full.is_empty() {
            chunker.close();
        }
        if chunker.full.len() > MAX_CHUNKS {
            let got = chunker.full.len();
            return Err(Error::invalid(field, format!("must be at most {MAX_CHUNKS} chunks, got {got}")));
        }
        let chunks = chunker.full.iter().map(|slots| token_chunk(tokenizer, slots, positions)).collect();
        Ok(ChunkedText { chunks, downweighted })
    }
}

/// Start, the slots, end and padding: `positions` in all.
fn token_chunk(tokenizer: &ClipTokenizer, slots: &[TokenSlot], positions: usize) -> TokenChunk {
    let unweighted = |id: u32| TokenSlot { id, weight: 1.0, downweighted: 0 };
    let mut padded = Vec::with_capacity(positions);
    padded.push(unweighted(tokenizer.start));
    padded.extend(slots);
    padded.push(unweighted(tokenizer.end));
    padded.resize(positions, unweighted(tokenizer.padding));
    TokenChunk {
        ids: padded.iter().map(|slot| slot.id).collect(),
        weights: padded.iter().map(|slot| slot.weight).collect(),
        downweighted: padded.iter().map(|slot| slot.downweighted).collect(),
    }
}

enum TextPiece<'a> {
    Text(&'a str),
    Embedding(&'a EmbeddingToken),
}

/// Splits a text at the words of embeddings. Of two words that begin at the same position the longer one counts.
fn pieces<'a>(text: &'a str, embeddings: &'a [EmbeddingToken]) -> Vec<TextPiece<'a>> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some((start, end, embedding)) = first_embedding(rest, embeddings) {
        pieces.push(TextPiece::Text(rest.get(..start).unwrap_or_default()));
        pieces.push(TextPiece::Embedding(embedding));
        rest = rest.get(end..).unwrap_or_default();
    }
    pieces.push(TextPiece::Text(rest));
    pieces
}

/// True if `token` occurs in the text as a word of its own.
pub(crate) fn contains_word(text: &str, token: &str) -> bool {
    text.char_indices().any(|(start, _)| word_end(text, start, token).is_some())
}

fn first_embedding<'a>(text: &str, embeddings: &'a [EmbeddingToken]) -> Option<(usize, usize, &'a EmbeddingToken)> {
    if embeddings.is_empty() {
        return None;
    }
    let longest = |start: usize| {
        let found = embeddings.iter().filter_map(|one| Some((start, word_end(text, start, &one.token)?, one)));
        found.max_by_key(|&(_, end, _)| end)
    };
    text.char_indices().find_map(|(start, _)| longest(start))
}

/// The end of `token` at `start`, ignoring case, unless a letter, digit or `_` makes it part of a longer word.
fn word_end(text: &str, start: usize, token: &str) -> Option<usize> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let joined = |inner: Option<char>, outer: Option<char>| inner.is_some_and(is_word) && outer.is_some_and(is_word);
    let (before, from) = (text.get(..start)?, text.get(start..)?);
    // Checked first because it saves the comparison inside every word.
    if joined(token.chars().next(), before.chars().next_back()) {
        return None;
    }
    let mut characters = from.chars();
    let mut length = 0;
    for wanted in token.chars() {
        let c = characters.next()?;
        if c != wanted && !c.to_lowercase().eq(wanted.to_lowercase()) {
            return None;
        }
        length += c.len_utf8();
    }
    let separate = length > 0 && !joined(token.chars().next_back(), characters.next());
    separate.then_some(start + length)
}

#[cfg(test)]
mod tests {
    use super::{Chunker, TokenSlot};

    const COMMA: u32 = 9;

    fn slot(id: u32) -> TokenSlot {
        TokenSlot { id, weight: 1.0, downweighted: 0 }
    }

    /// Chunks of 5 tokens of `text`, followed by an embedding of two vectors.
    #[track_caller]
    fn check(backtrack: usize, text: &[u32], expected: &[&[u32]]) {
        let comma = (backtrack > 0).then_some(COMMA);
        let (full, current) = (Vec::new(), Vec::new());
        let mut chunker = Chunker { capacity: 5, backtrack, comma, last_comma: None, full, current };
        text.iter().for_each(|&id| chunker.push(slot(id)));
        chunker.push_unbroken([100, 101].map(slot).into_iter());
        chunker.close();
        let got: Vec<Vec<u32>> = chunker.full.iter().map(|chunk| chunk.iter().map(|slot| slot.id).collect()).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn full_chunk_breaks_at_a_near_comma() {
        check(0, &[1, 2, COMMA, 3, 4], &[&[1, 2, COMMA, 3, 4], &[100, 101]]);
        check(3, &[1, 2, COMMA, 3, 4], &[&[1, 2, COMMA], &[3, 4, 100, 101]]);
        check(2, &[1, 2, COMMA, 3, 4], &[&[1, 2, COMMA, 3, 4], &[100, 101]]);
        check(3, &[1, 2, COMMA, 3], &[&[1, 2, COMMA, 3], &[100, 101]]);
        check(5, &[COMMA, 1, 2, 3, 4], &[&[COMMA], &[1, 2, 3, 4], &[100, 101]]);
    }
}

//! From a text to rows of token ids, each as long as the encoder has positions.

use crate::conditioning::workers::syntax::Fragment;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::model::managers::{ClipTokenizer, Token};

/// Longest text in bytes. No prompt is near it, and what is longer would keep the worker busy for nothing.
pub(crate) const LONGEST: usize = 64 * 1024;
/// Most rows that a prompt may take.
pub(crate) const MOST_CHUNKS: usize = 32;

/// Splits a text into tokens.
pub(crate) struct Tokenize;

pub(crate) struct TokenizeTask<'a> {
    pub(crate) tokenizer: &'a ClipTokenizer,
    pub(crate) text: &'a str,
    /// The part of the request in which the text stood.
    pub(crate) field: &'static str,
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
pub(crate) fn chunks(tokens: usize, positions: usize) -> usize {
    tokens.div_ceil(positions.saturating_sub(2).max(1)).max(1)
}

/// What an encoder is given of one chunk.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    /// Start, tokens, end, padding.
    pub(crate) ids: Vec<u32>,
    /// Of each position.
    pub(crate) weights: Vec<f64>,
    /// For each position the fragment of less than full weight that it belongs to, from 1; 0 for none.
    pub(crate) lessened: Vec<u32>,
}

/// A text as one encoder is given it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Side {
    /// One a chunk.
    pub(crate) rows: Vec<Row>,
    /// The weights of the fragments whose weight is below 1.
    pub(crate) lessened: Vec<f64>,
}

impl Side {
    pub(crate) fn is_weighted(&self) -> bool {
        self.rows.iter().flat_map(|row| &row.weights).any(|&weight| weight != 1.0)
    }

    /// Adds rows without text until there are `count`.
    pub(crate) fn fill(&mut self, count: usize, tokenizer: &ClipTokenizer, positions: usize) {
        while self.rows.len() < count {
            self.rows.push(row(tokenizer, &[], positions));
        }
    }
}

/// The ids of a row without text.
pub(crate) fn empty(tokenizer: &ClipTokenizer, positions: usize) -> Vec<u32> {
    row(tokenizer, &[], positions).ids
}

/// A token that stands for vectors.
#[derive(Clone, Debug)]
pub(crate) struct Word {
    pub(crate) token: String,
    /// The id of the first vector; the others follow.
    pub(crate) first: u32,
    pub(crate) count: usize,
}

/// Lays a text out in chunks.
pub(crate) struct Lay;

pub(crate) struct LayTask<'a> {
    pub(crate) tokenizer: &'a ClipTokenizer,
    pub(crate) fragments: &'a [Fragment],
    pub(crate) words: &'a [Word],
    /// Of the encoder, start and end included.
    pub(crate) positions: usize,
    /// How many tokens back a comma may stand for a chunk to end there; 0: it ends where it is full.
    pub(crate) backtrack: usize,
    /// The part of the request in which the text stood.
    pub(crate) field: &'static str,
}

/// One position of a chunk.
#[derive(Clone, Copy)]
struct Slot {
    id: u32,
    weight: f64,
    lessened: u32,
}

/// Chunks as they fill.
struct Chunks {
    room: usize,
    backtrack: usize,
    comma: Option<u32>,
    /// Where in the chunk that fills the last comma stands.
    last: Option<usize>,
    full: Vec<Vec<Slot>>,
    filling: Vec<Slot>,
}

impl Chunks {
    fn close(&mut self) {
        self.full.push(std::mem::take(&mut self.filling));
        self.last = None;
    }

    /// Ends a chunk that is full at its last comma, where that is near, and what follows it goes to the next chunk.
    fn relocate(&mut self) {
        if let Some(comma) = self.last.filter(|_| self.filling.len() == self.room)
            && self.room - comma <= self.backtrack
        {
            let moved = self.filling.split_off((comma + 1).min(self.filling.len()));
            self.close();
            self.filling = moved;
        }
    }

    fn push(&mut self, slot: Slot) {
        if self.comma == Some(slot.id) {
            self.last = Some(self.filling.len());
        } else {
            self.relocate();
        }
        if self.filling.len() == self.room {
            self.close();
        }
        self.filling.push(slot);
    }

    /// Slots that stay in one chunk.
    fn push_all(&mut self, slots: impl ExactSizeIterator<Item = Slot>) {
        self.relocate();
        if self.filling.len() + slots.len() > self.room {
            self.close();
        }
        self.filling.extend(slots);
    }
}

impl Worker<LayTask<'_>> for Lay {
    type Output = Side;

    /// The web UI's chunks (`modules/sd_hijack_clip.py`): `BREAK` ends one, a token of several vectors is not divided.
    ///
    /// # Errors
    /// `invalid_parameter` for a text that is too long.
    fn run(&self, task: LayTask, ctx: &Context) -> Result<Side> {
        let LayTask { tokenizer, fragments, words, positions, backtrack, field } = task;
        let comma = match backtrack {
            0 => None,
            _ => tokenizer.tokenize(",")?.first().map(|token| token.id),
        };
        let room = positions.saturating_sub(2).max(1);
        let (full, filling) = (Vec::new(), Vec::new());
        let mut chunks = Chunks { room, backtrack, comma, last: None, full, filling };
        let (mut lessened, mut count) = (Vec::new(), 0);
        for fragment in fragments {
            let Fragment::Text { text, weight } = fragment else {
                chunks.close();
                continue;
            };
            ctx.checkpoint()?;
            let weight = *weight;
            if weight < 1.0 {
                lessened.push(weight);
            }
            let mark = if weight < 1.0 { u32::try_from(lessened.len()).unwrap_or(u32::MAX) } else { 0 };
            for piece in pieces(text, words) {
                match piece {
                    Piece::Text(text) => {
                        let tokens = ctx.perform(&Tokenize, TokenizeTask { tokenizer, text, field })?;
                        count += tokens.len();
                        tokens.iter().for_each(|token| chunks.push(Slot { id: token.id, weight, lessened: mark }));
                    }
                    Piece::Word(word) => {
                        count += word.count;
                        let ids: Vec<u32> = (word.first..).take(word.count).collect();
                        chunks.push_all(ids.into_iter().map(|id| Slot { id, weight, lessened: mark }));
                    }
                }
            }
        }
        let most = MOST_CHUNKS * 75;
        if count > most {
            return Err(Error::invalid(field, format!("must be at most {most} tokens, got {count}")));
        }
        if !chunks.filling.is_empty() || chunks.full.is_empty() {
            chunks.close();
        }
        if chunks.full.len() > MOST_CHUNKS {
            let got = chunks.full.len();
            return Err(Error::invalid(field, format!("must be at most {MOST_CHUNKS} chunks, got {got}")));
        }
        let rows = chunks.full.iter().map(|chunk| row(tokenizer, chunk, positions)).collect();
        Ok(Side { rows, lessened })
    }
}

/// Start, the chunk, end and padding: `positions` in all.
fn row(tokenizer: &ClipTokenizer, chunk: &[Slot], positions: usize) -> Row {
    let free = |id: u32| Slot { id, weight: 1.0, lessened: 0 };
    let mut slots = Vec::with_capacity(positions);
    slots.push(free(tokenizer.start));
    slots.extend(chunk);
    slots.push(free(tokenizer.end));
    slots.resize(positions, free(tokenizer.padding));
    Row {
        ids: slots.iter().map(|slot| slot.id).collect(),
        weights: slots.iter().map(|slot| slot.weight).collect(),
        lessened: slots.iter().map(|slot| slot.lessened).collect(),
    }
}

enum Piece<'a> {
    Text(&'a str),
    Word(&'a Word),
}

/// A text, divided where a word stands that means vectors. Of two such words at a place the longer one counts.
fn pieces<'a>(text: &'a str, words: &'a [Word]) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some((start, end, word)) = first_word(rest, words) {
        pieces.push(Piece::Text(rest.get(..start).unwrap_or_default()));
        pieces.push(Piece::Word(word));
        rest = rest.get(end..).unwrap_or_default();
    }
    pieces.push(Piece::Text(rest));
    pieces
}

/// Whether a text has the word `token` by itself.
pub(crate) fn stands_in(text: &str, token: &str) -> bool {
    text.char_indices().any(|(start, _)| word_at(text, start, token).is_some())
}

fn first_word<'a>(text: &str, words: &'a [Word]) -> Option<(usize, usize, &'a Word)> {
    if words.is_empty() {
        return None;
    }
    let longest = |start: usize| {
        let ends = words.iter().filter_map(|word| Some((start, word_at(text, start, &word.token)?, word)));
        ends.max_by_key(|&(_, end, _)| end)
    };
    text.char_indices().find_map(|(start, _)| longest(start))
}

/// Where `token` ends that begins at `start`, in whatever case, if no letter, digit or `_` makes it part of a word.
fn word_at(text: &str, start: usize, token: &str) -> Option<usize> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let joined = |inner: Option<char>, outer: Option<char>| inner.is_some_and(is_word) && outer.is_some_and(is_word);
    let (before, from) = (text.get(..start)?, text.get(start..)?);
    // First, as it spares the comparison within every word.
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
    let apart = length > 0 && !joined(token.chars().next_back(), characters.next());
    apart.then_some(start + length)
}

#[cfg(test)]
mod tests {
    use super::{Chunks, Slot};

    const COMMA: u32 = 9;

    fn slot(id: u32) -> Slot {
        Slot { id, weight: 1.0, lessened: 0 }
    }

    /// Chunks of 5 of `text`, where an embedding of two vectors follows.
    #[track_caller]
    fn check(backtrack: usize, text: &[u32], expected: &[&[u32]]) {
        let comma = (backtrack > 0).then_some(COMMA);
        let mut chunks = Chunks { room: 5, backtrack, comma, last: None, full: Vec::new(), filling: Vec::new() };
        text.iter().for_each(|&id| chunks.push(slot(id)));
        chunks.push_all([100, 101].map(slot).into_iter());
        chunks.close();
        let got: Vec<Vec<u32>> = chunks.full.iter().map(|chunk| chunk.iter().map(|slot| slot.id).collect()).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn a_full_chunk_ends_at_a_comma_before_an_embedding_too() {
        check(0, &[1, 2, COMMA, 3, 4], &[&[1, 2, COMMA, 3, 4], &[100, 101]]);
        check(3, &[1, 2, COMMA, 3, 4], &[&[1, 2, COMMA], &[3, 4, 100, 101]]);
        check(2, &[1, 2, COMMA, 3, 4], &[&[1, 2, COMMA, 3, 4], &[100, 101]]);
        check(3, &[1, 2, COMMA, 3], &[&[1, 2, COMMA, 3], &[100, 101]]);
        check(5, &[COMMA, 1, 2, 3, 4], &[&[COMMA], &[1, 2, 3, 4], &[100, 101]]);
    }
}

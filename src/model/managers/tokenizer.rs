//! Keeps tokenizers. The vocabulary is parsed when the first prompt needs it.
//!
//! CLIP's tokenizer: NFC, runs of whitespace become one space, lower case; split into words by the expression of OpenAI's
//! `simple_tokenizer.py` (<https://github.com/openai/CLIP>, `clip/simple_tokenizer.py`), then byte-level BPE whose words
//! end with `</w>`. Special tokens are recognised in the text before any of that, which makes `!` the padding token of
//! the second tokenizer wherever a prompt has it.

use std::borrow::Cow;
use std::sync::Arc;

use serde::Deserialize;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as Splitters;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use crate::error::{Error, Result};
use crate::layers::{Manager, Resident};
use crate::model::catalog::demo;
use crate::model::catalog::files::ModelFile;
use crate::model::checkpoint::files::TokenizerFiles;
use crate::model::checkpoint::{Checkpoint, CheckpointKey};
use crate::units::Bytes;

/// Longest vocabulary file.
const VOCABULARY_LIMIT: u64 = 64 * Bytes::MIB;
/// Upper limit of checkpoints whose tokenizers are kept.
const KEPT: usize = 4;
/// Bytes in memory per byte of vocabulary file: two maps of tokens, and the merges as pairs of ids.
const BYTES_PER_BYTE: u64 = 8;

const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// The tokenizers of one checkpoint.
pub struct Tokenizers {
    /// CLIP ViT-L's; the refiner has none.
    pub first: Option<ClipTokenizer>,
    /// OpenCLIP ViT-bigG's.
    pub second: ClipTokenizer,
    bytes: Bytes,
}

/// One CLIP tokenizer and its special tokens.
pub struct ClipTokenizer {
    inner: Tokenizer,
    pub start: u32,
    pub end: u32,
    pub padding: u32,
}

/// A token of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub id: u32,
    /// Its entry in the vocabulary; words end with `</w>`.
    pub text: String,
}

impl ClipTokenizer {
    /// The tokens of `text`, without start, end and padding.
    ///
    /// # Errors
    /// None that a text can cause.
    pub fn tokenize(&self, text: &str) -> Result<Vec<Token>> {
        let encoding = self.inner.encode(text, false).map_err(|e| Error::bug(format!("tokenizer: {e}")))?;
        let ids = encoding.get_ids().iter().copied();
        Ok(ids.zip(encoding.get_tokens()).map(|(id, text)| Token { id, text: text.clone() }).collect())
    }
}

#[derive(Default)]
pub struct TokenizerManager {
    /// Least recently used first.
    entries: Vec<(CheckpointKey, String, Arc<Tokenizers>)>,
}

impl TokenizerManager {
    /// The tokenizers of a checkpoint, read if they are not in memory.
    ///
    /// # Errors
    /// `model_corrupt` if the checkpoint's own vocabulary cannot be used.
    pub fn acquire(&mut self, checkpoint: &Checkpoint) -> Result<Arc<Tokenizers>> {
        if let Some(index) = self.entries.iter().position(|(key, ..)| *key == checkpoint.key) {
            let entry = self.entries.remove(index);
            let tokenizers = Arc::clone(&entry.2);
            self.entries.push(entry);
            return Ok(tokenizers);
        }
        let tokenizers = Arc::new(read(checkpoint)?);
        self.entries.push((checkpoint.key, checkpoint.name.clone(), Arc::clone(&tokenizers)));
        let excess = self.entries.len().saturating_sub(KEPT);
        self.entries.drain(..excess);
        Ok(tokenizers)
    }

    /// Drops the tokenizers of a checkpoint; `None` drops all. Returns the bytes that were freed.
    pub(crate) fn remove(&mut self, checkpoint: Option<CheckpointKey>) -> Bytes {
        let bytes =
            |entries: &[(CheckpointKey, String, Arc<Tokenizers>)]| entries.iter().map(|entry| entry.2.bytes).sum();
        let before: Bytes = bytes(&self.entries);
        self.entries.retain(|(key, ..)| checkpoint.is_some_and(|wanted| wanted != *key));
        before.saturating_sub(bytes(&self.entries))
    }
}

impl Manager for TokenizerManager {
    fn resident(&self) -> Vec<Resident> {
        let resident = |(_, name, tokenizers): &(_, String, Arc<Tokenizers>)| Resident {
            kind: "tokenizer",
            name: name.clone(),
            bytes: tokenizers.bytes,
            pinned: false,
            used_ms: None,
            form: None,
            over: None,
        };
        self.entries.iter().map(resident).collect()
    }

    fn evict(&mut self, want: Bytes) -> Bytes {
        let mut freed = Bytes(0);
        self.entries.retain(|(.., tokenizers)| {
            let stays = freed >= want;
            if !stays {
                freed = freed + tokenizers.bytes;
            }
            stays
        });
        freed
    }
}

/// A special token in `tokenizer_config.json`: its text, or its text with options of recognition.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Special {
    Text(String),
    Token {
        content: String,
        #[serde(default)]
        normalized: bool,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        #[serde(default)]
        single_word: bool,
    },
}

impl Special {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Token { content: text, .. } => text,
        }
    }

    fn added(&self) -> AddedToken {
        match self {
            Self::Text(text) => AddedToken::from(text.as_str(), true),
            Self::Token { content, normalized, lstrip, rstrip, single_word } => {
                AddedToken::from(content.as_str(), true)
                    .normalized(*normalized)
                    .lstrip(*lstrip)
                    .rstrip(*rstrip)
                    .single_word(*single_word)
            }
        }
    }
}

/// The relevant part of `tokenizer_config.json`.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    bos_token: Option<Special>,
    eos_token: Option<Special>,
    unk_token: Option<Special>,
    pad_token: Option<Special>,
}

fn read(checkpoint: &Checkpoint) -> Result<Tokenizers> {
    let [first, second] = &checkpoint.tokenizers;
    let vocabulary_2 = vocabulary(second.as_ref().or(first.as_ref()))?;
    let mut bytes = vocabulary_2.bytes;
    let first = match &checkpoint.text_encoder {
        None => None,
        Some(encoder) => {
            let same = same_vocabulary(first.as_ref(), second.as_ref());
            let own = if same { vocabulary_2.clone() } else { vocabulary(first.as_ref())? };
            bytes += own.bytes;
            Some(build(own, first.as_ref(), "tokenizer", encoder.vocab_size)?)
        }
    };
    let second = build(vocabulary_2, second.as_ref(), "tokenizer_2", checkpoint.text_encoder_2.vocab_size)?;
    Ok(Tokenizers { first, second, bytes: Bytes(bytes) })
}

/// The tokenizer in the folder `name`, for an encoder that has embeddings for `rows` tokens.
fn build(vocabulary: Vocabulary, files: Option<&TokenizerFiles>, name: &str, rows: usize) -> Result<ClipTokenizer> {
    let path = files.map_or_else(|| name.into(), |files| files.vocab.path().to_owned());
    let config: TokenizerConfig = match files.and_then(|files| files.config.as_ref()) {
        Some(found) => found.json(Bytes::MIB)?,
        None => embedded(&format!("{name}/tokenizer_config.json"))?.json(Bytes::MIB)?,
    };
    let highest = vocabulary.highest;
    if highest as usize >= rows {
        let message = format!("has the token id {highest}, and the text encoder has {rows} tokens");
        return Err(Error::ModelCorrupt { path, message });
    }
    tokenizer(vocabulary.model, &config).map_err(|message| Error::ModelCorrupt { path, message })
}

fn embedded(name: &str) -> Result<ModelFile> {
    let bytes = demo::file(name).ok_or_else(|| Error::bug(format!("`{name}` is not embedded")))?;
    Ok(ModelFile::Embedded { path: name.into(), bytes })
}

/// True if both tokenizers have the same vocabulary, as in every SDXL checkpoint that has CLIP's twice. A tokenizer
/// without files uses the other's.
fn same_vocabulary(first: Option<&TokenizerFiles>, second: Option<&TokenizerFiles>) -> bool {
    let (Some(first), Some(second)) = (first, second) else { return true };
    let same = |a: &ModelFile, b: &ModelFile| {
        a.path() == b.path()
            || a.stamp().0 == b.stamp().0
                && matches!((a.read(VOCABULARY_LIMIT), b.read(VOCABULARY_LIMIT)), (Ok(a), Ok(b)) if a == b)
    };
    same(&first.vocab, &second.vocab) && same(&first.merges, &second.merges)
}

/// Tokens and merges, parsed.
#[derive(Clone)]
struct Vocabulary {
    model: BPE,
    highest: u32,
    /// Bytes in memory.
    bytes: u64,
}

/// The vocabulary of the files, or the embedded one.
fn vocabulary(files: Option<&TokenizerFiles>) -> Result<Vocabulary> {
    let (vocab, merges) = match files {
        Some(files) => (files.vocab.clone(), files.merges.clone()),
        None => (embedded("tokenizer/vocab.json")?, embedded("tokenizer/merges.txt")?),
    };
    let (vocab_bytes, merges_bytes) = (vocab.read(VOCABULARY_LIMIT)?, merges.read(VOCABULARY_LIMIT)?);
    let bytes = (vocab_bytes.len() + merges_bytes.len()) as u64 * BYTES_PER_BYTE;
    let corrupt = |found: &ModelFile, message: String| Error::ModelCorrupt { path: found.path().to_owned(), message };
    let words: Words =
        serde_json::from_slice(&vocab_bytes).map_err(|e| corrupt(&vocab, format!("is not a vocabulary: {e}")))?;
    let text = std::str::from_utf8(&merges_bytes).map_err(|e| corrupt(&merges, format!("is not UTF-8: {e}")))?;
    let pairs = text
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.is_empty())
        .map(|line| {
            let (a, b) = line
                .split_once(' ')
                .filter(|(_, b)| !b.contains(' '))
                .ok_or_else(|| corrupt(&merges, format!("must have two tokens a line, and has `{line}`")))?;
            // The library assumes that two merged tokens are a token.
            if a.len() + b.len() > words.longest {
                return Err(corrupt(&merges, format!("joins `{a}` and `{b}`, which the vocabulary does not know")));
            }
            Ok((a.to_owned(), b.to_owned()))
        })
        .collect::<Result<Vec<_>>>()?;
    let model = BPE::builder()
        .vocab_and_merges(words.vocab, pairs)
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".to_owned())
        .unk_token("<|endoftext|>".to_owned())
        .build()
        .map_err(|e| corrupt(&merges, format!("does not fit the vocabulary: {e}")))?;
    Ok(Vocabulary { model, highest: words.highest, bytes })
}

/// `vocab.json`, with the length of its longest token in bytes and its highest id.
struct Words {
    vocab: Vocab,
    longest: usize,
    highest: u32,
}

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Words;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object of tokens with their ids")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Words, A::Error> {
                let mut words = Words { vocab: Vocab::with_capacity(50_000), longest: 0, highest: 0 };
                while let Some((token, id)) = map.next_entry::<Cow<'de, str>, u32>()? {
                    words.longest = words.longest.max(token.len());
                    words.highest = words.highest.max(id);
                    words.vocab.insert(token.into_owned(), id);
                }
                Ok(words)
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

fn tokenizer(model: BPE, config: &TokenizerConfig) -> Result<ClipTokenizer, String> {
    let end = Special::Text("<|endoftext|>".to_owned());
    let start = Special::Text("<|startoftext|>".to_owned());
    let start = config.bos_token.as_ref().unwrap_or(&start);
    let specials = [start, config.eos_token.as_ref().unwrap_or(&end), config.unk_token.as_ref().unwrap_or(&end)];
    let padding = config.pad_token.as_ref().unwrap_or(&end);
    let mut inner = Tokenizer::new(model);
    let normalizers = vec![
        NFC.into(),
        Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ").map_err(|e| e.to_string())?.into(),
        Lowercase.into(),
    ];
    inner.with_normalizer(Some(Normalizers::new(normalizers))).map_err(|e| e.to_string())?;
    let words = Split::new(SplitPattern::Regex(WORDS.to_owned()), SplitDelimiterBehavior::Removed, true);
    inner.with_pre_tokenizer(Some(Splitters::new(vec![
        words.map_err(|e| e.to_string())?.into(),
        ByteLevel::new(false, true, true).into(),
    ])));
    let id = |inner: &Tokenizer, special: &Special| {
        inner.token_to_id(special.text()).ok_or_else(|| format!("does not have the special token `{}`", special.text()))
    };
    // Looked up before they are added: an unknown one would be given an id that the encoder has no embedding for.
    for special in specials.iter().chain([&padding]) {
        id(&inner, special)?;
    }
    inner.add_special_tokens(specials.iter().chain([&padding]).map(|s| s.added())).map_err(|e| e.to_string())?;
    Ok(ClipTokenizer { start: id(&inner, start)?, end: id(&inner, specials[1])?, padding: id(&inner, padding)?, inner })
}

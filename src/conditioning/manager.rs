//! Keeps the embeddings of prompts: a prompt that comes again needs no text encoder.

use crate::conditioning::interface::PromptWeighting;
use crate::conditioning::workers::encode::{Embeddings, EncodeText};
use crate::device::interface::Dtype;
use crate::layers::{Manager, Resident};
use crate::model::checkpoint::CheckpointKey;
use crate::units::Bytes;

/// About a hundred prompts of 77 tokens in f32.
const CAPACITY: Bytes = Bytes(64 * Bytes::MIB);

/// Everything that decides the embeddings of a text.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct EmbeddingKey {
    pub(super) checkpoint: CheckpointKey,
    pub(super) dtype: Dtype,
    pub(super) device: String,
    /// What each encoder is given: ids and weights.
    pub(super) text: EncodeText,
    pub(super) skip: usize,
    /// `None` for a text without weights.
    pub(super) weighting: PromptWeighting,
    /// The files whose vectors the ids mean.
    pub(super) embeddings: Vec<CheckpointKey>,
}

/// Embeddings by text, least recently used first.
#[derive(Default)]
pub struct EmbeddingManager {
    entries: Vec<(EmbeddingKey, Embeddings, Bytes)>,
}

impl EmbeddingManager {
    pub(super) fn get(&mut self, key: &EmbeddingKey) -> Option<Embeddings> {
        let place = self.entries.iter().position(|(known, ..)| known == key)?;
        let entry = self.entries.remove(place);
        let embeddings = entry.1.clone();
        self.entries.push(entry);
        Some(embeddings)
    }

    pub(super) fn insert(&mut self, key: EmbeddingKey, embeddings: &Embeddings) {
        let bytes = embeddings.bytes();
        if bytes > CAPACITY {
            return;
        }
        let excess = (self.bytes() + bytes).saturating_sub(CAPACITY);
        self.evict(excess);
        self.entries.push((key, embeddings.clone(), bytes));
    }

    fn bytes(&self) -> Bytes {
        self.entries.iter().map(|(.., bytes)| *bytes).sum()
    }
}

impl Manager for EmbeddingManager {
    /// All embeddings together: one line is enough for what is small and many.
    fn resident(&self) -> Vec<Resident> {
        let name = format!("{} prompts", self.entries.len());
        let all = Resident { kind: "embeddings", name, bytes: self.bytes(), pinned: false };
        if self.entries.is_empty() { Vec::new() } else { vec![all] }
    }

    fn evict(&mut self, want: Bytes) -> Bytes {
        let mut freed = Bytes(0);
        self.entries.retain(|(.., bytes)| {
            let stays = freed >= want;
            if !stays {
                freed = freed + *bytes;
            }
            stays
        });
        freed
    }
}

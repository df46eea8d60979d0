//! Keeps the embeddings of prompts, so that a prompt that comes again needs no text encoder, and the hints of ControlNets.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use crate::conditioning::init_image::{Cut, ResizeMode};
use crate::conditioning::interface::PromptWeighting;
use crate::conditioning::workers::encode::{Embeddings, EncodeText};
use crate::conditioning::workers::preprocess::Parameters;
use crate::device::interface::Dtype;
use crate::image::pixels::Rgb8;
use crate::layers::{Manager, Resident};
use crate::model::checkpoint::CheckpointKey;
use crate::units::{Bytes, ImageSize};

/// About a hundred prompts of 77 tokens in f32.
const CAPACITY: Bytes = Bytes(64 * Bytes::MIB);

/// Everything that decides the embeddings of a text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EmbeddingKey {
    pub(crate) checkpoint: CheckpointKey,
    pub(crate) dtype: Dtype,
    pub(crate) device: String,
    /// What is changed of the encoders.
    pub(crate) adapters: Option<CheckpointKey>,
    /// What each encoder is given: ids and weights.
    pub(crate) text: EncodeText,
    pub(crate) skip: usize,
    /// `None` for a text without weights.
    pub(crate) weighting: PromptWeighting,
    /// The files whose vectors the ids mean.
    pub(crate) embeddings: Vec<CheckpointKey>,
}

/// Embeddings by text, least recently used first.
#[derive(Default)]
pub struct EmbeddingManager {
    entries: Vec<(EmbeddingKey, Embeddings, Bytes)>,
}

impl EmbeddingManager {
    pub(crate) fn get(&mut self, key: &EmbeddingKey) -> Option<Embeddings> {
        let place = self.entries.iter().position(|(known, ..)| known == key)?;
        let entry = self.entries.remove(place);
        let embeddings = entry.1.clone();
        self.entries.push(entry);
        Some(embeddings)
    }

    pub(crate) fn insert(&mut self, key: EmbeddingKey, embeddings: &Embeddings) {
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
        let all = Resident {
            kind: "embeddings",
            name,
            bytes: self.bytes(),
            pinned: false,
            used_ms: None,
            over: None,
            form: None,
        };
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

/// About twenty hints of 1024².
const HINT_CAPACITY: Bytes = Bytes(64 * Bytes::MIB);

/// Everything that decides a hint.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct HintKey {
    /// Of the image's file.
    pub(crate) content: Content,
    pub(crate) preprocessor: &'static str,
    pub(crate) told: Parameters,
    pub(crate) resize: ResizeMode,
    pub(crate) size: ImageSize,
    pub(crate) cut: Option<Cut>,
}

/// The length of a file and two hashes of it under keys that were drawn when the process began: no file can be made to
/// look like another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Content(usize, [u64; 2]);

/// Hints by content, least recently used first.
#[derive(Default)]
pub struct HintManager {
    entries: Vec<(HintKey, Arc<Rgb8>)>,
    keys: [RandomState; 2],
}

impl HintManager {
    pub(crate) fn content(&self, file: &[u8]) -> Content {
        Content(file.len(), [self.keys[0].hash_one(file), self.keys[1].hash_one(file)])
    }

    pub(crate) fn get(&mut self, key: &HintKey) -> Option<Arc<Rgb8>> {
        let place = self.entries.iter().position(|(known, _)| known == key)?;
        let entry = self.entries.remove(place);
        let image = entry.1.clone();
        self.entries.push(entry);
        Some(image)
    }

    pub(crate) fn insert(&mut self, key: HintKey, image: &Arc<Rgb8>) {
        let bytes = bytes(image);
        if bytes > HINT_CAPACITY {
            return;
        }
        let excess = (self.bytes() + bytes).saturating_sub(HINT_CAPACITY);
        self.evict(excess);
        self.entries.push((key, image.clone()));
    }

    fn bytes(&self) -> Bytes {
        self.entries.iter().map(|(_, image)| bytes(image)).sum()
    }
}

fn bytes(image: &Rgb8) -> Bytes {
    Bytes(image.data.len() as u64)
}

impl Manager for HintManager {
    /// All hints together.
    fn resident(&self) -> Vec<Resident> {
        let name = format!("{} images", self.entries.len());
        let all =
            Resident { kind: "hints", name, bytes: self.bytes(), pinned: false, used_ms: None, over: None, form: None };
        if self.entries.is_empty() { Vec::new() } else { vec![all] }
    }

    fn evict(&mut self, want: Bytes) -> Bytes {
        let mut freed = Bytes(0);
        self.entries.retain(|(_, image)| {
            let stays = freed >= want;
            if !stays {
                freed = freed + bytes(image);
            }
            stays
        });
        freed
    }
}

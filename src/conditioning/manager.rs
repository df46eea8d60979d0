//! Caches the embeddings of prompts and the hints of ControlNets between requests.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use crate::conditioning::hints::{HintPlan, HintTarget};
use crate::conditioning::init_image::ResizeMode;
use crate::conditioning::interface::PromptWeighting;
use crate::conditioning::preprocessor::ParameterValues;
use crate::conditioning::workers::encode::{Embeddings, TokenizedText};
use crate::device::interface::Dtype;
use crate::image::pixels::Rgb8;
use crate::layers::{Manager, Resident};
use crate::model::checkpoint::CheckpointKey;
use crate::model::instructor::ModelResources;
use crate::units::Bytes;

/// The managers that the conditioning domain uses.
pub struct ConditioningResources {
    pub model: ModelResources,
    pub embeddings: EmbeddingManager,
    pub hints: HintManager,
}

/// About a hundred prompts of 77 tokens in f32.
const CAPACITY: Bytes = Bytes(64 * Bytes::MIB);

/// Everything that decides the embeddings of a text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EmbeddingKey {
    pub(crate) checkpoint: CheckpointKey,
    pub(crate) dtype: Dtype,
    pub(crate) device: String,
    /// LoRAs of the encoders.
    pub(crate) adapters: Option<CheckpointKey>,
    pub(crate) text: TokenizedText,
    pub(crate) skip: usize,
    /// [`PromptWeighting::None`] for a text without weights.
    pub(crate) weighting: PromptWeighting,
    /// The files of textual inversions, if the text has any.
    pub(crate) embeddings: Vec<CheckpointKey>,
}

/// Embeddings by text, least recently used first.
#[derive(Default)]
pub struct EmbeddingManager {
    entries: Vec<(EmbeddingKey, Embeddings, Bytes)>,
}

impl EmbeddingManager {
    pub(crate) fn get(&mut self, key: &EmbeddingKey) -> Option<Embeddings> {
        let position = self.entries.iter().position(|(known, ..)| known == key)?;
        let entry = self.entries.remove(position);
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
    /// All embeddings as one entry, because they are small and many.
    fn resident(&self) -> Vec<Resident> {
        let name = format!("{} prompts", self.entries.len());
        let resident = Resident {
            kind: "embeddings",
            name,
            bytes: self.bytes(),
            pinned: false,
            used_ms: None,
            over: None,
            form: None,
        };
        if self.entries.is_empty() { Vec::new() } else { vec![resident] }
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
    file: Fingerprint,
    preprocessor: &'static str,
    parameters: ParameterValues,
    resize: ResizeMode,
    target: HintTarget,
}

impl HintKey {
    pub(crate) fn new(file: Fingerprint, plan: &HintPlan, target: HintTarget) -> Self {
        Self { file, preprocessor: plan.preprocessor, parameters: plan.values, resize: plan.resize, target }
    }
}

/// The length of a file and two hashes with keys drawn at the start of the process, so that nobody can craft a collision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    length: usize,
    hashes: [u64; 2],
}

/// Hints by key, least recently used first.
#[derive(Default)]
pub struct HintManager {
    entries: Vec<(HintKey, Arc<Rgb8>)>,
    keys: [RandomState; 2],
}

impl HintManager {
    pub(crate) fn fingerprint(&self, file: &[u8]) -> Fingerprint {
        let [first, second] = &self.keys;
        Fingerprint { length: file.len(), hashes: [first.hash_one(file), second.hash_one(file)] }
    }

    pub(crate) fn get(&mut self, key: &HintKey) -> Option<Arc<Rgb8>> {
        let position = self.entries.iter().position(|(known, _)| known == key)?;
        let entry = self.entries.remove(position);
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
    /// All hints as one entry.
    fn resident(&self) -> Vec<Resident> {
        let name = format!("{} images", self.entries.len());
        let resident =
            Resident { kind: "hints", name, bytes: self.bytes(), pinned: false, used_ms: None, over: None, form: None };
        if self.entries.is_empty() { Vec::new() } else { vec![resident] }
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

//! Every manager as a plain field, owned by one thread, and the one order in which they free memory.

mod published;
pub mod throughput;

use std::sync::Arc;

pub use published::Published;

use crate::allocator;
use crate::conditioning::manager::{ConditioningResources, EmbeddingManager, HintManager};
use crate::device::instructor::MemoryStatus;
use crate::device::manager::DeviceManager;
use crate::layers::{Manager, Resident};
use crate::model::instructor::ModelResources;
use crate::model::interface::Settings as ModelSettings;
use crate::model::managers::Reach;
use crate::units::Bytes;

pub struct Managers {
    pub device: DeviceManager,
    /// Embeddings, hints and all networks.
    pub conditioning: ConditioningResources,
    pub published: Arc<Published>,
}

impl Managers {
    #[must_use]
    pub fn new(model: &ModelSettings, published: Arc<Published>) -> Self {
        Self {
            device: DeviceManager::default(),
            conditioning: ConditioningResources {
                model: ModelResources::new(model),
                embeddings: EmbeddingManager::default(),
                hints: HintManager::default(),
            },
            published,
        }
    }

    /// The networks.
    pub fn model(&mut self) -> &mut ModelResources {
        &mut self.conditioning.model
    }

    /// Everything that is kept in memory.
    #[must_use]
    pub fn resident(&self) -> Vec<Resident> {
        let mut all = self.conditioning.model.resident();
        all.extend(self.conditioning.embeddings.resident());
        all.extend(self.conditioning.hints.resident());
        all
    }

    /// Publishes what is kept now, and the device's `memory`.
    pub fn publish(&self, memory: Option<MemoryStatus>) {
        self.published.set(self.resident(), memory);
    }

    /// Bytes that [`Self::free_memory`] could free, tokenizers not counted.
    #[must_use]
    pub fn evictable(&self, reach: Reach) -> Bytes {
        let ConditioningResources { model, embeddings, hints } = &self.conditioning;
        let caches = embeddings.resident().into_iter().chain(hints.resident());
        caches.map(|one| one.bytes).sum::<Bytes>() + model.budget.evictable(reach)
    }

    /// Frees at least `want` if it can, and returns the bytes freed. The cheapest to get back goes first: hints,
    /// embeddings, tokenizers, then networks in the order of [`Budget`](crate::model::managers::Budget).
    pub fn free_memory(&mut self, want: Bytes, reach: Reach) -> Bytes {
        let ConditioningResources { model, embeddings, hints } = &mut self.conditioning;
        let caches: [&mut dyn Manager; 3] = [hints, embeddings, &mut model.tokenizers];
        let mut freed = Bytes(0);
        for manager in caches {
            if freed >= want {
                break;
            }
            freed = freed + manager.evict(want.saturating_sub(freed));
        }
        if freed < want {
            freed = freed + model.budget.evict(want.saturating_sub(freed), reach);
        }
        allocator::release();
        freed
    }

    /// Frees everything that is neither pinned nor in use at this moment, and returns the bytes freed.
    pub fn free_idle(&mut self) -> Bytes {
        self.free_memory(Bytes(u64::MAX), Reach::Idle)
    }
}

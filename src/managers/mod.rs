//! Every manager as a plain field, owned by one thread, and the order in which they give memory back.

use std::sync::{Arc, Mutex, PoisonError};

use crate::allocator;
use crate::conditioning::instructor::ConditioningResources;
use crate::conditioning::manager::{EmbeddingManager, HintManager};
use crate::device::instructor::Room;
use crate::device::manager::DeviceManager;
use crate::layers::{Manager, Resident};
use crate::model::instructor::ModelResources;
use crate::model::interface::Settings as ModelSettings;
use crate::model::managers::Reach;
use crate::throughput::Throughput;
use crate::units::Bytes;

/// What the compute thread lets the desk thread see.
#[derive(Debug, Default)]
pub struct Published {
    pub throughput: Throughput,
    residents: Mutex<Vec<Resident>>,
    room: Mutex<Option<(Room, bool)>>,
}

impl Published {
    /// What the compute thread held after its last job.
    #[must_use]
    pub fn residents(&self) -> Vec<Resident> {
        self.residents.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The room that its device had then, and whether that is the host.
    #[must_use]
    pub fn room(&self) -> Option<(Room, bool)> {
        *self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct Managers {
    pub device: DeviceManager,
    /// Embeddings and hints, and the networks that they and everything else are made with.
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

    /// Lets the desk see what is kept now.
    pub fn publish(&self, room: Option<Room>) {
        let on_host = self.device.opened().is_none_or(|opened| opened.device.is_cpu());
        *self.published.room.lock().unwrap_or_else(PoisonError::into_inner) = room.map(|room| (room, on_host));
        *self.published.residents.lock().unwrap_or_else(PoisonError::into_inner) = self.resident();
    }

    /// Frees at least `want` if it can, and says how much it freed. What is cheapest to have again goes first: hints,
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
}

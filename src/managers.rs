//! Every manager as a plain field, owned by one thread, and the order in which they give memory back.

use std::sync::{Arc, Mutex, PoisonError};

use crate::conditioning::interface::Settings as ConditioningSettings;
use crate::conditioning::manager::ConditioningManager;
use crate::device::manager::DeviceManager;
use crate::layers::{Manager, Resident};
use crate::model::instructor::ModelCrew;
use crate::model::interface::Settings as ModelSettings;
use crate::pace::Pace;
use crate::units::Bytes;

/// What the compute thread lets the desk thread see.
#[derive(Debug, Default)]
pub struct Published {
    pub pace: Pace,
    residents: Mutex<Vec<Resident>>,
}

impl Published {
    /// What the compute thread held after its last job.
    #[must_use]
    pub fn residents(&self) -> Vec<Resident> {
        self.residents.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

pub struct Managers {
    pub device: DeviceManager,
    pub model: ModelCrew,
    pub conditioning: ConditioningManager,
    pub published: Arc<Published>,
}

impl Managers {
    #[must_use]
    pub fn new(model: &ModelSettings, conditioning: &ConditioningSettings, published: Arc<Published>) -> Self {
        Self {
            device: DeviceManager::default(),
            model: ModelCrew::new(model),
            conditioning: ConditioningManager::new(conditioning),
            published,
        }
    }

    /// Everything that is kept in memory.
    #[must_use]
    pub fn resident(&self) -> Vec<Resident> {
        let mut all = self.model.resident();
        all.extend(self.conditioning.resident());
        all
    }

    /// Lets the desk see what is kept now.
    pub fn publish(&self) {
        *self.published.residents.lock().unwrap_or_else(PoisonError::into_inner) = self.resident();
    }

    /// Frees at least `want` if it can, and says how much it freed: what is cheapest to have again goes first.
    pub fn make_room(&mut self, want: Bytes) -> Bytes {
        let order: [&mut dyn Manager; 5] = [
            &mut self.conditioning,
            &mut self.model.tokenizers,
            &mut self.model.encoders,
            &mut self.model.vaes,
            &mut self.model.unets,
        ];
        let mut freed = Bytes(0);
        for manager in order {
            if freed >= want {
                break;
            }
            freed = freed + manager.evict(want.saturating_sub(freed));
        }
        freed
    }
}

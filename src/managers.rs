//! Every manager as a plain field of the compute thread.

use crate::device::manager::DeviceManager;

#[derive(Default)]
pub struct Managers {
    pub device: DeviceManager,
}

impl Managers {
    /// What they keep, all together.
    #[must_use]
    pub fn resident(&self) -> Vec<crate::layers::Resident> {
        Vec::new()
    }
}

//! Every manager as a plain field of the compute thread.

use crate::device::manager::DeviceManager;

#[derive(Default)]
pub struct Managers {
    pub device: DeviceManager,
}

//! A device that is ready to compute.

use crate::device::interface::DeviceId;

/// An open device.
#[derive(Clone)]
pub struct OpenDevice {
    pub id: DeviceId,
    pub device: candle_core::Device,
    /// The product's name; `None` if it cannot be read.
    pub description: Option<String>,
    /// CUDA's compute capability, major and minor.
    pub capability: Option<(u32, u32)>,
}

//! The open device.

/// Keeps the open device.
#[derive(Default)]
pub struct DeviceManager {}

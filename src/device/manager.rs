//! Keeps the open device. There is one, opened once, on the compute thread.

use crate::device::interface::{DeviceId, DeviceMemory};
use crate::device::workers::opened::OpenDevice;
use crate::device::workers::{cuda, metal};
use crate::error::{Error, Result};
use crate::units::Bytes;

/// Keeps the open device.
#[derive(Default)]
pub struct DeviceManager {
    open: Option<OpenDevice>,
}

impl DeviceManager {
    /// The device `id`, opened by the first call. Tensors live on the device that made them, so every call returns the same
    /// handle.
    ///
    /// # Errors
    /// `device_unavailable` with the reason.
    pub fn open(&mut self, id: DeviceId) -> Result<&OpenDevice> {
        let opened = match self.open.take() {
            Some(open) if open.id == id => open,
            _ => open(id)?,
        };
        Ok(self.open.insert(opened))
    }

    /// The open device, if any.
    #[must_use]
    pub fn opened(&self) -> Option<&OpenDevice> {
        self.open.as_ref()
    }

    /// The GPU's memory; `None` on the CPU, or if it cannot be read.
    #[must_use]
    pub fn memory(&self) -> Option<DeviceMemory> {
        let open = self.open.as_ref()?;
        let (total, free) = match open.id {
            DeviceId::Cuda(_) => cuda::memory(&open.device)?,
            DeviceId::Cpu | DeviceId::Metal => return None,
        };
        Some(DeviceMemory { name: open.id.to_string(), total: Bytes(total), free: Bytes(free) })
    }
}

fn open(id: DeviceId) -> Result<OpenDevice> {
    let unavailable = |message, hint: Option<&str>| Error::DeviceUnavailable {
        device: id.to_string(),
        message,
        hint: hint.map(str::to_owned),
    };
    match id {
        DeviceId::Cpu => Ok(OpenDevice { id, device: candle_core::Device::Cpu, description: None, capability: None }),
        DeviceId::Cuda(ordinal) => cuda::open(ordinal).map_err(|message| unavailable(message, cuda::HINT)),
        DeviceId::Metal => metal::open().map_err(|message| unavailable(message, metal::HINT)),
    }
}

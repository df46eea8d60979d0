//! The open device. There is one, and it is opened once, on the thread that computes.

use crate::device::interface::{DeviceId, DeviceMemory};
use crate::device::workers::{cuda, metal};
use crate::error::{Error, Result};
use crate::units::Bytes;

/// A device that is ready to compute.
#[derive(Clone)]
pub struct Opened {
    pub id: DeviceId,
    pub device: candle_core::Device,
    /// The product's name, where it can be read.
    pub description: Option<String>,
    /// CUDA's compute capability, major and minor.
    pub capability: Option<(u32, u32)>,
}

/// Keeps the open device.
#[derive(Default)]
pub struct DeviceManager {
    open: Option<Opened>,
}

impl DeviceManager {
    /// The device `id`, opened at the first call. Tensors live on the device that made them, so the same handle is
    /// given every time.
    ///
    /// # Errors
    /// `device_unavailable` with the reason.
    pub fn open(&mut self, id: DeviceId) -> Result<&Opened> {
        let opened = match self.open.take() {
            Some(open) if open.id == id => open,
            _ => open(id)?,
        };
        Ok(self.open.insert(opened))
    }

    /// The device that is open, if one is.
    #[must_use]
    pub fn opened(&self) -> Option<&Opened> {
        self.open.as_ref()
    }

    /// The GPU's memory; `None` on the CPU and where it cannot be read.
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

fn open(id: DeviceId) -> Result<Opened> {
    let unavailable = |message, hint: Option<&str>| Error::DeviceUnavailable {
        device: id.to_string(),
        message,
        hint: hint.map(str::to_owned),
    };
    match id {
        DeviceId::Cpu => Ok(Opened { id, device: candle_core::Device::Cpu, description: None, capability: None }),
        DeviceId::Cuda(ordinal) => cuda::open(ordinal).map_err(|message| unavailable(message, cuda::HINT)),
        DeviceId::Metal => metal::open().map_err(|message| unavailable(message, metal::HINT)),
    }
}

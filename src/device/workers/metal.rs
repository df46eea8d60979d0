//! Apple's GPU, through Metal.

use crate::device::workers::opened::OpenDevice;

#[cfg(not(feature = "metal"))]
pub(crate) const HINT: Option<&str> = Some("build the worker with `--features metal` on a Mac");
#[cfg(feature = "metal")]
pub(crate) const HINT: Option<&str> = None;

/// # Errors
/// The reason it cannot be opened.
#[cfg(not(feature = "metal"))]
pub(crate) fn open() -> Result<OpenDevice, String> {
    Err("this worker was built without Metal".to_owned())
}

/// # Errors
/// The reason it cannot be opened.
#[cfg(feature = "metal")]
pub(crate) fn open() -> Result<OpenDevice, String> {
    crate::device::workers::guarded(|| {
        let device = candle_core::Device::new_metal(0).map_err(|error| error.to_string())?;
        Ok(OpenDevice { id: crate::device::interface::DeviceId::Metal, description: None, capability: None, device })
    })
}

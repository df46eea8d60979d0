//! Apple's GPU, through Metal.

use crate::device::manager::Opened;

#[cfg(not(feature = "metal"))]
pub(crate) const HINT: Option<&str> = Some("build the worker with `--features metal` on a Mac");
#[cfg(feature = "metal")]
pub(crate) const HINT: Option<&str> = None;

/// # Errors
/// Why it cannot be opened, in words.
#[cfg(not(feature = "metal"))]
pub(crate) fn open() -> Result<Opened, String> {
    Err("this worker was built without Metal".to_owned())
}

/// # Errors
/// Why it cannot be opened, in words.
#[cfg(feature = "metal")]
pub(crate) fn open() -> Result<Opened, String> {
    crate::device::workers::guarded(|| {
        let device = candle_core::Device::new_metal(0).map_err(|error| error.to_string())?;
        Ok(Opened { id: crate::device::interface::DeviceId::Metal, description: None, capability: None, device })
    })
}

//! Inspects the machine: its devices, memory and CPU features.

pub(crate) mod cuda;
pub(crate) mod host;
pub(crate) mod metal;
pub(crate) mod opened;

/// Calls a driver's binding, and returns the text of its panic as an error.
#[cfg(any(feature = "cuda", feature = "metal"))]
fn guarded<T>(work: impl FnOnce() -> Result<T, String> + std::panic::UnwindSafe) -> Result<T, String> {
    std::panic::catch_unwind(work).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Err(text.unwrap_or("the driver's binding failed").to_owned())
    })
}

//! Looking at the machine: which devices it has, how much memory, what its CPU can do.

pub(crate) mod cuda;
pub(crate) mod host;
pub(crate) mod metal;

/// Runs what a driver's binding may answer with a panic, and gives the panic's text as an error.
#[cfg(any(feature = "cuda", feature = "metal"))]
fn guarded<T>(work: impl FnOnce() -> Result<T, String> + std::panic::UnwindSafe) -> Result<T, String> {
    std::panic::catch_unwind(work).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Err(text.unwrap_or("the driver's binding failed").to_owned())
    })
}

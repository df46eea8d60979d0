//! CUDA devices. Libraries are loaded before candle uses them: it panics if libcuda is missing.

use crate::device::workers::opened::OpenDevice;

/// A GPU as the driver names it; its index in the list is its ordinal.
pub(crate) struct Gpu {
    pub(crate) name: Option<String>,
}

#[cfg(not(feature = "cuda"))]
pub(crate) const HINT: Option<&str> = Some("build the worker with `--features cuda`");
#[cfg(feature = "cuda")]
pub(crate) const HINT: Option<&str> = None;

#[cfg(not(feature = "cuda"))]
mod backend {
    use super::{Gpu, OpenDevice};

    const ABSENT: &str = "this worker was built without CUDA";

    pub(crate) fn gpus() -> Result<Vec<Gpu>, String> {
        Err(ABSENT.to_owned())
    }

    pub(crate) fn open(_ordinal: usize) -> Result<OpenDevice, String> {
        Err(ABSENT.to_owned())
    }

    pub(crate) fn memory(_device: &candle_core::Device) -> Option<(u64, u64)> {
        None
    }
}

#[cfg(feature = "cuda")]
mod backend {
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, result};

    use super::{Gpu, OpenDevice};
    use crate::device::interface::DeviceId;
    use crate::device::workers::guarded;

    /// Libraries that candle opens at run time: the driver, and CUDA 13's matrix and random number libraries.
    const LIBRARIES: [&str; 3] = ["libcuda.so.1", "libcublas.so.13", "libcurand.so.10"];

    /// The driver's GPUs in its order.
    ///
    /// # Errors
    /// The reason there is none.
    pub(crate) fn gpus() -> Result<Vec<Gpu>, String> {
        libraries()?;
        guarded(|| {
            let count = CudaContext::device_count().map_err(|error| format!("the driver does not start: {error}"))?;
            if count == 0 {
                return Err("the driver shows no GPU".to_owned());
            }
            let name = |ordinal| result::device::get(ordinal).and_then(result::device::get_name).ok();
            Ok((0..count).map(|ordinal| Gpu { name: name(ordinal) }).collect())
        })
    }

    /// Opens a GPU for the calling thread: candle makes its stream here.
    ///
    /// # Errors
    /// The reason it cannot be opened.
    pub(crate) fn open(ordinal: usize) -> Result<OpenDevice, String> {
        let count = gpus()?.len();
        if ordinal >= count {
            return Err(format!("the driver shows {count} GPU(s), counted from 0"));
        }
        guarded(move || {
            let device = candle_core::Device::new_cuda(ordinal).map_err(|error| error.to_string())?;
            let context = device.as_cuda_device().map_err(|error| error.to_string())?.cuda_stream().context().clone();
            let (major, minor) = context.compute_capability().map_err(|error| error.to_string())?;
            let capability = u32::try_from(major).ok().zip(u32::try_from(minor).ok());
            Ok(OpenDevice { id: DeviceId::Cuda(ordinal), description: context.name().ok(), capability, device })
        })
    }

    /// Bytes in total and free.
    pub(crate) fn memory(device: &candle_core::Device) -> Option<(u64, u64)> {
        let stream = device.as_cuda_device().ok()?.cuda_stream();
        let (free, total) = stream.context().mem_get_info().ok()?;
        Some((total as u64, free as u64))
    }

    #[expect(unsafe_code, reason = "opening a shared library runs its initialisers")]
    fn libraries() -> Result<(), String> {
        for name in LIBRARIES {
            // SAFETY: NVIDIA's libraries may be opened at any time from any thread; nothing is called through the handle.
            let library = unsafe { libloading::Library::new(name) };
            // Kept open for good: candle opens the same library next.
            library.map(std::mem::forget).map_err(|_| format!("`{name}` cannot be loaded"))?;
        }
        Ok(())
    }
}

pub(crate) use backend::{gpus, memory, open};

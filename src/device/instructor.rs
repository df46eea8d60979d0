//! Chooses the device that computes, and its dtypes.

use crate::allocator;
use crate::context::Context;
use crate::device::interface::{
    CpuFeatures, Device, DeviceEntry, DeviceId, DeviceInfo, DeviceList, DeviceMemory, DeviceRequest, Dtype,
    MemoryReport, Quantization, Request, Response, Settings,
};
use crate::device::manager::DeviceManager;
use crate::device::workers::opened::OpenDevice;
use crate::device::workers::{cuda, host, metal};
use crate::error::{Error, Result};
use crate::kernels::simd::{self, SimdLevel};
use crate::layers::Instructor;
use crate::units::Bytes;

/// The device and dtypes of one request.
#[derive(Clone, Debug)]
pub struct Placement {
    pub device: candle_core::Device,
    /// `cpu`, `cuda:0`, `metal`.
    pub name: String,
    /// Text encoders and UNet.
    pub compute: Dtype,
    /// The VAE, which overflows in f16.
    pub vae: Dtype,
    /// Quantization of the UNet.
    pub quantization: Quantization,
    /// True if the UNet's weights stay on the host, or in their files, and are copied to the device a layer at a time.
    pub offloaded: bool,
}

impl Placement {
    /// The same with the quantization that a request asks for, if any.
    ///
    /// # Errors
    /// `unsupported_feature` for INT8 on a GPU.
    pub fn quantized(self, requested: Option<Quantization>) -> Result<Self> {
        let quantization = requested.unwrap_or(self.quantization);
        if quantization == Quantization::Int8 && !self.device.is_cpu() {
            return Err(Error::UnsupportedFeature {
                what: format!("int8 on `{}`", self.name),
                hint: Some("leave `quantization` out, or choose the device `cpu`".to_owned()),
                field: Some("quantization".to_owned()),
            });
        }
        Ok(Self { quantization, ..self })
    }
}

pub struct DeviceInstructor {
    settings: Settings,
}

impl DeviceInstructor {
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }

    /// The worker's device, opened if necessary, and the dtypes for a request that asks for `requested`. Only the compute
    /// thread may call this: CUDA's stream belongs to the thread that opened it.
    ///
    /// # Errors
    /// `device_unavailable`; `unknown_name` for an unknown device in the configuration; `unsupported_feature` for a dtype or
    /// quantization that the device lacks.
    pub fn place(&self, resources: &mut DeviceManager, requested: Option<Dtype>) -> Result<Placement> {
        let opened = self.open(resources)?;
        let dtypes = Dtypes::choose(opened.id, opened.capability, requested.or(self.settings.dtype))?;
        Placement {
            device: opened.device.clone(),
            name: opened.id.to_string(),
            compute: dtypes.compute,
            vae: dtypes.vae,
            quantization: self.settings.quantization,
            offloaded: false,
        }
        .quantized(None)
    }

    /// The quantization for a request that asks for `requested`.
    #[must_use]
    pub fn quantization(&self, requested: Option<Quantization>) -> Quantization {
        requested.unwrap_or(self.settings.quantization)
    }

    /// The dtype that [`Self::place`] would choose, without opening a device.
    ///
    /// # Errors
    /// `unknown_name` for an unknown device in the configuration; `unsupported_feature` for a dtype that the device lacks.
    pub fn dtype(&self, resources: &DeviceManager, requested: Option<Dtype>) -> Result<Dtype> {
        let (id, capability) = match (self.requested()?, resources.opened()) {
            (DeviceRequest::Exactly(id), None) => (id, None),
            (_, Some(opened)) => (opened.id, opened.capability),
            (DeviceRequest::Auto, None) => (DeviceId::Cpu, None),
        };
        Ok(Dtypes::choose(id, capability, requested.or(self.settings.dtype))?.compute)
    }

    /// Bytes free on the device; `None` if they cannot be read.
    #[must_use]
    pub fn free(&self, resources: &DeviceManager) -> Option<Bytes> {
        self.memory_status(resources).map(|memory| memory.free)
    }

    /// The GPU's memory, or the host's, within the limits of the configuration; `None` if it cannot be read.
    #[must_use]
    pub fn memory_status(&self, resources: &DeviceManager) -> Option<MemoryStatus> {
        let on_host = resources.opened().is_none_or(|opened| opened.device.is_cpu());
        if let Some(DeviceMemory { total, free, .. }) = resources.memory() {
            let limit = self.settings.device_memory.of(Some(total)).unwrap_or(total).min(total);
            let free = free.saturating_sub(total.saturating_sub(limit));
            return Some(MemoryStatus { total: limit, free, on_host });
        }
        let host = host::memory();
        let kept = allocator::usage().cached;
        let free = host.available.map(|available| available + kept);
        let Some(limit) = self.settings.host_memory.of(host.total) else {
            return Some(MemoryStatus { total: host.total?, free: free?, on_host });
        };
        // If the process cannot measure itself, it counts as empty.
        let taken = host::process().anonymous.unwrap_or_default().saturating_sub(kept);
        let left = limit.saturating_sub(taken);
        Some(MemoryStatus {
            total: host.total.map_or(limit, |total| total.min(limit)),
            free: free.map_or(left, |free| free.min(left)),
            on_host,
        })
    }

    fn requested(&self) -> Result<DeviceRequest> {
        match &self.settings.device {
            Some(name) => name.parse(),
            None if self.settings.auto_detect => Ok(DeviceRequest::Auto),
            None => Ok(DeviceRequest::Exactly(DeviceId::Cpu)),
        }
    }

    fn open<'a>(&self, resources: &'a mut DeviceManager) -> Result<&'a OpenDevice> {
        let id = match (self.requested()?, resources.opened()) {
            (DeviceRequest::Exactly(id), _) => id,
            (DeviceRequest::Auto, Some(opened)) => opened.id,
            (DeviceRequest::Auto, None) => first_that_opens(resources),
        };
        resources.open(id)
    }

    fn list(&self, resources: &DeviceManager) -> Result<DeviceList> {
        let entry = |id: DeviceId, description| DeviceEntry {
            name: id.to_string(),
            description,
            available: true,
            reason: None,
            chosen: false,
        };
        let absent = |name: &str, reason: String| DeviceEntry {
            name: name.to_owned(),
            description: None,
            available: false,
            reason: Some(reason),
            chosen: false,
        };
        let mut devices = match cuda::gpus() {
            Ok(gpus) => gpus.into_iter().enumerate().map(|(n, gpu)| entry(DeviceId::Cuda(n), gpu.name)).collect(),
            Err(reason) => vec![absent("cuda", reason)],
        };
        devices.push(match metal::open() {
            Ok(opened) => entry(DeviceId::Metal, opened.description),
            Err(reason) => absent("metal", reason),
        });
        devices.push(entry(DeviceId::Cpu, host::cpu().model));

        let chosen = match (self.requested()?, resources.opened()) {
            (DeviceRequest::Exactly(id), _) => Some(id.to_string()),
            (DeviceRequest::Auto, Some(opened)) => Some(opened.id.to_string()),
            (DeviceRequest::Auto, None) => {
                devices.iter().find(|device| device.available).map(|device| device.name.clone())
            }
        };
        for device in &mut devices {
            device.chosen = device.available && Some(&device.name) == chosen.as_ref();
        }
        Ok(DeviceList { devices })
    }

    fn info(&self, resources: &mut DeviceManager) -> Result<DeviceInfo> {
        let opened = self.open(resources)?;
        let dtypes = Dtypes::choose(opened.id, opened.capability, self.settings.dtype)?;
        let cpu = host::cpu();
        let allowed = |dtype: &Dtype| Dtypes::choose(opened.id, opened.capability, Some(*dtype)).is_ok();
        Ok(DeviceInfo {
            name: opened.id.to_string(),
            description: match opened.id {
                DeviceId::Cpu => cpu.model.clone(),
                DeviceId::Cuda(_) | DeviceId::Metal => opened.description.clone(),
            },
            compute_capability: opened.capability.map(|(major, minor)| format!("{major}.{minor}")),
            dtype: dtypes.compute,
            vae_dtype: dtypes.vae,
            dtypes: [Dtype::F32, Dtype::Bf16, Dtype::F16].into_iter().filter(allowed).collect(),
            cores: host::cores(),
            cpu,
        })
    }
}

impl Instructor for DeviceInstructor {
    type Interface = Device;
    type Resources<'a> = &'a mut DeviceManager;

    fn instruct(&self, request: Request, resources: &mut DeviceManager, _ctx: &Context) -> Result<Response> {
        Ok(match request {
            Request::List(_) => Response::List(self.list(resources)?),
            Request::Info(_) => Response::Info(self.info(resources)?),
            Request::Memory(_) => Response::Memory(MemoryReport {
                host: host::memory(),
                process: host::process(),
                device: resources.memory(),
            }),
        })
    }
}

/// Selects the CPU instruction sets of the whole process; called once, before the first computation.
///
/// # Errors
/// `device_unavailable`, naming the machine's instruction sets, if it lacks those requested.
pub fn choose_cpu_features(requested: CpuFeatures) -> Result<()> {
    let wanted = requested.level().unwrap_or_else(simd::best);
    if wanted.is_supported() {
        tracing::info!(cpu_features = simd::choose(wanted).name(), "the CPU's kernels");
        return Ok(());
    }
    let here =
        SimdLevel::ALL.into_iter().filter(|level| level.is_supported()).map(|level| format!("`{}`", level.name()));
    let here = here.collect::<Vec<_>>().join(", ");
    Err(Error::DeviceUnavailable {
        device: DeviceId::Cpu.to_string(),
        message: format!("`cpu_features` must be `auto` or what this machine has, {here}, got `{}`", wanted.name()),
        hint: None,
    })
}

/// Memory of a GPU or the host, for weights and feature maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryStatus {
    /// Bytes that may be in use.
    pub total: Bytes,
    /// Free bytes, including those that the allocator keeps for reuse.
    pub free: Bytes,
    /// True if the CPU computes.
    pub on_host: bool,
}

/// Dtypes of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dtypes {
    pub compute: Dtype,
    pub vae: Dtype,
}

impl Dtypes {
    /// `requested`, or the fastest dtype that is safe on the device: f32 on the CPU, bf16 on CUDA from compute capability
    /// 8.0, f16 below 8.0 and on Metal. The VAE overflows in f16: it takes bf16 if the GPU has it, else f32.
    ///
    /// # Errors
    /// `unsupported_feature` for bf16 on a GPU before compute capability 8.0.
    pub fn choose(id: DeviceId, capability: Option<(u32, u32)>, requested: Option<Dtype>) -> Result<Self> {
        let gpu_has_bf16 = matches!(id, DeviceId::Cuda(_)) && capability.is_some_and(|capability| capability >= (8, 0));
        let compute = requested.unwrap_or(match id {
            DeviceId::Cpu => Dtype::F32,
            DeviceId::Cuda(_) if gpu_has_bf16 => Dtype::Bf16,
            DeviceId::Cuda(_) | DeviceId::Metal => Dtype::F16,
        });
        if compute == Dtype::Bf16 && matches!(id, DeviceId::Cuda(_)) && !gpu_has_bf16 {
            return Err(Error::UnsupportedFeature {
                what: format!("bf16 on `{id}`, which came before compute capability 8.0,"),
                hint: Some("ask for f16 or f32".to_owned()),
                field: Some("dtype".to_owned()),
            });
        }
        let vae = match compute {
            Dtype::F16 if gpu_has_bf16 => Dtype::Bf16,
            Dtype::F16 => Dtype::F32,
            other => other,
        };
        Ok(Self { compute, vae })
    }
}

/// The first of CUDA, Metal and the CPU that opens; the CPU always does. A GPU that is present but fails to open is
/// logged.
fn first_that_opens(resources: &mut DeviceManager) -> DeviceId {
    for id in [DeviceId::Cuda(0), DeviceId::Metal] {
        match resources.open(id) {
            Ok(_) => return id,
            // The hint says that this build lacks the device's code, which is no reason for a warning.
            Err(error) if error.hint().is_some() => tracing::debug!(%error, "auto detection skips `{id}`"),
            Err(error) => tracing::warn!(%error, "auto detection skips `{id}`"),
        }
    }
    DeviceId::Cpu
}

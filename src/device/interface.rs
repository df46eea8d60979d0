//! The device domain's operations, and its section of the configuration.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, nearest};
use crate::kernels::simd::SimdLevel;
use crate::layers::{Domain, Interface, Nothing};
use crate::units::{Allowance, Bytes};
pub use crate::units::{Dtype, Quantization};

/// A device by name: `cpu`, `cuda:0`, `metal`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceId {
    Cpu,
    /// The GPU's number as the CUDA driver counts, from 0.
    Cuda(usize),
    Metal,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

/// The value of `--device` and the configuration's `device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceRequest {
    /// The first of CUDA, Metal and CPU that works.
    Auto,
    Exactly(DeviceId),
}

impl FromStr for DeviceRequest {
    type Err = Error;

    /// Reads `cpu`, `cuda`, `cuda:1`, `metal` and `auto`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let unknown = || Error::UnknownName {
            kind: "device",
            name: text.to_owned(),
            nearest: nearest(text, ["cpu", "cuda", "cuda:0", "metal", "auto"]),
            field: None,
        };
        Ok(match text {
            "auto" => Self::Auto,
            "cpu" => Self::Exactly(DeviceId::Cpu),
            "metal" => Self::Exactly(DeviceId::Metal),
            "cuda" => Self::Exactly(DeviceId::Cuda(0)),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Self::Exactly(DeviceId::Cuda(ordinal)),
                _ => return Err(unknown()),
            },
        })
    }
}

/// CPU instruction sets for the kernels: the value of `--cpu-features` and the configuration's `cpu_features`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CpuFeatures {
    /// The fastest that the machine has.
    #[default]
    Auto,
    /// Those of every machine of the architecture.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 BF16.
    Avx512Bf16,
    /// AMX-TILE, AMX-BF16 and AMX-INT8.
    Amx,
}

impl CpuFeatures {
    /// The kernels' level of that name; `None` for `auto`.
    #[must_use]
    pub fn level(self) -> Option<SimdLevel> {
        match self {
            Self::Auto => None,
            Self::Portable => Some(SimdLevel::Portable),
            Self::Avx2 => Some(SimdLevel::Avx2),
            Self::Avx512 => Some(SimdLevel::Avx512),
            Self::Avx512Bf16 => Some(SimdLevel::Avx512Bf16),
            Self::Amx => Some(SimdLevel::Amx),
        }
    }
}

/// The section `workers.instructors.device` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// `true`: the best device that works. `false`: the CPU, unless `device` names another.
    pub auto_detect: bool,
    /// `cpu`, `cuda`, `cuda:1`, `metal` or `auto`. Overrides `auto_detect`.
    pub device: Option<String>,
    /// Compute dtype. Default: the device's fastest safe one.
    pub dtype: Option<Dtype>,
    /// Quantization of the UNet: `none` or `int8`, the latter on the CPU only.
    pub quantization: Quantization,
    /// Instruction sets of the CPU's kernels: `auto`, `portable`, `avx2`, `avx512`, `avx512-bf16` or `amx`.
    pub cpu_features: CpuFeatures,
    /// Limit on the GPU memory in use by all processes: bytes as a number or as `20GB`, a share of the GPU's memory (`90%`),
    /// or `auto`: no limit.
    pub device_memory: Allowance,
    /// Limit on the host memory of this process, mapped files not counted: bytes as a number or as `16GB`, a share of the
    /// host's memory (`60%`), or `auto`: all that is available. Work that does not fit is done in ways that need less, or
    /// refused.
    pub host_memory: Allowance,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            auto_detect: true,
            device: None,
            dtype: None,
            quantization: Quantization::None,
            cpu_features: CpuFeatures::Auto,
            device_memory: Allowance::Auto,
            host_memory: Allowance::Auto,
        }
    }
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    List(Nothing),
    Info(Nothing),
    Memory(Nothing),
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Response {
    List(DeviceList),
    Info(DeviceInfo),
    Memory(MemoryReport),
}

/// The response to `list`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DeviceList {
    pub devices: Vec<DeviceEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct DeviceEntry {
    /// `cpu`, `cuda:0`, `metal`; `cuda` alone if CUDA is not available.
    pub name: String,
    /// The product's name; `null` if it cannot be read.
    pub description: Option<String>,
    pub available: bool,
    /// The reason it is not available.
    pub reason: Option<String>,
    /// True if this worker computes on it.
    pub chosen: bool,
}

/// The response to `info`: the device that computes.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DeviceInfo {
    /// `cpu`, `cuda:0`, `metal`.
    pub name: String,
    /// The product's name; `null` if it cannot be read.
    pub description: Option<String>,
    /// CUDA's compute capability, such as `9.0`.
    pub compute_capability: Option<String>,
    /// Compute dtype of the networks, unless a request names another.
    pub dtype: Dtype,
    /// Compute dtype of the VAE.
    pub vae_dtype: Dtype,
    /// Compute dtypes that a request may name.
    pub dtypes: Vec<Dtype>,
    /// CPU threads that this process may use at once.
    pub cores: usize,
    pub cpu: CpuInfo,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct CpuInfo {
    /// The system's name for it; `null` if there is none.
    pub model: Option<String>,
    /// The CPU's instruction sets, as far as kernels could use them, in Linux's spelling.
    pub instruction_sets: Vec<String>,
    /// The level in use by the kernels: `portable`, `avx2`, `avx512`, `avx512-bf16` or `amx`.
    pub cpu_features: &'static str,
}

/// The response to `memory`. Figures that the system does not offer are `null`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MemoryReport {
    pub host: HostMemory,
    pub process: ProcessMemory,
    /// The GPU's own memory, once the device is open; `null` if the CPU computes.
    pub device: Option<DeviceMemory>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct HostMemory {
    /// Most bytes that this process may use: the machine's memory, or its control group's limit if that is less.
    pub total: Option<Bytes>,
    /// Bytes that can be allocated without swapping, within that limit.
    pub available: Option<Bytes>,
    /// True if a control group sets the limit.
    pub limited_by_cgroup: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ProcessMemory {
    /// Bytes resident now.
    pub rss: Option<Bytes>,
    /// Most bytes that were ever resident.
    pub peak_rss: Option<Bytes>,
    /// Bytes resident now that belong to no file.
    pub anonymous: Option<Bytes>,
    /// Bytes of mapped weight files: part of `rss` as far as they were read; the system can reclaim them.
    pub mapped: Bytes,
    /// Bytes of `anonymous` that the allocator keeps for reuse.
    pub kept: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct DeviceMemory {
    pub name: String,
    pub total: Bytes,
    pub free: Bytes,
}

pub struct Device;

impl Interface for Device {
    const DOMAIN: Domain = Domain::Device;
    const OPERATIONS: &'static [&'static str] = &["list", "info", "memory"];
    type Request = Request;
    type Response = Response;
}

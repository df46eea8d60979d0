//! What can be asked of the devices.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, nearest};
use crate::kernels::simd::Level;
use crate::layers::{Domain, Interface, Nothing};
use crate::units::{Allowance, Bytes};

/// Number format of activations and arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Dtype {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    #[must_use]
    pub fn tensor(self) -> candle_core::DType {
        match self {
            Self::F32 => candle_core::DType::F32,
            Self::Bf16 => candle_core::DType::BF16,
            Self::F16 => candle_core::DType::F16,
        }
    }
}

/// What the UNet multiplies in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// The compute dtype.
    #[default]
    None,
    /// Signed bytes: weights by output, activations by token or feature map. On the CPU only.
    Int8,
}

impl Quantization {
    pub const ALL: [Self; 2] = [Self::None, Self::Int8];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Int8 => "int8",
        }
    }
}

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

/// What `--device` and the configuration's `device` say.
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

/// Which of the CPU's instruction sets the kernels use: what `--cpu-features` and the configuration's `cpu_features` say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CpuFeatures {
    /// The fastest of them that the machine has.
    #[default]
    Auto,
    /// What every machine of the architecture has.
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
    pub fn level(self) -> Option<Level> {
        match self {
            Self::Auto => None,
            Self::Portable => Some(Level::Portable),
            Self::Avx2 => Some(Level::Avx2),
            Self::Avx512 => Some(Level::Avx512),
            Self::Avx512Bf16 => Some(Level::Avx512Bf16),
            Self::Amx => Some(Level::Amx),
        }
    }
}

/// The section `workers.instructors.device` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Take the best device that works. `false`: the CPU, unless `device` names another.
    pub auto_detect: bool,
    /// `cpu`, `cuda`, `cuda:1`, `metal` or `auto`; over `auto_detect` when it is there.
    pub device: Option<String>,
    /// Compute dtype; the device's own choice when it is left out.
    pub dtype: Option<Dtype>,
    /// Whether the UNet multiplies in bytes: `none` or `int8`, the latter on the CPU only.
    pub quantization: Quantization,
    /// Instruction sets of the CPU's kernels: `auto`, `portable`, `avx2`, `avx512`, `avx512-bf16` or `amx`.
    pub cpu_features: CpuFeatures,
    /// The GPU's memory that may be in use, by this process and others: bytes as a number or as `20GB`, a share of the GPU's
    /// memory (`90%`), or `auto`: all of it.
    pub device_memory: Allowance,
    /// The host's memory that this process may take, files that it maps not counted: bytes as a number or as `16GB`, a share
    /// of the host's memory (`60%`), or `auto`: all that is available. What would not fit is done in ways that take less,
    /// or refused.
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

/// The answer to `list`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DeviceList {
    pub devices: Vec<DeviceEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct DeviceEntry {
    /// `cpu`, `cuda:0`, `metal`; `cuda` stands for all of CUDA where it is not available.
    pub name: String,
    /// The product's name, where it can be read.
    pub description: Option<String>,
    pub available: bool,
    /// Why it is not available.
    pub reason: Option<String>,
    /// Whether this worker computes on it.
    pub chosen: bool,
}

/// The answer to `info`: the device that computes.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DeviceInfo {
    /// `cpu`, `cuda:0`, `metal`.
    pub name: String,
    /// The product's name, where it can be read.
    pub description: Option<String>,
    /// CUDA's compute capability, such as `9.0`.
    pub compute_capability: Option<String>,
    /// What the networks compute in unless a request says otherwise.
    pub dtype: Dtype,
    /// What the VAE computes in.
    pub vae_dtype: Dtype,
    /// What a request may ask for.
    pub dtypes: Vec<Dtype>,
    /// CPU threads that this process may use at once.
    pub cores: usize,
    pub cpu: CpuInfo,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct CpuInfo {
    /// As the system names it, where it does.
    pub model: Option<String>,
    /// Those of the instruction sets that matter here which the CPU has, as Linux spells them.
    pub instruction_sets: Vec<String>,
    /// What the CPU's kernels use of them: `portable`, `avx2`, `avx512`, `avx512-bf16` or `amx`.
    pub cpu_features: &'static str,
}

/// The answer to `memory`. What a system does not tell is `null`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MemoryReport {
    pub host: HostMemory,
    pub process: ProcessMemory,
    /// The GPU's own memory, once the device is open; `null` where computing is on the host.
    pub device: Option<DeviceMemory>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct HostMemory {
    /// Bytes this process may use at most: the machine's, or its control group's limit if that is less.
    pub total: Option<Bytes>,
    /// Bytes that can be had without swapping, within that limit.
    pub available: Option<Bytes>,
    /// Whether a control group sets the limit.
    pub limited_by_cgroup: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ProcessMemory {
    /// Bytes resident now.
    pub rss: Option<Bytes>,
    /// The most bytes that were ever resident.
    pub peak_rss: Option<Bytes>,
    /// Bytes resident now that are the process's own, no file's.
    pub anonymous: Option<Bytes>,
    /// Bytes of weight files that are mapped: part of `rss` as far as they were read, and the system's to take back.
    pub mapped: Bytes,
    /// Bytes of `anonymous` that are free and wait for reuse.
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

//! The command line. Flags override the configuration.

use std::path::PathBuf;

use crate::device::interface::CpuFeatures;
use crate::runtime::config::{Config, ConfigError, LogLevel, OnEof};
use crate::units::Bytes;

/// Makes SDXL images from newline-delimited JSON: requests on stdin, answers on stdout, logs on stderr.
#[derive(clap::Parser, Debug)]
#[command(
    name = "sdxl-worker",
    version,
    about,
    after_help = "example:\n  echo '{\"prompt\": \"A sunset over mountains\"}' | sdxl-worker"
)]
pub struct Arguments {
    /// Configuration file; without it `configs/workers_config.json` where that is there
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// `cpu`, `cuda`, `cuda:1`, `metal` or `auto`
    #[arg(long)]
    device: Option<String>,
    /// Instruction sets of the CPU's kernels: `auto`, `portable`, `avx2`, `avx512`, `avx512-bf16` or `amx`
    #[arg(long, value_name = "LEVEL", value_parser = by_name::<CpuFeatures>)]
    cpu_features: Option<CpuFeatures>,
    /// `off`, `error`, `warn`, `info`, `debug` or `trace`, to stderr
    #[arg(long, value_name = "LEVEL", value_parser = by_name::<LogLevel>)]
    log_level: Option<LogLevel>,
    /// Longest line of input, as `33554432` or `32MiB`
    #[arg(long, value_name = "BYTES")]
    max_line_bytes: Option<Bytes>,
    /// Requests that may wait beside the one that runs
    #[arg(long, value_name = "COUNT")]
    queue_limit: Option<usize>,
    /// What becomes of accepted requests when stdin ends: `finish` or `cancel`
    #[arg(long, value_name = "WHAT", value_parser = by_name::<OnEof>)]
    on_eof: Option<OnEof>,
    /// Emit the event `ready` once requests can be computed
    #[arg(long)]
    announce: bool,
    /// Milliseconds between `heartbeat` events; 0 for none
    #[arg(long, value_name = "MS")]
    heartbeat_ms: Option<u64>,
    /// Folder of images whose request names none
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Folder beneath which models are looked for; may be given several times, in place of the configured ones
    #[arg(long, value_name = "DIR")]
    model_root: Vec<PathBuf>,
    /// Model of requests that name none
    #[arg(long)]
    model: Option<String>,
    /// Read weights into memory of the process rather than mapping their files
    #[arg(long)]
    no_mmap: bool,
    /// Print the JSON Schema of the wire and exit
    #[arg(long)]
    pub print_schema: bool,
}

impl Arguments {
    /// The configuration with the flags over it.
    ///
    /// # Errors
    /// A file or a value that cannot be used.
    pub fn configure(self) -> Result<Config, ConfigError> {
        let mut config = Config::load(self.config.as_deref())?;
        let main = &mut config.workers.main_interface;
        put(&mut main.log_level, self.log_level);
        put(&mut main.max_line_bytes, self.max_line_bytes);
        put(&mut main.queue_limit, self.queue_limit);
        put(&mut main.on_eof, self.on_eof);
        put(&mut main.heartbeat_ms, self.heartbeat_ms);
        main.announce |= self.announce;
        let domains = &mut config.workers.instructors;
        put(&mut domains.postprocessing.output_dir, self.output_dir);
        put(&mut domains.device.cpu_features, self.cpu_features);
        domains.model.mmap &= !self.no_mmap;
        if self.device.is_some() {
            domains.device.device = self.device;
        }
        if self.model.is_some() {
            domains.model.default = self.model;
        }
        if !self.model_root.is_empty() {
            domains.model.roots = self.model_root;
        }
        config.check()?;
        Ok(config)
    }
}

fn put<T>(setting: &mut T, flag: Option<T>) {
    if let Some(flag) = flag {
        *setting = flag;
    }
}

/// Reads a value as the configuration file would.
fn by_name<T: serde::de::DeserializeOwned>(name: &str) -> Result<T, serde::de::value::Error> {
    T::deserialize(serde::de::value::StrDeserializer::new(name))
}

//! The command line. Flags override the configuration.

use std::path::PathBuf;

use crate::device::interface::CpuFeatures;
use crate::runtime::config::{Config, ConfigError, LogLevel, OnEof};
use crate::units::Bytes;

/// Shown when stdin is a terminal, where the worker would otherwise seem to hang.
pub const TERMINAL_HINT: &str = "reading requests from this terminal, one JSON object per line (Ctrl-D to end); or pipe one \
                                 in: echo '{\"prompt\": \"A sunset over mountains\"}' | sdxl-worker";

/// Makes SDXL images from newline-delimited JSON: requests on stdin, answers on stdout, logs on stderr.
#[derive(clap::Parser, Debug)]
#[command(
    name = "sdxl-worker",
    version,
    about,
    after_help = "example:\n  echo '{\"prompt\": \"A sunset over mountains\"}' | sdxl-worker"
)]
pub struct Arguments {
    /// Configuration file; default: `configs/workers_config.json` if it exists
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// `cpu`, `cuda`, `cuda:1`, `metal` or `auto`
    #[arg(long)]
    device: Option<String>,
    /// Instruction sets for the CPU kernels: `auto`, `portable`, `avx2`, `avx512`, `avx512-bf16` or `amx`
    #[arg(long, value_name = "LEVEL", value_parser = by_name::<CpuFeatures>)]
    cpu_features: Option<CpuFeatures>,
    /// Log level on stderr: `off`, `error`, `warn`, `info`, `debug` or `trace`
    #[arg(long, value_name = "LEVEL", value_parser = by_name::<LogLevel>)]
    log_level: Option<LogLevel>,
    /// Longest line of input, such as `33554432` or `32MiB`
    #[arg(long, value_name = "BYTES")]
    max_line_bytes: Option<Bytes>,
    /// Requests that may wait in addition to the running one
    #[arg(long, value_name = "COUNT")]
    queue_limit: Option<usize>,
    /// When stdin ends, `finish` or `cancel` accepted requests
    #[arg(long, value_name = "ACTION", value_parser = by_name::<OnEof>)]
    on_eof: Option<OnEof>,
    /// Emit the event `ready` once the device is open
    #[arg(long)]
    announce: bool,
    /// Milliseconds between `heartbeat` events; 0 for none
    #[arg(long, value_name = "MS")]
    heartbeat_ms: Option<u64>,
    /// Folder for images of requests that name none
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Folder to search for models; may be repeated; replaces the configured folders
    #[arg(long, value_name = "DIR")]
    model_root: Vec<PathBuf>,
    /// Model for requests that name none
    #[arg(long)]
    model: Option<String>,
    /// Read weights into memory instead of mapping their files
    #[arg(long)]
    no_mmap: bool,
    /// Print the JSON Schema of the wire and exit
    #[arg(long)]
    pub print_schema: bool,
}

impl Arguments {
    /// Loads the configuration and applies the flags.
    ///
    /// # Errors
    /// The first unusable file or value.
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

/// Reads a value in the form of the configuration file.
fn by_name<T: serde::de::DeserializeOwned>(name: &str) -> Result<T, serde::de::value::Error> {
    T::deserialize(serde::de::value::StrDeserializer::new(name))
}

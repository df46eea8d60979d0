//! The log on stderr, whose level can be changed at run time.

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{filter::LevelFilter, fmt, reload};

use crate::error::{Error, Result};
use crate::runtime::config::LogLevel;

/// Starts logging at `level` and returns a function that changes the level. Called once in a process.
#[must_use]
pub fn begin(level: LogLevel) -> Box<dyn Fn(LogLevel) -> Result<()>> {
    let (filter, handle) = reload::Layer::new(lowest(level));
    // A closed stderr must not end the process.
    let log = fmt::layer().with_writer(std::io::stderr).with_ansi(false).log_internal_errors(false);
    tracing_subscriber::registry().with(filter).with(log).init();
    Box::new(move |wanted| {
        handle.reload(lowest(wanted)).map_err(|e| Error::bug(format!("the log level cannot be changed: {e}")))
    })
}

fn lowest(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

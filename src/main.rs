//! The process: arguments, the guard of stdout, logging, configuration and the exit code.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser as _;
use sdxl_worker::communication::instructor::CommunicationInstructor;
use sdxl_worker::communication::schema;
use sdxl_worker::communication::serve::{Setup, serve};
use sdxl_worker::communication::workers::{descriptor, log};
use sdxl_worker::device::instructor::choose_cpu_features;
use sdxl_worker::managers::Published;
use sdxl_worker::runtime::arguments::{Arguments, TERMINAL_HINT};
use sdxl_worker::runtime::lane;

const USAGE: u8 = 64;
const BAD_CONFIG: u8 = 65;
const NO_DEVICE: u8 = 69;
const NO_THREADS: u8 = 70;
const STDOUT_GONE: u8 = 74;

fn main() -> ExitCode {
    let begun = Instant::now();
    let Ok(mut stdout) = descriptor::claim_stdout() else { return STDOUT_GONE.into() };
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(refusal) if refusal.use_stderr() => {
            let _ = refusal.print();
            return USAGE.into();
        }
        Err(help) => return print(&mut stdout, &help.to_string()),
    };
    if arguments.print_schema {
        return schema::document().map_or(NO_THREADS.into(), |document| print(&mut stdout, &format!("{document}\n")));
    }
    let config = match arguments.configure() {
        Ok(config) => config,
        Err(error) => return refuse(BAD_CONFIG, &error),
    };
    let instructors = config.workers.instructors;
    let set_log_level = log::begin(config.workers.main_interface.log_level);
    if let Err(error) = choose_cpu_features(instructors.device.cpu_features) {
        return refuse(NO_DEVICE, &error);
    }
    let instructor = CommunicationInstructor { inference: instructors.inference.clone(), set_log_level };
    let published = Arc::new(Published::default());
    let (compute, query) = lane::builds(instructors, Arc::clone(&published));
    let settings = config.workers.main_interface;
    if std::io::stdin().is_terminal() {
        note(&TERMINAL_HINT);
    }
    match serve(Setup { settings, stdout, compute, query, published, instructor, begun }) {
        // Threads that wait on descriptors end with the process.
        Ok(exit) => std::process::exit(exit.code()),
        Err(error) => {
            tracing::error!(%error, "cannot start");
            NO_THREADS.into()
        }
    }
}

fn refuse(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    note(error);
    code.into()
}

fn note(text: &dyn std::fmt::Display) {
    // A closed stderr must not change the exit code.
    let _ = writeln!(std::io::stderr(), "sdxl-worker: {text}");
}

fn print(stdout: &mut std::fs::File, text: &str) -> ExitCode {
    stdout.write_all(text.as_bytes()).map_or(STDOUT_GONE.into(), |()| ExitCode::SUCCESS)
}

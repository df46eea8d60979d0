//! Arguments, the guard of stdout, logging, configuration, exit code.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser as _;
use sdxl_worker::communication::instructor::CommunicationInstructor;
use sdxl_worker::communication::schema;
use sdxl_worker::communication::serve::{Setup, serve};
use sdxl_worker::communication::workers::{descriptor, log};
use sdxl_worker::device::instructor::choose_cpu_features;
use sdxl_worker::managers::{Managers, Published};
use sdxl_worker::runtime::arguments::Arguments;
use sdxl_worker::runtime::dispatch::Instructors;
use sdxl_worker::runtime::lane::Build;

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
        Err(help) => return say(&mut stdout, &help.to_string()),
    };
    if arguments.print_schema {
        return schema::document().map_or(NO_THREADS.into(), |document| say(&mut stdout, &format!("{document}\n")));
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
    let seen = Arc::clone(&published);
    let make = move || {
        let managers = Managers::new(&instructors.model, Arc::clone(&seen));
        Ok((Instructors::new(&instructors)?, managers))
    };
    let desk: Build = Arc::new(make.clone());
    let compute: Build = Arc::new(move || {
        let (instructors, mut managers) = make()?;
        instructors.inference.device.place(&mut managers.device, None)?;
        Ok((instructors, managers))
    });
    let settings = config.workers.main_interface;
    match serve(Setup { settings, stdout, compute, desk, published, instructor, begun }) {
        // Threads that still wait on descriptors end with the process.
        Ok(exit) => std::process::exit(exit.code()),
        Err(error) => {
            tracing::error!(%error, "cannot begin");
            NO_THREADS.into()
        }
    }
}

fn refuse(code: u8, error: &dyn std::error::Error) -> ExitCode {
    // Nobody may be reading stderr, which is no reason to fail differently.
    let _ = writeln!(std::io::stderr(), "sdxl-worker: {error}");
    code.into()
}

fn say(stdout: &mut std::fs::File, text: &str) -> ExitCode {
    stdout.write_all(text.as_bytes()).map_or(STDOUT_GONE.into(), |()| ExitCode::SUCCESS)
}

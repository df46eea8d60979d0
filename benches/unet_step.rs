//! Whole images and single steps. Without an argument it times the demonstration model from the request to the
//! pixels. `cargo bench --bench unet_step -- --model NAME --root DIR [--size 1024] [--dtype bf16] [--int8]` times
//! one CFG step of another model, such as the one that the bench `random_model` writes, and prints load time and
//! peak memory. `--load` only loads the model, twice; `--negative TEXT` encodes a second prompt, `--release` frees
//! the text encoders after encoding, `--no-mmap` reads weights instead of mapping them.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use sdxl_worker::allocator;
use sdxl_worker::context::{CancelToken, Context, Progress};
use sdxl_worker::device::interface::{Dtype, Quantization};
use sdxl_worker::device::scope::RequestScope;
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::inference::managers::Session;
use sdxl_worker::inference::managers::pipeline::Pipeline;
use sdxl_worker::kernels::simd::{self, SimdLevel};
use sdxl_worker::layers::Instructor as _;
use sdxl_worker::managers::Managers;
use sdxl_worker::model::instructor::ModelInstructor;
use sdxl_worker::model::interface::{EncoderPolicy, ModelRequest, Request, Response};
use sdxl_worker::runtime::config::Config;
use sdxl_worker::runtime::dispatch::Instructors;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |flag: &str| arguments.iter().position(|a| a == flag).and_then(|at| arguments.get(at + 1)).cloned();
    let mut config = Config::default();
    if let Some(root) = value("--root") {
        config.workers.instructors.model.roots = vec![PathBuf::from(root)];
    }
    if arguments.iter().any(|argument| argument == "--release") {
        config.workers.instructors.model.text_encoders = EncoderPolicy::Release;
    }
    config.workers.instructors.model.mmap = !arguments.iter().any(|argument| argument == "--no-mmap");
    let dtype = match value("--dtype").as_deref() {
        Some("bf16") => Some(Dtype::Bf16),
        Some("f16") => Some(Dtype::F16),
        _ => Some(Dtype::F32),
    };
    if let Some(wanted) = value("--cpu-features") {
        simd::choose(SimdLevel::ALL.into_iter().find(|level| level.name() == wanted).expect("the name of a level"));
    }
    let size = value("--size").and_then(|size| size.parse().ok());
    let (steps, runs) = if value("--model").is_some() { (2, 1) } else { (25, 5) };
    let steps = value("--steps").and_then(|steps| steps.parse().ok()).unwrap_or(steps);
    let runs = value("--runs").and_then(|runs| runs.parse().ok()).unwrap_or(runs);
    let request = GenerateRequest {
        prompt: Some("A sunset over mountains".to_owned()),
        negative_prompt: value("--negative"),
        steps: Some(steps),
        seed: Some(1),
        width: size,
        height: size,
        model: value("--model"),
        dtype,
        quantization: arguments.iter().any(|argument| argument == "--int8").then_some(Quantization::Int8),
        ..GenerateRequest::default()
    };

    let settings = &config.workers.instructors;
    let mut managers = Managers::new(&settings.model, Arc::default());
    let inference = Instructors::new(settings).expect("the settings as shipped").inference;
    let plan = inference.plan(&request, &mut managers).expect("a plan");
    let placement = inference.device.place(&mut managers.device, plan.dtype).expect("a device");
    let placement = placement.quantized(plan.quantization).expect("a device that has it");
    if arguments.iter().any(|argument| argument == "--load") {
        let scope = RequestScope::Compute { placement };
        for run in 0..3 {
            let ask = |request, managers: &mut Managers| {
                let ctx = Context::detached();
                ModelInstructor.instruct(request, scope.with(managers.model()), &ctx).expect("a model that loads")
            };
            let options = ModelRequest { model: request.model.clone(), ..ModelRequest::default() };
            if let Response::Load(loaded) = ask(Request::Load(options.clone()), &mut managers) {
                let speed = loaded.bytes.0 as f64 / loaded.ms.max(1) as f64 / 1e6;
                eprintln!("load {run}: {} in {} ms, {speed:.2} GB/s: {:?}", loaded.bytes, loaded.ms, loaded.components);
            }
            print_memory();
            ask(Request::Unload(options), &mut managers);
            eprintln!("unloaded: {:?}", allocator::usage());
            print_memory();
        }
        return;
    }
    for run in 0..runs {
        let ended: Arc<Mutex<Vec<Instant>>> = Arc::default();
        let sink = {
            let ended = ended.clone();
            Box::new(move |progress| {
                if let Progress::Step { .. } | Progress::Stage { .. } = progress {
                    ended.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
                }
            })
        };
        let ctx = Context::new(String::new(), CancelToken::default(), None, None, sink);
        let start = Instant::now();
        let mut pipeline = Pipeline::new(&plan, inference.domains(), &ctx).expect("a pipeline");
        let mut session = Session { placement: &placement, managers: &mut managers, ctx: &ctx };
        let latents = pipeline.latents(&plan, plan.seeds[0], &mut session).expect("latents");
        let pixels = pipeline.pixels(&plan, &latents, &mut session).expect("pixels");
        let stages: Vec<String> =
            ctx.timings().iter().map(|(s, t)| format!("{} {:.3} s", s.name(), t.as_secs_f64())).collect();
        let (whole, steps) = (start.elapsed().as_secs_f64(), plan.steps());
        eprintln!("run {run}: {steps} steps {}×{} in {whole:.3} s: {}", pixels.width, pixels.height, stages.join(", "));
        let ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
        let spans: Vec<f64> = ended.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        eprintln!("run {run}: seconds between progress events: {spans:.3?}");
    }
    eprintln!("blocks: {:?}", allocator::usage());
    print_memory();
}

fn print_memory() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let lines = status.lines().filter(|line| ["VmHWM", "VmRSS"].iter().any(|key| line.starts_with(key)));
    eprintln!("resident (VmHWM is the peak): {}", lines.collect::<Vec<_>>().join(", ").replace([' ', '\t'], ""));
}

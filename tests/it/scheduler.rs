//! Schedules and samplers, compared with diffusers: `tests/goldens/make_schedules.py`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use sdxl_worker::context::{CancelToken, Context};
use sdxl_worker::error::{Error, Result};
use sdxl_worker::layers::{Instructor, Nothing};
use sdxl_worker::noise::{NoiseSource, RngKind};
use sdxl_worker::scheduler::config::{BetaSchedule, FinalSigmas, Prediction, SchedulerConfig, TimestepSpacing};
use sdxl_worker::scheduler::instructor::SchedulerInstructor;
use sdxl_worker::scheduler::interface::{Request, Response, SamplingOptions, Settings};
use sdxl_worker::scheduler::plan::{Level, SamplingPlan};
use sdxl_worker::scheduler::sampler::Model;
use sdxl_worker::scheduler::schedule::NoiseSchedule;
use sdxl_worker::scheduler::workers::{SAMPLERS, SPACINGS};
use serde::Deserialize;

/// Largest relative error of a σ.
const SIGMAS: f64 = 1e-6;
/// Largest error of a timestep: the reference computes some of them in f32 from f32 logarithms.
const TIMESTEPS: f64 = 1e-4;
/// Largest difference at the end of a run, over the standard deviation of the golden.
const RUNS: f64 = 1e-5;
/// The same for DEIS, whose reference divides f32 differences of logarithms by each other.
const RUNS_DEIS: f64 = 5e-5;
/// The same for two steps of samplers that divide by σ = 0.03 right after coming from σ = 14.6, which magnifies the
/// rounding of x and x₀ some 500 times: the reference's own f32 is 6e-5 from f64 in Heun's.
const RUNS_STEEP: f64 = 5e-4;
/// Runs that magnify rounding may differ by this many times what the reference itself differs by when its noise
/// moves by one unit in the last place, as after a start at σ 4096.
const OWN: f64 = 8.0;

#[derive(Deserialize)]
struct Goldens {
    seed: u64,
    tables: Vec<GoldenTable>,
    runs: Vec<GoldenRun>,
}

#[derive(Deserialize)]
struct GoldenTable {
    sampler: String,
    schedule: String,
    steps: usize,
    sigmas: Option<Vec<f64>>,
    timesteps: Vec<f64>,
    init_scale: Option<f64>,
}

#[derive(Deserialize)]
struct GoldenRun {
    name: String,
    sampler: String,
    evaluations: usize,
    schedule: Option<String>,
    steps: Option<i64>,
    timesteps: Option<Vec<f64>>,
    sigmas: Option<Vec<f64>>,
    eta: Option<f64>,
    prediction: Option<Prediction>,
    zero: Option<bool>,
    begin: Option<usize>,
    own: Option<f64>,
}

fn goldens() -> (Goldens, HashMap<String, Tensor>) {
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/schedules");
    let text = std::fs::read_to_string(format!("{base}.json")).unwrap();
    let tensors = candle_core::safetensors::load(format!("{base}.safetensors"), &Device::Cpu).unwrap();
    (serde_json::from_str(&text).unwrap(), tensors)
}

fn plan(options: &SamplingOptions) -> Result<SamplingPlan> {
    SchedulerInstructor::new(Settings::default()).unwrap().plan(options, &SchedulerConfig::sdxl())
}

fn options(sampler: &str, schedule: &str, steps: i64) -> SamplingOptions {
    SamplingOptions {
        sampler_name: Some(sampler.to_owned()),
        scheduler: Some(schedule.to_owned()),
        steps: Some(steps),
        ..SamplingOptions::default()
    }
}

/// x₀ by the network of the golden script: see its header.
pub(super) fn denoise(plan: &SamplingPlan, x: &Tensor, level: Level) -> Tensor {
    let norm = level.alpha.hypot(level.sigma);
    let (alpha, sigma) = (level.alpha / norm, level.sigma / norm);
    let shift = 0.3 * (level.timestep / 150.0).sin();
    let x0 = |x: &f32| {
        let x = f64::from(*x) / norm;
        let out = 0.8 * (0.9 * x + shift).tanh() + 0.1 * x;
        let x0 = match plan.prediction {
            Prediction::Epsilon => (x - sigma * out) / alpha,
            Prediction::VPrediction => alpha * x - sigma * out,
            Prediction::Sample => out,
        };
        x0 as f32
    };
    let values: Vec<f32> = x.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(x0).collect();
    Tensor::from_vec(values, x.dims(), &Device::Cpu).unwrap()
}

struct SampledRun {
    x: Tensor,
    calls: usize,
    steps: Vec<usize>,
}

fn sample(plan: &SamplingPlan, x: Tensor, noise: &mut NoiseSource, ctx: &Context) -> Result<SampledRun> {
    let (mut calls, mut steps) = (0, Vec::new());
    let mut denoiser = |x: &Tensor, level: Level| {
        calls += 1;
        Ok(denoise(plan, x, level))
    };
    let mut on_step = |completed_steps: usize, x: Tensor, _: &Tensor| {
        steps.push(completed_steps);
        Ok(x)
    };
    let mut model = Model::new(&mut denoiser, &mut on_step, noise, ctx);
    let x = SAMPLERS.get(plan.sampler)?.sample(plan, x, &mut model)?;
    Ok(SampledRun { x, calls, steps })
}

fn source(seed: u64) -> NoiseSource {
    NoiseSource::new(RngKind::Cpu, &[seed, seed + 1], 4, 3, 3, &Device::Cpu)
}

fn values(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
}

fn apart(x: &Tensor, golden: &Tensor) -> f64 {
    let (x, golden) = (values(&x.permute((0, 3, 1, 2)).unwrap()), values(golden));
    let mean = golden.iter().sum::<f64>() / golden.len() as f64;
    let deviation = (golden.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / golden.len() as f64).sqrt();
    let largest =
        x.iter().zip(&golden).map(|(a, b)| (a - b).abs()).fold(0.0, |a: f64, b| if b.is_nan() { b } else { a.max(b) });
    largest / deviation
}

#[test]
fn training_tables_equal_torch() {
    let (_, tensors) = goldens();
    let linear = SchedulerConfig {
        beta_start: 0.0001,
        beta_end: 0.02,
        beta_schedule: BetaSchedule::Linear,
        ..SchedulerConfig::sdxl()
    };
    let cosine = SchedulerConfig { beta_schedule: BetaSchedule::SquaredcosCapV2, ..SchedulerConfig::sdxl() };
    let sdxl = SchedulerConfig::sdxl();
    for (name, config, zero) in
        [("sdxl", &sdxl, false), ("linear", &linear, false), ("cosine", &cosine, false), ("zero", &sdxl, true)]
    {
        let golden = values(&tensors[&format!("alphas_cumprod.{name}")]);
        let table = NoiseSchedule::new(config, zero).unwrap().alphas_cumprod;
        // torch rounds some of the rescaling's roots and squares the other way.
        let ulps = if zero { 2.0 } else { 0.0 };
        let apart: Vec<_> = table
            .iter()
            .zip(&golden)
            .enumerate()
            .filter(|(_, (a, b))| (**a - **b).abs() > ulps * f64::from(f32::EPSILON) * **b)
            .take(5)
            .collect();
        assert!(apart.is_empty(), "{name}: {apart:?}");
    }
}

#[test]
fn sigmas_and_timesteps_equal_diffusers() {
    let (goldens, _) = goldens();
    let mut worst: Vec<(String, f64, f64, usize)> = Vec::new();
    let mut wrong = Vec::new();
    for golden in &goldens.tables {
        let GoldenTable { sampler, schedule, steps, .. } = golden;
        let plan = match plan(&options(sampler, schedule, *steps as i64)) {
            Ok(plan) => plan,
            Err(error) => {
                wrong.push(format!("{sampler} {schedule} {steps}: {error}"));
                continue;
            }
        };
        let mut sigmas = 0f64;
        if let Some(expected) = &golden.sigmas {
            assert_eq!(plan.sigmas.len(), expected.len(), "{sampler} {schedule} {steps}");
            for (ours, theirs) in plan.sigmas.iter().zip(expected) {
                sigmas = sigmas.max((ours - theirs).abs() / theirs.abs().max(1e-12));
            }
        }
        assert_eq!(plan.timesteps.len(), golden.timesteps.len(), "{sampler} {schedule} {steps}");
        let pairs = plan.timesteps.iter().zip(&golden.timesteps);
        let timesteps = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        if sigmas > SIGMAS || timesteps > TIMESTEPS {
            wrong.push(format!("{sampler} {schedule} {steps}: sigmas {sigmas:e}, timesteps {timesteps:e}"));
        }
        if let Some(scale) = golden.init_scale
            && (plan.init_scale / scale - 1.0).abs() > SIGMAS
        {
            wrong.push(format!("{sampler} {schedule} {steps}: init scale {} for {scale}", plan.init_scale));
        }
        let key = format!("{sampler:<20} {schedule:<17}");
        match worst.iter_mut().find(|(known, ..)| *known == key) {
            Some(row) => (row.1, row.2, row.3) = (row.1.max(sigmas), row.2.max(timesteps), row.3 + 1),
            None => worst.push((key, sigmas, timesteps, 1)),
        }
    }
    println!("{:<20} {:<17} {:>10} {:>10}  tables", "sampler", "schedule", "sigmas", "timesteps");
    for (key, sigmas, timesteps, count) in &worst {
        println!("{key} {sigmas:>10.1e} {timesteps:>10.1e}  {count}");
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), goldens.tables.len(), wrong.join("\n"));
}

#[test]
fn sampling_ends_where_diffusers_ends() {
    let (goldens, tensors) = goldens();
    let mut wrong = Vec::new();
    let mut worst: HashMap<&str, (f64, &str)> = HashMap::new();
    for golden in &goldens.runs {
        let options = SamplingOptions {
            sampler_name: Some(golden.sampler.clone()),
            scheduler: golden.schedule.clone(),
            steps: golden.steps,
            timesteps: golden.timesteps.clone(),
            sigmas: golden.sigmas.clone(),
            eta: golden.eta,
            prediction_type: golden.prediction,
            zero_terminal_snr: golden.zero,
        };
        let mut plan = match plan(&options) {
            Ok(plan) => plan,
            Err(error) => {
                wrong.push(format!("{}: {error}", golden.name));
                continue;
            }
        };
        let mut noise = source(goldens.seed);
        let mut x = noise.draw().unwrap();
        match golden.begin {
            Some(begin) => {
                let end = plan.trajectory.len();
                plan = plan.between(begin..end);
                let Level { alpha, sigma, .. } = plan.first();
                let image = (x.sin().unwrap() * 0.5).unwrap();
                x = ((image * alpha).unwrap() + (noise.draw().unwrap() * sigma).unwrap()).unwrap();
            }
            None => x = (x * plan.init_scale).unwrap(),
        }
        let SampledRun { x, calls, .. } = sample(&plan, x, &mut noise, &Context::detached()).unwrap();
        assert_eq!(calls, plan.evaluations(), "{}", golden.name);
        let apart = apart(&x, &tensors[&golden.name]);
        let steep = matches!(plan.sampler, "heun" | "pndm" | "kdpm2_ancestral")
            && plan.schedule == "linspace"
            && plan.trajectory.len() == 2;
        let allowed = match plan.sampler {
            "deis" => RUNS_DEIS,
            _ if steep => RUNS_STEEP,
            _ => RUNS,
        };
        let allowed = allowed.max(OWN * golden.own.unwrap_or_default());
        if apart.is_nan() || apart > allowed || calls != golden.evaluations {
            wrong.push(format!(
                "{}: off by {apart:.1e} of {allowed:.1e}, {calls} calls for {}",
                golden.name, golden.evaluations
            ));
        }
        let entry = worst.entry(&golden.sampler).or_default();
        if apart >= entry.0 {
            *entry = (apart, &golden.name);
        }
    }
    let mut rows: Vec<_> = worst.into_iter().collect();
    rows.sort_by(|a, b| a.0.cmp(b.0));
    for (sampler, (apart, name)) in rows {
        println!("{sampler:<20} {apart:>10.1e}  {name}");
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), goldens.runs.len(), wrong.join("\n"));
}

#[test]
fn every_sampler_runs_with_every_schedule() {
    for (sampler, _) in SAMPLERS.iter() {
        for schedule in SPACINGS.names() {
            for steps in [1, 2, 3, 10] {
                let case = format!("{sampler} {schedule} {steps}");
                let plan = plan(&options(sampler, schedule, steps)).unwrap_or_else(|error| panic!("{case}: {error}"));
                assert_eq!(plan.steps(), steps as usize, "{case}");
                let mut noise = source(5);
                let x = (noise.draw().unwrap() * plan.init_scale).unwrap();
                let run = sample(&plan, x, &mut noise, &Context::detached()).unwrap();
                assert_eq!(run.x.dims(), [2, 3, 3, 4], "{case}");
                assert!(values(&run.x).iter().all(|v| v.is_finite()), "{case}: {:?}", values(&run.x));
                assert_eq!(run.steps, (1..=steps as usize).collect::<Vec<_>>(), "{case}");
                assert_eq!(run.calls, plan.evaluations(), "{case}");
            }
        }
    }
}

#[test]
fn failing_denoiser_ends_the_run() {
    for (name, sampler) in SAMPLERS.iter() {
        let plan = plan(&options(name, "leading", 5)).unwrap();
        let mut noise = source(5);
        let x = noise.draw().unwrap();
        let mut calls = 0;
        let mut denoiser = |x: &Tensor, level: Level| {
            calls += 1;
            if calls == 3 { Err(Error::Cancelled) } else { Ok(denoise(&plan, x, level)) }
        };
        let (mut on_step, ctx) = (|_: usize, x: Tensor, _: &Tensor| Ok(x), Context::detached());
        let mut model = Model::new(&mut denoiser, &mut on_step, &mut noise, &ctx);
        let result = sampler.sample(&plan, x, &mut model);
        assert!(matches!(result, Err(Error::Cancelled)), "{name}");
        assert_eq!(calls, 3, "{name}");
    }
}

#[test]
fn cancelled_request_calls_the_model_no_more() {
    for (name, sampler) in SAMPLERS.iter() {
        let plan = plan(&options(name, "leading", 5)).unwrap();
        let mut noise = source(5);
        let x = noise.draw().unwrap();
        let cancel = CancelToken::default();
        let ctx = Context::new("r".to_owned(), cancel.clone(), None, None, Box::new(|_| ()));
        let mut calls = 0;
        let mut denoiser = |x: &Tensor, level: Level| {
            calls += 1;
            cancel.cancel();
            Ok(denoise(&plan, x, level))
        };
        let mut on_step = |_: usize, x: Tensor, _: &Tensor| Ok(x);
        let result = sampler.sample(&plan, x, &mut Model::new(&mut denoiser, &mut on_step, &mut noise, &ctx));
        assert!(matches!(result, Err(Error::Cancelled)), "{name}");
        assert_eq!(calls, 1, "{name}");
    }
}

#[test]
fn sampler_aliases_are_resolved() {
    fn check(name: &str, sampler: &str, schedule: &str) {
        let options =
            SamplingOptions { sampler_name: Some(name.to_owned()), steps: Some(4), ..SamplingOptions::default() };
        let plan = plan(&options).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((plan.sampler, plan.schedule), (sampler, schedule), "{name}");
    }
    check("DPM++ 2M Karras", "dpmpp_2m", "karras");
    check("dpm++ 2m", "dpmpp_2m", "leading");
    check("DPM++ 2M SDE", "dpmpp_2m_sde", "leading");
    check("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential");
    check("DPM++ 2S a Karras", "dpmpp_2s_ancestral", "karras");
    check("Euler a", "euler_ancestral", "leading");
    check("euler", "euler", "leading");
    check("Euler SGM Uniform", "euler", "sgm_uniform");
    check("LMS Karras", "lms", "karras");
    check("DPM2 a Karras", "kdpm2_ancestral", "karras");
    check("DPM2", "kdpm2", "leading");
    check("Heun", "heun", "leading");
    check("UniPC", "unipc", "leading");
    check("PLMS", "pndm", "leading");
    check("LCM", "lcm", "leading");
    check("DDIM", "ddim", "leading");
    check("sample_dpmpp_2m", "dpmpp_2m", "leading");
    check("EulerDiscreteScheduler", "euler", "leading");
    check("DEISMultistepScheduler", "deis", "leading");
    for (label, name) in [
        ("Karras", "karras"),
        ("SGM Uniform", "sgm_uniform"),
        ("Align Your Steps", "align_your_steps"),
        ("normal", "linspace"),
        ("Automatic", "leading"),
    ] {
        assert_eq!(plan(&options("euler", label, 4)).unwrap().schedule, name, "{label}");
    }
}

#[test]
fn options_without_a_run_are_errors() {
    fn check(options: &SamplingOptions, code: &str, pointer: &str, message: &str) {
        let error = plan(options).expect_err(message);
        let text = format!("{error} {}", error.hint().unwrap_or_default());
        assert_eq!((error.code(), error.pointer().as_deref()), (code, Some(pointer)), "{text}");
        assert!(text.contains(message), "{text}");
    }
    let none = SamplingOptions::default();
    let (number, name) = ("invalid_parameter", "unknown_name");
    check(&options("eular", "karras", 4), name, "/data/sampler_name", "did you mean `euler`?");
    check(&options("euler", "karas", 4), name, "/data/scheduler", "did you mean `karras`?");
    check(&options("DPM++ 2M Karras", "beta", 4), number, "/data/scheduler", "must be `karras`");
    check(&options("euler", "leading", 0), number, "/data/steps", "must be 1 to 1000, got 0");
    check(&options("euler", "leading", -3), number, "/data/steps", "got -3");
    check(&options("euler", "leading", 1001), number, "/data/steps", "got 1001");
    check(&options("lcm", "leading", 51), number, "/data/steps", "at most 50");
    check(&options("dpmpp_2m", "leading", 1000), number, "/data/steps", "must be fewer");
    check(&SamplingOptions { eta: Some(1.5), ..none.clone() }, number, "/data/eta", "must be 0 to 1, got 1.5");
    check(&SamplingOptions { eta: Some(f64::NAN), ..none.clone() }, number, "/data/eta", "got NaN");
    check(&SamplingOptions { eta: Some(0.5), ..options("heun", "leading", 4) }, number, "/data/eta", "`heun`");
    check(&SamplingOptions { sigmas: Some(vec![]), ..none.clone() }, number, "/data/sigmas", "got 0");
    check(&SamplingOptions { sigmas: Some(vec![1.0, 2.0]), ..none.clone() }, number, "/data/sigmas", "fall");
    check(&SamplingOptions { sigmas: Some(vec![f64::INFINITY, 2.0]), ..none.clone() }, number, "/data/sigmas", "fall");
    check(&SamplingOptions { timesteps: Some(vec![1000.0]), ..none.clone() }, number, "/data/timesteps", "0 to 999");
    check(&SamplingOptions { timesteps: Some(vec![f64::NAN]), ..none.clone() }, number, "/data/timesteps", "0 to 999");
    let both = SamplingOptions { steps: Some(3), timesteps: Some(vec![900.0, 100.0]), ..none.clone() };
    check(&both, number, "/data/steps", "must be 2");
    let zero = SamplingOptions { zero_terminal_snr: Some(true), ..options("ddim", "trailing", 4) };
    check(&zero, number, "/data/zero_terminal_snr", "v_prediction");
    let settings = Settings { default_scheduler: "ddin".to_owned() };
    assert_eq!(SchedulerInstructor::new(settings).err().map(|error| error.code()), Some(name));
}

#[test]
fn auto_uses_the_checkpoints_sampler() {
    fn check(config: &SchedulerConfig, sampler: &str, schedule: &str) {
        let settings = Settings { default_scheduler: "auto".to_owned() };
        let plan = SchedulerInstructor::new(settings).unwrap().plan(&SamplingOptions::default(), config).unwrap();
        assert_eq!((plan.sampler, plan.schedule, plan.steps()), (sampler, schedule, 25));
    }
    check(&SchedulerConfig::sdxl(), "euler", "leading");
    let text = r#"{"_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.42.1", "algorithm_type":
        "sde-dpmsolver++", "use_karras_sigmas": true, "timestep_spacing": "trailing", "trained_betas": null}"#;
    let config: SchedulerConfig = serde_json::from_str(text).unwrap();
    assert_eq!((config.beta_end, config.final_sigmas_type), (0.02, FinalSigmas::Zero));
    check(&config, "dpmpp_2m_sde", "karras");
    let config = SchedulerConfig { timestep_spacing: Some(TimestepSpacing::Trailing), ..SchedulerConfig::sdxl() };
    check(&config, "euler", "trailing");
}

#[test]
fn scheduler_lists_and_describes() {
    let instructor = SchedulerInstructor::new(Settings::default()).unwrap();
    let ctx = Context::detached();
    let Ok(Response::List(listing)) = instructor.instruct(Request::List(Nothing {}), (), &ctx) else {
        panic!("no list")
    };
    assert_eq!(listing.samplers.len(), SAMPLERS.names().count());
    assert_eq!(listing.schedules.len(), SPACINGS.names().count());
    let request = Request::Describe(options("heun", "karras", 10));
    let Ok(Response::Describe(plan)) = instructor.instruct(request, (), &ctx) else { panic!("no plan") };
    assert_eq!((plan.sampler_name, plan.steps, plan.evaluations, plan.sigmas.len()), ("heun", 10, 19, 11));
}

#[test]
fn alias_belongs_to_one_entry() {
    let fold = |name: &str| name.to_lowercase().replace(['_', '-', ' '], "").replace('+', "p");
    let mut seen: HashMap<String, &str> = HashMap::new();
    for (name, sampler) in SAMPLERS.iter() {
        let profile = sampler.profile();
        for alias in [name, profile.label].into_iter().chain(profile.aliases.iter().copied()) {
            let other = seen.insert(fold(alias), name);
            assert!(other.is_none_or(|other| other == name), "`{alias}` is both {other:?} and {name}");
        }
    }
}

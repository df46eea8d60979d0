//! The arithmetic of every sampler: 20 steps on the latents of a 1024² image, with a trivial model.

use std::time::Duration;

use candle_core::{Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use sdxl_worker::context::Context;
use sdxl_worker::noise::{NoiseSource, RngKind};
use sdxl_worker::scheduler::config::SchedulerConfig;
use sdxl_worker::scheduler::instructor::SchedulerInstructor;
use sdxl_worker::scheduler::interface::{SamplingOptions, Settings};
use sdxl_worker::scheduler::sampler::Model;
use sdxl_worker::scheduler::workers::SAMPLERS;

fn samplers(c: &mut Criterion) {
    let mut group = c.benchmark_group("samplers");
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    let instructor = SchedulerInstructor::new(Settings::default()).expect("the settings as shipped");
    let ctx = Context::detached();
    for (name, sampler) in SAMPLERS.iter() {
        let options =
            SamplingOptions { sampler_name: Some(name.to_owned()), steps: Some(20), ..SamplingOptions::default() };
        let plan = instructor.plan(&options, &SchedulerConfig::sdxl()).expect("a plan");
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut noise = NoiseSource::new(RngKind::Cpu, &[1], 4, 128, 128, &Device::Cpu);
                let x = (noise.draw().expect("noise") * plan.init_scale).expect("latents");
                let (mut denoiser, mut on_step) = (|x: &Tensor, _| Ok((x * 0.5)?), |_, x, _: &Tensor| Ok(x));
                let mut model = Model::new(&mut denoiser, &mut on_step, &mut noise, &ctx);
                sampler.sample(&plan, x, &mut model).expect("latents")
            });
        });
    }
}

criterion_group!(benches, samplers);
criterion_main!(benches);

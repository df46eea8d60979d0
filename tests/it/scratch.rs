//! scratch
#![allow(clippy::all, warnings)]
use crate::drawing::Worker;
use sdxl_worker::config::Config;
use sdxl_worker::context::Context;
use sdxl_worker::inference::interface::*;
use sdxl_worker::memory;

#[test]
fn measure() {
    for decode in [DecodeExtent::Whole, DecodeExtent::Strips] {
        let mut config = Config::default();
        config.workers.instructors.inference.decode = decode;
        let mut w = Worker::with(&config);
        let ctx = Context::detached();
        for (side, cfg) in [(64, 5.0), (256, 5.0), (512, 5.0), (512, 1.0), (768, 5.0), (1024, 5.0), (1024, 1.0)] {
            let request = GenerateRequest {
                prompt: Some("a".into()),
                steps: Some(1),
                width: Some(side),
                height: Some(side),
                cfg_scale: Some(cfg),
                seed: Some(1),
                ..Default::default()
            };
            let inference = &w.instructors.inference;
            let plan = inference.plan(&request, &mut w.managers).unwrap();
            let placement = inference.device.place(&mut w.managers.device, plan.dtype).unwrap();
            memory::release();
            let before = memory::usage().live.0;
            let latents = inference.latents(&plan, plan.seeds[0], &placement, &mut w.managers, &ctx).unwrap();
            let unet = memory::usage().peak.0 - before;
            memory::release();
            let before = memory::usage().live.0;
            inference.pixels(&plan, &latents, &placement, &mut w.managers, &ctx).unwrap();
            let dec = memory::usage().peak.0 - before;
            println!(
                "{decode:?} {side} cfg {cfg}: unet {unet} per position {:.1}  decode {dec} per pixel {:.1}",
                unet as f64 / (side * side / 64) as f64,
                dec as f64 / (side * side) as f64
            );
        }
    }
    println!("{:?}", sdxl_worker::model::checkpoint::Checkpoint::demo().unwrap().unet.block_out_channels);
    println!("{:?}", sdxl_worker::model::checkpoint::Checkpoint::demo().unwrap().vae.block_out_channels);
}

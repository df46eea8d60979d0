//! Guidance options: errors, defaults and their echo in the result.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use candle_core::Tensor;
use sdxl_worker::device::interface::Dtype;
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::inference::plan::GenerationPlan;

use super::drawing::{Worker, distance};

fn plan(data: &str) -> Result<GenerationPlan, String> {
    let request: GenerateRequest = serde_json::from_str(data).unwrap();
    let request = GenerateRequest { prompt: Some("a hill".to_owned()), ..request };
    let mut worker = Worker::new();
    let plan = worker.instructors.inference.plan(&request, &mut worker.managers);
    plan.map_err(|error| format!("{error}; {}", error.pointer().unwrap_or_default()))
}

fn check_refusal(data: &str, expected: &str) {
    let refusal = plan(data).map(|_| "a plan").unwrap_err();
    assert!(refusal.contains(expected), "{data}: {refusal}");
}

#[test]
fn contradictory_guidance_is_refused() {
    check_refusal(r#"{"cfg_interval":[0.6,0.5]}"#, "rising, got [0.6, 0.5]; /data/cfg_interval");
    check_refusal(
        r#"{"pag_scale":3,"pag_applied_layers":["middle"]}"#,
        "unknown layer `middle`; /data/pag_applied_layers",
    );
    check_refusal(r#"{"pag_applied_layers":["mid"]}"#, "needs `pag_scale`");
    check_refusal(r#"{"pag_scale":3,"pag_applied_layers":[]}"#, "must name a layer");
    check_refusal(r#"{"skip_layer":{"skip_attention_scores":true}}"#, "/data/skip_layer/skip_attention_scores");
    check_refusal(r#"{"skip_layer":{"skip_attention":false,"skip_ff":false}}"#, "must skip something");
    check_refusal(r#"{"skip_layer":{"start":0.5,"stop":0.4}}"#, "must be 0.5 to 1, got 0.4; /data/skip_layer/stop");
    let many = format!(r#"{{"pag_scale":1,"pag_applied_layers":[{}"mid"]}}"#, r#""mid","#.repeat(20));
    check_refusal(&many, "must name at most 11 layers, which is all, got 21");
    check_refusal(r#"{"freeu":{"b1":-1}}"#, "must be 0 to 10, got -1; /data/freeu/b1");
    check_refusal(r#"{"cfg_scale":1,"dynamic_thresholding":{}}"#, "needs `cfg_scale` above 1");
    check_refusal(r#"{"guidance_rescale":0.5,"dynamic_thresholding":{}}"#, "together");
    check_refusal(r#"{"dynamic_thresholding":{"threshold_percentile":95}}"#, "must be 0 to 1, got 95");
    check_refusal(r#"{"subseed":3}"#, "needs `subseed_strength`");
    check_refusal(r#"{"subseed_strength":1.5}"#, "must be 0 to 1, got 1.5");
    check_refusal(r#"{"n_iter":0}"#, "must be 1 to 64, got 0");
    check_refusal(r#"{"n_iter":9,"batch_size":8}"#, "at most 64 images, got 9 batches of 8");
    check_refusal(r#"{"subseed":9223372036854775807,"subseed_strength":0.1,"batch_size":2}"#, "must leave room for 2");
}

/// Seed and subseed of each image.
fn check_seeds(data: &str, expected: &[(u64, Option<u64>)]) {
    let plan = plan(data).unwrap();
    let seeds: Vec<_> = plan.seeds.iter().map(|s| (s.main, s.variation.map(|variation| variation.seed))).collect();
    assert_eq!(seeds, expected, "{data}");
    let parameters = GenerateRequest::from(&plan);
    let count = parameters.batch_size.unwrap() * parameters.n_iter.unwrap();
    assert_eq!(count, expected.len() as i64, "{data}");
    assert_eq!(parameters.subseed.is_some(), expected[0].1.is_some(), "{data}");
}

#[test]
fn seeds_count_up_and_subseeds_do_for_variations() {
    check_seeds(r#"{"seed":5,"batch_size":3}"#, &[(5, None), (6, None), (7, None)]);
    check_seeds(r#"{"seed":5,"n_iter":2,"batch_size":2}"#, &[(5, None), (6, None), (7, None), (8, None)]);
    let varied = r#"{"seed":5,"n_iter":2,"subseed":9,"subseed_strength":0.1}"#;
    check_seeds(varied, &[(5, Some(9)), (5, Some(10))]);
}

#[test]
fn guidance_echo_holds_the_defaults() {
    let parameters =
        plan(r#"{"pag_scale":3,"freeu":{"b1":1.1,"s2":null},"skip_layer":{"scale":1.5},"dynamic_thresholding":{}}"#);
    let parameters = serde_json::to_value(GenerateRequest::from(&parameters.unwrap())).unwrap();
    let expected = serde_json::json!({
        "cfg_scale": 5.0, "guidance_rescale": 0.0, "cfg_interval": [0.0, 1.0], "n_iter": 1, "subseed_strength": 0.0,
        "pag_scale": 3.0, "pag_adaptive_scale": 0.0, "pag_applied_layers": ["mid"],
        "freeu": { "s1": 0.9, "s2": 0.2, "b1": 1.1, "b2": 1.4 },
        "skip_layer": { "layers": ["mid"], "scale": 1.5, "start": 0.01, "stop": 0.2, "skip_attention": true,
            "skip_attention_scores": false, "skip_ff": true },
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&parameters[key], value, "{key}");
    }
    assert_eq!(parameters["dynamic_thresholding"]["mimic_scale"], 7.0);
}

/// Latents of one small image.
fn latents(data: &str, dtype: Dtype) -> Tensor {
    let request: GenerateRequest = serde_json::from_str(data).unwrap();
    let request = GenerateRequest {
        prompt: Some("a hill".to_owned()),
        dtype: Some(dtype),
        steps: Some(3),
        width: Some(64),
        height: Some(72),
        seed: Some(3),
        ..request
    };
    Worker::new().draw(&request)[0].0.clone()
}

#[test]
fn guidance_agrees_across_dtypes() {
    let all = r#"{"pag_scale":2,"pag_applied_layers":["mid","up_blocks.0"],"freeu":{},"cfg_interval":[0,0.7],
        "skip_layer":{"start":0,"stop":1,"skip_ff":false},"dynamic_thresholding":{}}"#;
    let reference = latents(all, Dtype::F32);
    assert!(distance(&latents("{}", Dtype::F32), &reference) > 1.0, "nothing of it counts");
    for (dtype, tolerance) in [(Dtype::F16, 0.1), (Dtype::Bf16, 0.5)] {
        let distance = distance(&latents(all, dtype), &reference);
        assert!(distance < tolerance, "{dtype:?}: {distance:.2e}");
    }
}

#[test]
fn guidance_passes_are_counted_per_step() {
    let passes = |data: &str| {
        let plan = plan(data).unwrap();
        plan.first().guidance.evaluations(&plan.first().sampling)
    };
    assert_eq!(passes(r#"{"steps":8}"#), 16);
    assert_eq!(passes(r#"{"steps":8,"cfg_scale":1}"#), 8);
    assert_eq!(passes(r#"{"steps":8,"cfg_interval":[0.2,0.8]}"#), 13);
    assert_eq!(passes(r#"{"steps":8,"pag_scale":3}"#), 24);
    assert_eq!(passes(r#"{"steps":8,"pag_scale":3,"sampler_name":"heun"}"#), 45);
}

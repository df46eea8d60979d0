//! Prompt syntax, from the request to the UNet's conditioning. `steer.rs` compares the images.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use sdxl_worker::conditioning::instructor::ConditioningInstructor;
use sdxl_worker::conditioning::interface::{
    AppliedEmbedding, CacheCount, EmbeddingRequest, PromptWeighting, Request, Response, Settings,
};
use sdxl_worker::conditioning::manager::{ConditioningResources, EmbeddingManager, HintManager};
use sdxl_worker::conditioning::prompt_options::PromptOptions;
use sdxl_worker::conditioning::prompt_schedule::PromptSchedule;
use sdxl_worker::context::Context;
use sdxl_worker::device::instructor::Placement;
use sdxl_worker::device::interface::{Dtype, Quantization};
use sdxl_worker::device::scope::RequestScope;
use sdxl_worker::error::{Error, Result};
use sdxl_worker::inference::interface::{self as inference, GenerateRequest};
use sdxl_worker::layers::{Instructor, Nothing};
use sdxl_worker::model::instructor::ModelResources;
use sdxl_worker::model::interface as model;
use sdxl_worker::postprocessing::instructor::PostprocessingInstructor;
use sdxl_worker::postprocessing::interface::{OutputOptions, ReturnAs};
use sdxl_worker::roots::Roots;
use sdxl_worker::runtime::config::Config;

use super::drawing::Worker;

const STYLE: &str = "steer-style";

fn placement() -> Placement {
    Placement {
        device: Device::Cpu,
        name: "cpu".to_owned(),
        compute: Dtype::F32,
        vae: Dtype::F32,
        quantization: Quantization::None,
        offloaded: false,
    }
}

fn resources(root: &Path) -> ConditioningResources {
    let settings = model::Settings { roots: vec![root.to_owned()], ..model::Settings::default() };
    ConditioningResources {
        model: ModelResources::new(&settings),
        embeddings: EmbeddingManager::default(),
        hints: HintManager::default(),
    }
}

fn models() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/steer/models")
}

fn instructor() -> ConditioningInstructor {
    let delivery = PostprocessingInstructor::new(Default::default());
    ConditioningInstructor { settings: Settings::default(), roots: Roots::new([]), delivery }
}

fn condition(options: &PromptOptions, resources: &mut ConditioningResources) -> Result<PromptSchedule> {
    let checkpoint = resources.model.catalog.resolve(None).unwrap();
    instructor().condition(options, &checkpoint, resources, &placement(), &Context::detached())
}

fn options(prompt: &str) -> PromptOptions {
    PromptOptions { prompt: prompt.to_owned(), guided: true, steps: 10, ..PromptOptions::default() }
}

/// The conditioning index of each step of `prompt`, and the number of parts and samples of each conditioning.
fn check(prompt: &str, steps: &[usize], parts: &[usize]) {
    let script = condition(&options(prompt), &mut resources(&models())).unwrap();
    let got: Vec<usize> = (0..10).map(|done| script.at(done)).collect();
    assert_eq!(got, steps, "{prompt}");
    let counts: Vec<usize> = script.conditionings.iter().map(|conditioning| conditioning.positive.len()).collect();
    assert_eq!(counts, parts, "{prompt}");
    assert!(script.conditionings.iter().all(|conditioning| conditioning.negative.is_some()), "{prompt}");
}

#[test]
fn prompt_is_encoded_in_spans() {
    check("a hill", &[0; 10], &[1]);
    check("a [red:blue:3] hill", &[0, 0, 0, 0, 1, 1, 1, 1, 1, 1], &[1, 1]);
    check("[a|b]", &[0, 0, 1, 0, 1, 0, 1, 0, 1, 0], &[1, 1]);
    check("[a|a] hill", &[0; 10], &[1]);
    check("[a|b] AND [c:d:0.2] AND e", &[0, 0, 1, 2, 3, 2, 3, 2, 3, 2], &[3, 3, 3, 3]);
    // Past the last step, because a sampler may evaluate once more.
    let script = condition(&options("[a:b:3]"), &mut resources(&models())).unwrap();
    assert_eq!((script.at(10), script.at(999)), (1, 1));
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    let difference = a.sub(b).unwrap().abs().unwrap().max_all().unwrap();
    difference.to_dtype(DType::F32).unwrap().to_scalar().unwrap()
}

#[test]
fn weights_of_one_change_nothing() {
    let context = |options: &PromptOptions| {
        let script = condition(options, &mut resources(&models())).unwrap();
        script.conditionings[0].positive[0].embeddings.context.clone()
    };
    let plain = context(&options("a red hill"));
    for weighting in [PromptWeighting::A1111, PromptWeighting::Comfy, PromptWeighting::Compel] {
        let weighted = PromptOptions { weighting, ..options("a (red:1.0) hill") };
        assert_eq!(difference(&context(&weighted), &plain), 0.0, "{weighting:?}");
        let weighted = PromptOptions { weighting, ..options("a (red:1.5) hill") };
        assert!(difference(&context(&weighted), &plain) > 0.1, "{weighting:?}");
    }
    let literal = context(&PromptOptions { weighting: PromptWeighting::None, ..options("a (red:1.5) hill") });
    assert_eq!(difference(&literal, &context(&options(r"a \(red:1.5\) hill"))), 0.0);
}

/// The first step's embeddings of the prompt and of the negative prompt.
fn contexts(options: &PromptOptions) -> [Tensor; 2] {
    let script = condition(options, &mut resources(&models())).unwrap();
    let first = &script.conditionings[0];
    [first.positive[0].embeddings.context.clone(), first.negative.as_ref().unwrap().context.clone()]
}

#[test]
fn encoding_is_independent_of_other_prompts() {
    let blurry = |prompt: &str| PromptOptions { negative_prompt: Some("blurry".to_owned()), ..options(prompt) };
    let [alone, _] = contexts(&options("a hill"));
    let [paired, negative] = contexts(&blurry("a hill"));
    assert_eq!(difference(&alone, &paired), 0.0);
    for prompt in ["[a hill|b|c|d|e]", "a hill AND fog :0.5 AND (rain:1.3)"] {
        let [first, other] = contexts(&blurry(prompt));
        assert_eq!(difference(&other, &negative), 0.0, "{prompt}");
        assert!(prompt.starts_with('a') || difference(&first, &alone) == 0.0, "{prompt}");
    }
    let weighed = PromptOptions { weighting: PromptWeighting::Compel, ..blurry("a (hill:0.5) in (fog:0.2)") };
    assert_eq!(difference(&contexts(&weighed)[1], &negative), 0.0);
    let again = PromptOptions { negative_prompt: Some("a (hill:0.5) in (fog:0.2)".to_owned()), ..weighed.clone() };
    assert_eq!(difference(&contexts(&weighed)[0], &contexts(&again)[1]), 0.0);
}

#[test]
fn masked_fragments_change_no_other_prompt() {
    let compel = |count: usize| PromptOptions {
        weighting: PromptWeighting::Compel,
        negative_prompt: Some("(a:0.5)(b:0.6)".repeat(count)),
        ..options("a (hill:0.5) in fog")
    };
    // In one encoder pass, and in two.
    let (few, many) = (contexts(&compel(1)), contexts(&compel(35)));
    assert_eq!(difference(&few[0], &many[0]), 0.0);
    let error = condition(&compel(129), &mut resources(&models())).unwrap_err();
    let (code, pointer) = (error.code(), error.pointer());
    assert_eq!((code, pointer.as_deref()), ("invalid_parameter", Some("/data/negative_prompt")), "{error}");
    assert!(error.to_string().contains("at most 256 fragments"), "{error}");
    assert!(
        condition(&PromptOptions { weighting: PromptWeighting::A1111, ..compel(129) }, &mut resources(&models()))
            .is_ok()
    );
}

#[test]
fn composed_prompt_without_guidance_has_a_negative() {
    let script = condition(&PromptOptions { guided: false, ..options("a AND b") }, &mut resources(&models())).unwrap();
    assert!(script.conditionings[0].negative.is_some());
    let script = condition(&PromptOptions { guided: false, ..options("a") }, &mut resources(&models())).unwrap();
    assert!(script.conditionings[0].negative.is_none());
}

#[test]
fn embedding_cache_key_covers_every_option() {
    let mut resources = resources(&models());
    let mut count = |options: PromptOptions| condition(&options, &mut resources).unwrap().cache;
    let fresh = CacheCount { hits: 0, misses: 1 };
    let known = CacheCount { hits: 1, misses: 0 };
    assert_eq!(count(options("a (red:1.5) hill")), fresh);
    assert_eq!(count(options("a (red:1.50) hill")), known);
    assert_eq!(count(options("a (red:1.6) hill")), fresh);
    assert_eq!(count(options("a red hill")), fresh);
    assert_eq!(count(PromptOptions { weighting: PromptWeighting::Comfy, ..options("a red hill") }), known);
    assert_eq!(count(PromptOptions { weighting: PromptWeighting::Comfy, ..options("a (red:1.5) hill") }), fresh);
    assert_eq!(count(options("a red BREAK hill")), fresh);
    assert_eq!(count(options("[a|b] red hill")), CacheCount { hits: 1, misses: 1 });
    assert_eq!(count(options("[a|b] red hill")), CacheCount { hits: 2, misses: 0 });
}

#[test]
fn textual_inversion_reaches_both_encoders() {
    let mut resources = resources(&models());
    let entries = [EmbeddingRequest { name: STYLE.to_owned(), token: None }];
    let embeddings = instructor().embeddings(&entries, &resources.model.catalog).unwrap();
    let with = PromptOptions { embeddings, ..options("a hill, Steer-Style") };
    let script = condition(&with, &mut resources).unwrap();
    let applied = AppliedEmbedding {
        name: format!("embeddings/{STYLE}"),
        token: STYLE.to_owned(),
        vectors: 3,
        encoders: vec!["text_encoder", "text_encoder_2"],
    };
    assert_eq!(script.applied, [applied]);
    let without = condition(&options("a hill, Steer-Style"), &mut resources).unwrap();
    assert_eq!((script.cache.misses, without.cache.misses), (1, 1));
    let context = |script: &PromptSchedule| script.conditionings[0].positive[0].embeddings.context.clone();
    for (from, width) in [(0, 32), (32, 64)] {
        let part = |script: &PromptSchedule| context(script).narrow(2, from, width).unwrap();
        assert!(difference(&part(&script), &part(&without)) > 0.1, "channels from {from}");
    }
    assert_eq!(condition(&with, &mut resources).unwrap().cache, CacheCount { hits: 1, misses: 0 });
}

fn planned(request: GenerateRequest) -> Result<GenerateRequest> {
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![models()];
    let mut worker = Worker::with(&config);
    let plan = worker.instructors.inference.plan(&request, &mut worker.managers)?;
    Ok(GenerateRequest::from(&plan))
}

#[test]
fn clip_stop_at_last_layers_counts_from_one() {
    let plan = |clip_skip: Option<i64>, clip_stop_at_last_layers: Option<i64>| {
        let prompt = Some("a hill".to_owned());
        planned(GenerateRequest { prompt, clip_skip, clip_stop_at_last_layers, ..GenerateRequest::default() })
    };
    for (layer, skip) in [(2, 0), (3, 1), (66, 64)] {
        let echo = plan(None, Some(layer)).unwrap();
        assert_eq!((echo.clip_skip, echo.clip_stop_at_last_layers), (Some(skip), None), "{layer}");
    }
    for (skip, layer) in [(None, 1), (None, 0), (None, 67), (Some(0), 2)] {
        let error = plan(skip, Some(layer)).unwrap_err();
        assert_eq!(error.pointer().as_deref(), Some("/data/CLIP_stop_at_last_layers"), "{layer}: {error}");
    }
}

fn request(prompt: &str) -> GenerateRequest {
    GenerateRequest { prompt: Some(prompt.to_owned()), ..GenerateRequest::default() }
}

fn style(token: &str) -> Option<Vec<EmbeddingRequest>> {
    Some(vec![EmbeddingRequest { name: STYLE.to_owned(), token: Some(token.to_owned()) }])
}

#[track_caller]
fn check_refused(request: GenerateRequest, pointer: &str, message: &str) {
    let error = planned(request).unwrap_err();
    assert_eq!((error.code(), error.pointer().as_deref()), ("invalid_parameter", Some(pointer)), "{error}");
    assert!(error.to_string().contains(message), "{error}");
}

#[test]
fn invalid_prompt_is_refused_before_loading() {
    let plain = || request("a");
    check_refused(request("a (b:1.2.3)"), "/data/prompt", "at character 6");
    check_refused(request("a [b:c:d]"), "/data/prompt", "at character 8");
    check_refused(request("x AND [b:(c:1..2):3]"), "/data/prompt", "at character 13");
    let wrong = Some("[a:b:c]".to_owned());
    check_refused(GenerateRequest { prompt_2: wrong.clone(), ..plain() }, "/data/prompt_2", "at character 6");
    check_refused(GenerateRequest { negative_prompt: wrong, ..plain() }, "/data/negative_prompt", "at character 6");
    let two = Some("a AND b".to_owned());
    check_refused(GenerateRequest { prompt_2: two, ..plain() }, "/data/prompt_2", "must be one part");
    let own = Some("c :2 AND d".to_owned());
    check_refused(GenerateRequest { prompt_2: own, ..request("a AND b") }, "/data/prompt_2", "weight of its own");
    check_refused(request(&"a AND ".repeat(20)), "/data/prompt", "at most 16 parts");
    let often = GenerateRequest { steps: Some(900), ..request(&format!("[a|b] {}", "c ".repeat(30_000))) };
    check_refused(often, "/data/prompt", "prompts together change 900 times");
    let backtrack = Some(75);
    check_refused(
        GenerateRequest { comma_padding_backtrack: backtrack, ..plain() },
        "/data/comma_padding_backtrack",
        "0 to 74",
    );
    let unused = "stands in none of the prompts";
    check_refused(GenerateRequest { embeddings: style("b"), ..plain() }, "/data/embeddings/0/token", unused);
    check_refused(GenerateRequest { embeddings: style("b"), ..request("ab b1") }, "/data/embeddings/0/token", unused);
    check_refused(GenerateRequest { embeddings: style(" "), ..plain() }, "/data/embeddings/0/token", "must be a word");
    let two = GenerateRequest { embeddings: style("a b"), ..request("a b") };
    check_refused(two, "/data/embeddings/0/token", "without white space");
}

#[test]
fn embedding_token_may_appear_where_it_is_not_encoded() {
    let with = |token: &str, prompt: &str| GenerateRequest { embeddings: style(token), ..request(prompt) };
    let negative = Some("bad, Style".to_owned());
    let unread = GenerateRequest { negative_prompt: negative, cfg_scale: Some(1.0), ..with("style", "a hill") };
    for request in [unread, with("style", "a hill [style::0]"), with("s(1)", r"a hill, s\(1\)"), with("<s>", "a<s>")] {
        assert!(planned(request.clone()).is_ok(), "{request:?}");
    }
}

#[test]
fn oversized_prompts_are_refused() {
    let changing = PromptOptions { steps: 600, ..options(&format!("[{}] {}", "a|".repeat(599), "b ".repeat(100))) };
    let mut resources = resources(&models());
    assert_eq!(
        condition(&PromptOptions { steps: 40, ..changing.clone() }, &mut resources).unwrap().conditionings.len(),
        1
    );
    let numbered: String = (0..599).map(|i| format!("{i}|")).collect();
    let error =
        condition(&PromptOptions { prompt: format!("[{numbered}] {}", "b ".repeat(100)), ..changing }, &mut resources);
    assert!(error.unwrap_err().to_string().contains("prompts together must be at most 512 texts of 2 chunks"));
}

#[test]
fn prompt_echo_holds_the_defaults() {
    let made = planned(GenerateRequest { embeddings: style("a"), ..request("A hill") }).unwrap();
    assert_eq!(made.prompt_weighting, Some(PromptWeighting::A1111));
    assert_eq!(made.comma_padding_backtrack, Some(0));
    let name = format!("embeddings/{STYLE}");
    assert_eq!(made.embeddings, Some(vec![EmbeddingRequest { name, token: Some("a".to_owned()) }]));
}

/// The answer to `data` as JSON.
fn answer(worker: &mut Worker, data: &str) -> serde_json::Value {
    let request: GenerateRequest = serde_json::from_str(data).unwrap();
    let output = OutputOptions { return_as: Some(ReturnAs::Base64), ..OutputOptions::default() };
    let request = GenerateRequest { output: Some(output), ..request };
    let (leader, ctx) = (&worker.instructors.inference, Context::detached());
    let request = inference::Request::Generate(Box::new(request));
    let made = leader.instruct(request, &mut worker.managers, &ctx).unwrap();
    serde_json::to_value(&made).unwrap()
}

#[test]
fn embedding_report_lists_hits_and_applied_files() {
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![models()];
    let mut worker = Worker::with(&config);
    let data = r#"{"prompt":"a (hill:1.2) in <s> AND [fog|rain]","negative_prompt":"b","steps":2,"seed":1,"width":64,
                   "height":64,"batch_size":2,"embeddings":[{"path":"steer-style","token":"<s>"}]}"#;
    let first = answer(&mut worker, data);
    assert_eq!(first["cache"]["embeddings"], serde_json::json!({"hits": 0, "misses": 4}));
    let applied = r#"[{"name":"embeddings/steer-style","token":"<s>","vectors":3,
                       "encoders":["text_encoder","text_encoder_2"]}]"#;
    assert_eq!(first["embeddings"], serde_json::from_str::<serde_json::Value>(applied).unwrap());
    let second = answer(&mut worker, data);
    assert_eq!(second["cache"]["embeddings"], serde_json::json!({"hits": 4, "misses": 0}));
    assert_eq!(first["images"], second["images"]);
    let again = answer(&mut worker, &first["parameters"].to_string());
    assert_eq!(first["images"], again["images"]);
    let plain = answer(&mut worker, r#"{"prompt":"a hill","steps":1,"width":64,"height":64}"#);
    assert!(plain.get("embeddings").is_none(), "{plain}");
}

fn inversion(tensors: &[(&str, (usize, usize))]) -> Error {
    let root = tempfile::tempdir().unwrap();
    let tensor = |shape: &(usize, usize)| Tensor::zeros(*shape, DType::F32, &Device::Cpu).unwrap();
    let tensors: std::collections::HashMap<&str, Tensor> =
        tensors.iter().map(|(name, shape)| (*name, tensor(shape))).collect();
    candle_core::safetensors::save(&tensors, root.path().join("x.safetensors")).unwrap();
    let mut resources = resources(root.path());
    let entries = [EmbeddingRequest { name: "x".to_owned(), token: None }];
    let embeddings = instructor().embeddings(&entries, &resources.model.catalog).unwrap();
    condition(&PromptOptions { embeddings, ..options("x") }, &mut resources).unwrap_err()
}

#[test]
fn foreign_textual_inversion_is_refused() {
    for tensors in [
        &[("clip_l", (2, 32))][..],
        &[("clip_g", (2, 64))],
        &[("emb_params", (2, 32))],
        &[("clip_l", (2, 768)), ("clip_g", (2, 1280))],
        &[("clip_l", (2, 32)), ("clip_g", (3, 64))],
        &[("clip_l", (76, 32)), ("clip_g", (76, 64))],
    ] {
        let error = inversion(tensors);
        assert_eq!(error.code(), "model_unsupported", "{tensors:?}: {error}");
    }
    let resources = resources(&models());
    let options = |name: &str| [EmbeddingRequest { name: name.to_owned(), token: None }];
    let code = |name: &str| instructor().embeddings(&options(name), &resources.model.catalog).unwrap_err().code();
    assert_eq!(code("nothing"), "model_not_found");
    assert_eq!(code("../x"), "path_not_allowed");
    assert_eq!(code(""), "invalid_parameter");
}

#[test]
fn conditioning_list_names_the_prompt_syntaxes() {
    let (mut resources, scope) = (resources(&models()), RequestScope::Query { residents: Vec::new() });
    let made =
        instructor().instruct(Request::List(Nothing {}), scope.with(&mut resources), &Context::detached()).unwrap();
    let Response::List(list) = made else { panic!("list") };
    assert!(list.prompt_syntax.contains(&"BREAK") && list.prompt_weightings.len() == 4);
}

//! Tokens and embeddings, compared with transformers and diffusers.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use candle_core::{DType, Device, Tensor};
use sdxl_worker::conditioning::Embeddings;
use sdxl_worker::conditioning::instructor::ConditioningInstructor;
use sdxl_worker::conditioning::interface::{CacheCount, EncodeRequest, Request, Response, Settings, TokenizeRequest};
use sdxl_worker::conditioning::manager::{ConditioningResources, EmbeddingManager, HintManager};
use sdxl_worker::conditioning::prompt_options::PromptOptions;
use sdxl_worker::conditioning::prompt_schedule::PromptSchedule;
use sdxl_worker::context::{CancelToken, Context};
use sdxl_worker::device::instructor::Placement;
use sdxl_worker::device::interface::{Dtype, Quantization};
use sdxl_worker::device::scope::RequestScope;
use sdxl_worker::layers::{Instructor, Manager, Nothing};
use sdxl_worker::model::checkpoint::Checkpoint;
use sdxl_worker::model::instructor::{ModelInstructor, ModelResources};
use sdxl_worker::model::interface as model;
use sdxl_worker::model::managers::{ClipTokenizer, TokenizerManager};
use sdxl_worker::postprocessing::instructor::PostprocessingInstructor;
use sdxl_worker::roots::Roots;

const TOKENS: &str = include_str!("../goldens/tokens.json");
const EMBEDDINGS: &[u8] = include_bytes!("../goldens/conditioning.safetensors");
/// As in `tests/goldens/make_conditioning.py`.
const SENTENCE: &str = "a lighthouse on a cliff above the stormy sea, ";

#[derive(serde::Deserialize)]
struct Golden {
    base_2_config: serde_json::Value,
    texts: Vec<GoldenText>,
    special: std::collections::HashMap<String, [u32; 3]>,
}

#[derive(serde::Deserialize)]
struct GoldenText {
    text: String,
    tokenizer: Vec<u32>,
    tokenizer_2: Vec<u32>,
    base_2: Vec<u32>,
}

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

fn on_cpu() -> RequestScope {
    RequestScope::Compute { placement: placement() }
}

fn resources() -> ConditioningResources {
    let model = ModelResources::new(&model::Settings::default());
    ConditioningResources { model, embeddings: EmbeddingManager::default(), hints: HintManager::default() }
}

fn instructor() -> ConditioningInstructor {
    let delivery = PostprocessingInstructor::new(Default::default());
    ConditioningInstructor { settings: Settings::default(), roots: Roots::new([]), delivery }
}

#[track_caller]
fn check_tokens(tokenizer: &ClipTokenizer, kind: &str, text: &str, expected: &[u32]) {
    let got: Vec<u32> = tokenizer.tokenize(text).unwrap().into_iter().map(|token| token.id).collect();
    assert_eq!(got, expected, "{kind}: {text:?}");
}

#[test]
fn tokens_equal_those_of_transformers() {
    let golden: Golden = serde_json::from_str(TOKENS).unwrap();
    assert!(golden.texts.len() >= 60);
    let demo = Checkpoint::demo().unwrap();
    let start = std::time::Instant::now();
    let tokenizers = TokenizerManager::default().acquire(&demo).unwrap();
    println!("vocabulary read in {:?}", start.elapsed());
    let first = tokenizers.first.as_ref().unwrap();
    assert_eq!([first.start, first.end, first.padding], golden.special["tokenizer"]);
    let second = &tokenizers.second;
    assert_eq!([second.start, second.end, second.padding], golden.special["tokenizer_2"]);
    for golden in &golden.texts {
        check_tokens(first, "tokenizer", &golden.text, &golden.tokenizer);
        check_tokens(second, "tokenizer_2", &golden.text, &golden.tokenizer_2);
    }
}

/// Copies the demonstration model into `folder`.
pub(crate) fn demo_folder(folder: &std::path::Path) {
    let assets = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    for part in ["", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"] {
        std::fs::create_dir_all(folder.join(part)).unwrap();
        for entry in std::fs::read_dir(assets.join(part)).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                std::fs::copy(entry.path(), folder.join(part).join(entry.file_name())).unwrap();
            }
        }
    }
}

#[test]
fn tokenizer_config_with_objects_is_read() {
    let golden: Golden = serde_json::from_str(TOKENS).unwrap();
    let root = tempfile::tempdir().unwrap();
    demo_folder(root.path());
    for name in ["vocab.json", "merges.txt"] {
        std::fs::copy(root.path().join("tokenizer").join(name), root.path().join("tokenizer_2").join(name)).unwrap();
    }
    std::fs::write(root.path().join("tokenizer_2/tokenizer_config.json"), golden.base_2_config.to_string()).unwrap();
    let roots = Roots::new([root.path().to_owned()]);
    let checkpoint = Checkpoint::open_folder("copy", root.path(), &roots).unwrap();
    let tokenizers = TokenizerManager::default().acquire(&checkpoint).unwrap();
    let second = &tokenizers.second;
    assert_eq!([second.start, second.end, second.padding], golden.special["base_2"]);
    for golden in &golden.texts {
        check_tokens(second, "base_2", &golden.text, &golden.base_2);
    }
}

#[test]
fn checkpoint_without_vocabulary_uses_the_built_in_one() {
    let root = tempfile::tempdir().unwrap();
    demo_folder(root.path());
    std::fs::remove_dir_all(root.path().join("tokenizer")).unwrap();
    std::fs::remove_dir_all(root.path().join("tokenizer_2")).unwrap();
    let checkpoint = Checkpoint::open_folder("copy", root.path(), &Roots::new([root.path().to_owned()])).unwrap();
    assert!(!checkpoint.own_tokenizers());
    let tokenizers = TokenizerManager::default().acquire(&checkpoint).unwrap();
    let paddings = (tokenizers.first.as_ref().unwrap().padding, tokenizers.second.padding);
    assert_eq!(paddings, (49407, 0));
}

#[track_caller]
fn check_vocabulary(vocab: &str, merges: &str) {
    let root = tempfile::tempdir().unwrap();
    demo_folder(root.path());
    std::fs::write(root.path().join("tokenizer/vocab.json"), vocab).unwrap();
    std::fs::write(root.path().join("tokenizer/merges.txt"), merges).unwrap();
    let roots = Roots::new([root.path().to_owned()]);
    let checkpoint = Checkpoint::open_folder("copy", root.path(), &roots).unwrap();
    let failure = TokenizerManager::default().acquire(&checkpoint).err().map(|e| (e.code(), e.to_string()));
    assert_eq!(failure.as_ref().map(|f| f.0), Some("model_corrupt"), "{vocab} {merges}: {failure:?}");
}

#[test]
fn broken_vocabulary_is_model_corrupt() {
    let specials = r#""<|startoftext|>":0,"<|endoftext|>":1,"!":2"#;
    check_vocabulary("", "");
    check_vocabulary("[]", "");
    check_vocabulary("{\"a\":-1}", "");
    check_vocabulary("{\"a\":99999999999}", "");
    check_vocabulary("{\"a\":1}", "");
    check_vocabulary(&format!("{{{specials},\"a\":49408}}"), "");
    check_vocabulary(&format!("{{{specials},\"a\":3}}"), "a");
    check_vocabulary(&format!("{{{specials},\"a\":3}}"), "a a a");
    check_vocabulary(&format!("{{{specials},\"a\":3}}"), "a b");
    check_vocabulary(&format!("{{{specials},\"a\":3}}"), "a a");
    check_vocabulary(&format!("{{{specials},\"a\":3}}"), "<|startoftext|> <|startoftext|>");
}

fn golden(name: &str) -> Option<Tensor> {
    let mut all = candle_core::safetensors::load_buffer(EMBEDDINGS, &Device::Cpu).unwrap();
    all.remove(name)
}

/// Relative to the largest value; a missing golden means zeros.
#[track_caller]
fn check_close(name: &str, got: &Tensor) {
    let got_values = got.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let Some(wanted) = golden(name) else {
        assert!(got_values.iter().all(|&v| v == 0.0), "{name} must be zeros");
        return;
    };
    assert_eq!(got.dims(), wanted.dims(), "{name}");
    let wanted = wanted.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let largest = wanted.iter().fold(0f32, |m, v| m.max(v.abs()));
    let error = got_values.iter().zip(&wanted).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest;
    println!("{name}: relative error {error:.2e}, largest {largest:.3}");
    assert!(error <= 1e-4, "{name}: relative error {error:e}");
}

/// The conditioning of the first step.
fn conditioned(script: &PromptSchedule) -> &Embeddings {
    &script.conditionings[0].positive[0].embeddings
}

#[track_caller]
fn check_condition(name: &str, options: PromptOptions) {
    let mut resources = resources();
    let checkpoint = resources.model.catalog.resolve(None).unwrap();
    let options = PromptOptions { guided: true, ..options };
    let made =
        instructor().condition(&options, &checkpoint, &mut resources, &placement(), &Context::detached()).unwrap();
    assert_eq!((made.conditionings.len(), made.conditionings[0].positive.len()), (1, 1), "{name}");
    let (positive, negative) = (conditioned(&made), made.conditionings[0].negative.as_ref().unwrap());
    check_close(&format!("{name}.context"), &positive.context);
    check_close(&format!("{name}.pooled"), &positive.pooled);
    if name == "chunks" {
        assert_eq!(negative.context.dims(), positive.context.dims());
        return;
    }
    check_close(&format!("{name}.negative.context"), &negative.context);
    check_close(&format!("{name}.negative.pooled"), &negative.pooled);
}

fn options(prompt: &str) -> PromptOptions {
    PromptOptions { prompt: prompt.to_owned(), ..PromptOptions::default() }
}

#[test]
fn missing_negative_prompt_is_zeros() {
    check_condition("plain", options("A sunset over mountains"));
}

#[test]
fn each_encoder_has_its_own_prompt() {
    check_condition(
        "both",
        PromptOptions {
            prompt_2: Some("a blue square, sharp!".into()),
            negative_prompt: Some("blurry".into()),
            negative_prompt_2: Some("low quality!".into()),
            ..options("a red circle")
        },
    );
}

#[test]
fn empty_negative_prompt_is_encoded() {
    check_condition("empty_negative", PromptOptions { negative_prompt: Some(String::new()), ..options("café 😀 123") });
}

#[test]
fn clip_skip_applies_to_the_prompt_only() {
    check_condition(
        "skip",
        PromptOptions { negative_prompt: Some("people".into()), clip_skip: Some(1), ..options("a lake at night") },
    );
}

#[test]
fn long_prompt_is_encoded_in_chunks() {
    check_condition(
        "chunks",
        PromptOptions { negative_prompt: Some("blurry".into()), ..options(&SENTENCE.repeat(12)) },
    );
}

#[test]
fn repeated_prompt_needs_no_encoder() {
    let (mut resources, placement, ctx) = (resources(), placement(), Context::detached());
    let checkpoint = resources.model.catalog.resolve(None).unwrap();
    let options = PromptOptions { guided: true, negative_prompt: Some("b".into()), ..options("a") };
    let first = instructor().condition(&options, &checkpoint, &mut resources, &placement, &ctx).unwrap();
    resources.model.encoders.evict(sdxl_worker::units::Bytes(u64::MAX));
    let second = instructor().condition(&options, &checkpoint, &mut resources, &placement, &ctx).unwrap();
    assert!(resources.model.encoders.resident().is_empty());
    assert_eq!((first.cache, second.cache), (CacheCount { hits: 0, misses: 2 }, CacheCount { hits: 2, misses: 0 }));
    let difference = (&conditioned(&first).context - &conditioned(&second).context).unwrap().abs().unwrap();
    assert_eq!(difference.max_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
    assert!(resources.embeddings.resident()[0].bytes.0 > 0);
    // Both prompts have the same number of tokens, so a longer negative prompt re-encodes the prompt.
    let longer = PromptOptions { negative_prompt: Some(SENTENCE.repeat(9)), ..options };
    let third = instructor().condition(&longer, &checkpoint, &mut resources, &placement, &ctx).unwrap();
    assert_eq!(conditioned(&third).context.dims(), [1, 154, 96]);

    resources.embeddings.evict(sdxl_worker::units::Bytes(u64::MAX));
    resources.model.encoders.evict(sdxl_worker::units::Bytes(u64::MAX));
    let settings = Settings { cache_embeddings: false, ..Settings::default() };
    let without = ConditioningInstructor { settings, ..instructor() };
    without.condition(&longer, &checkpoint, &mut resources, &placement, &ctx).unwrap();
    assert!(resources.embeddings.resident().is_empty());
}

#[test]
fn text_encoders_are_released_by_policy() {
    use model::EncoderPolicy::{Keep, Release};
    let (placement, ctx) = (placement(), Context::detached());
    for (policy, pinned, stays) in [(Keep, false, true), (Release, false, false), (Release, true, true)] {
        let mut resources = resources();
        resources.model.text_encoders = policy;
        let checkpoint = resources.model.catalog.resolve(None).unwrap();
        if pinned {
            let pin = model::Request::Pin(model::PinRequest { model: None, revision: None, pin: None });
            ModelInstructor.instruct(pin, on_cpu().with(&mut resources.model), &ctx).unwrap();
        }
        let first = instructor().condition(&options("a"), &checkpoint, &mut resources, &placement, &ctx).unwrap();
        assert_eq!(resources.model.encoders.resident().is_empty(), !stays, "{policy:?}, pinned: {pinned}");
        let second = instructor().condition(&options("b"), &checkpoint, &mut resources, &placement, &ctx).unwrap();
        assert_eq!(conditioned(&first).context.dims(), conditioned(&second).context.dims());
    }
}

#[track_caller]
fn check_refused(options: PromptOptions, code: &str, pointer: &str) {
    let mut resources = resources();
    let checkpoint = resources.model.catalog.resolve(None).unwrap();
    let options = PromptOptions { guided: true, ..options };
    let error =
        instructor().condition(&options, &checkpoint, &mut resources, &placement(), &Context::detached()).unwrap_err();
    assert_eq!((error.code(), error.pointer().as_deref()), (code, Some(pointer)), "{error}");
}

#[test]
fn prompt_errors_name_their_field() {
    check_refused(options(&"word ".repeat(2401)), "invalid_parameter", "/data/prompt");
    check_refused(options(&" ".repeat(70_000)), "invalid_parameter", "/data/prompt");
    let second = PromptOptions { prompt_2: Some("!".repeat(2401)), ..options("a") };
    check_refused(second, "invalid_parameter", "/data/prompt_2");
    let negative = PromptOptions { negative_prompt: Some("😀".repeat(30_000)), ..options("a") };
    check_refused(negative, "invalid_parameter", "/data/negative_prompt");
    check_refused(PromptOptions { clip_skip: Some(99), ..options("a") }, "invalid_parameter", "/data/clip_skip");
    check_refused(PromptOptions { clip_skip: Some(u32::MAX), ..options("a") }, "invalid_parameter", "/data/clip_skip");
}

#[test]
fn encode_and_tokenize_report_numbers() {
    let (mut resources, ctx) = (resources(), Context::detached());
    let text = SENTENCE.repeat(12) + "!";
    let request = Request::Tokenize(TokenizeRequest { text, model: None });
    let Response::Tokenize(made) = instructor().instruct(request, on_cpu().with(&mut resources), &ctx).unwrap() else {
        panic!("tokenize")
    };
    let names: Vec<_> = made.tokenizers.iter().map(|t| (t.name, t.count, t.chunks)).collect();
    assert_eq!((made.model.as_str(), names), ("demo", vec![("tokenizer", 121, 2), ("tokenizer_2", 121, 2)]));
    assert_eq!(made.tokenizers[0].tokens.last().unwrap(), "!</w>");
    assert_eq!(*made.tokenizers[1].ids.last().unwrap(), 0);

    let request: Request = serde_json::from_str(r#"{"encode_prompt":{"prompt":"a"}}"#).unwrap();
    let Response::EncodePrompt(made) = instructor().instruct(request, on_cpu().with(&mut resources), &ctx).unwrap()
    else {
        panic!("encode")
    };
    assert_eq!(made.positive.context_shape, [1, 77, 96]);
    assert_eq!(made.positive.pooled_shape, [1, 64]);
    assert!(made.positive.context_std > 0.1, "{made:?}");
    assert_eq!((made.negative.context_mean, made.negative.context_std), (0.0, 0.0));

    let Response::List(list) =
        instructor().instruct(Request::List(Nothing {}), on_cpu().with(&mut resources), &ctx).unwrap()
    else {
        panic!("list")
    };
    assert_eq!(list.max_tokens, 2400);
}

#[test]
fn cancelled_request_is_not_encoded() {
    let cancel = CancelToken::default();
    let ctx = Context::new("r".to_owned(), cancel.clone(), None, None, Box::new(|_| ()));
    cancel.cancel();
    let options = EncodeRequest {
        prompt: "a".into(),
        prompt_2: None,
        negative_prompt: None,
        negative_prompt_2: None,
        clip_skip: None,
        prompt_weighting: None,
        embeddings: None,
        model: None,
    };
    let error =
        instructor().instruct(Request::EncodePrompt(options), on_cpu().with(&mut resources()), &ctx).unwrap_err();
    assert_eq!(error.code(), "cancelled");
}

//! Preprocessors against OpenCV (goldens of `tests/steer/make_hints.py`), the hint cache, and `conditioning.preprocess`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use sdxl_worker::conditioning::PREPROCESSORS;
use sdxl_worker::conditioning::hints::{HintOptions, HintTarget};
use sdxl_worker::conditioning::init_image::ResizeMode;
use sdxl_worker::conditioning::instructor::ConditioningInstructor;
use sdxl_worker::conditioning::interface::{PreprocessorParameters, Request, Response, Settings};
use sdxl_worker::conditioning::manager::{ConditioningResources, EmbeddingManager, HintManager};
use sdxl_worker::conditioning::preprocessor::{ParameterValues, PreprocessTask};
use sdxl_worker::context::{CancelToken, Context};
use sdxl_worker::device::scope::RequestScope;
use sdxl_worker::error::Result;
use sdxl_worker::image::pixels::Rgb8;
use sdxl_worker::image::source::ImageSource;
use sdxl_worker::layers::{Instructor, Manager, Nothing};
use sdxl_worker::model::instructor::ModelResources;
use sdxl_worker::postprocessing::instructor::PostprocessingInstructor;
use sdxl_worker::roots::Roots;
use sdxl_worker::units::{Bytes, ImageSize};

fn steer(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/steer").join(name)
}

fn goldens() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(steer("hints.safetensors"), &Device::Cpu).unwrap()
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    assert_eq!(tensor.dtype(), DType::U8);
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn picture(name: &str, tensor: &Tensor) -> Rgb8 {
    if matches!(name, "coffee" | "chelsea") {
        let source = ImageSource::Path(steer(&format!("files/{name}.png")));
        return source.read(&Roots::new([steer("")]), "image").unwrap().decode().unwrap();
    }
    let (height, width, _) = tensor.dims3().unwrap();
    Rgb8 { width, height, data: bytes(tensor) }
}

fn resolve(name: &str, options: PreprocessorParameters) -> Result<ParameterValues> {
    ParameterValues::resolve(name, PREPROCESSORS.get(name)?.parameters(), &options, "parameters")
}

fn run(name: &str, image: &Rgb8, options: PreprocessorParameters) -> Rgb8 {
    let parameters = resolve(name, options).unwrap();
    let task = PreprocessTask { image, parameters: &parameters };
    Context::detached().perform(PREPROCESSORS.get(name).unwrap(), task).unwrap()
}

/// The parameters that the numbers in a golden's name stand for.
fn options(name: &str, numbers: &str) -> PreprocessorParameters {
    let parts: Vec<f64> = match name {
        "canny" => numbers.split('.').filter_map(|n| n.parse().ok()).collect(),
        _ => numbers.parse().ok().into_iter().collect(),
    };
    let mut options = PreprocessorParameters::default();
    match (name, parts.as_slice()) {
        (_, []) => (),
        ("canny", &[low, high]) => (options.low_threshold, options.high_threshold) = (Some(low), Some(high)),
        ("threshold", &[value]) => options.threshold = Some(value),
        ("blur", &[value]) => options.sigma = Some(value),
        other => panic!("{other:?}"),
    }
    options
}

/// The share of bytes that differ, and the largest difference.
fn difference(ours: &[u8], theirs: &[u8]) -> (f64, u8) {
    assert_eq!(ours.len(), theirs.len());
    let apart = || ours.iter().zip(theirs).map(|(a, b)| a.abs_diff(*b));
    (apart().filter(|&d| d > 0).count() as f64 / ours.len() as f64, apart().max().unwrap_or(0))
}

#[test]
fn preprocessors_equal_opencv() {
    let goldens = goldens();
    let mut wrong = Vec::new();
    let mut names: Vec<&String> =
        goldens.keys().filter(|name| name.contains('.') && !name.ends_with("tile.small")).collect();
    names.sort();
    for key in names {
        let (source, hint) = key.split_once('.').unwrap();
        let (name, numbers) = hint.split_once('.').unwrap_or((hint, ""));
        let ours = run(name, &picture(source, &goldens[source]), options(name, numbers));
        let golden = &goldens[key];
        let theirs = bytes(golden);
        let theirs = if golden.rank() == 2 { theirs.iter().flat_map(|&v| [v; 3]).collect() } else { theirs };
        let (share, most) = difference(&ours.data, &theirs);
        println!("{key:<28} {:>8.4} % differ, by {most} at most", 100.0 * share);
        // Floats summed in another order may truncate to the next byte.
        let fine = if name == "lineart" { share < 1e-3 && most <= 1 } else { share == 0.0 };
        if !fine {
            wrong.push(format!("{key}: {share} {most}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn tile_preprocessor_averages_as_opencv() {
    let goldens = goldens();
    let options = PreprocessorParameters { down_sampling_rate: Some(4.0), ..PreprocessorParameters::default() };
    for name in ["drawn", "noise", "blocks", "1x1", "9x1"] {
        let image = picture(name, &goldens[name]);
        let (height, width, _) = goldens[&format!("{name}.tile.small")].dims3().unwrap();
        let small = Rgb8 { width, height, data: bytes(&goldens[&format!("{name}.tile.small")]) };
        let theirs = small.resized(image.width, image.height, sdxl_worker::image::resample::Filter::Lanczos).unwrap();
        let (share, most) = difference(&run("tile", &image, options).data, &theirs.data);
        println!("{name:<10} {:>8.4} % differ, by {most} at most", 100.0 * share);
        assert!(most <= 2, "{name} {most}");
    }
    let image = picture("drawn", &goldens["drawn"]);
    assert_eq!(run("tile", &image, PreprocessorParameters::default()), image);
}

#[test]
fn every_preprocessor_takes_any_size_and_is_cancellable() {
    let cancel = CancelToken::default();
    cancel.cancel();
    let stopped = Context::new("x".to_owned(), cancel, None, None, Box::new(|_| ()));
    for (name, method) in PREPROCESSORS.iter() {
        let parameters = resolve(name, PreprocessorParameters::default()).unwrap();
        for (width, height) in [(1, 1), (1, 5), (5, 1), (2, 2), (2, 3), (3, 3), (7, 4), (64, 33)] {
            let data = (0..3 * width * height).map(|at| (at * 97 % 251) as u8).collect();
            let image = Rgb8 { width, height, data };
            let task = PreprocessTask { image: &image, parameters: &parameters };
            let made = Context::detached().perform(method, task).unwrap();
            assert_eq!((made.width, made.height, made.data.len()), (width, height, 3 * width * height), "{name}");
            assert_eq!(stopped.perform(method, task).unwrap_err().code(), "cancelled", "{name}");
        }
        // The reported parameters resolve to themselves; both ends of a range are accepted, and nothing beyond it.
        assert_eq!(resolve(name, parameters.echo(method.parameters())).unwrap(), parameters);
        for parameter in method.parameters() {
            let set = |value: f64| {
                let mut options = PreprocessorParameters::default();
                let field = match parameter.name {
                    "low_threshold" => &mut options.low_threshold,
                    "high_threshold" => &mut options.high_threshold,
                    "threshold" => &mut options.threshold,
                    "sigma" => &mut options.sigma,
                    "down_sampling_rate" => &mut options.down_sampling_rate,
                    other => panic!("`{other}` is no field"),
                };
                *field = Some(value);
                options
            };
            let image = Rgb8 { width: 9, height: 5, data: (0..135).collect() };
            for value in [parameter.min, parameter.max] {
                run(name, &image, set(value));
            }
            for value in [parameter.min - 1.0, parameter.max + 1.0, f64::NAN, f64::INFINITY] {
                let error = resolve(name, set(value)).unwrap_err();
                assert_eq!(
                    (error.code(), error.pointer().unwrap()),
                    ("invalid_parameter", format!("/data/parameters/{}", parameter.name))
                );
            }
        }
    }
    let stray = PreprocessorParameters { sigma: Some(1.0), ..PreprocessorParameters::default() };
    let error = resolve("canny", stray).unwrap_err();
    assert_eq!(error.to_string(), "`parameters.sigma` is no parameter of `canny`");
    assert_eq!(error.hint().unwrap(), "it has `low_threshold`, `high_threshold`");
}

fn resources() -> ConditioningResources {
    let model = ModelResources::new(&Default::default());
    ConditioningResources { model, embeddings: EmbeddingManager::default(), hints: HintManager::default() }
}

/// Reads from `root` and from `tests/steer`, writes beneath `root`.
fn instructor(root: &Path) -> ConditioningInstructor {
    let settings = sdxl_worker::postprocessing::interface::Settings {
        output_dir: root.to_owned(),
        roots: vec![steer("")],
        ..Default::default()
    };
    let delivery = PostprocessingInstructor::new(settings);
    let roots = delivery.roots().clone();
    ConditioningInstructor { settings: Settings::default(), roots, delivery }
}

#[test]
fn hints_are_cached_by_content() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy.png");
    std::fs::copy(steer("files/coffee.png"), &copy).unwrap();
    let (instructor, mut resources, ctx) = (instructor(folder.path()), resources(), Context::detached());
    let size = |width, height| ImageSize { width, height };
    let mut hint = |path: &Path, name: &str, low: Option<f64>, resize: ResizeMode, size: ImageSize| {
        let options = HintOptions {
            image: &ImageSource::Path(path.to_owned()),
            preprocessor: Some(name),
            parameters: &PreprocessorParameters { low_threshold: low, ..PreprocessorParameters::default() },
            resize,
            fields: ["image", "preprocessor", "parameters"],
        };
        let plan = instructor.plan_hint(&options).unwrap();
        let hint = instructor.hint(&plan, HintTarget { size, cut: None }, &mut resources, &ctx).unwrap();
        assert_eq!((hint.image.width, hint.image.height), (size.width, size.height));
        (hint.cached, hint.image)
    };
    let coffee = steer("files/coffee.png");
    use ResizeMode::{Crop, Stretch};
    let (cached, first) = hint(&coffee, "canny", None, Stretch, size(128, 96));
    assert!(!cached);
    // The same bytes under another name, and an explicit default, are the same hint.
    let (cached, again) = hint(&copy, "canny", Some(100.0), Stretch, size(128, 96));
    assert!(cached && again == first);
    for (path, name, low, resize, size) in [
        (&coffee, "canny", Some(90.0), Stretch, size(128, 96)),
        (&coffee, "canny", None, Crop, size(128, 96)),
        (&coffee, "canny", None, Stretch, size(96, 128)),
        (&coffee, "none", None, Stretch, size(128, 96)),
        (&steer("files/chelsea.png"), "canny", None, Stretch, size(128, 96)),
    ] {
        assert!(!hint(path, name, low, resize, size).0);
        assert!(hint(path, name, low, resize, size).0);
    }
    assert_eq!(resources.hints.resident()[0].bytes, Bytes(6 * 3 * 128 * 96));
    assert_eq!(resources.hints.evict(Bytes(1)), Bytes(3 * 128 * 96));
    resources.hints.evict(Bytes(u64::MAX));
    assert!(resources.hints.resident().is_empty());

    let file = |source: &str| {
        instructor.plan_hint(&HintOptions {
            image: &ImageSource::Path(coffee.clone()),
            preprocessor: Some(source),
            parameters: &PreprocessorParameters::default(),
            resize: Stretch,
            fields: ["controlnet.0.image", "controlnet.0.preprocessor", "controlnet.0.parameters"],
        })
    };
    let error = file("cany").err().unwrap();
    assert_eq!((error.code(), error.hint().as_deref()), ("unknown_name", Some("did you mean `canny`?")));
    assert_eq!(error.pointer().unwrap(), "/data/controlnet/0/preprocessor");
    assert_eq!(file("hed").err().unwrap().code(), "unsupported_feature");
}

#[test]
fn hint_cache_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let (instructor, mut resources, ctx) = (instructor(folder.path()), resources(), Context::detached());
    let options = |low: f64| PreprocessorParameters { low_threshold: Some(low), ..PreprocessorParameters::default() };
    for low in 0..12u8 {
        let plan = instructor.plan_hint(&HintOptions {
            image: &ImageSource::Path(steer("files/coffee.png")),
            preprocessor: Some("canny"),
            parameters: &options(f64::from(low)),
            resize: ResizeMode::Stretch,
            fields: ["image", "preprocessor", "parameters"],
        });
        instructor
            .hint(
                &plan.unwrap(),
                HintTarget { size: ImageSize { width: 2048, height: 1024 }, cut: None },
                &mut resources,
                &ctx,
            )
            .unwrap();
    }
    // Twelve hints of 6 MiB would take 72 MiB.
    assert_eq!(resources.hints.resident()[0].bytes, Bytes(60 * Bytes::MIB));
}

#[test]
fn preprocess_writes_the_hint() {
    let folder = tempfile::tempdir().unwrap();
    let (instructor, mut resources, ctx) = (instructor(folder.path()), resources(), Context::detached());
    let scope = RequestScope::Query { residents: Vec::new() };
    let options = |more: serde_json::Value| -> Request {
        let mut data = serde_json::json!({ "image": steer("files/chelsea.png"), "preprocessor": "canny" });
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(serde_json::json!({ "preprocess": data })).unwrap()
    };
    let request = options(serde_json::json!({ "output": { "dir": folder.path(), "name": "edges" } }));
    assert!(!request.needs_compute());
    let Response::Preprocess(made) = instructor.instruct(request, scope.with(&mut resources), &ctx).unwrap() else {
        panic!()
    };
    assert_eq!((made.width, made.height, made.preprocessor), (256, 192, "canny"));
    assert_eq!((made.parameters.low_threshold, made.parameters.sigma), (Some(100.0), None));
    let path = folder.path().join("edges.png");
    assert_eq!(made.path.as_deref(), path.to_str());
    let read =
        ImageSource::Path(path).read(&Roots::new([folder.path().to_owned()]), "image").unwrap().decode().unwrap();
    let golden = bytes(&goldens()["chelsea.canny"]);
    assert!(read.data.chunks_exact(3).zip(&golden).all(|(pixel, edge)| pixel == [*edge; 3]));

    let more =
        serde_json::json!({ "width": 64, "height": 40, "resize_mode": "crop", "output": { "return": "base64" } });
    let Response::Preprocess(made) = instructor.instruct(options(more), scope.with(&mut resources), &ctx).unwrap()
    else {
        panic!()
    };
    assert!(made.path.is_none());
    let read = ImageSource::Base64(made.base64.unwrap()).read(&Roots::new([]), "image").unwrap();
    assert_eq!((read.width, read.height), (64, 40));
    assert!(resources.hints.resident().is_empty());

    for (more, field) in [
        (serde_json::json!({ "width": 0 }), "width"),
        (serde_json::json!({ "height": 8193 }), "height"),
        (serde_json::json!({ "parameters": { "sigma": 2.0 } }), "parameters.sigma"),
        (serde_json::json!({ "output": { "quality": 0 } }), "output.quality"),
    ] {
        let error = instructor.instruct(options(more), scope.with(&mut resources), &ctx).unwrap_err();
        assert!(error.to_string().starts_with(&format!("`{field}`")), "{error}");
    }
    let null = serde_json::json!({ "parameters": null, "resize_mode": null, "width": null, "height": null,
                                   "output": { "return": "base64" } });
    assert!(instructor.instruct(options(null), scope.with(&mut resources), &ctx).is_ok());
    for (name, code) in
        [("openpose_full", "unsupported_feature"), ("depth_anything", "unsupported_feature"), ("canyn", "unknown_name")]
    {
        let error = instructor
            .instruct(options(serde_json::json!({ "preprocessor": name })), scope.with(&mut resources), &ctx)
            .unwrap_err();
        assert_eq!(error.code(), code, "{name}: {error}");
    }
    let Response::List(list) =
        instructor.instruct(Request::List(Nothing {}), scope.with(&mut resources), &ctx).unwrap()
    else {
        panic!()
    };
    let canny = list.preprocessors.iter().find(|entry| entry.name == "canny").unwrap();
    assert_eq!(
        canny.parameters.iter().map(|p| (p.name, p.default)).collect::<Vec<_>>(),
        [("low_threshold", 100.0), ("high_threshold", 200.0)]
    );
    assert_eq!(list.preprocessors.len(), PREPROCESSORS.names().count());
}

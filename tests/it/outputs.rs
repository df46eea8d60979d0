//! Output and input of images: pixels, formats, metadata, and files that are never overwritten or misplaced.
#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candle_core::{DType, Device, Tensor};
use sdxl_worker::context::{CancelToken, Context};
use sdxl_worker::error::Result;
use sdxl_worker::image::pixels::Rgb8;
use sdxl_worker::image::source::ImageSource;
use sdxl_worker::layers::{Instructor, Nothing};
use sdxl_worker::postprocessing::instructor::{Delivery, PostprocessingInstructor};
use sdxl_worker::postprocessing::interface::{
    Delivered, ImageMetadata, MetadataRequest, OutputOptions, Request, Response, ReturnAs, Settings,
};
use sdxl_worker::postprocessing::metadata::{FoundRequest, ImageText, Parameters};
use sdxl_worker::postprocessing::{EncodeTask, FORMATS};

/// A drawn landscape of odd size: gradients and an edge.
fn picture() -> Rgb8 {
    let (width, height) = (61, 43);
    let byte = |value: usize| u8::try_from(value % 256).unwrap();
    let data = (0..height)
        .flat_map(|y| (0..width).flat_map(move |x| [byte(4 * x), byte(5 * y), if x > y { 200 } else { 40 }]))
        .collect();
    Rgb8 { width, height, data }
}

fn text(prompt: &str) -> ImageText {
    let parameters = Parameters {
        prompt,
        negative_prompt: "fog",
        steps: 25,
        sampler: "euler",
        schedule: "karras",
        cfg_scale: 5.0,
        seed: 42,
        width: 61,
        height: 43,
        model: "demo",
        more: &[("Denoising strength", "0.6".to_owned()), ("Note", "a, b: c".to_owned())],
    };
    ImageText::new(&parameters, &serde_json::json!({ "prompt": prompt, "seed": 42 })).unwrap()
}

fn context(id: &str) -> Context {
    Context::new(id.to_owned(), CancelToken::default(), None, None, Box::new(|_| ()))
}

/// A worker whose only root is a fresh folder.
struct Place {
    root: tempfile::TempDir,
    instructor: PostprocessingInstructor,
}

impl Place {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let settings = Settings {
            output_dir: root.path().join("outputs"),
            roots: vec![root.path().to_owned()],
            ..Settings::default()
        };
        Self { root, instructor: PostprocessingInstructor::new(settings) }
    }

    fn path(&self, name: &str) -> String {
        self.root.path().join(name).display().to_string()
    }

    fn deliver(&self, options: &OutputOptions, id: &str, index: usize) -> Result<Delivered> {
        let plan = self.instructor.resolve(options)?;
        let (image, text) = (picture(), text("a lighthouse"));
        let delivery = Delivery { plan: &plan, image: &image, index, text: Some(&text) };
        self.instructor.deliver(delivery, &context(id))
    }

    fn metadata(&self, image: ImageSource) -> Result<ImageMetadata> {
        let request = Request::Metadata(MetadataRequest { image });
        match self.instructor.instruct(request, (), &Context::detached())? {
            Response::Metadata(metadata) => Ok(metadata),
            other => panic!("{other:?}"),
        }
    }

    /// Every file under the root, including hidden ones.
    fn files(&self) -> Vec<String> {
        fn walk(folder: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, found) } else { found.push(path.display().to_string()) }
            }
        }
        let mut found = Vec::new();
        walk(self.root.path(), &mut found);
        found.sort();
        found
    }
}

fn options(path: Option<&str>, dir: Option<&str>, name: Option<&str>) -> OutputOptions {
    OutputOptions {
        path: path.map(str::to_owned),
        dir: dir.map(str::to_owned),
        name: name.map(str::to_owned),
        ..OutputOptions::default()
    }
}

fn psnr(a: &Rgb8, b: &Rgb8) -> f64 {
    assert_eq!((a.width, a.height), (b.width, b.height));
    let square = |(a, b): (&u8, &u8)| (f64::from(*a) - f64::from(*b)).powi(2);
    let mean = a.data.iter().zip(&b.data).map(square).sum::<f64>() / a.data.len() as f64;
    10.0 * (255.0 * 255.0 / mean).log10()
}

#[test]
fn pixels_round_as_numpy_does() {
    // ((x * 0.5 + 0.5).clamp(0, 1).numpy() * 255).round() of torch 2.15 and numpy 2, in f32; 0.9960… lies on a half.
    let inputs = [-1.0f32, 1.0, 0.0, -3.0, 7.5, 2.0 * (0.5 / 255.0) - 1.0, 0.996_078_5, 0.25, -0.25];
    let expected = [0u8, 255, 128, 0, 255, 0, 254, 159, 96];
    let tensor = Tensor::from_slice(&inputs, (1, 1, 3, 3), &Device::Cpu).unwrap();
    assert_eq!(Rgb8::from_tensor(&tensor).unwrap()[0].data, expected);
    // Every multiple of 2⁻¹⁶; numpy's bytes add up to this.
    let all: Vec<f32> = (-65_536..=65_536i32).map(|n| n as f32 / 65_536.0).collect();
    let all = Tensor::from_vec(all, (1, 1, 43_691, 3), &Device::Cpu).unwrap();
    let sum: u64 = Rgb8::from_tensor(&all).unwrap()[0].data.iter().map(|&byte| u64::from(byte)).sum();
    assert_eq!(sum, 16_711_807);
    let bf16 = Rgb8::from_tensor(&tensor.to_dtype(DType::BF16).unwrap()).unwrap();
    assert_eq!(bf16[0].data[..3], expected[..3]);
}

#[test]
fn every_byte_survives_the_tensor_round_trip() {
    let data: Vec<u8> = (0..=255).flat_map(|v| [v, 255 - v, v]).collect();
    let image = Rgb8 { width: 16, height: 16, data };
    let tensor = image.to_tensor(&Device::Cpu).unwrap();
    assert_eq!(tensor.dims(), [1, 16, 16, 3]);
    let batch = Tensor::cat(&[&tensor, &tensor], 0).unwrap();
    assert_eq!(Rgb8::from_tensor(&batch).unwrap(), [image.clone(), image]);
}

#[test]
fn non_finite_pixel_is_a_numerical_error() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let tensor = Tensor::from_slice(&[0.0, bad, 0.0], (1, 1, 1, 3), &Device::Cpu).unwrap();
        assert_eq!(Rgb8::from_tensor(&tensor).unwrap_err().code(), "numerical_error", "{bad}");
    }
}

/// The contract of every entry of [`FORMATS`].
#[test]
fn every_format_round_trips_the_image_and_its_text() {
    let (place, image) = (Place::new(), picture());
    for (name, format) in FORMATS.iter() {
        assert_eq!(name, format.name);
        for prompt in ["a lighthouse", "Zürich, 2°", "灯台 🗼\nwith a second line", "nul \0 here"] {
            let text = text(prompt);
            let task = EncodeTask { image: &image, quality: 90, text: Some(&text) };
            let bytes = Context::detached().perform(format.encoder, task).unwrap();
            let source = ImageSource::Base64(STANDARD.encode(&bytes));
            let file = source.read(place.instructor.roots(), "image").unwrap();
            assert_eq!(file.format.to_mime_type(), format.media_type);
            let likeness = psnr(&image, &file.decode().unwrap());
            if format.lossless {
                assert_eq!(likeness, f64::INFINITY, "{name}");
            } else {
                assert!(likeness > 28.0, "{name}: {likeness:.1} dB");
            }
            let metadata = place.metadata(source).unwrap();
            assert_eq!((metadata.format, metadata.width, metadata.height), (name, 61, 43));
            let kept = |found: String| found.replace('\u{fffd}', "\0");
            assert_eq!(metadata.parameters.map(kept).as_deref(), Some(text.parameters.as_str()), "{name}");
            assert_eq!(metadata.request.as_ref().map(FoundRequest::json), Some(text.request.as_str()), "{name}");
        }
        let bad = Rgb8 { data: vec![0; 5], ..image.clone() };
        let task = EncodeTask { image: &bad, quality: 90, text: None };
        assert_eq!(Context::detached().perform(format.encoder, task).unwrap_err().code(), "internal");
    }
}

#[test]
fn jpeg_quality_is_applied() {
    let image = picture();
    let of = |quality| {
        let task = EncodeTask { image: &image, quality, text: None };
        let bytes = Context::detached().perform(FORMATS.get("jpeg").unwrap().encoder, task).unwrap();
        let source = ImageSource::Base64(STANDARD.encode(&bytes));
        let file = source.read(Place::new().instructor.roots(), "image").unwrap();
        (bytes.len(), psnr(&image, &file.decode().unwrap()))
    };
    let ((small, low), (large, high)) = (of(20), of(100));
    assert!(small < large && low < high && high > 36.0, "{small} B {low:.1} dB, {large} B {high:.1} dB");
}

#[test]
fn jpeg_truncates_metadata_that_does_not_fit() {
    let place = Place::new();
    let read = |prompt: &str| {
        let text = text(prompt);
        let (ctx, image) = (Context::detached(), picture());
        let task = EncodeTask { image: &image, quality: 90, text: Some(&text) };
        let bytes = ctx.perform(FORMATS.get("jpeg").unwrap().encoder, task).unwrap();
        (place.metadata(ImageSource::Base64(STANDARD.encode(bytes))).unwrap(), ctx.warnings())
    };
    let (found, warnings) = read(&"a".repeat(25_000));
    assert!(found.parameters.is_some() && found.request.is_none() && warnings.is_empty(), "{warnings:?}");
    let (found, warnings) = read(&"a".repeat(40_000));
    assert!(found.parameters.is_none() && found.request.is_none());
    assert_eq!(warnings.len(), 1, "{warnings:?}");
}

#[test]
fn parameters_text_has_the_form_of_automatic1111() {
    let expected = "a lighthouse\nNegative prompt: fog\nSteps: 25, Sampler: euler, Schedule type: karras, \
        CFG scale: 5, Seed: 42, Size: 61x43, Model: demo, Denoising strength: 0.6, Note: \"a, b: c\"";
    assert_eq!(text("a lighthouse").parameters, expected);
}

#[test]
fn png_text_is_read_by_an_independent_decoder() {
    let place = Place::new();
    let check = |prompt: &str, latin1: bool| {
        let text = text(prompt);
        let task = EncodeTask { image: &picture(), quality: 90, text: Some(&text) };
        let bytes = Context::detached().perform(FORMATS.get("png").unwrap().encoder, task).unwrap();
        let reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let info = reader.info();
        let chunks: Vec<(String, String)> = if latin1 {
            info.uncompressed_latin1_text.iter().map(|c| (c.keyword.clone(), c.text.clone())).collect()
        } else {
            info.utf8_text.iter().map(|c| (c.keyword.clone(), c.get_text().unwrap())).collect()
        };
        let expected = [("parameters", text.parameters), ("sdxl_worker", text.request)];
        assert_eq!(chunks, expected.map(|(key, value)| (key.to_owned(), value)), "{prompt}");
    };
    check("Zürich", true);
    check("灯台", false);
    drop(place);
}

#[test]
fn metadata_can_be_left_out() {
    let place = Place::new();
    let bare = OutputOptions { metadata: Some(false), return_as: Some(ReturnAs::Base64), ..OutputOptions::default() };
    let delivered = place.deliver(&bare, "r", 0).unwrap();
    assert_eq!(delivered.path, None);
    let base64 = delivered.base64.unwrap();
    assert_eq!(STANDARD.decode(&base64).unwrap().len() as u64, delivered.bytes);
    let found = place.metadata(ImageSource::Base64(base64)).unwrap();
    assert!(found.parameters.is_none() && found.request.is_none());
    assert_eq!(place.files(), Vec::<String>::new());
}

#[test]
fn automatic_names_count_up_and_leave_no_other_file() {
    let place = Place::new();
    let names = [("r-1", 0), ("r-1", 1), ("r-1", 0), ("r-1", 0)];
    let paths = names.map(|(id, index)| place.deliver(&OutputOptions::default(), id, index).unwrap().path.unwrap());
    let expected = ["r-1-0.png", "r-1-1.png", "r-1-0-1.png", "r-1-0-2.png"];
    assert_eq!(paths, expected.map(|name| place.path(&format!("outputs/{name}"))));
    let mut sorted = paths.to_vec();
    sorted.sort();
    assert_eq!(place.files(), sorted);
}

#[test]
fn named_file_is_never_overwritten() {
    let place = Place::new();
    let options = options(Some(&place.path("deep/er/a.jpg")), None, None);
    // Both requests are resolved before either is made.
    let plan = place.instructor.resolve(&options).unwrap();
    assert_eq!(plan.format.name, "jpeg");
    let image = picture();
    let deliver =
        |index| place.instructor.deliver(Delivery { plan: &plan, image: &image, index, text: None }, &context("r"));
    assert_eq!(deliver(0).unwrap().path, Some(place.path("deep/er/a.jpg")));
    let before = std::fs::read(place.path("deep/er/a.jpg")).unwrap();
    assert_eq!(deliver(0).unwrap_err().code(), "output_exists");
    assert_eq!(place.instructor.resolve(&options).err().map(|e| e.code()), Some("output_exists"));
    assert_eq!(std::fs::read(place.path("deep/er/a.jpg")).unwrap(), before);
    assert_eq!(deliver(1).unwrap().path, Some(place.path("deep/er/a-1.jpg")));
    assert_eq!(place.files(), [place.path("deep/er/a-1.jpg"), place.path("deep/er/a.jpg")]);
}

#[test]
fn hostile_request_ids_become_plain_names() {
    let place = Place::new();
    let long = "x".repeat(5000);
    for id in
        ["../../etc/passwd", "..", ".hidden", "a/b\\c", "nul\0\n\u{7f}", "", "CON", "日本/語", &long, "-rf *", "~"]
    {
        let path = place.deliver(&OutputOptions::default(), id, 0).unwrap().path.unwrap();
        let path = Path::new(&path);
        assert_eq!(path.parent().unwrap(), place.root.path().join("outputs"), "{id:?}");
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(
            name.len() < 140 && name.contains("-0") && name.ends_with(".png") && !name.starts_with('.'),
            "{id:?} gave {name:?}"
        );
        assert!(!name.chars().any(|c| c.is_control() || "/\\*~ ".contains(c)), "{id:?} gave {name:?}");
        assert!(path.is_file());
    }
}

#[test]
fn paths_outside_the_roots_are_refused() {
    let (place, other) = (Place::new(), tempfile::tempdir().unwrap());
    let outside = |name: &str| other.path().join(name).display().to_string();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(other.path(), place.path("link")).unwrap();
        std::os::unix::fs::symlink(outside("missing.png"), place.path("dangling.png")).unwrap();
    }
    let check = |options: OutputOptions, code: &str| {
        let error = place.deliver(&options, "r", 0).expect_err(&format!("{options:?}"));
        assert_eq!(error.code(), code, "{options:?}: {error}");
    };
    check(options(Some(&outside("a.png")), None, None), "path_not_allowed");
    check(options(Some("/etc/a.png"), None, None), "path_not_allowed");
    check(options(None, Some(&outside("")), None), "path_not_allowed");
    check(options(Some(&place.path("outputs/../../a.png")), None, None), "path_not_allowed");
    check(options(Some(&place.path("..")), None, None), "path_not_allowed");
    check(options(Some("../a.png"), None, None), "path_not_allowed");
    if cfg!(unix) {
        check(options(Some(&place.path("link/a.png")), None, None), "path_not_allowed");
        check(options(None, Some(&place.path("link/new")), Some("a")), "path_not_allowed");
        check(options(Some(&place.path("dangling.png")), None, None), "output_exists");
    }
    assert_eq!(std::fs::read_dir(other.path()).unwrap().count(), 0);
    for path in ["/etc/hostname", "../Cargo.toml"] {
        let error = place.metadata(ImageSource::Path(path.into())).unwrap_err();
        assert_eq!(error.code(), "path_not_allowed", "{path}: {error}");
    }
}

#[test]
fn impossible_output_options_are_named() {
    let place = Place::new();
    let check = |options: OutputOptions, code: &str, pointer: &str| {
        let error = place.instructor.resolve(&options).err().unwrap_or_else(|| panic!("{options:?} was accepted"));
        assert_eq!((error.code(), error.pointer().as_deref()), (code, Some(pointer)), "{options:?}: {error}");
    };
    let format = |name: &str| OutputOptions { format: Some(name.to_owned()), ..OutputOptions::default() };
    check(format("pngg"), "unknown_name", "/data/output/format");
    check(format(""), "unknown_name", "/data/output/format");
    for quality in [0, 101, -1, i64::MAX, i64::MIN] {
        let options = OutputOptions { quality: Some(quality), ..OutputOptions::default() };
        check(options, "invalid_parameter", "/data/output/quality");
    }
    let base64 = OutputOptions { return_as: Some(ReturnAs::Base64), ..options(None, None, Some("a")) };
    check(base64, "invalid_parameter", "/data/output/name");
    let path = place.path("a.png");
    check(options(Some(&path), Some("b"), None), "invalid_parameter", "/data/output/path");
    check(
        OutputOptions { format: Some("webp".to_owned()), ..options(Some(&path), None, None) },
        "invalid_parameter",
        "/data/output/path",
    );
    check(options(Some(&place.path("a.gif")), None, None), "unknown_name", "/data/output/path");
    check(options(Some(&place.path("dir/")), None, None), "invalid_parameter", "/data/output/path");
    check(options(Some(""), None, None), "invalid_parameter", "/data/output/path");
    for name in ["", "a/b", "a\\b", ".", "..", ".png", "a\nb", "a\0", &"x".repeat(300)] {
        check(options(None, None, Some(name)), "invalid_parameter", "/data/output/name");
    }
}

#[test]
fn output_names_and_formats_are_parsed() {
    let place = Place::new();
    let check = |options: OutputOptions, file: &str| {
        assert_eq!(
            place.deliver(&options, "r", 0).unwrap().path.as_deref(),
            Some(place.path(file).as_str()),
            "{options:?}"
        );
    };
    check(options(None, None, Some("v1.2 final")), "outputs/v1.2 final.png");
    check(options(None, None, Some("a.JPEG")), "outputs/a.jpg");
    check(options(Some(&place.path("bare")), None, None), "bare.png");
    check(OutputOptions { format: Some("JPG".to_owned()), ..options(None, Some(&place.path("d")), None) }, "d/r-0.jpg");
    check(
        OutputOptions { format: Some("webp".to_owned()), ..options(Some(&place.path("v1.2")), None, None) },
        "v1.2.webp",
    );
}

#[test]
fn unwritable_folder_is_output_write_failed() {
    let place = Place::new();
    std::fs::write(place.path("file"), "x").unwrap();
    let error = place.deliver(&options(None, Some(&place.path("file")), None), "r", 0).unwrap_err();
    assert_eq!(error.code(), "output_write_failed", "{error}");
    assert_eq!(place.files(), [place.path("file")]);
}

#[test]
fn output_options_read_their_wire_names() {
    let options: OutputOptions = serde_json::from_str(r#"{"return":"base64","format":"webp","quality":80}"#).unwrap();
    assert_eq!(
        (options.return_as, options.format.as_deref(), options.quality),
        (Some(ReturnAs::Base64), Some("webp"), Some(80))
    );
    assert_eq!(serde_json::from_str::<OutputOptions>("{}").unwrap(), OutputOptions::default());
}

#[test]
fn image_source_has_four_forms() {
    let read = |json: &str| serde_json::from_str::<ImageSource>(json);
    let check = |json: &str, expected: ImageSource| assert_eq!(read(json).unwrap(), expected, "{json}");
    check(r#""in.png""#, ImageSource::Path("in.png".into()));
    check(r#"{"path":"in.png"}"#, ImageSource::Path("in.png".into()));
    check(r#"{"base64":"aGk="}"#, ImageSource::Base64("aGk=".to_owned()));
    check(r#""data:image/png;base64,aGk=""#, ImageSource::Base64("aGk=".to_owned()));
    check(r#"{"base64":"data:image/png;base64,aGk="}"#, ImageSource::Base64("aGk=".to_owned()));
    for bad in [
        "{}",
        "1",
        "null",
        "[]",
        r#"{"path":"a","base64":"b"}"#,
        r#"{"url":"a"}"#,
        r#""data:image/png,x""#,
        r#"{"path":1}"#,
    ] {
        assert!(read(bad).is_err(), "{bad}");
    }
}

#[test]
fn non_image_is_refused_before_decoding() {
    let place = Place::new();
    let check = |source: ImageSource, code: &str| {
        let error = place.metadata(source.clone()).expect_err(&format!("{source:?}"));
        assert_eq!(error.code(), code, "{source:?}: {error}");
    };
    check(ImageSource::Base64("!".to_owned()), "invalid_parameter");
    check(ImageSource::Base64(String::new()), "image_decode_failed");
    check(ImageSource::Base64(STANDARD.encode(b"GIF89a")), "image_decode_failed");
    check(ImageSource::Path(place.path("none.png").into()), "invalid_parameter");
    check(ImageSource::Path(place.path("").into()), "invalid_parameter");
    // A PNG header that claims 60000 × 60000 pixels.
    let mut bomb = Vec::new();
    let mut encoder = png::Encoder::new(&mut bomb, 60_000, 60_000);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().unwrap();
    writer.write_chunk(png::chunk::IDAT, &[0; 16]).unwrap();
    drop(writer);
    check(ImageSource::Base64(STANDARD.encode(&bomb)), "image_too_large");
    // No truncation of a real file panics.
    for (_, format) in FORMATS.iter() {
        let text = text("a lighthouse");
        let task = EncodeTask { image: &picture(), quality: 90, text: Some(&text) };
        let bytes = Context::detached().perform(format.encoder, task).unwrap();
        for end in (0..bytes.len()).step_by(13) {
            let _ = place.metadata(ImageSource::Base64(STANDARD.encode(&bytes[..end])));
        }
    }
}

#[test]
fn request_from_image_metadata_is_one_line() {
    let found = FoundRequest::new("{\n  \"prompt\": \"a\\nb\"\r\n}").unwrap();
    assert!(!found.json().contains(['\n', '\r']));
    assert_eq!(serde_json::to_string(&found).unwrap(), found.json());
    for text in ["", "[]", "1", "{", "{} {}", "\"{\"", "null"] {
        assert!(FoundRequest::new(text).is_none(), "{text:?}");
    }
}

#[test]
fn format_list_marks_the_default() {
    let Response::List(list) = Place::new().instructor.instruct(Request::List(Nothing {}), (), &context("r")).unwrap()
    else {
        panic!("not a list")
    };
    let default: Vec<_> = list.formats.iter().filter(|format| format.default).map(|format| format.name).collect();
    assert_eq!((list.formats.len(), default), (3, vec!["png"]));
}

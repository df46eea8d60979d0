//! img2img, inpainting and outpainting: unmasked pixels, the echoed request, and errors.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sdxl_worker::conditioning::init_image::{InitImageOptions, InpaintingFill, MaskOptions, ResizeMode};
use sdxl_worker::conditioning::{PrepareInitImage, PrepareInitImageTask};
use sdxl_worker::context::Context;
use sdxl_worker::error::{Error, Result};
use sdxl_worker::image::pixels::Rgb8;
use sdxl_worker::image::resample::{Filter, resize};
use sdxl_worker::inference::interface::{GenerateRequest, Generated, Request, Response};
use sdxl_worker::inference::workers::paste::{PasteBack, PasteTask};
use sdxl_worker::runtime::dispatch::{Call, Reply};
use sdxl_worker::units::ImageSize;

use super::drawing::Worker;

fn request(fields: &str) -> GenerateRequest {
    let common = r#""prompt": "a lake at night", "seed": 5, "steps": 4, "output": {"return": "base64"}"#;
    serde_json::from_str(&format!("{{{common}{}{fields}}}", if fields.is_empty() { "" } else { "," })).unwrap()
}

fn generate(worker: &mut Worker, request: Request) -> Result<Generated> {
    match worker.instructors.dispatch(Call::Inference(request), &mut worker.managers, &Context::detached())? {
        Reply::Inference(Response::Generated(generated)) => Ok(generated),
        other => panic!("{other:?}"),
    }
}

fn picture(generated: &Generated) -> Rgb8 {
    let bytes = STANDARD.decode(generated.images[0].base64.as_ref().unwrap()).unwrap();
    let image = image::load_from_memory(&bytes).unwrap().into_rgb8();
    Rgb8 { width: image.width() as usize, height: image.height() as usize, data: image.into_raw() }
}

fn file(name: &str) -> Rgb8 {
    let image = image::open(format!("tests/steer/files/{name}")).unwrap().into_rgb8();
    Rgb8 { width: image.width() as usize, height: image.height() as usize, data: image.into_raw() }
}

/// The pixels that differ, each with true if it is allowed to.
fn changed(ours: &Rgb8, original: &Rgb8, may: impl Fn(usize, usize) -> bool) -> (usize, bool) {
    assert_eq!((ours.width, ours.height), (original.width, original.height));
    let pixels = ours.data.chunks_exact(3).zip(original.data.chunks_exact(3)).enumerate();
    let places: Vec<usize> = pixels.filter(|(_, (a, b))| a != b).map(|(at, _)| at).collect();
    (places.len(), places.iter().all(|at| may(at % ours.width, at / ours.width)))
}

const IMAGE: &str = r#""init_image": "tests/steer/files/scene.png""#;

#[test]
fn unmasked_pixels_are_kept_bit_for_bit() {
    let mut worker = Worker::new();
    let scene = file("scene.png");
    let spot = |x: usize, y: usize, reach: usize| {
        (60 - reach..100 + reach).contains(&x) && (40 - reach..75 + reach).contains(&y)
    };
    for (fields, reach) in [
        (r#""mask_blur": 0"#, 0),
        (r#""mask_blur": 2"#, 5),
        (r#""mask_blur": 0, "inpaint_full_res": true, "width": 128, "height": 128"#, 0),
        (r#""mask_blur": 0, "inpainting_fill": "fill""#, 0),
        (r#""mask_blur": 0, "inpainting_fill": "noise""#, 0),
        (r#""mask_blur": 0, "inpainting_fill": "zeros", "soft_mask": true"#, 0),
    ] {
        let data = request(&format!(r#"{IMAGE}, "mask": "tests/steer/files/spot.png", {fields}"#));
        let made = generate(&mut worker, Request::Inpaint(Box::new(data))).unwrap();
        let (count, allowed) = changed(&picture(&made), &scene, |x, y| spot(x, y, reach));
        assert!(allowed, "{fields}: a pixel outside the mask changed");
        assert!(count > 500, "{fields}: only {count} pixels were repainted");
    }
    let data =
        request(&format!(r#"{IMAGE}, "mask": "tests/steer/files/spot.png", "mask_blur": 0, "mask_invert": true"#));
    let made = generate(&mut worker, Request::Generate(Box::new(data))).unwrap();
    let (count, allowed) = changed(&picture(&made), &scene, |x, y| !spot(x, y, 0));
    assert!(allowed && count > 5000, "inverted: {count} pixels");
}

#[test]
fn masked_region_at_the_border_is_undistorted() {
    let (ctx, conditioning) = (Context::detached(), Worker::new().instructors.inference.conditioning);
    // One half of a picture of columns is masked, so its region cannot have the square's proportions.
    let (width, height) = (256, 64);
    let data = (0..width * height).flat_map(|at| [(at % width) as u8; 3]).collect();
    let image = Rgb8 { width, height, data };
    let mask = (0..width * height).flat_map(|at| [if at % width < 128 { 255 } else { 0 }; 3]).collect();
    let mask = Rgb8 { width, height, data: mask };
    let file = |rgb: &Rgb8| {
        let (mut bytes, side) = (Vec::new(), |side: usize| u32::try_from(side).unwrap());
        let buffer = image::RgbImage::from_raw(side(rgb.width), side(rgb.height), rgb.data.clone()).unwrap();
        buffer.write_to(&mut std::io::Cursor::new(&mut bytes), image::ImageFormat::Png).unwrap();
        let source = sdxl_worker::image::source::ImageSource::Base64(STANDARD.encode(bytes));
        source.read(&conditioning.roots, "init_image").unwrap()
    };
    let options = InitImageOptions {
        image: file(&image),
        margins: [0; 4],
        resize: ResizeMode::Stretch,
        mask: Some(MaskOptions {
            image: Some(file(&mask)),
            invert: false,
            blur: 0.0,
            only_masked: Some(0),
            fill: InpaintingFill::Original,
            paste: true,
        }),
    };
    let size = ImageSize { width: 128, height: 128 };
    let canvas = ctx.perform(&PrepareInitImage, PrepareInitImageTask { options: &options, size }).unwrap();
    let paste = canvas.paste.unwrap();
    assert_eq!((paste.region.width, paste.region.height), (128, 64));
    // Unmasked pixels must be at their old place.
    let pasted = ctx.perform(&PasteBack, PasteTask { painted: &canvas.image, paste: &paste }).unwrap();
    let worst = pasted.data.iter().zip(&image.data).map(|(a, b)| a.abs_diff(*b)).max();
    assert_eq!(worst, Some(0));
}

#[test]
fn outpainted_image_contains_the_original() {
    let mut worker = Worker::new();
    let data = request(&format!(r#"{IMAGE}, "extend": {{"left": 32, "bottom": 16}}, "mask_blur": 0"#));
    let made = generate(&mut worker, Request::Inpaint(Box::new(data))).unwrap();
    let image = picture(&made);
    assert_eq!((image.width, image.height), (160, 144));
    let inner = sdxl_worker::image::pixels::Region { left: 32, top: 0, width: 128, height: 128 };
    assert_eq!(image.part(inner).unwrap(), file("scene.png"));
}

#[test]
fn echoed_parameters_reproduce_the_edit() {
    let mut worker = Worker::new();
    for fields in [
        format!(r#"{IMAGE}, "mask": "tests/steer/files/sky.png""#),
        format!(r#"{IMAGE}, "denoising_strength": 0.5"#),
        r#""width": 128, "height": 128, "enable_hr": true, "hr_scale": 1.25"#.to_owned(),
        r#""width": 128, "height": 128, "refiner": {"model": "demo"}"#.to_owned(),
        format!(r#"{IMAGE}, "mask": "tests/steer/files/sky.png", "refiner": {{"model": "demo", "switch_at": 0.5}}"#),
        r#""width": 128, "height": 128, "enable_hr": true, "hr_scale": 1.25, "hr_second_pass_steps": 6,
           "refiner": {"model": "demo", "switch_at": 0.7}, "cfg_interval": [0.0, 0.6]"#
            .to_owned(),
    ] {
        let first = generate(&mut worker, Request::Generate(Box::new(request(&fields)))).unwrap();
        let again = generate(&mut worker, Request::Generate(first.parameters.clone())).unwrap();
        assert_eq!(first.parameters, again.parameters, "{fields}");
        assert_eq!(picture(&first), picture(&again), "{fields}");
    }
}

#[test]
fn unsupported_edits_name_their_field() {
    let mut worker = Worker::new();
    let mask = r#""mask": "tests/steer/files/sky.png""#;
    let refusals = [
        (format!("{IMAGE}, \"denoising_strength\": 0.1"), "denoising_strength"),
        (format!("{IMAGE}, \"denoising_strength\": 1.5"), "denoising_strength"),
        (format!("{IMAGE}, \"mask_blur\": 2"), "mask_blur"),
        (format!("{IMAGE}, {mask}, \"mask_blur\": -1"), "mask_blur"),
        (format!("{IMAGE}, {mask}, \"inpaint_full_res_padding\": 8"), "inpaint_full_res_padding"),
        (
            format!("{IMAGE}, {mask}, \"inpaint_full_res\": true, \"inpaint_full_res_padding\": -1"),
            "inpaint_full_res_padding",
        ),
        (format!("{IMAGE}, \"extend\": {{\"left\": 8}}, \"mask_invert\": true"), "mask_invert"),
        (format!("{IMAGE}, \"denoising_start\": 0.5, \"denoising_strength\": 0.5"), "denoising_strength"),
        ("\"enable_hr\": true, \"denoising_end\": 0.5".to_owned(), "denoising_end"),
        (format!("{IMAGE}, \"extend\": {{\"left\": 7}}"), "extend.left"),
        (format!("{IMAGE}, \"extend\": {{}}"), "extend"),
        (format!("{IMAGE}, \"enable_hr\": true"), "enable_hr"),
        (mask.to_owned(), "mask"),
        ("\"denoising_strength\": 0.5".to_owned(), "denoising_strength"),
        ("\"denoising_start\": 0.5".to_owned(), "denoising_start"),
        ("\"denoising_end\": 0.0".to_owned(), "denoising_end"),
        ("\"hr_scale\": 2".to_owned(), "hr_scale"),
        ("\"enable_hr\": true, \"hr_scale\": 9".to_owned(), "hr_scale"),
        ("\"enable_hr\": true, \"hr_resize_x\": 9".to_owned(), "hr_resize_x"),
        ("\"refiner\": {\"model\": \"demo\", \"switch_at\": 1.0}".to_owned(), "refiner.switch_at"),
        ("\"refiner\": {\"model\": \"demo\"}, \"denoising_end\": 0.5".to_owned(), "denoising_end"),
    ];
    for (fields, wanted) in refusals {
        match generate(&mut worker, Request::Generate(Box::new(request(&fields)))) {
            Err(Error::InvalidParameter { field, .. }) => assert_eq!(field, wanted, "{fields}"),
            other => panic!("{fields}: {other:?}"),
        }
    }
    let unknown = request(r#""enable_hr": true, "hr_upscaler": "latnet""#);
    let error = generate(&mut worker, Request::Generate(Box::new(unknown))).unwrap_err();
    assert_eq!((error.code(), error.hint().as_deref()), ("unknown_name", Some("did you mean `latent`?")));
    let error = generate(&mut worker, Request::Img2img(Box::new(request("")))).unwrap_err();
    assert_eq!((error.code(), error.pointer().as_deref()), ("invalid_parameter", Some("/data/init_image")));
    let with_image = Request::Text2image(Box::new(request(IMAGE)));
    assert_eq!(generate(&mut worker, with_image).unwrap_err().pointer().as_deref(), Some("/data/init_image"));
    let outside = request(r#""init_image": "/etc/hostname""#);
    assert_eq!(generate(&mut worker, Request::Generate(Box::new(outside))).unwrap_err().code(), "path_not_allowed");
}

/// CRC-32 of `scene.png` resized by Pillow 13.0.0, made by `tests/steer/make_edits.py`.
#[test]
fn resizing_equals_pillow() {
    #[derive(serde::Deserialize)]
    struct Resized {
        filter: String,
        size: (usize, usize),
        crc32: u32,
    }
    let text = std::fs::read_to_string("tests/steer/resized/pillow.json").unwrap();
    let scene = file("scene.png");
    let cases: Vec<Resized> = serde_json::from_str(&text).unwrap();
    assert!(cases.len() >= 12);
    for Resized { filter, size, crc32 } in cases {
        let by = match filter.as_str() {
            "lanczos" => Filter::Lanczos,
            "bicubic" => Filter::Bicubic,
            _ => Filter::Bilinear,
        };
        let data = resize(&scene.data, 3, (scene.width, scene.height), size, by).unwrap();
        assert_eq!(crc32fast::hash(&data), crc32, "{filter} {size:?}");
    }
}

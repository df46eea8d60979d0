//! The ControlNet of the demonstration model, `assets/demo-controlnet/`: the image follows the hint's edges.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{ExtendedColorType, ImageEncoder};
use sdxl_worker::image::pixels::Rgb8;
use sdxl_worker::inference::interface::GenerateRequest;
use sdxl_worker::runtime::config::Config;

use super::drawing::Worker;

const SIDE: usize = 128;

/// A square at a place where the model would not put one.
fn inside(x: usize, y: usize) -> bool {
    (24..76).contains(&x) && (60..112).contains(&y)
}

/// The square, as a file in base64.
fn square() -> String {
    let pixel = |at: usize| if inside(at % SIDE, at / SIDE) { [246, 140, 26] } else { [41, 158, 61] };
    let data: Vec<u8> = (0..SIDE * SIDE).flat_map(pixel).collect();
    let mut bytes = Vec::new();
    let side = u32::try_from(SIDE).unwrap();
    image::codecs::png::PngEncoder::new(&mut bytes).write_image(&data, side, side, ExtendedColorType::Rgb8).unwrap();
    STANDARD.encode(bytes)
}

/// Intersection over union of the square and the orange pixels.
fn overlap(picture: &Rgb8) -> f64 {
    let (mut both, mut either) = (0, 0);
    for (at, pixel) in picture.data.chunks_exact(3).enumerate() {
        let (orange, wanted) = (pixel[0] > pixel[1], inside(at % SIDE, at / SIDE));
        both += usize::from(orange && wanted);
        either += usize::from(orange || wanted);
    }
    f64::from(u32::try_from(both).unwrap()) / f64::from(u32::try_from(either).unwrap())
}

#[test]
fn demo_controlnet_follows_the_edges_of_its_hint() {
    let mut config = Config::default();
    config.workers.instructors.model.roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("assets")];
    let mut worker = Worker::with(&config);
    let mut draw = |guided: bool| {
        let mut request = serde_json::json!({
            "prompt": "an orange square on a green background", "width": SIDE, "height": SIDE, "steps": 12,
            "sampler_name": "euler", "seed": 7,
        });
        if guided {
            let image = serde_json::json!({ "base64": square() });
            let controlnet =
                serde_json::json!([{ "model": "demo-controlnet", "image": image, "preprocessor": "canny" }]);
            request.as_object_mut().unwrap().insert("controlnet".to_owned(), controlnet);
        }
        let request: GenerateRequest = serde_json::from_value(request).unwrap();
        overlap(&worker.draw(&request)[0].1)
    };
    let (free, guided) = (draw(false), draw(true));
    println!("overlap with the square: {free:.3} without, {guided:.3} with the ControlNet");
    assert!(guided > 0.85 && guided > free + 0.2, "{free} {guided}");
}

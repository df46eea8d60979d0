//! Input image files: unusual ones decode as in Pillow (`tests/steer/make_images.py`), hostile ones are refused quickly
//! and with little memory.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::Device;
use image::{ExtendedColorType, ImageEncoder};
use sdxl_worker::error::{Error, Result};
use sdxl_worker::image::pixels::Rgb8;
use sdxl_worker::image::resample::Filter;
use sdxl_worker::image::source::{ImageFile, ImageSource};
use sdxl_worker::roots::Roots;

fn steer(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/steer").join(name)
}

fn read(path: &Path) -> Result<ImageFile> {
    ImageSource::Path(path.to_owned()).read(&Roots::new([path.parent().unwrap().to_owned()]), "image")
}

fn pixels(path: &Path) -> Result<Rgb8> {
    let file = read(path)?;
    let image = file.decode()?;
    assert_eq!((file.width, file.height), (image.width, image.height));
    Ok(image)
}

#[test]
fn unusual_image_files_decode_as_in_pillow() {
    let goldens = candle_core::safetensors::load(steer("images.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(goldens.len(), 17);
    let mut wrong = Vec::new();
    for (name, golden) in goldens {
        let image = pixels(&steer("files/odd").join(&name)).unwrap();
        let (height, width, _) = golden.dims3().unwrap();
        let theirs: Vec<u8> = golden.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!((image.width, image.height), (width, height), "{name}");
        let most = image.data.iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        println!("{name:<20} {width:>2} × {height:<2} differs by {most} at most");
        // JPEG decoders round differently.
        let fine = if name.ends_with("jpg") { 4 } else { 0 };
        if most > fine {
            wrong.push(format!("{name}: {most}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let mut crc = !0u32;
    for &byte in kind.iter().chain(data) {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    let length = u32::try_from(data.len()).unwrap().to_be_bytes();
    [&length[..], kind, data, &(!crc).to_be_bytes()].concat()
}

/// A PNG of 8-bit RGB in which only the header is valid.
fn claims(width: u32, height: u32, between: &[u8]) -> Vec<u8> {
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    let data = [0x78, 0x01, 0x03, 0x00, 0x00, 0x00, 0x00, 0x01];
    [b"\x89PNG\r\n\x1a\n", &chunk(b"IHDR", &header)[..], between, &chunk(b"IDAT", &data), &chunk(b"IEND", &[])].concat()
}

fn jpeg(side: u32) -> Vec<u8> {
    let data: Vec<u8> = (0..3 * side * side).map(|at| (at * 7 / 5 % 253) as u8).collect();
    let mut bytes = Vec::new();
    image::codecs::jpeg::JpegEncoder::new(&mut bytes).write_image(&data, side, side, ExtendedColorType::Rgb8).unwrap();
    bytes
}

fn png(side: u32) -> Vec<u8> {
    let data: Vec<u8> = (0..3 * side * side).map(|at| (at * 7 / 5 % 253) as u8).collect();
    let mut bytes = Vec::new();
    image::codecs::png::PngEncoder::new(&mut bytes).write_image(&data, side, side, ExtendedColorType::Rgb8).unwrap();
    bytes
}

/// The peak memory of this process in bytes; `None` where it cannot be read or reset.
fn peak(reset: bool) -> Option<u64> {
    if reset {
        std::fs::write("/proc/self/clear_refs", "5").ok()?;
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// Set in the child process that measures memory.
const ALONE: &str = "SDXL_WORKER_TEST_ALONE";

/// The error, which must come in under 50 ms.
fn refused(name: &str, work: impl Fn() -> Result<Rgb8>) -> Error {
    // Other tests run at the same time, so the best of a few counts.
    let mut best = Duration::MAX;
    let mut last = None;
    for _ in 0..5 {
        let start = Instant::now();
        let result = work();
        best = best.min(start.elapsed());
        last = Some(result.err().unwrap_or_else(|| panic!("{name} was not refused")));
    }
    println!("{name:<28} {best:>10.2?}");
    assert!(best < Duration::from_millis(50), "{name} took {best:?}");
    last.unwrap()
}

#[test]
fn hostile_image_files_are_refused_quickly() {
    // In a child process, because other tests allocate memory here.
    if std::env::var_os(ALONE).is_none() {
        let own =
            ["image_files::hostile_image_files_are_refused_quickly", "--exact", "--nocapture", "--test-threads", "1"];
        let program = std::env::current_exe().unwrap();
        let ended = std::process::Command::new(program).args(own).env(ALONE, "1").status().unwrap();
        assert!(ended.success());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    // A colour profile of zeros that inflates a thousandfold.
    let bomb = {
        let mut body = b"x\0\0".to_vec();
        let zeros = vec![0u8; 1 << 24];
        let mut packed = Vec::new();
        image::codecs::png::PngEncoder::new(&mut packed)
            .write_image(&zeros, 4096, 4096, ExtendedColorType::L8)
            .unwrap();
        // Each row of the zlib stream is a filter byte and zeros.
        let start = packed.windows(4).position(|name| name == b"IDAT").unwrap();
        let length = u32::from_be_bytes(packed[start - 4..start].try_into().unwrap()) as usize;
        body.extend_from_slice(&packed[start + 4..start + 4 + length]);
        chunk(b"iCCP", &body)
    };
    let whole = jpeg(3000);
    let whole_png = png(2000);
    let webp = std::fs::read(steer("files/odd/animated.webp")).unwrap();
    let files: Vec<(&str, Vec<u8>, &str)> = vec![
        ("huge.png", claims(100_000, 100_000, &[]), "image_too_large"),
        ("long.png", claims(70_000, 1, &[]), "image_too_large"),
        ("most.png", claims(u32::MAX, u32::MAX, &[]), "image_too_large"),
        ("none.png", claims(0, 5, &[]), "image_decode_failed"),
        ("hollow.png", claims(100, 100, &[]), "image_decode_failed"),
        ("half.jpg", whole[..whole.len() / 2].to_vec(), "image_decode_failed"),
        ("endless.jpg", whole[..whole.len() - 2].to_vec(), "image_decode_failed"),
        ("head.jpg", whole[..300].to_vec(), "image_decode_failed"),
        ("half.png", whole_png[..whole_png.len() / 2].to_vec(), "image_decode_failed"),
        ("endless.png", whole_png[..whole_png.len() - 12].to_vec(), "image_decode_failed"),
        ("half.webp", webp[..webp.len() / 2].to_vec(), "image_decode_failed"),
        ("head.webp", webp[..16].to_vec(), "image_decode_failed"),
        ("empty.png", Vec::new(), "image_decode_failed"),
        ("text.jpg", b"GIF89a, or so it says".to_vec(), "image_decode_failed"),
    ];
    assert_eq!(files[0].1.len(), 65);
    let held = peak(true);
    for (name, bytes, code) in &files {
        let path = place(name, bytes);
        assert_eq!(refused(name, || pixels(&path)).code(), *code, "{name}");
    }
    let path = place("profile.png", &claims(8, 8, &bomb.repeat(3)));
    println!("profile: {:?}", refused("profile.png", || pixels(&path)).code());
    // A file of 65 MiB is refused unread.
    let long = folder.path().join("long.jpg");
    std::fs::File::create(&long).unwrap().set_len(ImageSource::MAX_BYTES + 1).unwrap();
    assert_eq!(refused("65 MiB", || pixels(&long)).code(), "image_too_large");
    if let (Some(before), Some(after)) = (held, peak(false)) {
        let grown = after.saturating_sub(before);
        println!("peak memory grew by {:.1} MiB", grown as f64 / 1048576.0);
        assert!(grown < 64 << 20, "{grown} bytes");
    }
    // Trailing bytes are ignored.
    for (name, bytes) in [("whole.jpg", &whole), ("whole.png", &whole_png), ("whole.webp", &webp)] {
        pixels(&place(name, bytes)).unwrap();
        pixels(&place(name, &[bytes, &b"behind the end"[..]].concat())).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn image_paths_outside_the_roots_are_refused_quickly() {
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let secret = outside.path().join("secret.png");
    std::fs::File::create(&secret).unwrap().write_all(&png(8)).unwrap();
    let at = |name: &str| inside.path().join(name);
    let pipe = std::ffi::CString::new(at("pipe.png").to_str().unwrap()).unwrap();
    #[expect(unsafe_code, reason = "the standard library makes no pipes that have names")]
    // SAFETY: the path is a string that ends with a zero byte.
    let made = unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) };
    assert_eq!(made, 0);
    std::os::unix::fs::symlink(&secret, at("link.png")).unwrap();
    std::os::unix::fs::symlink(outside.path(), at("folder")).unwrap();
    std::os::unix::fs::symlink("loop.png", at("loop.png")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", at("zero.png")).unwrap();
    std::fs::create_dir(at("directory.png")).unwrap();
    let roots = Roots::new([inside.path().to_owned()]);
    for (name, code) in [
        ("pipe.png", "invalid_parameter"),
        ("directory.png", "invalid_parameter"),
        ("missing.png", "invalid_parameter"),
        ("link.png", "path_not_allowed"),
        ("folder/secret.png", "path_not_allowed"),
        ("loop.png", "path_not_allowed"),
        ("zero.png", "path_not_allowed"),
        ("../secret.png", "path_not_allowed"),
        ("x/../../secret.png", "path_not_allowed"),
    ] {
        let source = ImageSource::Path(at(name));
        let error = refused(name, || source.read(&roots, "image")?.decode());
        assert_eq!(error.code(), code, "{name}: {error}");
    }
    for path in [secret.as_path(), Path::new("/dev/stdin"), Path::new("/proc/self/mem")] {
        let source = ImageSource::Path(path.to_owned());
        assert_eq!(refused("absolute", || source.read(&roots, "image")?.decode()).code(), "path_not_allowed");
    }
}

#[test]
fn thin_image_does_not_become_huge() {
    let thin = Rgb8 { width: 1, height: 65_535, data: vec![9; 3 * 65_535] };
    assert_eq!(thin.resized(8, 8, Filter::Lanczos).unwrap().data, vec![9; 192]);
    assert_eq!(refused("thin", || thin.resized(8192, 8192, Filter::Lanczos)).code(), "image_too_large");
    assert_eq!(refused("vast", || thin.resized(usize::MAX, 8, Filter::Lanczos)).code(), "image_too_large");
}

//! The choice of device and dtype, and the errors for unavailable ones.
#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use sdxl_worker::context::Context;
use sdxl_worker::device::instructor::{DeviceInstructor, Dtypes};
use sdxl_worker::device::interface::{
    CpuFeatures, DeviceId, DeviceList, DeviceRequest, Dtype, Quantization, Request, Response, Settings,
};
use sdxl_worker::device::manager::DeviceManager;
use sdxl_worker::error::{Error, Result};
use sdxl_worker::kernels::simd::SimdLevel;
use sdxl_worker::layers::{Instructor, Nothing};

fn instructor(device: &str) -> DeviceInstructor {
    DeviceInstructor::new(Settings { device: Some(device.to_owned()), ..Settings::default() })
}

fn ask(device: &str, request: Request) -> Result<Response> {
    instructor(device).instruct(request, &mut DeviceManager::default(), &Context::detached())
}

fn check_dtypes(id: DeviceId, capability: Option<(u32, u32)>, options: Option<Dtype>, compute: Dtype, vae: Dtype) {
    let chosen = Dtypes::choose(id, capability, options).unwrap();
    assert_eq!(chosen, Dtypes { compute, vae }, "{id} {capability:?} {options:?}");
}

#[test]
fn vae_never_computes_in_f16() {
    use Dtype::{Bf16, F16, F32};
    let cuda = DeviceId::Cuda(0);
    check_dtypes(DeviceId::Cpu, None, None, F32, F32);
    check_dtypes(DeviceId::Cpu, None, Some(Bf16), Bf16, Bf16);
    check_dtypes(DeviceId::Cpu, None, Some(F16), F16, F32);
    check_dtypes(cuda, Some((9, 0)), None, Bf16, Bf16);
    check_dtypes(cuda, Some((8, 0)), Some(F16), F16, Bf16);
    check_dtypes(cuda, Some((8, 6)), Some(F32), F32, F32);
    check_dtypes(cuda, Some((7, 5)), None, F16, F32);
    check_dtypes(DeviceId::Metal, None, None, F16, F32);
}

#[test]
fn bf16_on_an_old_gpu_is_refused() {
    let error = Dtypes::choose(DeviceId::Cuda(0), Some((7, 5)), Some(Dtype::Bf16)).unwrap_err();
    assert_eq!((error.code(), error.pointer().as_deref()), ("unsupported_feature", Some("/data/dtype")), "{error}");
}

#[test]
fn device_names_are_read() {
    let check = |text: &str, expected| assert_eq!(text.parse::<DeviceRequest>().unwrap(), expected, "{text}");
    check("auto", DeviceRequest::Auto);
    check("cpu", DeviceRequest::Exactly(DeviceId::Cpu));
    check("cuda", DeviceRequest::Exactly(DeviceId::Cuda(0)));
    check("cuda:3", DeviceRequest::Exactly(DeviceId::Cuda(3)));
    check("metal", DeviceRequest::Exactly(DeviceId::Metal));
    for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU "] {
        let error = text.parse::<DeviceRequest>().unwrap_err();
        assert!(matches!(error, Error::UnknownName { kind: "device", .. }), "{text}: {error}");
    }
}

#[test]
fn placement_on_the_cpu_follows_the_request_then_the_settings() {
    let mut resources = DeviceManager::default();
    let placed = instructor("cpu").place(&mut resources, None).unwrap();
    assert!(placed.device.is_cpu());
    assert_eq!((placed.name.as_str(), placed.compute, placed.vae), ("cpu", Dtype::F32, Dtype::F32));
    assert_eq!(instructor("cpu").place(&mut resources, Some(Dtype::Bf16)).unwrap().compute, Dtype::Bf16);

    let settings = Settings { auto_detect: false, dtype: Some(Dtype::F16), ..Settings::default() };
    let placed = DeviceInstructor::new(settings).place(&mut DeviceManager::default(), None).unwrap();
    assert_eq!((placed.name.as_str(), placed.compute, placed.vae), ("cpu", Dtype::F16, Dtype::F32));
}

#[test]
fn quantization_follows_the_request_then_the_settings() {
    use Quantization::{Int8, None as Without};
    let settings = Settings { device: Some("cpu".to_owned()), quantization: Int8, ..Settings::default() };
    let check = |instructor: DeviceInstructor, options, expected| {
        let placed = instructor.place(&mut DeviceManager::default(), None).unwrap().quantized(options).unwrap();
        assert_eq!((placed.quantization, instructor.quantization(options)), (expected, expected), "{options:?}");
    };
    check(instructor("cpu"), None, Without);
    check(instructor("cpu"), Some(Int8), Int8);
    check(DeviceInstructor::new(settings.clone()), None, Int8);
    check(DeviceInstructor::new(settings), Some(Without), Without);
}

#[test]
fn auto_detection_always_finds_a_device() {
    let mut resources = DeviceManager::default();
    let first = instructor("auto").place(&mut resources, None).unwrap().name;
    assert_eq!(instructor("auto").place(&mut resources, None).unwrap().name, first);
    assert_eq!(resources.opened().map(|open| open.id.to_string()), Some(first));
}

#[test]
fn absent_device_is_device_unavailable() {
    // No machine has a hundred GPUs; a build without CUDA has none.
    let error = instructor("cuda:99").place(&mut DeviceManager::default(), None).unwrap_err();
    assert_eq!(error.code(), "device_unavailable", "{error}");
    assert!(error.to_string().contains("cuda:99"), "{error}");
    if cfg!(not(feature = "cuda")) {
        assert!(error.hint().is_some_and(|hint| hint.contains("--features cuda")), "{:?}", error.hint());
    }
}

#[test]
fn every_instruction_set_has_a_setting() {
    for level in SimdLevel::ALL {
        let read: CpuFeatures = serde_json::from_value(level.name().into()).unwrap();
        assert_eq!(read.level(), Some(level));
    }
    assert_eq!(CpuFeatures::default().level(), None);
}

fn list(device: &str) -> DeviceList {
    match ask(device, Request::List(Nothing {})).unwrap() {
        Response::List(list) => list,
        other => panic!("{other:?}"),
    }
}

#[test]
fn device_list_names_every_kind_and_why_it_is_unavailable() {
    let devices = list("cpu").devices;
    for kind in ["cpu", "cuda", "metal"] {
        assert!(devices.iter().any(|device| device.name.starts_with(kind)), "{kind} in {devices:?}");
    }
    for device in &devices {
        assert_eq!(device.available, device.reason.is_none(), "{device:?}");
    }
    let chosen: Vec<_> = devices.iter().filter(|device| device.chosen).map(|device| device.name.as_str()).collect();
    assert_eq!(chosen, ["cpu"]);
    assert_eq!(list("auto").devices.iter().filter(|device| device.chosen).count(), 1);
}

#[test]
fn device_info_names_the_computing_device() {
    let Response::Info(info) = ask("cpu", Request::Info(Nothing {})).unwrap() else { panic!("not an info") };
    assert_eq!((info.name.as_str(), info.dtype, info.vae_dtype), ("cpu", Dtype::F32, Dtype::F32));
    assert_eq!(info.dtypes.len(), 3);
    assert!(info.cores >= 1);
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    assert_eq!(
        info.cpu.instruction_sets.iter().any(|set| set == "avx2"),
        std::is_x86_feature_detected!("avx2"),
        "{:?}",
        info.cpu
    );
}

#[cfg(target_os = "linux")]
#[test]
fn memory_report_is_plausible() {
    let Response::Memory(report) = ask("cpu", Request::Memory(Nothing {})).unwrap() else { panic!("not a memory") };
    let (total, available) = report.host.total.zip(report.host.available).unwrap();
    assert!(available <= total && total.0 > 1 << 27, "{report:?}");
    let (rss, peak) = report.process.rss.zip(report.process.peak_rss).unwrap();
    assert!(rss <= peak && rss.0 > 1 << 20 && peak < total, "{report:?}");
    assert_eq!(report.device, None);
}

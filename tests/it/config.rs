//! The configuration file: every documented key is read, and anything else is an error that names its path.

use sdxl_worker::device::interface::{CpuFeatures, Dtype};
use sdxl_worker::inference::interface::DecodeExtent;
use sdxl_worker::model::interface::EncoderPolicy;
use sdxl_worker::runtime::config::{Config, LogLevel, OnEof};
use sdxl_worker::units::{Allowance, Bytes};

fn parse(text: &str) -> Config {
    Config::parse(text, "test.json").unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn every_file_in_configs_parses() {
    let mut count = 0;
    for entry in std::fs::read_dir("configs").unwrap() {
        let path = entry.unwrap().path();
        Config::load(Some(&path)).unwrap_or_else(|error| panic!("{error}"));
        count += 1;
    }
    assert!(count >= 1);
}

#[test]
fn shipped_configuration_equals_the_defaults() {
    let shipped = Config::load(None).unwrap();
    let shipped = serde_json::to_value(shipped).unwrap();
    assert_eq!(shipped, serde_json::to_value(Config::default()).unwrap());
    assert_eq!(shipped, serde_json::to_value(parse("{}")).unwrap());
}

#[test]
fn every_documented_key_is_read() {
    let config = parse(
        r#"{"workers":{
            "main_interface":{"log_level":"DEBUG","max_line_bytes":4096,"queue_limit":3,"on_eof":"cancel","announce":true,"heartbeat_ms":500},
            "instructors":{
                "device":{"auto_detect":false,"device":"cuda:1","dtype":"bf16","cpu_features":"avx512-bf16","device_memory":"90%","host_memory":"16GB"},
                "model":{"cache_size":"2GiB","text_encoders":"release","mmap":false,"roots":["a","b"],"default":"m",
                    "hub":{"download":true,"endpoint":"https://hub.example","cache":"c","token_file":"t"}},
                "conditioning":{"cache_embeddings":false},
                "inference":{"batch_size":4,"decode":"strips"},
                "scheduler":{"default_scheduler":"euler"},
                "postprocessing":{"output_format":"webp","quality":55,"output_dir":"o","roots":["r"],"metadata":false}}}}"#,
    );
    let main = &config.workers.main_interface;
    assert_eq!((main.log_level, main.on_eof), (LogLevel::Debug, OnEof::Cancel));
    assert_eq!((main.max_line_bytes, main.queue_limit), (Bytes(4096), 3));
    assert_eq!((main.announce, main.heartbeat_ms), (true, 500));
    let all = &config.workers.instructors;
    assert!(!all.device.auto_detect);
    assert_eq!(all.device.device_memory, Allowance::Share(90));
    assert_eq!(all.device.host_memory, Allowance::Bytes(Bytes(16_000_000_000)));
    assert_eq!(all.device.cpu_features, CpuFeatures::Avx512Bf16);
    assert_eq!((all.device.device.as_deref(), all.device.dtype), (Some("cuda:1"), Some(Dtype::Bf16)));
    assert_eq!((all.model.cache_size, all.model.default.as_deref()), (Allowance::Bytes(Bytes(2 << 30)), Some("m")));
    assert_eq!(all.model.text_encoders, EncoderPolicy::Release);
    assert!(!all.model.mmap);
    assert_eq!(all.model.roots, ["a", "b"].map(std::path::PathBuf::from));
    let hub = &all.model.hub;
    assert_eq!((hub.download, hub.endpoint.as_deref()), (true, Some("https://hub.example")));
    assert_eq!((&hub.cache, &hub.token_file), (&Some("c".into()), &Some("t".into())));
    assert!(!all.conditioning.cache_embeddings);
    assert_eq!((all.inference.batch_size, all.inference.decode), (4, DecodeExtent::Strips));
    assert_eq!(all.scheduler.default_scheduler, "euler");
    let output = &all.postprocessing;
    assert_eq!((output.output_format.as_str(), output.quality, output.metadata), ("webp", 55, false));
    assert_eq!((output.output_dir.to_str(), output.roots.as_slice()), (Some("o"), &["r".into()][..]));
}

#[test]
fn sizes_are_numbers_or_text_with_a_unit() {
    let size = |json: &str| {
        parse(&format!(r#"{{"workers":{{"instructors":{{"model":{{"cache_size":{json}}}}}}}}}"#))
            .workers
            .instructors
            .model
            .cache_size
    };
    assert_eq!(size("\"1024MB\""), Allowance::Bytes(Bytes(1_024_000_000)));
    assert_eq!(size("\"60%\""), Allowance::Share(60));
    assert_eq!((size("null"), size("\"auto\"")), (Allowance::Auto, Allowance::Auto));
    assert_eq!(size("\"7 GiB\""), Allowance::Bytes(Bytes(7 << 30)));
    assert_eq!(size("12345"), Allowance::Bytes(Bytes(12345)));
}

/// The error's text must contain each of `parts`.
fn check_error(text: &str, parts: &[&str]) {
    let error = Config::parse(text, "test.json").expect_err(text).to_string();
    for part in parts {
        assert!(error.contains(part), "{text}\n gave: {error}\n without: {part}");
    }
}

#[test]
fn unknown_key_names_its_path_and_the_nearest_key() {
    check_error(
        r#"{"workers":{"instructors":{"device":{"auto_detct":true}}}}"#,
        &["test.json", "workers.instructors.device", "unknown field `auto_detct`", "did you mean `auto_detect`?"],
    );
    check_error(r#"{"wrokers":{}}"#, &["unknown field `wrokers`", "did you mean `workers`?"]);
    check_error(r#"{"workers":{"instructors":{"zebra":{}}}}"#, &["workers.instructors", "unknown field `zebra`"]);
    check_error(
        r#"{"workers":{"instructors":{"device":{"cpu_features":"protable"}}}}"#,
        &["cpu_features", "mean `portable`?"],
    );
    check_error(r#"{"workers":{"main_interface":{"log_level":"inf"}}}"#, &["log_level", "did you mean `info`?"]);
}

#[test]
fn duplicate_key_is_an_error() {
    check_error(r#"{"workers":{},"workers":{}}"#, &["duplicate field `workers`"]);
    check_error(
        r#"{"workers":{"instructors":{"inference":{"batch_size":1,"batch_size":2}}}}"#,
        &["workers.instructors.inference", "duplicate field `batch_size`"],
    );
}

#[test]
fn wrong_type_names_its_key() {
    let of = |section: &str| format!(r#"{{"workers":{{"instructors":{{{section}}}}}}}"#);
    check_error(&of(r#""device":{"auto_detect":"yes"}"#), &["workers.instructors.device.auto_detect", "boolean"]);
    check_error(&of(r#""inference":{"batch_size":-1}"#), &["workers.instructors.inference.batch_size"]);
    check_error(
        &of(r#""model":{"hub":{"endpoint":"hub.example"}}"#),
        &["workers.instructors.model.hub.endpoint", "https"],
    );
    check_error(&of(r#""model":{"cache_size":"lots"}"#), &["workers.instructors.model.cache_size", "`1024MB`"]);
    check_error(&of(r#""device":[]"#), &["`workers.instructors.device`: must be an object, got an array"]);
    check_error("[]", &["must be an object"]);
}

#[test]
fn out_of_range_value_names_its_key() {
    let of = |section: &str| format!(r#"{{"workers":{{"instructors":{{{section}}}}}}}"#);
    check_error(&of(r#""inference":{"batch_size":0}"#), &["workers.instructors.inference.batch_size", "at least 1"]);
    check_error(&of(r#""device":{"device":"cudda"}"#), &["workers.instructors.device.device", "did you mean `cuda`?"]);
    check_error(&of(r#""postprocessing":{"quality":0}"#), &["postprocessing", "`quality` must be from 1 to 100"]);
    check_error(&of(r#""postprocessing":{"output_format":"pngg"}"#), &["unknown output format `pngg`", "`png`?"]);
    check_error(r#"{"workers":{"main_interface":{"queue_limit":0}}}"#, &["workers.main_interface.queue_limit"]);
}

#[test]
fn configuration_must_be_one_json_object() {
    check_error("", &["test.json", "EOF"]);
    check_error("{} {}", &["trailing characters"]);
    check_error("{\"workers\":", &["line 1"]);
}

#[test]
fn named_configuration_file_must_exist() {
    let error = Config::load(Some(std::path::Path::new("configs/none.json"))).unwrap_err();
    assert!(error.to_string().contains("configs/none.json: cannot be read"), "{error}");
}

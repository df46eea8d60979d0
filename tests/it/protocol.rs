//! The wire protocol, tested against the real binary.

use serde_json::{Value, json};

use crate::wire::{Worker, code, control, long, schema, validator};

const HOSTILE: &[u8] = include_bytes!("../fixtures/hostile.ndjson");

/// The non-blank lines of the fixture.
fn hostile() -> Vec<&'static [u8]> {
    let lines = HOSTILE.split(|byte| *byte == b'\n');
    lines.filter(|line| !line.iter().all(u8::is_ascii_whitespace)).collect()
}

#[test]
fn every_hostile_line_gets_one_answer_with_its_code() {
    let mut worker = Worker::start(&["--max-line-bytes", "262144"]);
    let expected = hostile().len();
    assert!(expected >= 300, "{expected} lines");
    worker.send_bytes(HOSTILE);
    worker.send_bytes(b"\n");
    worker.send_bytes(&[b"{\"prompt\":\"", vec![b'a'; 300_000].as_slice(), b"\"}\n"].concat());
    worker.send(&control("alive", "ping", &json!({})));
    worker.close_stdin();
    let (lines, exit) = worker.rest();
    assert_eq!(exit, Some(0));
    assert_eq!(lines.len(), expected + 2, "{expected} lines of the fixture, one too long, one ping");
    let mut too_long = 0;
    for line in &lines {
        let id = line["request_id"].as_str().unwrap();
        if id == "alive" {
            assert_eq!(line["success"], true, "{line}");
            continue;
        }
        // The fixture's ids begin with the expected code.
        let wanted = id.rsplit_once('-').map_or("", |(wanted, _)| wanted);
        let got = code(line);
        assert!(wanted == got || ["auto", ""].contains(&wanted), "{line}");
        assert_ne!(got, "internal", "{line}");
        too_long += usize::from(got == "line_too_long");
    }
    assert_eq!(too_long, 1);
    let mut ids: Vec<&str> = lines.iter().filter_map(|line| line["request_id"].as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), lines.len(), "no id is answered twice");
}

/// The error that answers a line.
fn refusal(line: &str) -> Value {
    let mut worker = Worker::start(&[]);
    worker.send_bytes(line.as_bytes());
    worker.close_stdin();
    let (lines, exit) = worker.rest();
    assert_eq!((lines.len(), exit), (1, Some(0)), "{lines:?}");
    lines[0]["error"].clone()
}

fn check_refusal(line: &str, code: &str, pointer: &str, text: &str) {
    let error = refusal(line);
    assert_eq!((&error["code"], &error["pointer"]), (&json!(code), &json!(pointer)), "{error}");
    assert!(error.to_string().contains(text), "`{text}` is not in {error}");
}

#[test]
fn errors_point_at_the_field_and_suggest_the_nearest() {
    check_refusal(r#"{"prompt":"a","cfg_scal":1}"#, "invalid_parameter", "/cfg_scal", "did you mean `cfg_scale`?");
    check_refusal(
        r#"{"worker_type":"inference","operation":"generate","data":{"prompt":"a","stps":1}}"#,
        "invalid_parameter",
        "/data/stps",
        "did you mean `steps`?",
    );
    check_refusal(
        r#"{"prompt":"a","steps":2,"num_inference_steps":3}"#,
        "invalid_parameter",
        "/steps",
        "`steps` and `num_inference_steps` are two names of one field",
    );
    check_refusal(
        r#"{"worker_type":"inference","operation":"batch","data":{"requests":[{"prompt":"a"},{"prompt":"a","output":{"foramt":"png"}}]}}"#,
        "invalid_parameter",
        "/data/requests/1/output/foramt",
        "did you mean `format`?",
    );
    check_refusal(r#"{"prompt":"a","steps":"20"}"#, "invalid_parameter", "/steps", "must be an integer, got string");
    check_refusal(r#"{"prompt":"a","control_image":[]}"#, "invalid_parameter", "/control_image", "use `controlnet`");
    check_refusal(
        r#"{"prompt":"a","strict":false,"ip_adapter_image":1}"#,
        "invalid_parameter",
        "/ip_adapter_image",
        "use `ip_adapter`",
    );
    check_refusal(
        r#"{"worker_type":"inference","operation":"batch","data":{"requests":[{"prompt":"a","control_image":"a.png"}]}}"#,
        "invalid_parameter",
        "/data/requests/0/control_image",
        "use `controlnet`",
    );
    check_refusal(
        r#"{"worker_type":"inference","operation":"generat"}"#,
        "unknown_operation",
        "/operation",
        "did you mean `generate`?",
    );
    check_refusal(
        r#"{"worker_type":"infrence","operation":"generate"}"#,
        "unknown_operation",
        "/worker_type",
        "did you mean worker_type `inference`?",
    );
    check_refusal(r#"{"prompt":"a","steps":0}"#, "invalid_parameter", "/steps", "`steps`");
    check_refusal(r#"{"prompt":"a","quantization":"int4"}"#, "invalid_parameter", "/quantization", "`none`");
    check_refusal(r#"{"prompt":"a","sampler_name":"eular"}"#, "unknown_name", "/sampler_name", "did you mean `euler`?");
}

#[test]
fn one_piped_line_prints_one_line() {
    let mut worker = Worker::start(&[]);
    worker.send_bytes(br#"{"prompt":"A sunset","steps":1,"width":64,"height":64,"strict":false,"colour":"red"}"#);
    worker.close_stdin();
    let (lines, exit) = worker.rest();
    assert_eq!((lines.len(), exit), (1, Some(0)), "{lines:?}");
    let line = &lines[0];
    assert_eq!(line["request_id"], "auto-1", "{line}");
    assert_eq!(line["data"]["model"], "demo", "{line}");
    assert_eq!(line["warnings"][0]["pointer"], "/colour", "{line}");
    assert!(worker.folder.path().join(line["data"]["images"][0]["path"].as_str().unwrap()).exists(), "{line}");
    assert!(line["timings_ms"]["total"].is_u64() && line["timings_ms"]["denoise"].is_u64(), "{line}");
    assert!(line["engine"]["device"].is_string(), "{line}");
}

#[test]
fn result_reports_the_quantization() {
    let mut worker = Worker::start(&["--device", "cpu"]);
    for quantization in ["none", "int8"] {
        worker.send(&json!({ "request_id": quantization, "prompt": "a hill", "steps": 1, "width": 64, "height": 64,
            "quantization": quantization }));
        let line = worker.answer(quantization);
        assert_eq!(line["engine"]["quantization"], quantization, "{line}");
        assert_eq!(line["data"]["parameters"]["quantization"], quantization, "{line}");
    }
}

#[test]
fn running_request_is_cancelled_within_a_step_while_control_answers() {
    let mut worker = Worker::start(&[]);
    worker.send(&long("r"));
    worker.until(|line| line["event"] == "progress" && line["done"].as_u64() >= Some(1));
    assert_eq!(worker.ask("h", "health", &json!({}))["compute"], "busy");
    let status = worker.ask("s", "status", &json!({}));
    assert_eq!(status["running"][0]["request_id"], "r", "{status}");
    let done = status["running"][0]["done"].as_u64().unwrap();
    worker.send(&json!({ "request_id": "d", "worker_type": "scheduler", "operation": "list" }));
    assert_eq!(worker.answer("d")["success"], true);
    worker.send(&long("r"));
    assert_eq!(code(&worker.answer("r")), "duplicate_request_id");
    worker.send(&control("c", "cancel", &json!({ "request_id": "r" })));
    assert!(done >= 1, "{status}");
    assert_eq!(worker.answer("c")["data"]["found"], "running");
    let mut steps = 0;
    let end = loop {
        let line = worker.next().unwrap();
        if line["type"] != "event" {
            break line;
        }
        steps += usize::from(line["event"] == "progress");
    };
    // The step that ran at the cancellation, and one whose event was already on its way.
    assert!(steps <= 2, "{steps} steps after the cancellation");
    assert_eq!(code(&end), "cancelled");
    let found = worker.ask("c2", "cancel", &json!({ "request_id": "r" }));
    assert_eq!(found["found"], "finished");
    assert_eq!(worker.ask("c3", "cancel", &json!({ "request_id": "nobody" }))["found"], "unknown");
    worker.close_stdin();
    assert_eq!(worker.rest(), (vec![], Some(0)));
}

#[test]
fn queue_takes_its_limit_then_is_full_and_runs_by_priority() {
    let mut worker = Worker::start(&[]);
    worker.send(&long("first"));
    worker.until(|line| line["event"] == "started");
    for n in 0..64 {
        let priority = if n == 40 { 10 } else { 0 };
        worker.send(
            &json!({ "request_id": format!("q{n}"), "prompt": "a", "steps": 0, "priority": priority, "events": {} }),
        );
    }
    let last = worker.until(|line| line["request_id"] == "q63" && line["event"] == "accepted");
    assert_eq!(last["position"], 64, "{last}");
    worker.send(&json!({ "request_id": "over", "prompt": "a" }));
    let over = worker.answer("over");
    assert_eq!((code(&over), &over["error"]["retryable"]), ("queue_full", &json!(true)));
    let status = worker.ask("s", "status", &json!({}));
    let queue: Vec<&str> =
        status["queue"].as_array().unwrap().iter().filter_map(|w| w["request_id"].as_str()).collect();
    assert_eq!((queue.len(), queue[0], queue[1]), (64, "q40", "q0"));
    assert_eq!(worker.ask("c", "cancel", &json!({ "request_id": "q5" }))["found"], "queued");
    worker.send(&control("c1", "cancel", &json!({ "request_id": "first" })));
    worker.close_stdin();
    let (lines, exit) = worker.rest();
    assert_eq!(exit, Some(0));
    let ended: Vec<&str> =
        lines.iter().filter(|line| line["type"] == "error").filter_map(|line| line["request_id"].as_str()).collect();
    let mut expected = vec!["first".to_owned(), "q40".to_owned()];
    expected.extend((0..64).filter(|n| ![5, 40].contains(n)).map(|n| format!("q{n}")));
    assert_eq!(ended, expected, "priority first, then in order");
}

#[test]
fn deadline_of_a_queued_request_fires_without_the_lane() {
    let mut worker = Worker::start(&[]);
    worker.send(&long("r"));
    worker.send(&json!({ "request_id": "late", "prompt": "a", "timeout_ms": 20 }));
    let late = worker.answer("late");
    assert_eq!(code(&late), "deadline_exceeded");
    worker.send(&json!({ "request_id": "late2", "prompt": "a", "steps": 999, "priority": 5, "timeout_ms": 1 }));
    assert_eq!(code(&worker.answer("late2")), "deadline_exceeded");
    assert_eq!(worker.ask("c", "cancel_all", &json!({})), json!({ "queued": 0, "running": 1 }));
    worker.close_stdin();
    assert_eq!(worker.rest().1, Some(0));
}

#[test]
fn deadline_of_a_running_request_ends_it() {
    let mut worker = Worker::start(&[]);
    let mut request = long("r");
    request["timeout_ms"] = json!(1500);
    worker.send(&request);
    assert_eq!(code(&worker.answer("r")), "deadline_exceeded");
}

#[test]
fn idempotency_key_gives_one_answer_to_every_request() {
    let mut worker = Worker::start(&[]);
    let ask = |id: &str, steps: u32| {
        json!({ "request_id": id, "worker_type": "inference", "operation": "generate", "idempotency_key": "k",
                "data": { "prompt": "a", "steps": steps, "width": 64, "height": 64 } })
    };
    worker.send(&ask("a", 1));
    worker.send(&ask("b", 1));
    let (a, b) = (worker.answer("a"), worker.answer("b"));
    assert_eq!(a["success"], true, "{a}");
    assert_eq!(a["data"], b["data"], "the second attached to the first");
    worker.send(&ask("c", 1));
    assert_eq!(worker.answer("c")["data"], a["data"], "the third was remembered");
    worker.send(&ask("d", 2));
    assert_eq!(worker.answer("d")["error"]["pointer"], "/idempotency_key");
    assert_eq!(worker.ask("m", "metrics", &json!({}))["images"], 1);
}

#[test]
fn sequence_numbers_rise_by_one_and_nothing_follows_the_end() {
    let mut worker = Worker::start(&[]);
    worker.send(&json!({ "request_id": "r", "prompt": "a", "steps": 3, "width": 64, "height": 64,
                         "events": { "progress": true, "preview": { "every": 1, "max_side": 32 } } }));
    worker.close_stdin();
    let (lines, exit) = worker.rest();
    assert_eq!(exit, Some(0));
    let (end, events) = lines.split_last().unwrap();
    assert_eq!(end["type"], "result", "{end}");
    for (seq, event) in events.iter().enumerate() {
        assert_eq!(event["seq"], seq, "{event}");
    }
    let names: Vec<&str> = events.iter().filter_map(|event| event["event"].as_str()).collect();
    assert!(names.starts_with(&["accepted", "started"]), "{names:?}");
    for wanted in ["stage", "model_loading", "progress", "preview", "image"] {
        assert!(names.contains(&wanted), "{wanted} is not in {names:?}");
    }
}

#[test]
fn first_sigterm_returns_the_queue_and_second_cancels() {
    let mut worker = Worker::start(&[]);
    worker.send(&long("r"));
    worker.send(&long("waits"));
    worker.until(|line| line["request_id"] == "waits" && line["event"] == "accepted");
    worker.signal(libc::SIGTERM);
    assert_eq!(code(&worker.answer("waits")), "draining");
    worker.send(&long("new"));
    assert_eq!(code(&worker.answer("new")), "draining");
    assert_eq!(worker.ask("h", "health", &json!({}))["accepting"], false);
    worker.signal(libc::SIGTERM);
    assert_eq!(code(&worker.answer("r")), "cancelled");
    assert_eq!(worker.rest(), (vec![], Some(0)), "it ends by itself, stdin still open");
}

#[test]
fn third_signal_ends_at_once() {
    let mut worker = Worker::start(&[]);
    worker.send(&long("r"));
    worker.send(&long("waits"));
    worker.until(|line| line["request_id"] == "waits" && line["event"] == "accepted");
    // Equal pending signals merge, so each is sent after the previous one was handled.
    worker.signal(libc::SIGINT);
    worker.answer("waits");
    worker.signal(libc::SIGTERM);
    worker.signal(libc::SIGINT);
    let code = worker.exit_code();
    assert!(matches!(code, Some(0 | 130 | 143)), "{code:?}");
}

#[test]
fn sigterm_while_idle_exits_zero() {
    let mut worker = Worker::start(&["--announce"]);
    worker.until(|line| line["event"] == "ready");
    worker.signal(libc::SIGTERM);
    assert_eq!(worker.rest(), (vec![], Some(0)));
}

#[test]
fn end_of_input_finishes_or_cancels_accepted_requests() {
    let mut worker = Worker::start(&["--on-eof", "cancel"]);
    worker.send(&long("r"));
    worker.send(&long("waits"));
    worker.until(|line| line["event"] == "progress");
    worker.close_stdin();
    let (lines, exit) = worker.rest();
    let ends: Vec<&Value> = lines.iter().filter(|line| line["type"] != "event").collect();
    assert_eq!(exit, Some(0));
    assert_eq!(ends.len(), 2, "{ends:?}");
    assert!(ends.iter().all(|end| code(end) == "cancelled"), "{ends:?}");
}

#[test]
fn drain_refuses_new_work_and_shutdown_ends() {
    let mut worker = Worker::start(&[]);
    worker.send(&long("r"));
    worker.until(|line| line["event"] == "progress");
    assert_eq!(worker.ask("d", "drain", &json!({})), json!({ "draining": true, "in_flight": 1 }));
    worker.send(&json!({ "request_id": "new", "prompt": "a" }));
    assert_eq!(code(&worker.answer("new")), "draining");
    worker.send(&control("x", "shutdown", &json!({ "mode": "cancel" })));
    let (lines, exit) = worker.rest();
    assert_eq!(exit, Some(0));
    let ends: Vec<&Value> = lines.iter().filter(|line| line["type"] != "event").collect();
    assert_eq!(ends.len(), 2, "{ends:?}");
}

#[test]
fn closed_stdout_ends_the_process_idle_or_busy() {
    let mut idle = Worker::start_without_reader(&[]);
    assert_eq!(idle.exit_code(), Some(74));
    let mut busy = Worker::start_without_reader(&[]);
    // The pipe may break before the line is written, which is equivalent.
    let line = format!("{}\n", long("r"));
    busy.try_send(line.as_bytes());
    assert_eq!(busy.exit_code(), Some(74));
}

#[test]
fn stdout_carries_protocol_only_and_logs_go_to_stderr() {
    let mut worker = Worker::start(&["--log-level", "trace"]);
    worker.ask("l", "set_log_level", &json!({ "level": "debug" }));
    worker.send(&json!({ "request_id": "r", "prompt": "a", "steps": 1, "width": 64, "height": 64 }));
    worker.close_stdin();
    // `Worker` checks every line against the schema.
    let (lines, exit) = worker.rest();
    assert_eq!((lines.len(), exit), (1, Some(0)));
    assert!(!worker.stderr().is_empty());
}

#[test]
fn control_operations_answer_in_the_schema() {
    let mut worker = Worker::start(&[]);
    let hello = worker.ask("1", "hello", &json!({}));
    assert_eq!(hello["protocol"], "1.4", "{hello}");
    let capabilities = worker.ask("2", "capabilities", &json!({}));
    assert_eq!(
        capabilities["operations"]["inference"],
        json!(["generate", "text2image", "img2img", "inpaint", "controlnet", "lora", "batch"]),
        "{capabilities}"
    );
    assert!(capabilities["samplers"].as_array().unwrap().contains(&json!("ddim")), "{capabilities}");
    assert_eq!(&worker.ask("3", "schema", &json!({})), schema());
    for (id, operation) in ["ping", "health", "metrics", "status", "cancel_all"].iter().enumerate() {
        worker.ask(&format!("c{id}"), operation, &json!({}));
    }
    let estimate = worker.ask("e", "estimate", &json!({ "prompt": "a", "width": 64, "height": 64 }));
    assert!(estimate.is_object(), "{estimate}");
    assert_eq!(worker.ask("s", "shutdown", &json!({}))["in_flight"], 0);
    assert_eq!(worker.rest(), (vec![], Some(0)));
}

#[test]
fn schema_agrees_with_the_worker() {
    let requests = validator("RequestLine");
    let good = [
        json!({ "prompt": "a" }),
        json!({ "prompt": "a", "num_inference_steps": 2, "priority": 3, "events": { "progress": true } }),
        json!({ "worker_type": "inference", "operation": "generate", "data": { "prompt": "a", "guidance_scale": 2.0 } }),
        control("c", "cancel", &json!({ "request_id": "r" })),
        json!({ "worker_type": "device", "operation": "list" }),
    ];
    for line in good {
        assert!(requests.is_valid(&line), "{line}");
    }
    for line in hostile() {
        if let Ok(value) = serde_json::from_slice::<Value>(line)
            && let Some(("invalid_parameter", _)) = value["request_id"].as_str().and_then(|id| id.rsplit_once('-'))
        {
            // Validators do not check the range of `int64`; null stands for an absent key.
            let beyond = value["data"].is_null() || value.to_string().contains("9223372036854775808");
            assert!(beyond || !requests.is_valid(&value), "{value}");
        }
    }
}

#[test]
fn exit_codes_of_a_bad_start() {
    let check = |flags: &[&str], wanted: i32| {
        // stdin stays open: the worker exits by itself.
        let mut worker = Worker::start(flags);
        assert_eq!(worker.rest(), (vec![], Some(wanted)), "{flags:?}");
    };
    check(&["--no-such-flag"], 64);
    check(&["--config", "no-such-file.json"], 65);
    check(&["--queue-limit", "0"], 65);
    if !cfg!(feature = "cuda") {
        check(&["--device", "cuda"], 69);
    }
}

#[test]
fn missing_stdin_and_stdout_do_not_crash() {
    let program = env!("CARGO_BIN_EXE_sdxl-worker");
    for redirect in ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"] {
        let status = std::process::Command::new("sh")
            .args(["-c", &format!("'{program}' {redirect}")])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(matches!(status.code(), Some(0 | 74)), "{redirect}: {status}");
    }
}

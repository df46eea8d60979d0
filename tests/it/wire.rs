//! Drives the real binary over stdin and stdout.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use jsonschema::Validator;
use serde_json::{Value, json};

/// Long enough for a loaded machine; only a failing test waits this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The program with stdin and stdout piped, in its own temporary folder.
pub(crate) struct Worker {
    pub(crate) child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    stderr: Receiver<String>,
    pub(crate) folder: tempfile::TempDir,
}

impl Worker {
    pub(crate) fn start(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut child = command(folder.path()).args(flags).spawn().unwrap();
        let (give, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| give.send(line)));
        let (give, stderr) = channel();
        let mut pipe = child.stderr.take().unwrap();
        std::thread::spawn(move || {
            let mut text = Vec::new();
            pipe.read_to_end(&mut text).map(|_| give.send(String::from_utf8_lossy(&text).into_owned()))
        });
        let stdin = child.stdin.take();
        Self { child, stdin, lines, stderr, folder }
    }

    pub(crate) fn send(&mut self, line: &Value) {
        self.send_bytes(format!("{line}\n").as_bytes());
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(bytes).unwrap();
        stdin.flush().unwrap();
    }

    /// Sends bytes that the process may no longer read.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) {
        let _ = self.stdin.as_mut().unwrap().write_all(bytes);
    }

    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The next line of stdout, checked against the schema; `None` at its end.
    pub(crate) fn next(&self) -> Option<Value> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                let value: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("not JSON: {e}: {line}"));
                if let Err(error) = output_schema().validate(&value) {
                    panic!("{error} in {line}");
                }
                Some(value)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("no line within {PATIENCE:?}"),
        }
    }

    /// The next line for which `wanted` is true.
    pub(crate) fn until(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let line = self.next().expect("stdout ended before the line that was waited for");
            if wanted(&line) {
                return line;
            }
        }
    }

    /// The next terminal line of `id`.
    pub(crate) fn answer(&self, id: &str) -> Value {
        self.until(|line| line["request_id"] == id && line["type"] != "event")
    }

    /// Sends a control operation, and gives the `data` of its result.
    pub(crate) fn ask(&mut self, id: &str, operation: &str, data: &Value) -> Value {
        self.send(&control(id, operation, data));
        let answer = self.answer(id);
        assert_eq!(answer["success"], true, "{answer}");
        answer["data"].clone()
    }

    /// Every line to the end of stdout, and the exit code.
    pub(crate) fn rest(&mut self) -> (Vec<Value>, Option<i32>) {
        let lines = std::iter::from_fn(|| self.next()).collect();
        (lines, self.child.wait().unwrap().code())
    }

    pub(crate) fn stderr(&self) -> String {
        self.stderr.recv_timeout(PATIENCE).unwrap_or_default()
    }

    pub(crate) fn signal(&self, number: libc::c_int) {
        let status = Command::new("kill").arg(format!("-{number}")).arg(self.child.id().to_string()).status();
        assert!(status.unwrap().success());
    }

    /// Waits for the process, and gives its exit code.
    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    /// A worker whose stdout is closed after the answer to `hello`.
    pub(crate) fn start_without_reader(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut child = command(folder.path()).args(flags).spawn().unwrap();
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().unwrap();
        let (give, lines) = channel();
        let mut first = String::new();
        let mut stdout = BufReader::new(stdout);
        let mut worker = Self { child, stdin, lines, stderr: channel().1, folder };
        worker.send(&control("h", "hello", &json!({})));
        stdout.read_line(&mut first).unwrap();
        give.send(first).unwrap();
        worker
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // A failed test leaves no process behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sdxl-worker"));
    // Tests must not depend on this machine's hub cache or proxies.
    command.env("HF_HUB_CACHE", folder.join("no-hub"));
    for name in ["HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "HF_HOME"] {
        command.env_remove(name);
    }
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(name);
    }
    command.current_dir(folder).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(crate) fn control(id: &str, operation: &str, data: &Value) -> Value {
    json!({ "request_id": id, "worker_type": "communication", "operation": operation, "data": data })
}

/// A generation that would take minutes.
pub(crate) fn long(id: &str) -> Value {
    json!({ "request_id": id, "prompt": "a hill", "steps": 999, "width": 512, "height": 512, "events": { "progress": true } })
}

pub(crate) fn code(line: &Value) -> &str {
    line["error"]["code"].as_str().unwrap_or_else(|| panic!("no error: {line}"))
}

/// The whole printed schema.
pub(crate) fn schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        let output = Command::new(env!("CARGO_BIN_EXE_sdxl-worker")).arg("--print-schema").output().unwrap();
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).unwrap()
    })
}

fn output_schema() -> &'static Validator {
    static VALIDATOR: OnceLock<Validator> = OnceLock::new();
    VALIDATOR.get_or_init(|| validator("OutputLine"))
}

/// A validator for one definition of the schema.
pub(crate) fn validator(definition: &str) -> Validator {
    let mut schema = schema().clone();
    let root = schema.as_object_mut().unwrap();
    root.remove("anyOf");
    root.insert("$ref".to_owned(), json!(format!("#/$defs/{definition}")));
    jsonschema::validator_for(&schema).unwrap()
}

//! A generated corpus of hostile files, all given to one running worker: each must be a typed error within a second and
//! little memory, and must not change the images that the worker makes afterwards.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and prints its numbers")]

mod component_files;
mod folders;
mod gguf;
mod headers;
mod loras;
mod places;
mod single;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::conditioning::demo_folder;
use super::wire::Worker;

const SLOWEST: Duration = Duration::from_secs(1);
const MEMORY_KIB: u64 = 64 * 1024;
/// Files that the documentation promises.
const MINIMUM: usize = 1000;

/// Codes that blame the file or the request, not the worker.
const TYPED: [&str; 7] = [
    "model_corrupt",
    "model_unsupported",
    "unsafe_format",
    "path_not_allowed",
    "model_not_found",
    "invalid_parameter",
    "unsupported_feature",
];

/// A hostile file or folder, and the requests that name it.
pub(crate) struct Case {
    pub(crate) kind: &'static str,
    pub(crate) what: String,
    /// Sent in order, until one fails.
    requests: Vec<Value>,
    /// The codes that are accepted; any of [`TYPED`] if empty.
    codes: &'static [&'static str],
    /// A file that is truncated to this length after the first answer.
    cut: Option<(PathBuf, u64)>,
}

/// The files, in a temporary model root.
pub(crate) struct Corpus {
    root: tempfile::TempDir,
    /// A sound copy of the demonstration model, outside the root.
    sound: tempfile::TempDir,
    pub(crate) cases: Vec<Case>,
}

/// A folder with a copy of the demonstration model.
pub(crate) struct Model(PathBuf);

impl Model {
    /// Unlinks the file `name`, because unchanged files are hard links to the original, and gives its path.
    pub(crate) fn fresh(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        let _ = fs::remove_file(&path);
        path
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.fresh(name), bytes).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.0.join(name)).unwrap()
    }

    /// Sets the value at `pointer` in a JSON file.
    pub(crate) fn set(&self, name: &str, pointer: &str, value: Value) {
        let mut json: Value = serde_json::from_slice(&self.read(name)).unwrap();
        match json.pointer_mut(pointer) {
            Some(place) => *place = value,
            None => drop(json.as_object_mut().unwrap().insert(pointer[1..].to_owned(), value)),
        }
        self.write(name, json.to_string());
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

fn operation(worker: &str, operation: &str, data: &Value) -> Value {
    json!({ "worker_type": worker, "operation": operation, "data": data })
}

/// A request for a small image, overridden by `fields`.
fn generate(fields: &Value) -> Value {
    let mut data = json!({ "prompt": "a lake", "seed": 3, "steps": 1, "width": 64, "height": 64,
                           "output": { "return": "base64" } });
    data.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    operation("inference", "generate", &data)
}

impl Corpus {
    fn new() -> Self {
        let sound = tempfile::tempdir().unwrap();
        demo_folder(sound.path());
        Self { root: tempfile::tempdir().unwrap(), sound, cases: Vec::new() }
    }

    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    pub(crate) fn case(
        &mut self,
        kind: &'static str,
        what: &str,
        requests: Vec<Value>,
        codes: &'static [&'static str],
    ) {
        self.cases.push(Case { kind, what: what.to_owned(), requests, codes, cut: None });
    }

    /// A unique name for the next case's file.
    pub(crate) fn name(&self, kind: &str) -> String {
        format!("{kind}-{}", self.cases.len())
    }

    /// A case that inspects, loads and generates with a model.
    pub(crate) fn ask_model(&mut self, kind: &'static str, what: &str, name: &str, codes: &'static [&'static str]) {
        let options = json!({ "model": name });
        let requests =
            vec![operation("model", "inspect", &options), operation("model", "load", &options), generate(&options)];
        self.case(kind, what, requests, codes);
    }

    /// A copy of the demonstration model, modified by `change`.
    pub(crate) fn model(
        &mut self,
        kind: &'static str,
        what: &str,
        codes: &'static [&'static str],
        change: impl FnOnce(&Model),
    ) {
        let name = self.name("model");
        let folder = self.root().join(&name);
        link(self.sound.path(), &folder);
        change(&Model(folder));
        self.ask_model(kind, what, &name, codes);
    }

    /// Truncates the last case's file after its first request.
    pub(crate) fn cut(&mut self, path: PathBuf, length: u64) {
        self.cases.last_mut().unwrap().cut = Some((path, length));
    }

    /// One file, named in the request by `fields`.
    pub(crate) fn file(
        &mut self,
        kind: &'static str,
        what: &str,
        end: &str,
        bytes: impl AsRef<[u8]>,
        fields: impl Fn(&str) -> Value,
        codes: &'static [&'static str],
    ) {
        let name = format!("{}.{end}", self.name("file"));
        fs::write(self.root().join(&name), bytes).unwrap();
        self.case(kind, what, vec![generate(&fields(&name))], codes);
    }

    /// One file, requested as a model.
    pub(crate) fn checkpoint(&mut self, kind: &'static str, what: &str, bytes: &[u8], codes: &'static [&'static str]) {
        let name = format!("{}.safetensors", self.name("file"));
        fs::write(self.root().join(&name), bytes).unwrap();
        self.ask_model(kind, what, &name, codes);
    }

    /// As [`Self::file`], extended to `length` bytes as a sparse file.
    pub(crate) fn sparse(
        &mut self,
        (kind, what): (&'static str, &str),
        end: &str,
        bytes: &[u8],
        length: u64,
        fields: impl Fn(&str) -> Value,
        codes: &'static [&'static str],
    ) {
        let path = self.root().join(format!("{}.{end}", self.name("file")));
        self.file(kind, what, end, bytes, fields, codes);
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
    }
}

/// Copies a folder with hard links to its files.
fn link(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let own = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            link(&entry.path(), &own)
        } else {
            fs::hard_link(entry.path(), own).unwrap()
        }
    }
}

/// A valid safetensors file of f32 tensors, each filled with one value.
pub(crate) fn tensors<'a>(all: impl IntoIterator<Item = (&'a str, Vec<usize>, f32)>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    for (name, shape, value) in all {
        let from = data.len();
        (0..shape.iter().product::<usize>()).for_each(|_| data.extend(value.to_le_bytes()));
        header.insert(name.to_owned(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [from, data.len()] }));
    }
    let header = Value::from(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// A line of `/proc/PID/status`, in KiB.
fn status(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

struct Tried {
    code: String,
    message: String,
    time: Duration,
    /// Peak above what was resident before.
    memory_kib: u64,
}

struct Measured {
    worker: Worker,
    count: usize,
}

impl Measured {
    fn start(root: &Path) -> Self {
        let worker = Worker::start(&["--model-root", root.to_str().unwrap(), "--device", "cpu"]);
        let edges = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/steer/files/control_edges.png");
        fs::copy(edges, worker.folder.path().join("edges.png")).unwrap();
        Self { worker, count: 0 }
    }

    fn ask(&mut self, request: &Value) -> Value {
        self.count += 1;
        let id = format!("r{}", self.count);
        let mut line = request.clone();
        line["request_id"] = json!(id);
        self.worker.send(&line);
        self.worker.answer(&id)
    }

    fn unload(&mut self) {
        let answer = self.ask(&operation("model", "unload", &json!({})));
        assert_eq!(answer["success"], true, "{answer}");
    }

    /// Sends the requests until one fails; `None` if none does.
    fn try_case(&mut self, case: &Case) -> Option<Tried> {
        let pid = self.worker.child.id();
        // Resets the peak.
        fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
        let before = status(pid, "VmRSS");
        for (number, request) in case.requests.iter().enumerate() {
            if let (1, Some((path, length))) = (number, &case.cut) {
                fs::OpenOptions::new().write(true).open(path).unwrap().set_len(*length).unwrap();
            }
            let start = Instant::now();
            let answer = self.ask(request);
            let time = start.elapsed();
            if answer["success"] == false {
                let memory_kib = status(pid, "VmHWM").saturating_sub(before);
                let text = |field: &str| answer["error"][field].as_str().unwrap_or_default().to_owned();
                return Some(Tried { code: text("code"), message: text("message"), time, memory_kib });
            }
        }
        None
    }

    /// The bytes of an image of the embedded model.
    fn picture(&mut self) -> Value {
        let answer = self.ask(&generate(&json!({ "model": "demo", "steps": 2, "width": 128, "height": 128 })));
        assert_eq!(answer["success"], true, "{answer}");
        answer["data"]["images"][0]["base64"].clone()
    }
}

#[test]
fn hostile_files_are_typed_errors_within_time_and_memory() {
    let mut corpus = Corpus::new();
    headers::add(&mut corpus);
    folders::add(&mut corpus);
    component_files::add(&mut corpus);
    places::add(&mut corpus);
    loras::add(&mut corpus);
    single::add(&mut corpus);
    gguf::add(&mut corpus);
    assert!(corpus.cases.len() >= MINIMUM, "{} cases, {MINIMUM} are promised", corpus.cases.len());
    let mut worker = Measured::start(corpus.root());
    let picture = worker.picture();
    assert!(picture.as_str().is_some_and(|text| text.len() > 100), "{picture}");
    let resident = status(worker.worker.child.id(), "VmRSS");
    let mut highest = 0;
    let (mut wrong, mut kinds) = (Vec::new(), BTreeMap::<_, (usize, Duration, u64, BTreeMap<String, usize>)>::new());
    for case in &corpus.cases {
        let name = format!("{}: {}", case.kind, case.what);
        let Some(mut tried) = worker.try_case(case) else {
            wrong.push(format!("{name}: succeeded"));
            worker.unload();
            continue;
        };
        // Other load on the machine may delay one answer; a slow loader is slow every time.
        for _ in 0..2 {
            if tried.time > SLOWEST || tried.memory_kib > MEMORY_KIB {
                worker.unload();
                if let Some(again) = worker.try_case(case) {
                    tried.time = tried.time.min(again.time);
                    tried.memory_kib = tried.memory_kib.min(again.memory_kib);
                }
            }
        }
        let (time, memory) = (tried.time, tried.memory_kib);
        let known = if case.codes.is_empty() { &TYPED[..] } else { case.codes };
        if !known.contains(&tried.code.as_str()) {
            wrong.push(format!("{name}: must be one of {known:?}, is {}: {}", tried.code, tried.message));
        }
        if time > SLOWEST || memory > MEMORY_KIB {
            wrong.push(format!("{name}: {} after {time:?} and {memory} KiB", tried.code));
        }
        let kind = kinds.entry(case.kind).or_default();
        *kind = (kind.0 + 1, kind.1.max(time), kind.2.max(memory), std::mem::take(&mut kind.3));
        *kind.3.entry(tried.code).or_default() += 1;
        highest = highest.max(status(worker.worker.child.id(), "VmHWM"));
        worker.unload();
    }
    for (kind, (count, time, memory, codes)) in &kinds {
        println!("{kind:24} {count:4} files, at most {:4} ms and {:5} KiB: {codes:?}", time.as_millis(), memory);
    }
    println!(
        "{} files; {resident} KiB resident after an image, at most {highest} KiB during all of them",
        corpus.cases.len()
    );
    assert!(worker.picture() == picture, "the demonstration image changed");
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), corpus.cases.len(), wrong.join("\n"));
    worker.worker.close_stdin();
    assert_eq!(worker.worker.rest().1, Some(0));
}

//! Malformed GGUF files. <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use serde_json::json;

use super::Corpus;

const REFUSED: &[&str] = &["model_corrupt", "model_unsupported"];

/// The value and tensor types used here.
const TEXT: u32 = 8;
const ARRAY: u32 = 9;
const U32: u32 = 4;
const U64: u32 = 10;
const F32: u32 = 0;
const F16: u32 = 1;
const Q4_0: u32 = 2;
const Q8_0: u32 = 8;

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A key, its type and its bytes.
fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key)[..], &kind.to_le_bytes(), value].concat()
}

fn tensor(name: &str, sides: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let count = (sides.len() as u32).to_le_bytes();
    let sides: Vec<u8> = sides.iter().flat_map(|side| side.to_le_bytes()).collect();
    [&text(name)[..], &count, &sides, &kind.to_le_bytes(), &offset.to_le_bytes()].concat()
}

/// A whole file: its counts, entries and tensors, and so many bytes of data.
fn file(counts: [u64; 2], entries: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut all = [&b"GGUF"[..], &3_u32.to_le_bytes(), &counts[0].to_le_bytes(), &counts[1].to_le_bytes()].concat();
    all.extend(entries.concat());
    all.extend(tensors.concat());
    all.resize(all.len().next_multiple_of(32), 0);
    all.resize(all.len() + data, 7);
    all
}

fn all() -> Vec<(&'static str, Vec<u8>)> {
    let one = |tensor: Vec<u8>, data| file([1, 0], &[], &[tensor], data);
    let with_entry = |entry: Vec<u8>| file([0, 1], &[entry], &[], 0);
    let array = |kind: u32, count: u64, rest: &[u8]| [&kind.to_le_bytes()[..], &count.to_le_bytes(), rest].concat();
    let sound = || tensor("conv_in.weight", &[32, 2], F16, 0);
    let with = |entry: Vec<u8>| file([1, 1], &[entry], &[sound()], 128);
    let head = |version: u32| [&b"GGUF"[..], &version.to_le_bytes()].concat();
    let nested = (0..100_000).fold(Vec::new(), |mut bytes, _| {
        bytes.extend(array(ARRAY, 1, &[]));
        bytes
    });
    let mut same = [sound(), sound()];
    vec![
        ("empty", vec![]),
        ("the magic alone", b"GGUF".to_vec()),
        ("another magic", b"GGML".repeat(20)),
        ("the other byte order", b"FUGG".repeat(20)),
        ("no version", head(3)[..6].to_vec()),
        ("version 0", [head(0), vec![0; 64]].concat()),
        ("version 1", [head(1), vec![0; 64]].concat()),
        ("version 2^32 - 1", [head(u32::MAX), vec![0; 64]].concat()),
        ("no counts", head(3)),
        ("nothing", file([0, 0], &[], &[], 0)),
        ("2^64 - 1 tensors", file([u64::MAX, 0], &[], &[], 0)),
        ("2^60 tensors", file([1 << 60, 0], &[], &[sound()], 128)),
        ("2^32 tensors", file([1 << 32, 0], &[], &[sound()], 128)),
        ("2^64 - 1 entries", file([0, u64::MAX], &[], &[], 0)),
        ("2^40 entries", file([0, 1 << 40], &[], &[], 0)),
        ("a key of 2^60 bytes", with_entry([&(1_u64 << 60).to_le_bytes()[..], b"a"].concat())),
        ("a key of 2^64 - 1 bytes", with_entry([&u64::MAX.to_le_bytes()[..], b"a"].concat())),
        ("a text of 2^60 bytes", with_entry(entry("a", TEXT, &(1_u64 << 60).to_le_bytes()))),
        (
            "a key that is not UTF-8",
            with_entry([&2_u64.to_le_bytes()[..], b"\xff\xfe", &U32.to_le_bytes(), &[0; 4]].concat()),
        ),
        ("a value of kind 99", with_entry(entry("a", 99, &[0; 8]))),
        ("an array of 2^60 numbers", with_entry(entry("a", ARRAY, &array(U32, 1 << 60, &[])))),
        ("an array of 2^61 wide numbers", with_entry(entry("a", ARRAY, &array(U64, 1 << 61, &[])))),
        ("an array of 2^64 - 1 texts", with_entry(entry("a", ARRAY, &array(TEXT, u64::MAX, &[])))),
        ("an array of kind 77", with_entry(entry("a", ARRAY, &array(77, 4, &[0; 16])))),
        ("arrays in arrays", with_entry(entry("a", ARRAY, &nested))),
        ("alignment 0", with(entry("general.alignment", U32, &0_u32.to_le_bytes()))),
        ("alignment 3", with(entry("general.alignment", U32, &3_u32.to_le_bytes()))),
        ("alignment 2^31", with(entry("general.alignment", U32, &(1_u32 << 31).to_le_bytes()))),
        ("alignment of text", with(entry("general.alignment", TEXT, &text("32")))),
        ("of a language model", with(entry("general.architecture", TEXT, &text("llama")))),
        ("of Flux", with(entry("general.architecture", TEXT, &text("flux")))),
        ("a tensor without sides", one(tensor("conv_in.weight", &[], F16, 0), 64)),
        ("a tensor of 2^32 - 1 sides", { one([&text("a")[..], &u32::MAX.to_le_bytes(), &[1; 64]].concat(), 64) }),
        ("a tensor of nine sides", one(tensor("a", &[1; 9], F16, 0), 64)),
        ("a side of 0", one(tensor("conv_in.weight", &[0, 32], F16, 0), 64)),
        ("sides that overflow", one(tensor("conv_in.weight", &[1 << 40, 1 << 40], F16, 0), 64)),
        ("sides that overflow behind 0", one(tensor("conv_in.weight", &[0, u64::MAX, u64::MAX], F16, 0), 64)),
        ("2^40 numbers", one(tensor("conv_in.weight", &[1 << 20, 1 << 20], Q4_0, 0), 64)),
        ("a tensor of kind 99", one(tensor("conv_in.weight", &[32, 2], 99, 0), 128)),
        ("a tensor of a kind that was removed", one(tensor("conv_in.weight", &[32, 2], 4, 0), 128)),
        ("rows that end within a block", one(tensor("conv_in.weight", &[33, 2], Q8_0, 0), 256)),
        ("K rows that end within a block", one(tensor("conv_in.weight", &[32, 2], 12, 0), 256)),
        ("an offset beyond the end", one(tensor("conv_in.weight", &[32, 2], F16, 1 << 40), 128)),
        ("an offset of 2^64 - 1", one(tensor("conv_in.weight", &[32, 2], F16, u64::MAX), 128)),
        ("an offset that is not aligned", one(tensor("conv_in.weight", &[32, 2], F16, 7), 256)),
        ("data cut off", one(tensor("conv_in.weight", &[32, 2], F32, 0), 255)),
        ("data missing", one(tensor("conv_in.weight", &[32, 2], F32, 0), 0)),
        ("a tensor twice", file([2, 0], &[], &same, 256)),
        ("tensors that overlap", {
            same[1] = tensor("conv_out.weight", &[32, 2], F16, 32);
            file([2, 0], &[], &same, 256)
        }),
        ("a name of a megabyte", one(tensor(&"a".repeat(1 << 20), &[32, 2], F16, 0), 128)),
        ("names of a megabyte together", {
            let name = |i: u64| format!("{i}{}", "a".repeat(1 << 10));
            let all: Vec<_> = (0..1 << 10).map(|i| tensor(&name(i), &[], F32, 32 * i)).collect();
            file([1 << 10, 0], &[], &all, 32 << 10)
        }),
        ("2^17 properties", {
            let all: Vec<_> = (0..1 << 17).map(|i: u32| entry(&i.to_string(), U32, &[0; 4])).collect();
            file([0, 1 << 17], &all, &[], 0)
        }),
        ("no name", one(tensor("", &[32, 2], F16, 0), 128)),
        ("one sound tensor", one(sound(), 128)),
        ("a safetensors file", crate::model::headers::safetensors("{}", 0)),
    ]
}

pub(super) fn add(corpus: &mut Corpus) {
    let unet = |name: &str| json!({ "model": "demo", "unet": name });
    for (what, bytes) in all() {
        corpus.file("GGUF", what, "gguf", &bytes, unet, REFUSED);
        corpus.file("GGUF by another name", what, "safetensors", &bytes, unet, REFUSED);
    }
    let sparse = file([1, 0], &[], &[tensor("conv_in.weight", &[1 << 20, 1 << 19], F16, 0)], 0);
    corpus.sparse(("GGUF", "a terabyte of nothing"), "gguf", &sparse, sparse.len() as u64 + (1 << 40), unet, REFUSED);
}

//! Malformed safetensors files.

use std::fs;
use std::path::Path;

const TEXT_ENCODER: &str = "text_encoder/model.safetensors";

/// Descriptions and bytes.
pub(crate) fn all() -> Vec<(&'static str, Vec<u8>)> {
    let one = |entry: String, data| safetensors(&format!(r#"{{"a":{entry}}}"#), data);
    let two = |a: String, b: String, data| safetensors(&format!(r#"{{"a":{a},"b":{b}}}"#), data);
    let f16 = |from, to| tensor("F16", "[2]", from, to);
    let length = |n: u64, rest: &[u8]| [&n.to_le_bytes()[..], rest].concat();
    let whole = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo").join(TEXT_ENCODER)).unwrap();
    let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    let max = u64::MAX.to_string();
    vec![
        ("empty", vec![]),
        ("one byte", vec![1]),
        ("seven bytes", vec![0; 7]),
        ("eight zeros", vec![0; 8]),
        ("zeros", vec![0; 4096]),
        ("all ones", vec![255; 4096]),
        ("text", b"<!DOCTYPE html><html><body>404</body></html>".to_vec()),
        ("git lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n".to_vec()),
        ("pickle", b"\x80\x02}q\x00X\x05\x00\x00\x00modelq\x01.".to_vec()),
        ("zip", b"PK\x03\x04archive/data.pkl".to_vec()),
        ("header length max", length(u64::MAX, b"{}")),
        ("header length i64 max", length(i64::MAX as u64, b"{}")),
        ("header length one more", length(3, b"{}")),
        ("header length 16 MiB", length(16 << 20, b"{}")),
        ("header length beyond limit", length((16 << 20) + 1, b"{}")),
        ("header without brace", safetensors("[]", 0)),
        ("header with leading space", safetensors(" {}", 0)),
        ("header not JSON", safetensors("{nonsense}", 0)),
        ("header cut", safetensors(r#"{"a":{"dtype":"F16","#, 0)),
        ("header with trailing text", safetensors("{} {}", 0)),
        ("header with NUL", safetensors("{}\0\0", 0)),
        ("header not UTF-8", length(4, b"{\"\xff\"")),
        ("header deep", safetensors(&deep, 0)),
        ("entry not an object", one("5".into(), 0)),
        ("entry null", one("null".into(), 0)),
        ("entry without dtype", one(r#"{"shape":[2],"data_offsets":[0,4]}"#.into(), 4)),
        ("entry without shape", one(r#"{"dtype":"F16","data_offsets":[0,4]}"#.into(), 4)),
        ("entry without offsets", one(r#"{"dtype":"F16","shape":[2]}"#.into(), 4)),
        ("dtype unknown", one(tensor("F17", "[2]", 0, 4), 4)),
        ("dtype lower case", one(tensor("f16", "[2]", 0, 4), 4)),
        ("dtype a number", one(r#"{"dtype":16,"shape":[2],"data_offsets":[0,4]}"#.into(), 4)),
        ("shape negative", one(tensor("F16", "[-2]", 0, 4), 4)),
        ("shape a fraction", one(tensor("F16", "[2.5]", 0, 4), 4)),
        ("shape a float", one(tensor("F16", "[2e0]", 0, 4), 4)),
        ("shape overflows", one(tensor("F16", &format!("[{max},{max}]"), 0, 4), 4)),
        ("shape overflows behind zero", one(tensor("F16", &format!("[0,{max},{max}]"), 0, 0), 0)),
        ("shape beyond u64", one(tensor("F16", "[99999999999999999999]", 0, 4), 4)),
        ("shape of nine axes", one(tensor("F16", "[1,1,1,1,1,1,1,1,2]", 0, 4), 4)),
        ("shape smaller than data", one(tensor("F16", "[1]", 0, 4), 4)),
        ("shape larger than data", one(tensor("F16", "[3]", 0, 4), 4)),
        ("dtype wider than data", one(tensor("F32", "[2]", 0, 4), 4)),
        ("offsets backwards", one(f16(4, 0), 4)),
        ("offsets beyond the end", one(f16(0, 4), 3)),
        ("offsets far beyond", one(tensor("U8", "[18446744073709551615]", 0, u64::MAX), 4)),
        ("offsets start beyond", one(f16(u64::MAX - 3, u64::MAX), 4)),
        ("offsets negative", one(r#"{"dtype":"F16","shape":[2],"data_offsets":[-4,0]}"#.into(), 4)),
        ("offsets of three", one(r#"{"dtype":"F16","shape":[2],"data_offsets":[0,4,8]}"#.into(), 4)),
        ("offsets of one", one(r#"{"dtype":"F16","shape":[2],"data_offsets":[4]}"#.into(), 4)),
        ("tensors the same", two(f16(0, 4), f16(0, 4), 4)),
        ("tensors overlap", two(f16(0, 4), f16(2, 6), 6)),
        ("gap between", two(f16(0, 4), f16(6, 10), 10)),
        ("gap before", one(f16(4, 8), 8)),
        ("data after", one(f16(0, 4), 400)),
        ("data without tensors", safetensors("{}", 4)),
        ("name twice", safetensors(&format!(r#"{{"a":{},"a":{}}}"#, f16(0, 4), f16(4, 8)), 8)),
        ("metadata twice", safetensors(r#"{"__metadata__":{},"__metadata__":{}}"#, 0)),
        ("metadata a list", safetensors(r#"{"__metadata__":[1]}"#, 0)),
        ("cut by a byte", whole[..whole.len() - 1].to_vec()),
        ("cut in half", whole[..whole.len() / 2].to_vec()),
        ("cut in the header", whole[..1000].to_vec()),
        ("one byte more", [&whole[..], &[0]].concat()),
    ]
}

/// The code of each: a pickle is `unsafe_format` whatever its name.
pub(crate) fn codes(what: &str) -> &'static [&'static str] {
    if matches!(what, "pickle" | "zip") { &["unsafe_format"] } else { &["model_corrupt"] }
}

/// A safetensors file of a header and `data` bytes.
pub(crate) fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + data, 7);
    file
}

fn tensor(dtype: &str, shape: &str, from: u64, to: u64) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
}

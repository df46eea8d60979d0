//! Headers of GGUF files, validated before anything in them is used:
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! The format, in little endian: `GGUF`, version, counts of tensors and properties; the properties (name, type, value);
//! the tensors (name, sides, the fastest first, type, offset); then, on a multiple of the alignment, the data. Files of
//! ComfyUI-GGUF have the names of single files, and, for tensors that are stored as rows of 256 numbers, the original
//! shape as the property `comfy.gguf.orig_shape.NAME`.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::ops::Range;

use crate::kernels::Coding;
use crate::model::weights::dtype::StoredDtype;
use crate::model::weights::stored::{RANK_LIMIT, Stored};

/// The first bytes of every GGUF file.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// Longest header that is read, many times longer than SDXL's: its parsed form takes a few times its bytes.
const HEADER_LIMIT: u64 = 8 << 20;
/// Upper limit of tensors, and of properties.
const COUNT_LIMIT: u64 = 1 << 16;
/// Longest text that is kept.
const TEXT_LIMIT: u64 = 64 << 10;
/// Longest name.
const NAME_LIMIT: u64 = 1 << 10;
/// Prefixes of texts that are kept.
const KEPT_PREFIXES: [&str; 3] = ["general.architecture", "config.", "modelspec."];
/// The property with the original shape of a reshaped tensor.
const SHAPE: &str = "comfy.gguf.orig_shape.";

/// Types of tensors by their numbers. Types of blocks that are not here are not read.
const TYPES: [(u32, StoredDtype); 18] = [
    (0, StoredDtype::F32),
    (1, StoredDtype::F16),
    (2, StoredDtype::Coded(Coding::Q4_0)),
    (3, StoredDtype::Coded(Coding::Q4_1)),
    (6, StoredDtype::Coded(Coding::Q5_0)),
    (7, StoredDtype::Coded(Coding::Q5_1)),
    (8, StoredDtype::Coded(Coding::Q8_0)),
    (10, StoredDtype::Coded(Coding::Q2K)),
    (11, StoredDtype::Coded(Coding::Q3K)),
    (12, StoredDtype::Coded(Coding::Q4K)),
    (13, StoredDtype::Coded(Coding::Q5K)),
    (14, StoredDtype::Coded(Coding::Q6K)),
    (24, StoredDtype::Other("i8")),
    (25, StoredDtype::Other("i16")),
    (26, StoredDtype::Other("i32")),
    (27, StoredDtype::Other("i64")),
    (28, StoredDtype::F64),
    (30, StoredDtype::Bf16),
];

/// A header.
pub(crate) struct Gguf {
    /// In the order of the file.
    pub(crate) tensors: Vec<(String, Stored)>,
    /// Short texts among the properties.
    pub(crate) texts: BTreeMap<String, String>,
}

/// The reason why a file is not read. The message follows the file's name.
pub(crate) enum Refusal {
    Corrupt(String),
    Unsupported(String),
}

impl From<String> for Refusal {
    fn from(message: String) -> Self {
        Self::Corrupt(message)
    }
}

/// Reads and checks the header of a file of `length` bytes, from its first byte on.
pub(crate) fn header(file: &mut impl Read, length: u64) -> Result<Gguf, Refusal> {
    let mut from = GgufReader { file, read: 0, length };
    let start: [u8; 4] = from.array()?;
    let version = u32::from_le_bytes(from.array()?);
    if start != MAGIC || !(2..=3).contains(&version) {
        return Err(Refusal::Unsupported(format!("is GGUF of version {version}, and versions 2 and 3 are read")));
    }
    let (tensors, properties) = (from.count()?, from.count()?);
    if tensors > COUNT_LIMIT || properties > COUNT_LIMIT {
        let message = format!("has {tensors} tensors and {properties} properties, and {COUNT_LIMIT} are the most");
        return Err(message.into());
    }
    let mut described = Properties { texts: BTreeMap::new(), shapes: BTreeMap::new(), alignment: 32 };
    for _ in 0..properties {
        described.take(&mut from)?;
    }
    if let Some(other) = described.texts.get("general.architecture").filter(|name| *name != "sdxl") {
        return Err(Refusal::Unsupported(format!("is a GGUF of `{other}`, and this worker runs SDXL")));
    }
    let mut listed = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..tensors {
        let tensor = tensor(&mut from, &described)?;
        if !names.insert(tensor.0.clone()) {
            return Err(format!("has tensor `{}` twice", tensor.0).into());
        }
        listed.push(tensor);
    }
    let start = from.read.checked_next_multiple_of(described.alignment).filter(|start| *start <= length);
    let start = start.ok_or_else(|| format!("is cut off: its header ends at byte {} of {length}", from.read))?;
    Ok(Gguf { tensors: locate(listed, start, length)?, texts: described.texts })
}

/// Locates the tensors in the file, whose data begins at `start`.
fn locate(listed: Vec<(String, Stored)>, start: u64, end: u64) -> Result<Vec<(String, Stored)>, String> {
    let mut tensors = Vec::new();
    for (name, stored) in listed {
        let Range { start: from, end: to } = stored.range;
        if to > end - start {
            return Err(format!(
                "tensor `{name}` lies at bytes {from} to {to} of the data, which has {}; the file may be cut off",
                end - start
            ));
        }
        tensors.push((name, Stored { range: start + from..start + to, ..stored }));
    }
    tensors.sort_by_key(|(_, stored)| (stored.range.start, stored.range.end));
    for pair in tensors.windows(2) {
        if let [(_, before), (name, stored)] = pair
            && stored.range.start < before.range.end
        {
            return Err(format!("tensor `{name}` overlaps another one"));
        }
    }
    Ok(tensors)
}

/// One tensor; its range is within the data.
fn tensor(from: &mut GgufReader<impl Read>, properties: &Properties) -> Result<(String, Stored), Refusal> {
    let name = from.text(NAME_LIMIT)?.ok_or("has a tensor with too long a name".to_owned())?;
    let rank = u32::from_le_bytes(from.array()?) as usize;
    if rank > RANK_LIMIT {
        return Err(format!("tensor `{name}` must have at most {RANK_LIMIT} axes, and has {rank}").into());
    }
    let mut sides = Vec::new();
    for _ in 0..rank {
        sides.push(u64::from_le_bytes(from.array()?));
    }
    let number = u32::from_le_bytes(from.array()?);
    let offset = u64::from_le_bytes(from.array()?);
    let Some((_, dtype)) = TYPES.iter().find(|(known, _)| *known == number) else {
        let known = TYPES.iter().filter(|(_, dtype)| dtype.is_weight()).map(|(_, dtype)| dtype.name());
        let known = known.collect::<Vec<_>>().join(", ");
        return Err(Refusal::Unsupported(format!("has tensor `{name}` of type {number}, and these are read: {known}")));
    };
    let impossible = || format!("tensor `{name}` has the impossible shape {sides:?}");
    let product = |least: u64| sides.iter().try_fold(8_u64, |product, &side| product.checked_mul(side.max(least)));
    // Eight bytes for each number are more than any type takes. A zero side must not hide the others.
    let count = product(1).and_then(|_| product(0)).ok_or_else(impossible)? / 8;
    let row = sides.first().copied().unwrap_or(1);
    let (numbers, size) = match dtype {
        StoredDtype::F64 | StoredDtype::Other("i64") => (1, 8),
        StoredDtype::Other("i32") => (1, 4),
        StoredDtype::Other("i16") => (1, 2),
        StoredDtype::Other(_) => (1, 1),
        stored => stored.coding().map_or((1, 4), Coding::block),
    };
    if !row.is_multiple_of(numbers as u64) {
        return Err(
            format!("tensor `{name}` has rows of {row} numbers, and `{}` blocks of {numbers}", dtype.name()).into()
        );
    }
    if !offset.is_multiple_of(properties.alignment) {
        return Err(format!("tensor `{name}` lies at byte {offset}, no multiple of {}", properties.alignment).into());
    }
    let bytes = count / numbers as u64 * size as u64;
    let end = offset.checked_add(bytes).ok_or_else(impossible)?;
    let reversed: Vec<u64> = sides.iter().rev().copied().collect();
    let sides = match properties.shapes.get(&name) {
        Some(own) if own.iter().try_fold(1_u64, |product, &side| product.checked_mul(side)) == Some(count) => own,
        Some(own) => return Err(format!("tensor `{name}` has {count} numbers, and shall be of shape {own:?}").into()),
        None => &reversed,
    };
    let shape = sides.iter().map(|&side| usize::try_from(side)).collect::<Result<_, _>>();
    let shape = shape.map_err(|_| impossible())?;
    Ok((name, Stored { dtype: *dtype, shape, range: offset..end }))
}

/// The properties that matter.
struct Properties {
    texts: BTreeMap<String, String>,
    /// Shapes of tensors, the slowest side first.
    shapes: BTreeMap<String, Vec<u64>>,
    alignment: u64,
}

impl Properties {
    /// Reads one property.
    fn take(&mut self, from: &mut GgufReader<impl Read>) -> Result<(), String> {
        let name = from.text(NAME_LIMIT)?.ok_or("has a property with too long a name")?;
        let kind = u32::from_le_bytes(from.array()?);
        match kind {
            8 => {
                let is_kept = KEPT_PREFIXES.iter().any(|start| name.starts_with(start));
                if let Some(text) = from.text(if is_kept { TEXT_LIMIT } else { 0 })? {
                    self.texts.insert(name, text);
                }
            }
            9 => {
                let kind = u32::from_le_bytes(from.array()?);
                let count = from.count()?;
                let tensor = name.strip_prefix(SHAPE).filter(|_| count <= RANK_LIMIT as u64);
                let mut sides = Vec::new();
                for _ in 0..count {
                    match (kind, tensor) {
                        (8, _) => drop(from.text(0)?),
                        (4..=5 | 10..=11, Some(_)) => sides.push(from.whole(kind)?),
                        _ => {
                            // All of them at once.
                            let all = width(kind).and_then(|width| width.checked_mul(count));
                            from.skip(all.ok_or_else(|| format!("has property `{name}` of the unknown type {kind}"))?)?;
                            break;
                        }
                    }
                }
                if let Some(tensor) = tensor {
                    self.shapes.insert(tensor.to_owned(), sides);
                }
            }
            4 | 10 if name == "general.alignment" => {
                self.alignment = from.whole(kind)?;
                if !self.alignment.is_power_of_two() || self.alignment > 1 << 20 {
                    return Err(format!("has the impossible alignment {}", self.alignment));
                }
            }
            other => {
                from.skip(width(other).ok_or_else(|| format!("has property `{name}` of the unknown type {other}"))?)?
            }
        }
        Ok(())
    }
}

/// Bytes of a number or truth value.
fn width(kind: u32) -> Option<u64> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => return None,
    })
}

/// A file that is read from its beginning, up to the limit of a header.
struct GgufReader<'a, R> {
    file: &'a mut R,
    read: u64,
    length: u64,
}

impl<R: Read> GgufReader<'_, R> {
    /// Counts `bytes` that are about to be read.
    fn count_on(&mut self, bytes: u64) -> Result<(), String> {
        let end = self.read.checked_add(bytes).filter(|end| *end <= self.length);
        self.read = end.ok_or_else(|| format!("is cut off: its header goes on behind byte {}", self.length))?;
        if self.read > HEADER_LIMIT {
            return Err(format!("has a header of more than {HEADER_LIMIT} bytes"));
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.count_on(N as u64)?;
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
        Ok(bytes)
    }

    fn count(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// An unsigned number, or a signed one that is not negative.
    fn whole(&mut self, kind: u32) -> Result<u64, String> {
        let number = match kind {
            4 => Some(u32::from_le_bytes(self.array()?).into()),
            5 => u64::try_from(i32::from_le_bytes(self.array()?)).ok(),
            11 => u64::try_from(i64::from_le_bytes(self.array()?)).ok(),
            _ => Some(self.count()?),
        };
        number.ok_or_else(|| "has a side of less than nothing".to_owned())
    }

    /// A text; `None` for one of more than `most` bytes.
    fn text(&mut self, most: u64) -> Result<Option<String>, String> {
        let length = self.count()?;
        if length > most {
            self.skip(length)?;
            return Ok(None);
        }
        self.count_on(length)?;
        let mut bytes = Vec::new();
        self.file.take(length).read_to_end(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
        String::from_utf8(bytes).map(Some).map_err(|_| "has a text that is not UTF-8".to_owned())
    }

    fn skip(&mut self, bytes: u64) -> Result<(), String> {
        self.count_on(bytes)?;
        let copied = std::io::copy(&mut self.file.take(bytes), &mut std::io::sink());
        match copied {
            Ok(copied) if copied == bytes => Ok(()),
            Ok(_) => Err("is cut off".to_owned()),
            Err(e) => Err(format!("cannot be read: {e}")),
        }
    }
}

//! Headers of safetensors files, validated before anything in them is used.
//!
//! The format: 8 bytes little-endian length of the header, the header (JSON: name → dtype, shape, data_offsets), then
//! the data, which the tensors cover without gaps; <https://github.com/huggingface/safetensors#format>.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::model::weights::dtype::StoredDtype;
use crate::model::weights::stored::{RANK_LIMIT, Stored};
use crate::units::Bytes;

/// Longest header that is read, so that no file takes much memory before it is known. Those of whole SDXL models are
/// below 1 MB.
const HEADER_LIMIT: u64 = 16 * Bytes::MIB;

/// Reads and checks the header of a file of `length` bytes. The message of a failure follows the file's name.
pub(crate) fn header(file: &mut impl Read, length: u64) -> Result<Header<Stored>, String> {
    if length == 0 {
        return Err("is empty".to_owned());
    }
    if length < 8 {
        return Err(format!("is not a safetensors file: it must have at least 8 bytes, and has {length}"));
    }
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(|e| format!("cannot be read: {e}"))?;
    let header_length = u64::from_le_bytes(prefix);
    if header_length > HEADER_LIMIT {
        return Err(format!("is not a safetensors file: its header claims {header_length} bytes"));
    }
    if header_length > length - 8 {
        return Err(format!("is cut off: its header claims {header_length} bytes, and {} follow", length - 8));
    }
    let mut text = Vec::with_capacity(usize::try_from(header_length).unwrap_or_default());
    file.take(header_length).read_to_end(&mut text).map_err(|e| format!("cannot be read: {e}"))?;
    if text.len() as u64 != header_length || text.first() != Some(&b'{') {
        return Err("is not a safetensors file: its header must be a JSON object".to_owned());
    }
    let Header { entries, metadata } =
        serde_json::from_slice(&text).map_err(|e| format!("has a header that cannot be understood: {e}"))?;
    drop(text);
    Ok(Header { entries: locate(entries, 8 + header_length, length)?, metadata })
}

/// Locates the tensors, which must cover the data from `start` to `end` of the file without gap or overlap.
fn locate(entries: Vec<(String, HeaderEntry)>, start: u64, end: u64) -> Result<Vec<(String, Stored)>, String> {
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let (dtype, size) = StoredDtype::KNOWN
            .iter()
            .find(|(known, ..)| *known == entry.dtype)
            .map(|(_, dtype, size)| (*dtype, *size))
            .ok_or_else(|| format!("tensor `{name}` has the unknown dtype `{}`", entry.dtype))?;
        if entry.shape.len() > RANK_LIMIT {
            return Err(format!("tensor `{name}` must have at most {RANK_LIMIT} axes, and has {}", entry.shape.len()));
        }
        // A zero side must not hide sides whose product no number holds.
        let product =
            |least: u64| entry.shape.iter().try_fold(size, |product, &side| product.checked_mul(side.max(least)));
        let bytes = product(1)
            .and_then(|_| product(0))
            .ok_or_else(|| format!("tensor `{name}` has the impossible shape {:?}", entry.shape))?;
        let [from, to] = entry.data_offsets;
        if from > to || to > end - start {
            return Err(format!(
                "tensor `{name}` lies at bytes {from} to {to} of the data, which has {}; the file may be cut off",
                end - start
            ));
        }
        if to - from != bytes {
            return Err(format!(
                "tensor `{name}` of shape {:?} in {} takes {bytes} bytes, and has {}",
                entry.shape,
                dtype.name(),
                to - from
            ));
        }
        let shape = entry.shape.iter().map(|&side| usize::try_from(side)).collect::<Result<_, _>>();
        let shape = shape.map_err(|_| format!("tensor `{name}` has the impossible shape {:?}", entry.shape))?;
        tensors.push((name, Stored { dtype, shape, range: start + from..start + to }));
    }
    tensors.sort_by_key(|(_, stored)| (stored.range.start, stored.range.end));
    let mut covered = start;
    for (name, stored) in &tensors {
        if stored.range.start < covered {
            return Err(format!("tensor `{name}` overlaps another one"));
        }
        if stored.range.start > covered {
            return Err(format!(
                "has {} bytes before tensor `{name}` that belong to none",
                stored.range.start - covered
            ));
        }
        covered = stored.range.end;
    }
    if covered != end {
        return Err(format!("has {} bytes after its last tensor that belong to none", end - covered));
    }
    Ok(tensors)
}

/// The header's JSON: entries in the order of the file. A name that comes twice is refused.
pub(crate) struct Header<T> {
    pub(crate) entries: Vec<(String, T)>,
    pub(crate) metadata: BTreeMap<String, String>,
}

/// Longest text of the metadata that is kept: trainers write down every word of their captions.
const TEXT_LIMIT: usize = 64 << 10;
/// Key of diffusers' description of an adapter, which is kept whatever its length: it has numbers for every layer.
pub(crate) const ADAPTER: &str = "lora_adapter_metadata";

#[derive(Deserialize)]
#[serde(untagged)]
enum Metadata {
    Text(String),
    Other(IgnoredAny),
}

#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Header<HeaderEntry> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header<HeaderEntry>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut entries, mut metadata) = (Vec::new(), BTreeMap::new());
                let mut described = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut described, true) {
                            return Err(A::Error::custom("`__metadata__` comes twice"));
                        }
                        for (key, value) in map.next_value::<BTreeMap<String, Metadata>>()? {
                            match value {
                                Metadata::Text(text) if text.len() <= TEXT_LIMIT || key == ADAPTER => {
                                    drop(metadata.insert(key, text));
                                }
                                Metadata::Text(_) | Metadata::Other(_) => {}
                            }
                        }
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                let mut names: Vec<&str> =
                    entries.iter().map(|(name, _): &(String, HeaderEntry)| name.as_str()).collect();
                names.sort_unstable();
                if let Some([name, _]) = names.array_windows().find(|[one, next]| one == next) {
                    return Err(A::Error::custom(format!("`{name}` comes twice")));
                }
                Ok(Header { entries, metadata })
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

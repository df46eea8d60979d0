//! Opens the files of one network, safetensors or GGUF, as one set of tensors.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::allocator::{self, FromBits};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::model::catalog::files::ModelFile;
pub(crate) use crate::model::weights::dtype::StoredDtype;
use crate::model::weights::gguf;
pub(crate) use crate::model::weights::safetensors::ADAPTER;
use crate::model::weights::safetensors::{Header, header};
pub(crate) use crate::model::weights::stored::Stored;

/// The weights of one network: every tensor of its files, none of them read yet.
pub struct Weights {
    mmap: bool,
    shards: Vec<Arc<Shard>>,
    tensors: BTreeMap<String, (usize, Stored)>,
    /// The files' metadata without long texts.
    metadata: BTreeMap<String, String>,
}

struct Shard {
    path: PathBuf,
    source: ShardSource,
}

enum ShardSource {
    Disk(File),
    Embedded(&'static [u8]),
}

impl Weights {
    /// Tensors by name, in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Stored)> {
        self.tensors.iter().map(|(name, (_, stored))| (name.as_str(), stored))
    }

    /// One tensor and its file.
    pub(crate) fn tensor(&self, name: &str) -> Option<(usize, &Stored)> {
        self.tensors.get(name).map(|(shard, stored)| (*shard, stored))
    }

    /// A text of the files' `__metadata__`.
    pub(crate) fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The same tensors with other names; tensors for which `name` returns `None` are left out.
    ///
    /// # Errors
    /// `model_corrupt` where two tensors would have one name.
    pub(crate) fn renamed(&self, name: impl Fn(&str) -> Option<String>) -> Result<Self> {
        self.relaid(|old, stored| name(old).map(|new| (new, stored.clone())).into_iter().collect())
    }

    /// The tensors that `split` returns for each: itself with another name, or parts of it.
    ///
    /// # Errors
    /// `model_corrupt` where two tensors would have one name.
    pub(crate) fn relaid(&self, split: impl Fn(&str, &Stored) -> Vec<(String, Stored)>) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (old, (number, stored)) in &self.tensors {
            for (new, stored) in split(old, stored) {
                if tensors.contains_key(&new) {
                    let path = self.path(*number).to_owned();
                    let message = format!("has a second tensor `{new}`, which it calls `{old}`");
                    return Err(Error::ModelCorrupt { path, message });
                }
                tensors.insert(new, (*number, stored));
            }
        }
        Ok(Self { mmap: self.mmap, shards: self.shards.clone(), tensors, metadata: self.metadata.clone() })
    }

    /// True if there is a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The numbers of a small tensor of floats; `None` if there is no such tensor of at most `most` numbers.
    ///
    /// # Errors
    /// The errors of [`Self::read`].
    pub(crate) fn numbers(&self, name: &str, most: usize) -> Result<Option<Vec<f64>>> {
        let Some((shard, stored)) = self.tensors.get(name) else { return Ok(None) };
        let width = match stored.dtype {
            StoredDtype::F64 => 8,
            StoredDtype::F32 => 4,
            StoredDtype::F16 | StoredDtype::Bf16 => 2,
            StoredDtype::Coded(_) | StoredDtype::Other(_) => return Ok(None),
        };
        let bytes = usize::try_from(stored.range.end - stored.range.start).unwrap_or(usize::MAX);
        if bytes > most * width {
            return Ok(None);
        }
        let mut all = vec![0; bytes];
        self.read(*shard, stored.range.start, &mut all)?;
        let number = |bytes: &[u8]| match (stored.dtype, bytes) {
            (StoredDtype::F64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
            (StoredDtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).into(),
            (StoredDtype::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).into(),
            (_, &[a, b]) => half::bf16::from_le_bytes([a, b]).into(),
            _ => f64::NAN,
        };
        Ok(Some(all.chunks_exact(width).map(number).collect()))
    }

    /// The value of a tensor of one integer or boolean; `None` for any other tensor.
    ///
    /// # Errors
    /// The errors of [`Self::read`].
    pub(crate) fn whole_number(&self, name: &str) -> Result<Option<f64>> {
        let Some((shard, stored)) = self.tensors.get(name) else { return Ok(None) };
        let StoredDtype::Other(dtype) = stored.dtype else { return Ok(None) };
        let width = usize::try_from(stored.range.end - stored.range.start).unwrap_or(usize::MAX);
        if width > 8 || stored.shape.iter().any(|&side| side != 1) {
            return Ok(None);
        }
        let mut bytes = [0; 8];
        let Some(own) = bytes.get_mut(..width) else { return Ok(None) };
        self.read(*shard, stored.range.start, own)?;
        let unsigned = u64::from_le_bytes(bytes);
        // A narrower number's sign is moved to the highest bit and back.
        let unused = 64 - 8 * width as u32;
        Ok(Some(if dtype.starts_with('i') {
            ((unsigned << unused).cast_signed() >> unused) as f64
        } else {
            unsigned as f64
        }))
    }

    /// The tensors in the order of their files, each with its shard.
    pub(crate) fn in_file_order(&self) -> Vec<(&str, usize, &Stored)> {
        let mut all: Vec<_> =
            self.tensors.iter().map(|(name, (shard, stored))| (name.as_str(), *shard, stored)).collect();
        all.sort_by_key(|(_, shard, stored)| (*shard, stored.range.start));
        all
    }

    pub(crate) fn path(&self, shard: usize) -> &Path {
        self.shards.get(shard).map_or(Path::new(""), |shard| &shard.path)
    }

    /// Maps `count` numbers of a file from byte `offset` on; `None` if they must be read.
    pub(crate) fn map<T: FromBits>(&self, shard: usize, offset: u64, count: usize) -> Option<Vec<T>> {
        match &self.shards.get(shard)?.source {
            ShardSource::Disk(file) if self.mmap => allocator::map_file(file, offset, count),
            ShardSource::Disk(_) | ShardSource::Embedded(_) => None,
        }
    }

    /// True if a tensor that is kept as it is stored can be mapped by [`Self::map`].
    pub(crate) fn stays(&self, shard: usize, stored: &Stored) -> bool {
        let on_disk = self.shards.get(shard).is_some_and(|shard| matches!(shard.source, ShardSource::Disk(_)));
        let bytes = stored.range.end - stored.range.start;
        on_disk && self.mmap && cfg!(target_os = "linux") && bytes >= allocator::LARGE as u64
    }

    /// Makes the system read `mapped`, the mapping of a file from `offset` on.
    ///
    /// # Errors
    /// The errors of [`Self::read`].
    pub(crate) fn populate(&self, shard: usize, offset: u64, mapped: &[u8]) -> Result<()> {
        let shard = self.shards.get(shard).ok_or_else(|| Error::bug("a tensor names a file that was not opened"))?;
        allocator::populate(mapped).map_err(|e| shard.corrupt(format!("cannot be read at byte {offset}: {e}")))
    }

    /// Reads `into.len()` bytes of a file from `offset` on. Several threads may read at once.
    ///
    /// # Errors
    /// `model_corrupt` if they cannot be read, as when the file was cut off since it was opened.
    pub(crate) fn read(&self, shard: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        let shard = self.shards.get(shard).ok_or_else(|| Error::bug("a tensor names a file that was not opened"))?;
        match &shard.source {
            ShardSource::Embedded(bytes) => {
                let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)?.get(..into.len()));
                into.copy_from_slice(from.ok_or_else(|| Error::bug("a tensor lies outside its file"))?);
                Ok(())
            }
            ShardSource::Disk(file) => {
                read_at(file, offset, into).map_err(|e| shard.corrupt(format!("cannot be read at byte {offset}: {e}")))
            }
        }
    }
}

#[cfg(unix)]
fn read_at(file: &File, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, offset)
}

#[cfg(windows)]
fn read_at(file: &File, mut offset: u64, mut into: &mut [u8]) -> std::io::Result<()> {
    while !into.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, into, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => {
                offset += count as u64;
                into = into.get_mut(count..).unwrap_or_default();
            }
        }
    }
    Ok(())
}

impl Shard {
    fn corrupt(&self, message: impl Into<String>) -> Error {
        Error::ModelCorrupt { path: self.path.clone(), message: message.into() }
    }
}

/// Opens every file of one network as one set of tensors.
pub(crate) struct Open;

/// The files of one network, and its index of tensors to files, if it has one.
pub(crate) struct OpenTask<'a> {
    pub(crate) files: &'a [ModelFile],
    pub(crate) index: Option<&'a HashMap<String, String>>,
    /// True if tensors may be mapped.
    pub(crate) mmap: bool,
}

impl Worker<OpenTask<'_>> for Open {
    type Output = Weights;

    /// # Errors
    /// `model_corrupt` with the file at fault.
    fn run(&self, task: OpenTask, ctx: &Context) -> Result<Weights> {
        let mut weights =
            Weights { mmap: task.mmap, shards: Vec::new(), tensors: BTreeMap::new(), metadata: BTreeMap::new() };
        for (number, found) in task.files.iter().enumerate() {
            ctx.checkpoint()?;
            let (shard, Header { entries: tensors, metadata }) = open(found)?;
            weights.metadata.extend(metadata);
            for (name, stored) in tensors {
                if weights.tensors.contains_key(&name) {
                    return Err(
                        shard.corrupt(format!("has tensor `{name}`, which another file of the same model has too"))
                    );
                }
                weights.tensors.insert(name, (number, stored));
            }
            weights.shards.push(Arc::new(shard));
        }
        for (name, file) in task.index.into_iter().flatten() {
            let held = weights.tensors.get(name).and_then(|(shard, _)| weights.shards.get(*shard));
            if held.is_none_or(|shard| shard.path.file_name().is_none_or(|n| n != file.as_str())) {
                let path = task.files.first().map(|f| f.path().to_owned()).unwrap_or_default();
                let message = format!("the index places tensor `{name}` in `{file}`, which does not have it");
                return Err(Error::ModelCorrupt { path, message });
            }
        }
        Ok(weights)
    }
}

/// Reads the header of one file, to identify it.
///
/// # Errors
/// `model_corrupt`, `unsafe_format`.
pub(crate) fn look(found: &ModelFile) -> Result<Weights> {
    let (shard, Header { entries, metadata }) = open(found)?;
    let tensors = entries.into_iter().map(|(name, stored)| (name, (0, stored))).collect();
    Ok(Weights { mmap: false, shards: vec![Arc::new(shard)], tensors, metadata })
}

fn open(found: &ModelFile) -> Result<(Shard, Header<Stored>)> {
    match found {
        ModelFile::Embedded { path, bytes } => {
            let shard = Shard { path: path.clone(), source: ShardSource::Embedded(bytes) };
            let header = header(&mut &bytes[..], bytes.len() as u64).map_err(|message| shard.corrupt(message))?;
            Ok((shard, header))
        }
        ModelFile::Disk(path) => {
            let (mut file, length) = ModelFile::open(path)?;
            let mut start = [0; 4];
            if read_at(&file, 0, &mut start).is_ok() && start == gguf::MAGIC {
                let read = gguf::header(&mut std::io::BufReader::new(&file), length);
                let gguf::Gguf { tensors: entries, texts: metadata } = read.map_err(|refusal| match refusal {
                    gguf::Refusal::Corrupt(message) => Error::ModelCorrupt { path: path.clone(), message },
                    gguf::Refusal::Unsupported(message) => {
                        Error::ModelUnsupported { name: path.display().to_string(), message: format!("it {message}") }
                    }
                })?;
                return Ok((
                    Shard { path: path.clone(), source: ShardSource::Disk(file) },
                    Header { entries, metadata },
                ));
            }
            if is_pickle(&file) {
                return Err(Error::UnsafeFormat { path: path.clone() });
            }
            let header =
                header(&mut file, length).map_err(|message| Error::ModelCorrupt { path: path.clone(), message })?;
            Ok((Shard { path: path.clone(), source: ShardSource::Disk(file) }, header))
        }
    }
}

/// True if a file begins as a pickle of protocol 2 to 5, or as the zip archive in which torch keeps one, whatever its
/// name. The length of a safetensors header does not begin so: its upper half is zero.
pub(crate) fn is_pickle(file: &File) -> bool {
    let mut start = [0; 8];
    if read_at(file, 0, &mut start).is_err() {
        return false;
    }
    match start {
        [b'P', b'K', 3, 4, ..] => true,
        [0x80, 2..=5, _, _, rest @ ..] => rest != [0; 4],
        _ => false,
    }
}

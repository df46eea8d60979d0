//! Finds adapter files by what people call them: a path beneath a root, or the name of the file alone.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, nearest};
use crate::model::catalog::Catalog;
use crate::model::catalog::component_file::ComponentFile;

/// Folders in which adapters lie beside the models.
const FOLDERS: [&str; 3] = ["loras", "lora", "Lora"];
/// Entries that one look may see, and how far below a root it goes.
const ENTRIES: usize = 50_000;
const DEPTH: usize = 5;
const END: &str = "safetensors";

impl Catalog {
    /// The adapter file that `name` stands for. `field` is the part of the request in which the name stood.
    ///
    /// # Errors
    /// `model_not_found` with the nearest name, and for a name that several files have; those of [`Self::component_file`].
    pub fn lora(&self, name: &str, field: &str) -> Result<ComponentFile> {
        let called = |mut component_file: ComponentFile| {
            name.clone_into(&mut component_file.name);
            component_file
        };
        if let Some(found) = self.beneath(name, field)? {
            return Ok(found);
        }
        if !Path::new(name).is_absolute() {
            for folder in FOLDERS {
                if let Some(found) = self.beneath(&format!("{folder}/{name}"), field)? {
                    return Ok(called(found));
                }
            }
        }
        let files = self.files();
        let wanted = name.strip_suffix(".safetensors").unwrap_or(name);
        let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let mut same = files.iter().filter(|path| stem(path) == wanted);
        match (same.next(), same.next()) {
            (Some(path), None) => self.component_file(&path.to_string_lossy(), field).map(called),
            (Some(one), Some(other)) => {
                let hint = format!("`{}` and `{}` have this name: give a path", one.display(), other.display());
                Err(Error::ModelNotFound { name: name.to_owned(), hint: Some(hint) })
            }
            (None, _) => {
                // Nobody has it here: the name may be a repository's.
                let error = match self.component_file(name, field) {
                    Err(error @ Error::ModelNotFound { .. }) => error,
                    other => return other,
                };
                let stems: Vec<String> = files.iter().map(|path| stem(path)).collect();
                let own = wanted.rsplit('/').next().unwrap_or(wanted);
                match nearest(own, stems.iter().map(String::as_str)) {
                    Some(close) => {
                        let hint = format!("did you mean `{close}`?");
                        Err(Error::ModelNotFound { name: name.to_owned(), hint: Some(hint) })
                    }
                    None => Err(error),
                }
            }
        }
    }

    /// Files of weights beneath the roots that are no parts of models.
    fn files(&self) -> Vec<PathBuf> {
        let (mut found, mut seen) = (Vec::new(), 0);
        // A root may lie in another, and a link may lead to what was seen.
        let mut known = HashSet::new();
        let mut waiting: Vec<(PathBuf, usize)> = self.real_roots().into_iter().map(|root| (root, 0)).collect();
        while let Some((folder, depth)) = waiting.pop() {
            let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
            if folder.join("model_index.json").is_file() || !known.insert(real(&folder)) {
                continue;
            }
            for path in fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
                seen += 1;
                if seen > ENTRIES {
                    return found;
                }
                if path.is_dir() && depth < DEPTH {
                    waiting.push((path, depth + 1));
                } else if path.extension().is_some_and(|end| end == END) && known.insert(real(&path)) {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }
}

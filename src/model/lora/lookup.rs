//! Finds adapter files by a path under a root, or by the file name alone.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, nearest};
use crate::model::catalog::Catalog;
use crate::model::catalog::component_file::ComponentFile;

/// Usual folders of adapters under a root.
const FOLDERS: [&str; 3] = ["loras", "lora", "Lora"];
/// Limits on a search: entries, and levels below a root.
const ENTRIES: usize = 50_000;
const DEPTH: usize = 5;
const EXTENSION: &str = "safetensors";

impl Catalog {
    /// The adapter file called `name`. `field` is the request field, for messages.
    ///
    /// # Errors
    /// `model_not_found` with the nearest name, or if several files have the name; errors of [`Self::component_file`].
    pub fn lora(&self, name: &str, field: &str) -> Result<ComponentFile> {
        let with_name = |mut component_file: ComponentFile| {
            name.clone_into(&mut component_file.name);
            component_file
        };
        if let Some(found) = self.find_under_roots(name, field)? {
            return Ok(found);
        }
        if !Path::new(name).is_absolute() {
            for folder in FOLDERS {
                if let Some(found) = self.find_under_roots(&format!("{folder}/{name}"), field)? {
                    return Ok(with_name(found));
                }
            }
        }
        let files = self.lora_files();
        let wanted = name.strip_suffix(".safetensors").unwrap_or(name);
        let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let mut same = files.iter().filter(|path| stem(path) == wanted);
        match (same.next(), same.next()) {
            (Some(path), None) => self.component_file(&path.to_string_lossy(), field).map(with_name),
            (Some(one), Some(other)) => {
                let hint = format!("`{}` and `{}` have this name: give a path", one.display(), other.display());
                Err(Error::ModelNotFound { name: name.to_owned(), hint: Some(hint) })
            }
            (None, _) => {
                // No file has the name; it may be a repository.
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

    /// Weight files under the roots that are not part of a diffusers model.
    fn lora_files(&self) -> Vec<PathBuf> {
        let (mut found, mut seen) = (Vec::new(), 0);
        // Roots may be nested, and links may lead to visited folders.
        let mut visited = HashSet::new();
        let mut waiting: Vec<(PathBuf, usize)> = self.real_roots().into_iter().map(|root| (root, 0)).collect();
        while let Some((folder, depth)) = waiting.pop() {
            let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
            if folder.join("model_index.json").is_file() || !visited.insert(real(&folder)) {
                continue;
            }
            for path in fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
                seen += 1;
                if seen > ENTRIES {
                    return found;
                }
                if path.is_dir() && depth < DEPTH {
                    waiting.push((path, depth + 1));
                } else if path.extension().is_some_and(|end| end == EXTENSION) && visited.insert(real(&path)) {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }
}

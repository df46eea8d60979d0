//! Selects the files of a repository to download: those that the request names, or the files of a model.

use std::path::PathBuf;

use crate::error::{Error, Result, nearest};
use crate::model::checkpoint::files::VARIANTS;
use crate::model::checkpoint::part::Part;

/// Extensions of files that this worker reads.
const READABLE: [&str; 4] = ["safetensors", "gguf", "json", "txt"];
/// Extensions of files that can run code when they are loaded.
const PICKLES: [&str; 6] = ["bin", "ckpt", "pt", "pth", "pkl", "pickle"];
/// Folders of a diffusers model without weights.
const FOLDERS: [&str; 3] = ["tokenizer", "tokenizer_2", "scheduler"];
/// Stems of weight files in a repository of a single network.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];
/// Most names that a message lists.
const SHOWN: usize = 8;

/// The selected ones of `files`, sorted. Pickle files are never selected.
///
/// # Errors
/// `invalid_parameter` for names and patterns without a match, and if the choice is ambiguous; `unsafe_format` if there are
/// only pickle files; `model_unsupported` for other files that this worker cannot read.
pub(crate) fn select(repository: &str, files: &[String], wanted: &[String]) -> Result<Vec<String>> {
    let mut chosen = if wanted.is_empty() { default(repository, files)? } else { named(files, wanted)? };
    chosen.sort();
    chosen.dedup();
    Ok(chosen)
}

/// True if `name` is a weight file.
pub(crate) fn is_weights(name: &str) -> bool {
    matches!(ending(name).as_str(), "safetensors" | "gguf")
}

fn ending(name: &str) -> String {
    let own = name.rsplit('/').next().unwrap_or(name);
    own.rsplit_once('.').map(|(_, end)| end.to_lowercase()).unwrap_or_default()
}

fn is_readable(name: &str) -> bool {
    READABLE.contains(&ending(name).as_str())
}

fn is_pickle(name: &str) -> bool {
    PICKLES.contains(&ending(name).as_str())
}

/// Splits a path into folder and file name.
fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('/').unwrap_or(("", name))
}

fn named(files: &[String], wanted: &[String]) -> Result<Vec<String>> {
    let mut chosen = Vec::new();
    for pattern in wanted {
        if pattern.contains(['*', '?']) {
            let before = chosen.len();
            chosen.extend(files.iter().filter(|name| is_readable(name) && matches(pattern, name)).cloned());
            if chosen.len() == before {
                let message = format!("has `{pattern}`, which matches no file that this worker reads");
                return Err(Error::invalid("files", message));
            }
            continue;
        }
        let folder = network(files, pattern.trim_end_matches('/'));
        if !folder.is_empty() {
            chosen.extend(folder);
            continue;
        }
        if !files.contains(pattern) {
            let near = nearest(pattern, files.iter().map(String::as_str));
            return Err(Error::InvalidParameter {
                field: "files".to_owned(),
                message: format!("names `{pattern}`, which the repository does not have"),
                hint: near.map(|name| format!("did you mean `{name}`?")),
            });
        }
        if is_pickle(pattern) {
            return Err(Error::UnsafeFormat { path: PathBuf::from(pattern) });
        }
        if !is_readable(pattern) {
            let message = format!("this worker reads files that end in {}", READABLE.join(", "));
            return Err(Error::ModelUnsupported { name: pattern.clone(), message });
        }
        chosen.push(pattern.clone());
    }
    Ok(chosen)
}

/// The files that diffusers would load: of several number formats, the one without a variant in its name.
fn default(repository: &str, files: &[String]) -> Result<Vec<String>> {
    let has = |name: &str| files.iter().any(|known| known == name);
    if has("model_index.json") {
        let mut chosen = vec!["model_index.json".to_owned()];
        for part in Part::ALL {
            let dir = part.name();
            let own: Vec<&String> = files.iter().filter(|name| split(name).0 == dir).collect();
            let weights = weights(files, dir, part.stem());
            if weights.is_empty()
                && let Some(pickle) = own.iter().find(|name| is_pickle(name))
            {
                return Err(Error::UnsafeFormat { path: PathBuf::from(pickle) });
            }
            chosen.extend(weights);
            chosen.extend(own.iter().filter(|name| split(name).1 == "config.json").map(|name| (*name).clone()));
        }
        let small =
            |name: &&String| FOLDERS.contains(&split(name).0) && matches!(ending(name).as_str(), "json" | "txt");
        chosen.extend(files.iter().filter(small).cloned());
        return Ok(chosen);
    }
    let own = network(files, "");
    if !own.is_empty() {
        return Ok(own);
    }
    let config = files.iter().filter(|name| *name == "config.json").cloned();
    let single: Vec<&String> = files.iter().filter(|name| is_weights(name)).collect();
    match single.as_slice() {
        [only] => Ok(config.chain([(*only).clone()]).collect()),
        [] => Err(match files.iter().find(|name| is_pickle(name)) {
            Some(pickle) => Error::UnsafeFormat { path: PathBuf::from(pickle) },
            None => {
                let message = "it has no safetensors file".to_owned();
                Error::ModelUnsupported { name: repository.to_owned(), message }
            }
        }),
        many => {
            let shown: Vec<String> = many.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
            let more = if many.len() > SHOWN { ", …" } else { "" };
            let message = format!("must say which of {} are meant: {}{more}", many.len(), shown.join(", "));
            Err(Error::invalid("files", message))
        }
    }
}

/// The weights and configuration of the network in `dir`; empty if there is none.
fn network(files: &[String], dir: &str) -> Vec<String> {
    let own = STEMS.iter().map(|stem| weights(files, dir, stem)).find(|weights| !weights.is_empty());
    let config = files.iter().filter(|name| split(name) == (dir, "config.json")).cloned();
    own.map(|own| own.into_iter().chain(config).collect()).unwrap_or_default()
}

/// The weights of one network: one file, or an index with its shards.
fn weights(files: &[String], dir: &str, stem: &str) -> Vec<String> {
    let own: Vec<(&str, &String)> =
        files.iter().filter(|name| split(name).0 == dir).map(|name| (split(name).1, name)).collect();
    let find = |wanted: &str| own.iter().find(|(name, _)| *name == wanted).map(|(_, path)| (*path).clone());
    for variant in [""].into_iter().chain(VARIANTS) {
        let dotted = if variant.is_empty() { String::new() } else { format!(".{variant}") };
        if let Some(single) = find(&format!("{stem}{dotted}.safetensors")) {
            return vec![single];
        }
        if let Some(index) = find(&format!("{stem}.safetensors.index{dotted}.json")) {
            let forms = [format!("{stem}{dotted}-*-of-*.safetensors"), format!("{stem}-*-of-*{dotted}.safetensors")];
            let part = |name: &str| {
                let marked = VARIANTS.iter().any(|other| *other != variant && name.contains(&format!(".{other}")));
                !marked && forms.iter().any(|form| matches(form, name))
            };
            let parts = own.iter().filter(|(name, _)| part(name)).map(|(_, path)| (*path).clone());
            return [index].into_iter().chain(parts).collect();
        }
    }
    Vec::new()
}

/// True if `name` matches `pattern`: `*` stands for any characters including `/`, `?` for one.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut here) = (0, 0);
    // Position after the last star, and how much of the name the star has matched.
    let mut star: Option<(usize, usize)> = None;
    while here < name.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at, here));
                at += 1;
            }
            Some(c) if *c == '?' || name.get(here) == Some(c) => {
                at += 1;
                here += 1;
            }
            _ => match star {
                Some((after, matched)) => {
                    star = Some((after, matched + 1));
                    at = after + 1;
                    here = matched + 1;
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(at).all(|c| *c == '*')
}

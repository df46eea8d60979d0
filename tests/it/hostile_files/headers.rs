//! Malformed safetensors headers, given to every loader.

use serde_json::json;

use super::Corpus;
use crate::model::headers;

pub(super) fn add(corpus: &mut Corpus) {
    for (what, bytes) in headers::all() {
        let codes = headers::codes(what);
        corpus
            .model("header, text encoder", what, codes, |model| model.write("text_encoder/model.safetensors", &bytes));
        let control = |name: &str| json!({ "controlnet": [{ "model": name, "image": "edges.png" }] });
        corpus.file("header, ControlNet", what, "safetensors", &bytes, control, codes);
        let embedding = |name: &str| json!({ "prompt": "a zz lake", "embeddings": [{ "name": name, "token": "zz" }] });
        corpus.file("header, embedding", what, "safetensors", &bytes, embedding, codes);
    }
}

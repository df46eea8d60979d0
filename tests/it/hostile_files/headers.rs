//! Headers that lie, given to every loader that reads them.

use serde_json::json;

use super::Corpus;
use crate::model::headers;

pub(super) fn add(corpus: &mut Corpus) {
    for (what, bytes) in headers::all() {
        corpus.model("header, text encoder", what, &["model_corrupt"], |model| {
            model.write("text_encoder/model.safetensors", &bytes)
        });
        let control = |name: &str| json!({ "controlnet": [{ "model": name, "image": "edges.png" }] });
        corpus.file("header, ControlNet", what, "safetensors", &bytes, control, &["model_corrupt"]);
        let embedding = |name: &str| json!({ "prompt": "a zz lake", "embeddings": [{ "name": name, "token": "zz" }] });
        corpus.file("header, embedding", what, "safetensors", &bytes, embedding, &["model_corrupt"]);
    }
}

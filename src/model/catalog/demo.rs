//! The demonstration model and the CLIP vocabulary, embedded in the binary.

/// The name by which requests, results and configurations call it.
pub const NAME: &str = "demo";

/// Bytes at an address that any tensor's element fits, so that reading an embedded tensor copies it once.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        &[$(($name, {
            static FILE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!("../../../assets/demo/", $name)));
            &FILE.0
        })),*]
    };
}

/// Every file of the model by its path within the diffusers folder layout. The vocabulary serves both tokenizers, and
/// every checkpoint that brings none.
pub(crate) static FILES: &[(&str, &[u8])] = embedded![
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

/// One embedded file.
pub(crate) fn file(name: &str) -> Option<&'static [u8]> {
    FILES.iter().find(|(known, _)| *known == name).map(|(_, bytes)| *bytes)
}

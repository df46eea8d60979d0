//! Long-lived weights: one manager for each network, the shelves on which they are kept, and the budget of all shelves.

pub(crate) mod adapters;
pub(crate) mod budget;
pub(crate) mod cached_network;
pub(crate) mod controlnet;
pub(crate) mod encoder;
pub(crate) mod opened;
pub(crate) mod shelf;
pub(crate) mod tokenizer;
pub(crate) mod unet;
pub(crate) mod vae;

pub use adapters::{Adapter, AdapterManager, shapes};
pub use budget::{Budget, Reach};
pub use cached_network::CachedNetwork;
pub use controlnet::ControlNetManager;
pub use encoder::{ENCODERS, EncoderManager, TextEncoders};
pub use shelf::{Shelf, ShelfKey};
pub use tokenizer::{ClipTokenizer, Token, TokenizerManager, Tokenizers};
pub use unet::UnetManager;
pub use vae::{Vae, VaeManager};

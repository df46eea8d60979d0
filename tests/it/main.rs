//! Integration tests: behaviour at the boundaries, and goldens.

mod protocol;
mod wire;

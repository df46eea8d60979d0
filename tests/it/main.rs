//! Integration tests: behaviour at the boundaries, and goldens.

mod architecture;
mod parity;

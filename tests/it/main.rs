//! Integration tests: behaviour at the boundaries, and goldens.

mod architecture;
mod config;
mod device;
mod outputs;
mod parity;

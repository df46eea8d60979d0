//! Integration tests: behaviour at the boundaries, and goldens.

mod architecture;
mod conditioning;
mod config;
mod device;
mod model;
mod outputs;
mod parity;

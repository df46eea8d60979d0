//! Integration tests: behaviour at the boundaries, and goldens.

mod amx;
mod architecture;
mod conditioning;
mod config;
mod device;
mod kernels;
mod model;
mod networks;
mod noise;
mod outputs;
mod parity;
mod scheduler;
mod protocol;
mod tile_emulator;
mod wire;

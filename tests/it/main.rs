//! Integration tests: behaviour at the boundaries, and goldens.

mod alone;
mod architecture;
mod conditioning;
mod config;
mod device;
mod drawing;
mod guidance;
mod instruction_sets;
mod mapping;
mod memory;
mod model;
mod networks;
mod noise;
mod outputs;
mod parity;
mod scheduler;
mod protocol;
mod steer;
mod wire;

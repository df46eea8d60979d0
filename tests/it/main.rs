//! Integration tests: behaviour at the boundaries, and goldens.

mod architecture;
mod conditioning;
mod config;
mod demo_controlnet;
mod device;
mod drawing;
mod edits;
mod hints;
mod image_files;
mod instruction_sets;
mod mapping;
mod memory;
mod model;
mod networks;
mod noise;
mod outputs;
mod parity;
mod scheduler;
mod prompts;
mod protocol;
mod random_networks;
mod steer;
mod wire;

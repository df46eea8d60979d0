//! sdxl-worker: newline-delimited JSON in, SDXL images out.
//!
//! This page is the map; it is rewritten as the parts arrive.

pub mod units;
pub mod error;
pub mod context;
pub mod layers;
pub mod registry;
pub mod roots;
pub mod noise;
pub mod pixels;
pub mod image_source;
pub mod kernels;
pub mod device;
pub mod scheduler;
pub mod model;
pub mod conditioning;
pub mod postprocessing;
pub mod inference;
pub mod config;
pub mod managers;
pub mod instructors;
pub mod lane;
pub mod communication;

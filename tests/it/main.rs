//! The worker's tests, one binary.

mod kernels;

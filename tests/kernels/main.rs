//! Tests of the kernels, in a process of their own: they set the instruction-set level of the whole process.

mod amx;
mod int8;
mod parity;
mod stored_weights;
mod streaming_pack;
mod tile_emulator;

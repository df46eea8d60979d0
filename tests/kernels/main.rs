//! Tests of the kernels, in a process of their own: they choose the instruction set of the whole process.

mod amx;
mod int8;
mod stored;
mod tile_emulator;
mod unpacked;
mod whole;

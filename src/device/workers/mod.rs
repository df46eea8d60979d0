//! Probing devices and their memory.

//! RGB images and tensors.

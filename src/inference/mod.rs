//! Generation of images.

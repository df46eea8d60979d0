//! ControlNet preprocessors by name.

pub(crate) mod blur;
pub(crate) mod canny;
pub(crate) mod gaussian;
pub(crate) mod grayscale;
pub(crate) mod invert;
pub(crate) mod lineart;
pub(crate) mod none;
pub(crate) mod scharr;
pub(crate) mod threshold;
pub(crate) mod tile;

use crate::conditioning::preprocessor::Preprocessor;
use crate::registry::Registry;

pub static PREPROCESSORS: Registry<dyn Preprocessor> = Registry::new(
    "preprocessor",
    &[
        ("none", &none::None),
        ("canny", &canny::Canny),
        ("scharr", &scharr::Scharr),
        ("lineart", &lineart::Lineart),
        ("tile", &tile::Tile),
        ("blur", &blur::Blur),
        ("grayscale", &grayscale::Grayscale),
        ("threshold", &threshold::Threshold),
        ("invert", &invert::Invert),
    ],
);

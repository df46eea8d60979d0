//! Kinds of SDXL by what tells them apart in their files. Data: a network is configured by its own `config.json`.

mod sdxl_base;
mod sdxl_inpaint;
mod sdxl_refiner;

use crate::registry::Registry;

/// What a checkpoint of one kind looks like.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    pub name: &'static str,
    /// Values of `_class_name` in `model_index.json`.
    pub pipelines: &'static [&'static str],
    /// Whether it has the CLIP ViT-L encoder besides OpenCLIP's.
    pub first_encoder: bool,
    /// `in_channels` of its UNet.
    pub channels: usize,
}

pub static FAMILIES: Registry<Family> = Registry::new(
    "model family",
    &[
        ("sdxl_base", &sdxl_base::FAMILY),
        ("sdxl_refiner", &sdxl_refiner::FAMILY),
        ("sdxl_inpaint", &sdxl_inpaint::FAMILY),
    ],
);

impl Family {
    /// The family of a checkpoint with such parts.
    #[must_use]
    pub fn detect(first_encoder: bool, channels: usize) -> Option<&'static Self> {
        FAMILIES.iter().map(|(_, f)| f).find(|f| f.first_encoder == first_encoder && f.channels == channels)
    }

    /// Whether any family comes as the pipeline `class`.
    #[must_use]
    pub fn knows(class: &str) -> bool {
        FAMILIES.iter().any(|(_, family)| family.pipelines.contains(&class))
    }
}

//! SDXL model families, as data. Networks are configured by their `config.json` or tensor shapes, not by the family.

pub(crate) mod family;
pub(crate) mod koala_1b;
pub(crate) mod koala_700m;
pub(crate) mod sdxl_base;
pub(crate) mod sdxl_inpaint;
pub(crate) mod sdxl_instruct_pix2pix;
pub(crate) mod sdxl_refiner;
pub(crate) mod segmind_vega;
pub(crate) mod ssd_1b;
pub mod variants;

pub use family::Family;

use crate::registry::Registry;

pub static FAMILIES: Registry<Family> = Registry::new(
    "model family",
    &[
        ("ssd_1b", &ssd_1b::FAMILY),
        ("segmind_vega", &segmind_vega::FAMILY),
        ("koala_700m", &koala_700m::FAMILY),
        ("koala_1b", &koala_1b::FAMILY),
        ("sdxl_base", &sdxl_base::FAMILY),
        ("sdxl_refiner", &sdxl_refiner::FAMILY),
        ("sdxl_inpaint", &sdxl_inpaint::FAMILY),
        ("sdxl_instruct_pix2pix", &sdxl_instruct_pix2pix::FAMILY),
    ],
);

impl Family {
    /// The first family that matches; more specific families come first.
    #[must_use]
    pub fn detect(first_encoder: bool, channels: usize, depths: &[usize]) -> Option<&'static Self> {
        let fits = |family: &&Self| {
            family.first_encoder == first_encoder
                && family.channels == channels
                && family.depths.is_none_or(|own| own == depths)
        };
        FAMILIES.iter().map(|(_, family)| family).find(fits)
    }

    /// True if a family comes as the pipeline `class`.
    #[must_use]
    pub fn knows(class: &str) -> bool {
        FAMILIES.iter().any(|(_, family)| family.pipelines.contains(&class))
    }
}

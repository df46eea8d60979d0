//! Pastes a repainted image into the original, whose bytes stay the same where nothing is masked.

use crate::conditioning::init_image::Paste;
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Region, Rgb8};
use crate::image::resample::Filter;
use crate::layers::Worker;

pub struct PasteBack;

pub struct PasteTask<'a> {
    pub painted: &'a Rgb8,
    pub paste: &'a Paste,
}

impl Worker<PasteTask<'_>> for PasteBack {
    /// The original with the repainted part.
    type Output = Rgb8;

    fn run(&self, task: PasteTask<'_>, _ctx: &Context) -> Result<Rgb8> {
        let Paste { original, mask, region } = task.paste;
        let painted = uncovered(task.painted, *region)?;
        let mut pasted = original.clone();
        for (y, row) in painted.data.chunks_exact(3 * region.width).enumerate() {
            let start = (region.top + y) * original.width + region.left;
            let shares = mask.data.get(start..start + region.width).unwrap_or_default();
            let place = pasted.data.get_mut(3 * start..3 * (start + region.width)).unwrap_or_default();
            for ((under, over), share) in place.chunks_exact_mut(3).zip(row.chunks_exact(3)).zip(shares) {
                let share = u32::from(*share);
                for (under, over) in under.iter_mut().zip(over) {
                    let mixed = u32::from(*under) * (255 - share) + u32::from(*over) * share;
                    *under = ((mixed + 127) / 255) as u8;
                }
            }
        }
        Ok(pasted)
    }
}

/// An image, resized to a region. If the proportions differ, the region is the image's centre, as it was when the region
/// was resized to the image.
fn uncovered(painted: &Rgb8, region: Region) -> Result<Rgb8> {
    let Region { width, height, .. } = region;
    let (wide, high) = match width * painted.height < height * painted.width {
        true => (painted.width * height / painted.height, height),
        false => (width, painted.height * width / painted.width),
    };
    let (wide, high) = (wide.max(width), high.max(height));
    let inner = Region { left: wide / 2 - width / 2, top: high / 2 - height / 2, width, height };
    painted.resized(wide, high, Filter::Lanczos)?.part(inner)
}

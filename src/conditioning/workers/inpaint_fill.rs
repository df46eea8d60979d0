//! Fills the masked part with blurred surrounding colours, from wide blurs to narrow ones: AUTOMATIC1111's `fill`, with
//! Pillow's rounding, which is visible where opacity is low.

use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Gray8, Rgb8};
use crate::layers::Worker;

pub(crate) struct FillMasked;

pub(crate) struct FillMaskedTask<'a> {
    pub(crate) image: &'a Rgb8,
    /// The mask, of the image's size.
    pub(crate) mask: &'a Gray8,
}

/// Standard deviations of the blurs in pixels, and how many times each is composited.
const BLURS: [(u32, usize); 6] = [(256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)];

/// Red, green, blue and opacity.
type Rgba = [u8; 4];

impl Worker<FillMaskedTask<'_>> for FillMasked {
    type Output = Rgb8;

    fn run(&self, task: FillMaskedTask<'_>, ctx: &Context) -> Result<Rgb8> {
        let FillMaskedTask { image, mask } = task;
        let (width, height) = (image.width, image.height);
        // Premultiplied colours; masked pixels are transparent.
        let visible: Vec<Rgba> = (image.data.chunks_exact(3).zip(&mask.data))
            .map(|(colour, masked)| {
                let opacity = u32::from(255 - masked);
                let part = |value: u8| divided(u32::from(value) * opacity);
                [part(colour[0]), part(colour[1]), part(colour[2]), part(255)]
            })
            .collect();
        let mut filled: Vec<Rgba> = vec![[0; 4]; width * height];
        for (radius, times) in BLURS {
            ctx.checkpoint()?;
            let mut blurred = visible.clone();
            if radius > 0 {
                blur(&mut blurred, width, radius);
            }
            let over: Vec<Rgba> = blurred.into_iter().map(unpremultiplied).collect();
            for _ in 0..times {
                filled.iter_mut().zip(&over).for_each(|(under, over)| *under = composed(*under, *over));
            }
        }
        let data = filled.into_iter().flat_map(|[red, green, blue, _]| [red, green, blue]).collect();
        Ok(Rgb8 { width, height, data })
    }
}

/// The product of two bytes divided by 255, rounded.
fn divided(product: u32) -> u8 {
    let half = product + 128;
    (((half >> 8) + half) >> 8) as u8
}

/// Undoes premultiplication.
fn unpremultiplied([red, green, blue, opacity]: Rgba) -> Rgba {
    let whole = |value: u8| match opacity {
        0 | 255 => value,
        _ => (255 * u32::from(value) / u32::from(opacity)).min(255) as u8,
    };
    [whole(red), whole(green), whole(blue), opacity]
}

/// Composites one pixel over another in Pillow's 7-bit fixed point.
fn composed(under: Rgba, over: Rgba) -> Rgba {
    const BITS: u32 = 7;
    if over[3] == 0 {
        return under;
    }
    let shifted = |value: u32| ((value >> 8) + value) >> 8;
    let opacity = u32::from(over[3]) * 255 + u32::from(under[3]) * u32::from(255 - over[3]);
    let upper = ((u32::from(over[3]) * 255 * 255) << BITS) / opacity;
    let lower = (255 << BITS) - upper;
    let mixed = |channel: usize| {
        let sum = u32::from(over[channel]) * upper + u32::from(under[channel]) * lower;
        (shifted(sum + (0x80 << BITS)) >> BITS) as u8
    };
    [mixed(0), mixed(1), mixed(2), shifted(opacity + 0x80) as u8]
}

/// Pillow's Gaussian: three box blurs across and three down. A box covers a whole number of pixels to each side and a
/// fraction of the next (Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering");
/// the border is repeated.
fn blur(pixels: &mut [Rgba], width: usize, radius: u32) {
    let variance = (radius * radius) as f32 / 3.0;
    let length = f64::from(12.0 * variance + 1.0).sqrt() as f32;
    let whole = ((length - 1.0) / 2.0).floor();
    let share = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
        / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)));
    let reach = whole + share;
    let inner = ((1u32 << 24) as f32 / (reach * 2.0 + 1.0)) as u32;
    let outer = ((1 << 24) - (reach as u32 * 2 + 1) * inner) / 2;
    let boxed = BoxBlur { half: reach as isize, inner, outer };
    let height = pixels.len() / width.max(1);
    for y in 0..height {
        boxed.blur_line(pixels, y * width, 1, width);
    }
    for x in 0..width {
        boxed.blur_line(pixels, x, width, height);
    }
}

/// A box in 24-bit fixed point.
struct BoxBlur {
    half: isize,
    inner: u32,
    outer: u32,
}

impl BoxBlur {
    /// Blurs a line of `length` pixels three times; it starts at `start` with a distance of `stride`.
    fn blur_line(&self, pixels: &mut [Rgba], start: usize, stride: usize, length: usize) {
        for channel in 0..4 {
            let mut line: Vec<u8> =
                pixels.iter().skip(start).step_by(stride).take(length).map(|pixel| pixel[channel]).collect();
            for _ in 0..3 {
                line = self.blurred(&line);
            }
            for (pixel, value) in pixels.iter_mut().skip(start).step_by(stride).zip(line) {
                pixel[channel] = value;
            }
        }
    }

    fn blurred(&self, line: &[u8]) -> Vec<u8> {
        let last = line.len() as isize - 1;
        let at = |place: isize| u32::from(line[place.clamp(0, last) as usize]);
        let mut sum: u32 = (-self.half..=self.half).map(at).sum();
        (0..=last)
            .map(|place| {
                let ends = at(place - self.half - 1) + at(place + self.half + 1);
                let value = (sum * self.inner).wrapping_add(ends * self.outer).wrapping_add(1 << 23) >> 24;
                sum = sum + at(place + self.half + 1) - at(place - self.half);
                value as u8
            })
            .collect()
    }
}

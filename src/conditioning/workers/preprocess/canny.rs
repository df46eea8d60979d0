//! Edge detection: Canny 1986, <https://doi.org/10.1109/TPAMI.1986.4767851>, equal to OpenCV's `Canny` of an RGB image.
//!
//! The gradient is a 3×3 Sobel with repeated border, of the channel with the largest |dx| + |dy|. A pixel is kept if it is
//! the largest along its gradient, whose direction is rounded to eighths of a circle in 15-bit fixed point. Edges begin
//! above the high threshold and continue, over all eight neighbours, above the low one.

use crate::conditioning::preprocessor::{ParameterSpec, PreprocessTask, Preprocessor};
use crate::context::Context;
use crate::error::Result;
use crate::image::pixels::{Gray8, Rgb8};
use crate::layers::Worker;

pub(crate) struct Canny;

impl Preprocessor for Canny {
    fn parameters(&self) -> &'static [ParameterSpec] {
        // |dx| + |dy| is 2040 at most.
        &[
            ParameterSpec { name: "low_threshold", default: 100.0, min: 0.0, max: 2040.0 },
            ParameterSpec { name: "high_threshold", default: 200.0, min: 0.0, max: 2040.0 },
        ]
    }
}

const NO_EDGE: u8 = 0;
const WEAK: u8 = 1;
const EDGE: u8 = 255;

/// tan 22.5° in 15-bit fixed point.
const TAN: i32 = 13573;

/// One row of gradients, with an empty pixel at either end.
#[derive(Clone)]
struct Gradients {
    strength: Vec<i32>,
    dx: Vec<i32>,
    dy: Vec<i32>,
}

impl Worker<PreprocessTask<'_>> for Canny {
    type Output = Rgb8;

    fn run(&self, task: PreprocessTask<'_>, ctx: &Context) -> Result<Rgb8> {
        let Rgb8 { width, height, .. } = *task.image;
        let (low, high) = (task.parameters.low_threshold.floor(), task.parameters.high_threshold.floor());
        let (low, high) = (low.min(high) as i32, low.max(high) as i32);

        let empty = Gradients { strength: vec![0; width + 2], dx: vec![0; width + 2], dy: vec![0; width + 2] };
        let (mut above, mut own, mut below) = (empty.clone(), empty.clone(), empty.clone());
        gradients(task.image, 0, &mut own);
        let mut map = vec![NO_EDGE; width * height];
        let mut open = Vec::new();
        for y in 0..height {
            ctx.checkpoint()?;
            if y + 1 < height {
                gradients(task.image, y + 1, &mut below);
            } else {
                below.clone_from(&empty);
            }
            for x in 0..width {
                let strength = own.strength[x + 1];
                if strength > low && largest(&above, &own, &below, x + 1) {
                    map[y * width + x] = WEAK;
                    if strength > high {
                        map[y * width + x] = EDGE;
                        open.push(y * width + x);
                    }
                }
            }
            std::mem::swap(&mut above, &mut own);
            std::mem::swap(&mut own, &mut below);
        }

        let mut seen = 0usize;
        while let Some(at) = open.pop() {
            let (x, y) = (at % width, at / width);
            seen += 1;
            if seen.is_multiple_of(1 << 16) {
                ctx.checkpoint()?;
            }
            for near_y in y.saturating_sub(1)..(y + 2).min(height) {
                for near_x in x.saturating_sub(1)..(x + 2).min(width) {
                    let near = &mut map[near_y * width + near_x];
                    if *near == WEAK {
                        *near = EDGE;
                        open.push(near_y * width + near_x);
                    }
                }
            }
        }
        map.iter_mut().filter(|value| **value == WEAK).for_each(|value| *value = NO_EDGE);
        Ok(Gray8 { width, height, data: map }.to_rgb())
    }
}

/// The gradients of row `y`, written to positions 1 to width.
fn gradients(image: &Rgb8, y: usize, out: &mut Gradients) {
    let (width, stride) = (image.width, 3 * image.width);
    let row = |y: usize| &image.data[y * stride..][..stride];
    let (above, own, below) = (row(y.saturating_sub(1)), row(y), row((y + 1).min(image.height - 1)));
    for x in 0..width {
        let (left, right) = (3 * x.saturating_sub(1), 3 * (x + 1).min(width - 1));
        let mut best = (-1, 0, 0);
        for channel in 0..3 {
            let at = |row: &[u8], x: usize| i32::from(row[x + channel]);
            let across = |row: &[u8]| at(row, right) - at(row, left);
            let down = |x: usize| at(below, x) - at(above, x);
            let dx = across(above) + 2 * across(own) + across(below);
            let dy = down(left) + 2 * down(3 * x) + down(right);
            let strength = dx.abs() + dy.abs();
            if strength > best.0 {
                best = (strength, dx, dy);
            }
        }
        (out.strength[x + 1], out.dx[x + 1], out.dy[x + 1]) = best;
    }
}

/// True if position `x` is the largest along its gradient. Of equal neighbours in a row or column, the first counts.
fn largest(above: &Gradients, own: &Gradients, below: &Gradients, x: usize) -> bool {
    let (dx, dy, strength) = (own.dx[x], own.dy[x], own.strength[x]);
    let (wide, high) = (dx.abs(), dy.abs() << 15);
    let flat = wide * TAN;
    // tan 67.5° is tan 22.5° + 2.
    let steep = flat + (wide << 16);
    if high < flat {
        strength > own.strength[x - 1] && strength >= own.strength[x + 1]
    } else if high > steep {
        strength > above.strength[x] && strength >= below.strength[x]
    } else if (dx ^ dy) < 0 {
        strength > above.strength[x + 1] && strength > below.strength[x - 1]
    } else {
        strength > above.strength[x - 1] && strength > below.strength[x + 1]
    }
}

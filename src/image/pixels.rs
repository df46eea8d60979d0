//! RGB images of bytes ⇄ tensors: the only place where `[0, 255]`, `[0, 1]` and `[-1, 1]` are converted.
//!
//! Legend: `B` batch, `H` `W` rows and columns.

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result, StageContext};
use crate::image::resample::{self, Filter};

/// An RGB image, one byte a channel, rows from the top, no padding: `data` holds `height · width · 3` bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb8 {
    pub width: usize,
    pub height: usize,
    pub data: Vec<u8>,
}

/// One byte a pixel, rows from the top: a mask in which 255 is 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gray8 {
    pub width: usize,
    pub height: usize,
    pub data: Vec<u8>,
}

/// A region of an image, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub left: usize,
    pub top: usize,
    pub width: usize,
    pub height: usize,
}

impl Rgb8 {
    /// The images of a decoder's output `[B, H, W, 3]` in `[-1, 1]`, any float dtype, any device.
    ///
    /// Rounds as diffusers' image processor does in f32: `x/2 + 0.5` clamped to `[0, 1]`, times 255, halves to even.
    /// A bf16 tensor is widened first, so that the halving adds no rounding of its own.
    ///
    /// # Errors
    /// `numerical_error` if a value is not finite; a shape other than `[B, H, W, 3]`; the device's own.
    pub fn from_tensor(decoded: &Tensor) -> Result<Vec<Self>> {
        let (batch, height, width, channels) = decoded.dims4().stage("pixels")?;
        if channels != 3 {
            return Err(Error::bug(format!("an image has 3 channels, got {channels}")));
        }
        (0..batch)
            .map(|index| {
                let values = decoded
                    .get(index)
                    .and_then(|image| image.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>())
                    .stage("pixels")?;
                let data = values.into_iter().map(byte).collect::<Option<Vec<u8>>>().ok_or_else(not_finite)?;
                Ok(Self { width, height, data })
            })
            .collect()
    }

    /// The image as `[1, H, W, 3]`, f32 in `[-1, 1]`: `2 · (byte / 255) - 1`.
    ///
    /// # Errors
    /// `data` of another length than the size says; the device's own.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        let values: Vec<f32> = self.data.iter().map(|&value| 2.0 * (f32::from(value) / 255.0) - 1.0).collect();
        Tensor::from_vec(values, (1, self.height, self.width, 3), device).stage("pixels")
    }

    /// The image as `[1, H, W, 3]`, f32 in `[0, 1]`: `byte / 255`, as ControlNets take hints.
    ///
    /// # Errors
    /// `data` of another length than the size says; the device's own.
    pub fn to_unit_tensor(&self, device: &Device) -> Result<Tensor> {
        let values: Vec<f32> = self.data.iter().map(|&value| f32::from(value) / 255.0).collect();
        Tensor::from_vec(values, (1, self.height, self.width, 3), device).stage("pixels")
    }

    /// The image at another size.
    ///
    /// # Errors
    /// Those of [`resample::resize`].
    pub fn resized(&self, width: usize, height: usize, filter: Filter) -> Result<Self> {
        let data = resample::resize(&self.data, 3, (self.width, self.height), (width, height), filter)?;
        Ok(Self { width, height, data })
    }

    /// A region of the image.
    ///
    /// # Errors
    /// `internal` if the region reaches beyond the image.
    pub fn part(&self, region: Region) -> Result<Self> {
        let Region { left, top, width, height } = region;
        if left + width > self.width || top + height > self.height {
            return Err(Error::bug(format!("{region:?} of an image of {} × {}", self.width, self.height)));
        }
        let row = |y: usize| &self.data[3 * (y * self.width + left)..3 * (y * self.width + left + width)];
        Ok(Self { width, height, data: (top..top + height).flat_map(|y| row(y).iter().copied()).collect() })
    }

    /// The image with margins (left, top, right, bottom) that repeat its border.
    ///
    /// # Errors
    /// `internal` for an empty image.
    pub fn grown(&self, [left, top, right, bottom]: [usize; 4]) -> Result<Self> {
        if self.width == 0 || self.height == 0 {
            return Err(Error::bug("an empty image cannot grow"));
        }
        let (width, height) = (self.width + left + right, self.height + top + bottom);
        let mut data = Vec::with_capacity(3 * width * height);
        for y in 0..height {
            let row = y.saturating_sub(top).min(self.height - 1) * self.width;
            for x in 0..width {
                let at = 3 * (row + x.saturating_sub(left).min(self.width - 1));
                data.extend_from_slice(&self.data[at..at + 3]);
            }
        }
        Ok(Self { width, height, data })
    }

    /// Luminance as in Pillow: ITU-R 601 in 16-bit fixed point.
    #[must_use]
    pub fn to_gray(&self) -> Gray8 {
        let luminance = |pixel: &[u8]| {
            let weighted = pixel.iter().zip([19595u32, 38470, 7471]).map(|(&value, weight)| u32::from(value) * weight);
            ((weighted.sum::<u32>() + 0x8000) >> 16) as u8
        };
        Gray8 { width: self.width, height: self.height, data: self.data.chunks_exact(3).map(luminance).collect() }
    }

    /// Width and height in the type of image files.
    ///
    /// # Errors
    /// `internal` if `data` has another length than the size says, or a side does not fit in 32 bits.
    pub fn sides(&self) -> Result<(u32, u32)> {
        let fits = self.width.checked_mul(self.height).and_then(|n| n.checked_mul(3)) == Some(self.data.len());
        match (u32::try_from(self.width), u32::try_from(self.height)) {
            (Ok(width), Ok(height)) if fits => Ok((width, height)),
            _ => Err(Error::bug(format!(
                "an image of {} × {} pixels cannot have {} bytes",
                self.width,
                self.height,
                self.data.len()
            ))),
        }
    }
}

impl Gray8 {
    #[must_use]
    pub fn to_rgb(&self) -> Rgb8 {
        let data = self.data.iter().flat_map(|&value| [value; 3]).collect();
        Rgb8 { width: self.width, height: self.height, data }
    }

    /// The mask with margins (left, top, right, bottom) of `value`.
    #[must_use]
    pub fn framed(&self, [left, top, right, bottom]: [usize; 4], value: u8) -> Self {
        let (width, height) = (self.width + left + right, self.height + top + bottom);
        let mut data = vec![value; width * height];
        for (row, line) in data.chunks_exact_mut(width).skip(top).zip(self.data.chunks_exact(self.width.max(1))) {
            row[left..left + self.width].copy_from_slice(line);
        }
        Self { width, height, data }
    }
}

/// Index of the pixel at `index`, which may lie outside 0..`length`: mirrored at the border pixel, which is not repeated
/// (OpenCV's `BORDER_REFLECT_101`).
pub(crate) fn mirrored(index: isize, length: usize) -> usize {
    let Some(last) = length.checked_sub(1).filter(|&last| last > 0) else { return 0 };
    let period = 2 * last;
    let position = index.rem_euclid(period.cast_signed()).unsigned_abs();
    if position > last { period - position } else { position }
}

/// `[-1, 1]` to a byte; `None` if `value` is not finite.
fn byte(value: f32) -> Option<u8> {
    let scaled = ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=255 above")]
    value.is_finite().then_some(scaled as u8)
}

fn not_finite() -> Error {
    Error::Numerical {
        stage: "vae decode",
        hint: Some(
            "the VAE or UNet overflowed: ask for `dtype` f32 or bf16, or use a checkpoint with a fixed VAE".into(),
        ),
    }
}

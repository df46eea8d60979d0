//! RGB images of bytes ⇄ tensors: the only place where `[0, 255]`, `[0, 1]` and `[-1, 1]` are converted.
//!
//! Legend: `B` batch, `H` `W` rows and columns.

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result, Stage};

/// An RGB image, one byte a channel, rows from the top, no padding: `data` holds `height · width · 3` bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb8 {
    pub width: usize,
    pub height: usize,
    pub data: Vec<u8>,
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

    /// The image as `[1, H, W, 3]`, f32 in `[0, 1]`: `byte / 255`.
    ///
    /// # Errors
    /// `data` of another length than the size says; the device's own.
    pub fn to_unit_tensor(&self, device: &Device) -> Result<Tensor> {
        let values: Vec<f32> = self.data.iter().map(|&value| f32::from(value) / 255.0).collect();
        Tensor::from_vec(values, (1, self.height, self.width, 3), device).stage("pixels")
    }

    /// Width and height as image files count them.
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

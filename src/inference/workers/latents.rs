//! Pictures to latents, and latents to the level at which a run starts.

use candle_core::{DType, Tensor};

use crate::context::Context;
use crate::device::instructor::Placement;
use crate::error::Result;
use crate::image::pixels::{Gray8, Rgb8};
use crate::layers::Worker;
use crate::model::managers::Vae;
use crate::model::networks::vae::{Extent, VaeConfig};
use crate::noise::NoiseSource;
use crate::scheduler::plan::{Level, SamplingPlan};

/// Runs the encoder.
pub struct Encode;

pub struct EncodeTask<'a> {
    pub vae: &'a Vae,
    pub config: &'a VaeConfig,
    /// `[1, H, W, 3]`, f32, -1..=1.
    pub pixels: &'a Tensor,
    /// Draws from the encoder's distribution; `None` takes its mode.
    pub noise: Option<&'a mut NoiseSource>,
    pub extent: Extent,
    pub placement: &'a Placement,
}

impl Worker<EncodeTask<'_>> for Encode {
    /// `[1, H/8, W/8, Z]`, f32, in the UNet's scale.
    type Output = Tensor;

    fn run(&self, task: EncodeTask<'_>, ctx: &Context) -> Result<Tensor> {
        let EncodeTask { vae, config, pixels, noise, extent, placement } = task;
        let pixels = pixels.to_dtype(placement.vae.tensor())?;
        let moments = vae.encoder.encode(&pixels, extent, &|| ctx.checkpoint())?;
        let z = match noise {
            Some(noise) => (&moments.mean + ((moments.logvar * 0.5)?.exp()? * noise.draw()?)?)?,
            None => moments.mean,
        };
        config.to_model(&z)
    }
}

/// What an inpainting run is held to.
pub struct Masking {
    /// `[1, H/8, W/8, 1]`, f32: 1 is repainted.
    pub mask: Tensor,
    /// What a UNet without channels for the mask is held to after each step.
    pub outside: Option<Outside>,
    /// `[1, H/8, W/8, 1 + Z]`, f32: mask and masked picture, for a UNet that takes them beside its latents.
    pub beside: Option<Tensor>,
}

/// The latents outside the mask: `[1, H/8, W/8, Z]` each, f32.
pub struct Outside {
    pub latents: Tensor,
    /// The noise that the run began with.
    pub noise: Tensor,
}

impl Outside {
    /// `x` with what lies outside the mask put back as it is where the step `landed`; clean after the last, unless
    /// another run goes on from there.
    ///
    /// # Errors
    /// Those of the device.
    pub fn hold(
        &self,
        mask: &Tensor,
        x: &Tensor,
        (sampling, landed): (&SamplingPlan, usize),
        goes_on: bool,
    ) -> Result<Tensor> {
        let next = sampling.run.start + landed;
        let at = sampling.trajectory.get(next).filter(|_| next < sampling.run.end || goes_on).map(|step| step.at);
        let proper = match at {
            Some(level) => noised(&self.latents, &self.noise, level)?,
            None => self.latents.clone(),
        };
        Ok((proper.broadcast_mul(&(1.0 - mask)?)? + x.broadcast_mul(mask)?)?)
    }
}

/// `α·latents + σ·noise`
///
/// # Errors
/// Those of the device.
pub fn noised(latents: &Tensor, noise: &Tensor, level: Level) -> Result<Tensor> {
    Ok(((latents * level.alpha)? + (noise * level.sigma)?)?)
}

/// The mask in latents: every eighth pixel, as the reference takes them. `soft` keeps its greys, otherwise half and more
/// is 1.
///
/// # Errors
/// Those of the device.
pub fn mask_of_latents(mask: &Gray8, soft: bool, reduction: usize, placement: &Placement) -> Result<Tensor> {
    let (height, width) = (mask.height / reduction, mask.width / reduction);
    let value = |byte: u8| match soft {
        true => f32::from(byte) / 255.0,
        false => f32::from(u8::from(byte >= 128)),
    };
    let rows = mask.data.chunks_exact(mask.width.max(1)).step_by(reduction).take(height);
    let values: Vec<f32> =
        rows.flat_map(|row| row.iter().step_by(reduction).take(width).map(|&byte| value(byte))).collect();
    Ok(Tensor::from_vec(values, (1, height, width, 1), &placement.device)?)
}

/// The picture with mid-grey where the mask is half and more: `[1, H, W, 3]`, f32.
///
/// # Errors
/// Those of the device.
pub fn hidden(image: &Rgb8, mask: &Gray8, placement: &Placement) -> Result<Tensor> {
    let seen: Vec<f32> = mask.data.iter().map(|&byte| f32::from(u8::from(byte < 128))).collect();
    let seen = Tensor::from_vec(seen, (1, mask.height, mask.width, 1), &placement.device)?;
    Ok(image.to_tensor(&placement.device)?.broadcast_mul(&seen)?)
}

/// Latents at another size, `[1, H, W, C]`, f32: each channel as torch's `interpolate` without corners aligned.
pub struct Enlarge;

/// How latents are enlarged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    Nearest,
    Bilinear,
    /// Keys' cubic with a = -0.75.
    Bicubic,
}

pub struct EnlargeTask<'a> {
    pub latents: &'a Tensor,
    /// Rows and columns.
    pub to: (usize, usize),
    pub between: Between,
}

impl Worker<EnlargeTask<'_>> for Enlarge {
    type Output = Tensor;

    fn run(&self, task: EnlargeTask<'_>, _ctx: &Context) -> Result<Tensor> {
        let EnlargeTask { latents, to, between } = task;
        let (batch, height, width, channels) = latents.dims4()?;
        let rows = between.matrix(height, to.0, latents)?; // [H', H]
        let columns = between.matrix(width, to.1, latents)?; // [W', W]
        let x = latents.permute((0, 3, 1, 2))?.contiguous()?.reshape((batch * channels, height, width))?;
        let x = rows.broadcast_matmul(&x)?.broadcast_matmul(&columns.t()?.contiguous()?)?;
        Ok(x.reshape((batch, channels, to.0, to.1))?.permute((0, 2, 3, 1))?.contiguous()?)
    }
}

impl Between {
    /// Each row says what of the `from` places a result takes: `[to, from]`, f32.
    fn matrix(self, from: usize, to: usize, like: &Tensor) -> Result<Tensor> {
        let mut values = vec![0f32; from * to];
        let last = from.saturating_sub(1) as isize;
        let scale = from as f64 / to as f64;
        for (place, row) in values.chunks_exact_mut(from).enumerate() {
            let mut add = |at: isize, weight: f64| row[at.clamp(0, last) as usize] += weight as f32;
            let centre = (place as f64 + 0.5) * scale - 0.5;
            match self {
                Self::Nearest => add((place as f64 * scale) as isize, 1.0),
                Self::Bilinear => {
                    let centre = centre.max(0.0);
                    let (first, part) = (centre.floor() as isize, centre.fract());
                    add(first, 1.0 - part);
                    add(first + 1, part);
                }
                Self::Bicubic => {
                    let (first, part) = (centre.floor() as isize, centre - centre.floor());
                    let near = |x: f64| (1.25 * x - 2.25) * x * x + 1.0;
                    let far = |x: f64| ((-0.75 * x + 3.75) * x - 6.0) * x + 3.0;
                    for (step, weight) in
                        [far(1.0 + part), near(part), near(1.0 - part), far(2.0 - part)].into_iter().enumerate()
                    {
                        add(first - 1 + step as isize, weight);
                    }
                }
            }
        }
        Ok(Tensor::from_vec(values, (to, from), like.device())?.to_dtype(DType::F32)?)
    }
}

//! Classifier-free guidance (Ho & Salimans 2022, <https://arxiv.org/abs/2207.12598>) and its rescaling (Lin et al. 2023,
//! <https://arxiv.org/abs/2305.08891>, equations 15 and 16).

use candle_core::{DType, Device, Tensor};

use crate::context::Context;
use crate::error::Result;
use crate::inference::plan::Guidance;
use crate::layers::Worker;

/// Joins the two predictions of the network.
pub struct Guide;

pub struct GuideTask {
    /// `[B, H, W, C]`, f32: the prediction for the negative prompt.
    pub negative: Tensor,
    /// `[B, H, W, C]`, f32: the prediction for the prompt.
    pub positive: Tensor,
    pub guidance: Guidance,
}

impl Worker<GuideTask> for Guide {
    /// `[B, H, W, C]`, f32.
    type Output = Tensor;

    fn run(&self, task: GuideTask, _ctx: &Context) -> Result<Tensor> {
        let GuideTask { negative, positive, guidance } = task;
        let guided = (&negative + ((&positive - &negative)? * guidance.scale)?)?;
        if guidance.rescale == 0.0 {
            return Ok(guided);
        }
        let ratio = (deviation(&positive)? / deviation(&guided)?)?; // [B, 1, 1, 1]
        let rescaled = guided.broadcast_mul(&ratio)?;
        Ok(((rescaled * guidance.rescale)? + (guided * (1.0 - guidance.rescale))?)?)
    }
}

/// Standard deviation of each sample, with Bessel's correction as torch has it: `[B, 1, 1, 1]`, f32.
fn deviation(x: &Tensor) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    // On the host: Metal has no f64.
    let flat = x.to_device(&Device::Cpu)?.reshape((batch, height * width * channels))?.to_dtype(DType::F64)?;
    let centred = flat.broadcast_sub(&flat.mean_keepdim(1)?)?;
    let count = (height * width * channels).saturating_sub(1).max(1) as f64;
    let variance = (centred.sqr()?.sum_keepdim(1)? / count)?;
    Ok(variance.sqrt()?.to_dtype(DType::F32)?.reshape((batch, 1, 1, 1))?.to_device(x.device())?)
}

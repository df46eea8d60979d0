//! Dynamic thresholding of guided latents, as mcmonkey's sd-dynamic-thresholding defines it (dynthres_core.py at 1fd915a):
//! guidance by the full scale is brought to the extent of guidance by a lower one, the mimic scale.

use candle_core::{DType, Device, Tensor};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::inference::request::guidance::{ScaleMode, ScalingStartpoint, VariabilityMeasure};
use crate::layers::Worker;

/// Dynamic thresholding with nothing left to decide.
#[derive(Clone, Debug, PartialEq)]
pub struct Thresholding {
    /// The scale whose extent is the target.
    pub mimic: Curve,
    /// The guidance scale.
    pub guided: Curve,
    /// Share of the values that set the guided extent.
    pub percentile: f64,
    /// True if every channel has an extent of its own.
    pub separate: bool,
    pub startpoint: ScalingStartpoint,
    pub measure: VariabilityMeasure,
    /// Share of the thresholded latents.
    pub phi: f64,
}

/// A scale that changes over the steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curve {
    pub mode: ScaleMode,
    pub scale: f64,
    /// Its minimum.
    pub least: f64,
    /// Exponent or periods, for modes that have one.
    pub value: f64,
}

impl Curve {
    /// The scale at a share of the steps, 0 at the first, 1 at the last. The curves are those of sd-dynamic-thresholding, its
    /// rounded π included.
    #[must_use]
    #[expect(clippy::approx_constant, reason = "the reference rounds π to five places")]
    pub fn at(self, done: f64) -> f64 {
        const QUARTER: f64 = 1.5707;
        const TURN: f64 = 6.28318;
        let share = match self.mode {
            ScaleMode::Constant => 1.0,
            ScaleMode::LinearDown => 1.0 - done,
            ScaleMode::HalfCosineDown => done.cos(),
            ScaleMode::CosineDown => (done * QUARTER).cos(),
            ScaleMode::LinearUp => done,
            ScaleMode::HalfCosineUp => 1.0 - done.cos(),
            ScaleMode::CosineUp => 1.0 - (done * QUARTER).cos(),
            ScaleMode::PowerUp => done.powf(self.value),
            ScaleMode::PowerDown => 1.0 - done.powf(self.value),
            ScaleMode::LinearRepeating => (0.5 - (done * self.value).fract()).abs() * 2.0,
            ScaleMode::CosineRepeating => (done * TURN * self.value).cos() * 0.5 + 0.5,
            ScaleMode::Sawtooth => (done * self.value).fract(),
        };
        (self.scale - self.least) * share + self.least
    }
}

pub struct ThresholdGuidance;

pub struct ThresholdTask<'a> {
    /// `[B, H, W, C]`, f32: x₀ for the negative prompt, and for the prompt.
    pub negative: &'a Tensor,
    pub positive: &'a Tensor,
    /// 0 at the first step, 1 at the last.
    pub progress: f64,
    pub options: &'a Thresholding,
}

impl Worker<ThresholdTask<'_>> for ThresholdGuidance {
    /// `[B, H, W, C]`, f32: x₀ under guidance.
    type Output = Tensor;

    fn run(&self, task: ThresholdTask<'_>, _ctx: &Context) -> Result<Tensor> {
        let ThresholdTask { negative, positive, progress, options } = task;
        let (mimic, scale) = (options.mimic.at(progress), options.guided.at(progress));
        let (batch, height, width, channels) = positive.dims4()?;
        // On the host: the quantile sorts, and latents are small.
        let planes = |x: &Tensor| -> Result<Vec<Vec<f64>>> {
            let host = x.to_device(&Device::Cpu)?.permute((0, 3, 1, 2))?.to_dtype(DType::F64)?;
            Ok(host.reshape((batch * channels, height * width))?.to_vec2::<f64>()?)
        };
        let (negative, positive) = (planes(negative)?, planes(positive)?);
        let mut values = Vec::with_capacity(batch * channels * height * width);
        for (negative, positive) in negative.chunks(channels).zip(positive.chunks(channels)) {
            if options.separate {
                for (negative, positive) in negative.chunks(1).zip(positive.chunks(1)) {
                    values.extend(thresholded(negative, positive, [mimic, scale], options)?);
                }
            } else {
                values.extend(thresholded(negative, positive, [mimic, scale], options)?);
            }
        }
        let host = Tensor::from_vec(values, (batch, channels, height, width), &Device::Cpu)?;
        Ok(host.permute((0, 2, 3, 1))?.contiguous()?.to_device(task.positive.device())?)
    }
}

/// Channels of one sample that share an extent, guided and scaled to the extent of the mimic scale.
fn thresholded(
    negative: &[Vec<f64>],
    positive: &[Vec<f64>],
    [mimic, scale]: [f64; 2],
    options: &Thresholding,
) -> Result<Vec<f32>> {
    let guided = |scale: f64| -> Vec<Vec<f64>> {
        let plane = |(negative, positive): (&Vec<f64>, &Vec<f64>)| {
            negative.iter().zip(positive).map(|(n, p)| n + (p - n) * scale).collect()
        };
        negative.iter().zip(positive).map(plane).collect()
    };
    let mean = |plane: &Vec<f64>| plane.iter().sum::<f64>() / plane.len().max(1) as f64;
    let centred = |planes: &[Vec<f64>]| -> Vec<f64> {
        let around = |plane: &Vec<f64>| -> Vec<f64> {
            let mean = mean(plane);
            plane.iter().map(|x| x - mean).collect()
        };
        planes.iter().flat_map(around).collect()
    };
    let guided_planes = guided(scale);
    let (model, around) = (centred(&guided(mimic)), centred(&guided_planes));
    let (wanted, own) = match options.measure {
        VariabilityMeasure::Std => (deviation(&model), deviation(&around)),
        VariabilityMeasure::Ad => {
            let wanted = model.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            (wanted, quantile(&around, options.percentile)?)
        }
    };
    let phi = options.phi;
    let means = guided_planes.iter().flat_map(|plane| std::iter::repeat_n(mean(plane), plane.len()));
    let values = guided_planes.iter().flatten().zip(&around).zip(means).map(|((&guided, &around), mean)| {
        let result = match (options.startpoint, options.measure) {
            (ScalingStartpoint::Zero, _) => guided * (wanted / own),
            (ScalingStartpoint::Mean, VariabilityMeasure::Std) => around / own * wanted + mean,
            (ScalingStartpoint::Mean, VariabilityMeasure::Ad) => {
                let top = wanted.max(own);
                around.max(-top).min(top) / top * wanted + mean
            }
        };
        (result * phi + guided * (1.0 - phi)) as f32
    });
    Ok(values.collect())
}

/// Standard deviation with Bessel's correction, as torch computes it.
fn deviation(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    let squares: f64 = values.iter().map(|x| (x - mean) * (x - mean)).sum();
    (squares / values.len().saturating_sub(1).max(1) as f64).sqrt()
}

/// Quantile of the magnitudes, interpolated linearly, as torch computes it.
fn quantile(values: &[f64], share: f64) -> Result<f64> {
    let mut sorted: Vec<f64> = values.iter().map(|x| x.abs()).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let at = share * sorted.len().saturating_sub(1) as f64;
    let below = at.floor();
    let value = |index: f64| sorted.get(index as usize).copied();
    match (value(below), value(at.ceil())) {
        (Some(low), Some(high)) => Ok(low + (high - low) * (at - below)),
        _ => Err(Error::bug("a quantile of nothing")),
    }
}

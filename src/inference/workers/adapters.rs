//! IP-Adapters and T2I-Adapters at each step: which of them apply, and how their features are combined.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::Tensor;

use crate::conditioning::image_adapters::{Adaptation, Features};
use crate::context::Context;
use crate::error::{Error, Result, StageContext as _};
use crate::layers::Worker;
use crate::model::networks::unet::{Pictures, ReadPictures, ReadText, Unet};

const STAGE: &str = "adapters";

/// Computes the UNet's keys and values of IP-Adapter images, once for all steps.
pub struct ReadAdapters;

pub struct ReadAdaptersTask<'a> {
    pub unet: &'a Unet,
    pub adaptation: &'a Adaptation,
    /// The UNet's keys and values of the text.
    pub text: &'a ReadText,
    /// Number of samples of the negative prompt, which come first.
    pub negatives: usize,
}

/// Adapters, prepared for every step.
#[derive(Default)]
pub struct Adapters {
    pictures: Vec<(ReadPictures, f64, [f64; 2])>,
    features: Vec<(Vec<Tensor>, f64)>,
}

/// Adapters that apply to one evaluation.
pub(crate) struct ActiveAdapters<'a> {
    pictures: Vec<(Cow<'a, ReadPictures>, f64)>,
    pub(crate) features: Vec<Tensor>,
}

impl ActiveAdapters<'_> {
    pub(crate) fn pictures(&self) -> Vec<Pictures<'_>> {
        self.pictures.iter().map(|(read, weight)| Pictures { read, weight: *weight }).collect()
    }
}

impl Worker<ReadAdaptersTask<'_>> for ReadAdapters {
    type Output = Adapters;

    fn run(&self, task: ReadAdaptersTask<'_>, ctx: &Context) -> Result<Adapters> {
        let ReadAdaptersTask { unet, adaptation, text, negatives } = task;
        let mut pictures = Vec::with_capacity(adaptation.pictures.len());
        for one in &adaptation.pictures {
            let read = unet.pictures(text, &one.adapter.network, &one.tokens, &|| ctx.checkpoint())?;
            pictures.push((read.spread(negatives, text.samples())?, one.weight, one.share));
        }
        let features = adaptation.features.iter().map(|Features { maps, end }| (maps.clone(), *end)).collect();
        Ok(Adapters { pictures, features })
    }
}

impl Adapters {
    /// Adapters that apply to `samples` in step `step` of `steps`. Diffusers' rules: an IP-Adapter applies to steps that lie
    /// entirely within its share, a T2I-Adapter to the first `⌊steps · end⌋`.
    ///
    /// # Errors
    /// `model_unsupported` for T2I-Adapters whose features differ in size; those of the device.
    pub(crate) fn at(&self, step: usize, steps: usize, samples: &Range<usize>) -> Result<ActiveAdapters<'_>> {
        let (now, all) = (step as f64, steps as f64);
        let counts = |[start, end]: [f64; 2]| now / all >= start && (now + 1.0) / all <= end;
        let pictures = (self.pictures.iter())
            .filter(|(_, weight, share)| *weight != 0.0 && counts(*share))
            .map(|(read, weight, _)| Ok((read.of(samples)?, *weight)))
            .collect::<Result<_>>()?;
        let mut features: Vec<Tensor> = Vec::new();
        for (maps, _) in self.features.iter().filter(|(_, end)| now < (all * end).floor()) {
            if features.is_empty() {
                features.clone_from(maps);
                continue;
            }
            if features.len() != maps.len() || features.iter().zip(maps).any(|(a, b)| a.dims() != b.dims()) {
                let message = "they give features of other sizes than each other".to_owned();
                return Err(Error::ModelUnsupported { name: "t2i_adapter".to_owned(), message });
            }
            features = features
                .iter()
                .zip(maps)
                .map(|(sum, map)| sum + map)
                .collect::<candle_core::Result<_>>()
                .stage(STAGE)?;
        }
        Ok(ActiveAdapters { pictures, features })
    }
}

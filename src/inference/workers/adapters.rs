//! What adapters add at each step: which of them count then, and how they join.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::Tensor;

use crate::conditioning::image_adapters::{Adaptation, Features};
use crate::context::Context;
use crate::error::{Error, Result, StageContext as _};
use crate::layers::Worker;
use crate::model::networks::unet::{Pictures, ReadPictures, ReadText, Unet};

const STAGE: &str = "adapters";

/// Reads pictures as the UNet reads the text, once for all steps.
pub struct ReadAdapters;

pub struct ReadAdaptersTask<'a> {
    pub unet: &'a Unet,
    pub adaptation: &'a Adaptation,
    /// What the UNet reads beside them.
    pub text: &'a ReadText,
    /// Samples of an evaluation that are of the negative prompt; they come first.
    pub negatives: usize,
}

/// Ready for every step.
#[derive(Default)]
pub struct Adapters {
    pictures: Vec<(ReadPictures, f64, [f64; 2])>,
    features: Vec<(Vec<Tensor>, f64)>,
}

/// What one evaluation takes.
pub(crate) struct Now<'a> {
    pictures: Vec<(Cow<'a, ReadPictures>, f64)>,
    pub(crate) features: Vec<Tensor>,
}

impl Now<'_> {
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
    /// What counts in step `step` of `steps` for some samples of all that were read. Diffusers' rules: pictures in steps
    /// that lie whole between their shares, features in the first `⌊steps · end⌋`.
    ///
    /// # Errors
    /// `model_unsupported` where T2I-Adapters do not go together; those of the device.
    pub(crate) fn at(&self, step: usize, steps: usize, samples: &Range<usize>) -> Result<Now<'_>> {
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
        Ok(Now { pictures, features })
    }
}

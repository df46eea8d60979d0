//! What a ControlNet is shown: a request's image, brought to the size of the work, through a preprocessor, and kept for
//! the next request.

use std::sync::Arc;

use crate::conditioning::init_image::{Cut, ResizeMode};
use crate::conditioning::instructor::{ConditioningInstructor, ConditioningResources};
use crate::conditioning::interface::{
    ParameterEntry, PreprocessRequest, PreprocessedImage, PreprocessorEntry, PreprocessorParameters,
};
use crate::conditioning::manager::HintKey;
use crate::conditioning::workers::preprocess::{HintTask, PREPROCESSORS, Parameters, Preprocessor};
use crate::conditioning::workers::resize::{Fit, FitTask};
use crate::context::{Context, Stage};
use crate::error::{Error, Result};
use crate::image::pixels::Rgb8;
use crate::image::source::{ImageFile, ImageSource};
use crate::postprocessing::instructor::Delivery;
use crate::units::ImageSize;

/// An image for a ControlNet, as a request says it.
#[derive(Clone, Debug)]
pub struct HintOptions<'a> {
    pub image: &'a ImageSource,
    /// Default: `none`, the image is the hint.
    pub preprocessor: Option<&'a str>,
    pub parameters: &'a PreprocessorParameters,
    pub resize: ResizeMode,
    /// The name of each field in the request, for errors: image, preprocessor, parameters.
    pub fields: [&'a str; 3],
}

/// An image for a ControlNet, read and decided.
#[derive(Clone)]
pub struct HintPlan {
    pub image: ImageFile,
    pub preprocessor: &'static str,
    /// Every number used, as a request says them.
    pub parameters: PreprocessorParameters,
    pub resize: ResizeMode,
    method: &'static Preprocessor,
    told: Parameters,
}

/// A hint of the wanted size.
#[derive(Clone, Debug)]
pub struct Hint {
    pub image: Arc<Rgb8>,
    /// Whether it was made for an earlier request.
    pub cached: bool,
}

impl ConditioningInstructor {
    /// Reads the image's file and decides what is left open; no pixel is decoded.
    ///
    /// # Errors
    /// `unknown_name`, `invalid_parameter`, and those of [`ImageSource::read`].
    pub fn plan_hint(&self, options: &HintOptions) -> Result<HintPlan> {
        let [image, preprocessor, parameters] = options.fields;
        let name = options.preprocessor.unwrap_or("none");
        let known = PREPROCESSORS.iter().find(|(known, _)| *known == name);
        let (name, method) = match known {
            Some(entry) => entry,
            None => return Err(unknown(name).at(preprocessor)),
        };
        let told = Parameters::resolve(name, method.parameters(), options.parameters, parameters)?;
        let parameters = told.said(method.parameters());
        let image = options.image.read(&self.roots, image)?;
        Ok(HintPlan { image, preprocessor: name, parameters, resize: options.resize, method, told })
    }

    /// The hint of `size`, made or kept; of a part of the image where only that is worked on.
    ///
    /// # Errors
    /// `image_decode_failed`, `cancelled`, `deadline_exceeded`.
    pub fn hint(
        &self,
        plan: &HintPlan,
        (size, cut): (ImageSize, Option<Cut>),
        resources: &mut ConditioningResources,
        ctx: &Context,
    ) -> Result<Hint> {
        ctx.stage(Stage::Encode, || {
            let content = resources.hints.content(&plan.image.bytes);
            let key =
                HintKey { content, preprocessor: plan.preprocessor, told: plan.told, resize: plan.resize, size, cut };
            if let Some(image) = resources.hints.get(&key).filter(|_| self.settings.cache_hints) {
                return Ok(Hint { image, cached: true });
            }
            let image = Arc::new(plan.make(size, cut, ctx)?);
            if self.settings.cache_hints {
                resources.hints.insert(key, &image);
            }
            Ok(Hint { image, cached: false })
        })
    }

    /// Answers `conditioning.preprocess`. Nothing is kept: it runs beside the thread that has the cache.
    pub(crate) fn preprocess(&self, options: &PreprocessRequest, ctx: &Context) -> Result<PreprocessedImage> {
        let plan = self.plan_hint(&HintOptions {
            image: &options.image,
            preprocessor: Some(&options.preprocessor),
            parameters: &options.parameters.unwrap_or_default(),
            resize: options.resize_mode.unwrap_or_default(),
            fields: ["image", "preprocessor", "parameters"],
        })?;
        let side = |field: &str, options: Option<i64>, own: usize| match options {
            None => Ok(own),
            Some(side) => usize::try_from(side)
                .ok()
                .filter(|side| (1..=MAX_SIDE).contains(side))
                .ok_or_else(|| Error::invalid(field, format!("must be 1 to {MAX_SIDE}, got {side}"))),
        };
        let size = ImageSize {
            width: side("width", options.width, plan.image.width)?,
            height: side("height", options.height, plan.image.height)?,
        };
        let output = self.delivery.resolve(&options.output.clone().unwrap_or_default())?;
        let image = ctx.stage(Stage::Encode, || plan.make(size, None, ctx))?;
        let delivery = Delivery { plan: &output, image: &image, index: 0, text: None };
        let delivered = ctx.stage(Stage::Write, || self.delivery.deliver(delivery, ctx))?;
        Ok(PreprocessedImage {
            path: delivered.path,
            base64: delivered.base64,
            format: output.format.name,
            width: image.width,
            height: image.height,
            preprocessor: plan.preprocessor,
            parameters: plan.parameters,
        })
    }
}

impl HintPlan {
    fn make(&self, size: ImageSize, cut: Option<Cut>, ctx: &Context) -> Result<Rgb8> {
        let image = self.image.decode()?;
        let fit = |image: &Rgb8, size, mode| ctx.perform(&Fit, FitTask { image, size, mode });
        let image = match cut {
            None => fit(&image, size, self.resize)?,
            // As the image that is worked on is cut.
            Some(Cut { whole, region }) => {
                fit(&fit(&image, whole, self.resize)?.part(region)?, size, ResizeMode::Fill)?
            }
        };
        ctx.perform(self.method, HintTask { image: &image, parameters: &self.told })
    }
}

/// The longest side of a hint; images that are read may be longer.
const MAX_SIDE: usize = 8192;

/// Preprocessors that people know and that need a network of their own.
const NETWORKS: [&str; 28] = [
    "depth_anything",
    "depth_anything_v2",
    "depth_leres",
    "depth_midas",
    "depth_zoe",
    "dw_openpose_full",
    "hed",
    "lineart_anime",
    "lineart_anime_denoise",
    "lineart_coarse",
    "lineart_realistic",
    "mlsd",
    "normal_bae",
    "normal_midas",
    "openpose",
    "openpose_face",
    "openpose_faceonly",
    "openpose_full",
    "openpose_hand",
    "scribble_hed",
    "scribble_pidinet",
    "seg_ofade20k",
    "seg_ofcoco",
    "seg_ufade20k",
    "softedge_hed",
    "softedge_hedsafe",
    "softedge_pidinet",
    "softedge_pidisafe",
];

fn unknown(name: &str) -> Error {
    if NETWORKS.contains(&name) {
        let names: Vec<String> = PREPROCESSORS.names().map(|name| format!("`{name}`")).collect();
        return Error::UnsupportedFeature {
            what: format!("preprocessor `{name}`, which needs a network of its own,"),
            hint: Some(format!("make the hint elsewhere and send it with `none`; there are {}", names.join(", "))),
            field: None,
        };
    }
    match PREPROCESSORS.get(name) {
        Err(error) => error,
        Ok(_) => Error::bug(format!("preprocessor `{name}` is known and is not")),
    }
}

pub(crate) fn list() -> Vec<PreprocessorEntry> {
    let entry = |(name, method): (&'static str, &'static Preprocessor)| {
        let parameter = |parameter: &crate::conditioning::workers::preprocess::Parameter| ParameterEntry {
            name: parameter.name,
            default: parameter.default,
            least: parameter.least,
            most: parameter.most,
        };
        PreprocessorEntry { name, parameters: method.parameters().iter().map(parameter).collect() }
    };
    PREPROCESSORS.iter().map(entry).collect()
}

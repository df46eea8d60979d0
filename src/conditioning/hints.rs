//! Plans and makes the hint of a ControlNet: the request's image, resized and preprocessed.

use std::sync::Arc;

use crate::conditioning::init_image::{Cut, ResizeMode};
use crate::conditioning::interface::{ParameterEntry, PreprocessorEntry, PreprocessorParameters};
use crate::conditioning::preprocessor::{ParameterValues, PreprocessTask, Preprocessor};
use crate::conditioning::workers::preprocess::PREPROCESSORS;
use crate::conditioning::workers::resize::{Resize, ResizeTask};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::image::pixels::Rgb8;
use crate::image::source::{ImageFile, ImageSource};
use crate::roots::Roots;
use crate::units::ImageSize;

/// A requested hint.
#[derive(Clone, Debug)]
pub struct HintOptions<'a> {
    pub image: &'a ImageSource,
    /// Default: `none`, which takes the image as the hint.
    pub preprocessor: Option<&'a str>,
    pub parameters: &'a PreprocessorParameters,
    pub resize: ResizeMode,
    /// The request fields of image, preprocessor and parameters, for errors.
    pub fields: [&'a str; 3],
}

/// A hint, decided, with its image file read.
#[derive(Clone)]
pub struct HintPlan {
    pub image: ImageFile,
    pub preprocessor: &'static str,
    /// Every parameter used.
    pub parameters: PreprocessorParameters,
    pub resize: ResizeMode,
    pub(crate) values: ParameterValues,
    method: &'static dyn Preprocessor,
}

/// The size of a hint, and the region of the image that it shows if not all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HintTarget {
    pub size: ImageSize,
    pub cut: Option<Cut>,
}

#[derive(Clone, Debug)]
pub struct Hint {
    pub image: Arc<Rgb8>,
    /// True if an earlier request made it.
    pub cached: bool,
}

impl HintPlan {
    /// Reads the image's file without decoding it, and decides what the options leave open.
    ///
    /// # Errors
    /// `unknown_name`, `invalid_parameter`, and those of [`ImageSource::read`].
    pub(crate) fn new(options: &HintOptions, roots: &Roots) -> Result<Self> {
        let [image, preprocessor, parameters] = options.fields;
        let name = options.preprocessor.unwrap_or("none");
        let known = PREPROCESSORS.iter().find(|(known, _)| *known == name);
        let (name, method) = known.ok_or_else(|| unknown(name).at(preprocessor))?;
        let values = ParameterValues::resolve(name, method.parameters(), options.parameters, parameters)?;
        let parameters = values.echo(method.parameters());
        let image = options.image.read(roots, image)?;
        Ok(Self { image, preprocessor: name, parameters, resize: options.resize, values, method })
    }

    /// # Errors
    /// `image_decode_failed`, `cancelled`, `deadline_exceeded`.
    pub(crate) fn make(&self, target: HintTarget, ctx: &Context) -> Result<Rgb8> {
        let image = self.image.decode()?;
        let resized = |image: &Rgb8, size, mode| ctx.perform(&Resize, ResizeTask { image, size, mode });
        let image = match target.cut {
            None => resized(&image, target.size, self.resize)?,
            // Cut in the same way as the init image.
            Some(Cut { whole, region }) => {
                resized(&resized(&image, whole, self.resize)?.part(region)?, target.size, ResizeMode::Fill)?
            }
        };
        ctx.perform(self.method, PreprocessTask { image: &image, parameters: &self.values })
    }
}

/// Well-known preprocessors that need a network of their own.
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
    if !NETWORKS.contains(&name) {
        return PREPROCESSORS.unknown(name);
    }
    let names: Vec<String> = PREPROCESSORS.names().map(|name| format!("`{name}`")).collect();
    Error::UnsupportedFeature {
        what: format!("preprocessor `{name}`, which needs a network of its own,"),
        hint: Some(format!("make the hint elsewhere and send it with `none`; there are {}", names.join(", "))),
        field: None,
    }
}

pub(crate) fn list() -> Vec<PreprocessorEntry> {
    let entry = |(name, method): (&'static str, &'static dyn Preprocessor)| {
        let specs = method.parameters().iter();
        let parameters = specs.map(|spec| ParameterEntry {
            name: spec.name,
            default: spec.default,
            least: spec.min,
            most: spec.max,
        });
        PreprocessorEntry { name, parameters: parameters.collect() }
    };
    PREPROCESSORS.iter().map(entry).collect()
}

//! Settings, requests and responses of the postprocessing domain, and the `output` options of requests for images.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::image::source::ImageSource;
use crate::layers::{Domain, Interface, Nothing};
use crate::postprocessing::metadata::FoundRequest;

/// The section `workers.instructors.postprocessing` of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Default format of images: `png`, `jpeg` or `webp`.
    pub output_format: String,
    /// Default JPEG quality, 1 to 100.
    pub quality: i64,
    /// Default folder of images; created when the first is written.
    pub output_dir: PathBuf,
    /// Folders that requests may read and write images in, besides `output_dir`.
    pub roots: Vec<PathBuf>,
    /// True if image files carry their parameters and request by default.
    pub metadata: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            output_format: "png".to_owned(),
            quality: 90,
            output_dir: PathBuf::from("outputs"),
            roots: vec![PathBuf::from(".")],
            metadata: true,
        }
    }
}

/// The field `output` of requests that make images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct OutputOptions {
    /// `png`, `jpeg` or `webp`. Default: the extension of `path` or `name`, or else the configuration's `output_format`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// JPEG quality, 1 to 100. Default: the configuration's `quality`. Ignored by PNG and WebP, which are lossless.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<i64>,
    /// `file` writes a file and returns its path, `base64` returns the bytes instead. Default `file`.
    #[serde(default, rename = "return", skip_serializing_if = "Option::is_none")]
    pub return_as: Option<ReturnAs>,
    /// The file to write, which must not exist. Further images of the request get `-1`, `-2` … before the extension.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The folder to write to, created if missing. Default: the configuration's `output_dir`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<String>,
    /// The file's name in that folder, which must not exist. Default: the request's id and the image's index, with a
    /// number if that exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// True to write parameters and request into the image file. Default: the configuration's `metadata`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReturnAs {
    File,
    Base64,
}

/// One finished image in a reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Delivered {
    /// The file that was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The file's bytes, if the request asked for them instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    /// Size of the encoded image in bytes.
    pub bytes: u64,
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    List(Nothing),
    Metadata(MetadataRequest),
}

/// Reads the generation parameters from an image file.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct MetadataRequest {
    /// The image: a path inside the configured roots, base64 or a `data:` URL.
    pub image: ImageSource,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Response {
    List(FormatList),
    Metadata(ImageMetadata),
}

/// The answer to `list`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct FormatList {
    pub formats: Vec<FormatEntry>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct FormatEntry {
    /// The value for `output.format`.
    pub name: &'static str,
    pub extension: &'static str,
    pub media_type: &'static str,
    /// True if pixels are preserved exactly.
    pub lossless: bool,
    /// True for the default format.
    pub default: bool,
}

/// The answer to `metadata`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ImageMetadata {
    pub format: &'static str,
    pub width: usize,
    pub height: usize,
    /// The text in AUTOMATIC1111's form, which other programs write too.
    pub parameters: Option<String>,
    /// The `data` of the request that makes the same image, if this worker made it.
    pub request: Option<FoundRequest>,
}

pub struct Postprocessing;

impl Interface for Postprocessing {
    const DOMAIN: Domain = Domain::Postprocessing;
    const OPERATIONS: &'static [&'static str] = &["list", "metadata"];
    type Request = Request;
    type Response = Response;
}

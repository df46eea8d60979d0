//! What can be asked of the postprocessing domain, and how a request for images says where they go.

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
    /// Format of images whose request names none: `png`, `jpeg` or `webp`.
    pub output_format: String,
    /// JPEG quality of requests that name none, 1 to 100.
    pub quality: i64,
    /// Folder of images whose request names none; made when the first is written.
    pub output_dir: PathBuf,
    /// Folders beneath which requests may read and write images, besides `output_dir`.
    pub roots: Vec<PathBuf>,
    /// Whether images carry their parameters and request, unless a request says otherwise.
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
    /// `png`, `jpeg` or `webp`. Default: as the extension of `path` or `name` says, else the configuration's
    /// `output_format`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// JPEG quality, 1 to 100. Default: the configuration's `quality`. PNG and WebP lose nothing and have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<i64>,
    /// `file` writes a file and gives its path, `base64` writes none and gives the bytes. Default `file`.
    #[serde(default, rename = "return", skip_serializing_if = "Option::is_none")]
    pub return_as: Option<ReturnAs>,
    /// The file to write, which must not exist. Further images of the request get `-1`, `-2` … before the extension.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The folder to write to, made if need be. Default: the configuration's `output_dir`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<String>,
    /// The file's name in that folder, which must not exist. Default: the request's id and the image's index, counted
    /// up past what exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether the image carries its parameters and request. Default: the configuration's `metadata`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReturnAs {
    File,
    Base64,
}

/// One finished image, as a reply names it.
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

/// Reads what an image says of its own making.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct MetadataRequest {
    /// The image: a path beneath the configured roots, base64 or a `data:` URL.
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
    /// What `output.format` takes.
    pub name: &'static str,
    pub extension: &'static str,
    pub media_type: &'static str,
    /// Whether the pixels come back as they were.
    pub lossless: bool,
    /// Whether images whose request names no format get this one.
    pub default: bool,
}

/// The answer to `metadata`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ImageMetadata {
    pub format: &'static str,
    pub width: usize,
    pub height: usize,
    /// The text of AUTOMATIC1111's web UI; also found in images of other programs.
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

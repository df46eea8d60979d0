//! Decides the format, folder and name of an image file, and writes it.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::image::pixels::Rgb8;
use crate::layers::Instructor;
use crate::postprocessing::format::{EncodeTask, Format};
use crate::postprocessing::interface::{
    Delivered, FormatEntry, FormatList, ImageMetadata, MetadataRequest, OutputOptions, Postprocessing, Request,
    Response, ReturnAs, Settings,
};
use crate::postprocessing::metadata::{FoundRequest, ImageText};
use crate::postprocessing::workers::encode::FORMATS;
use crate::postprocessing::workers::read_text::ReadImageText;
use crate::postprocessing::workers::write::{WriteFile, WriteTask};
use crate::roots::Roots;

/// How the images of one request are delivered, decided.
#[derive(Clone)]
pub struct OutputPlan {
    pub format: &'static Format,
    pub quality: u8,
    pub metadata: bool,
    pub destination: Destination,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    Base64,
    /// A file in `folder` with the request's id as its name.
    Automatic {
        folder: PathBuf,
    },
    /// A file named by the request; `stem` has no extension.
    Named {
        folder: PathBuf,
        stem: String,
    },
}

/// One finished image to deliver.
#[derive(Clone, Copy)]
pub struct Delivery<'a> {
    pub plan: &'a OutputPlan,
    pub image: &'a Rgb8,
    /// The image's index in the request, from 0.
    pub index: usize,
    /// Written into the file if the plan says so.
    pub text: Option<&'a ImageText>,
}

#[derive(Clone)]
pub struct PostprocessingInstructor {
    settings: Settings,
    roots: Roots,
}

impl PostprocessingInstructor {
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let roots = Roots::new(settings.roots.iter().chain([&settings.output_dir]).cloned());
        Self { settings, roots }
    }

    /// Folders that requests may read and write images in.
    #[must_use]
    pub fn roots(&self) -> &Roots {
        &self.roots
    }

    /// Decides the delivery before an image is made, so that faulty options cost no compute.
    ///
    /// # Errors
    /// `unknown_name`, `invalid_parameter`, `path_not_allowed`, and `output_exists` for a named file that exists.
    pub fn resolve(&self, options: &OutputOptions) -> Result<OutputPlan> {
        let quality = quality(options.quality.unwrap_or(self.settings.quality))
            .map_err(|m| Error::invalid("output.quality", m))?;
        let requested = options
            .format
            .as_deref()
            .map(|name| format(name).map_err(|error| error.at("output.format")))
            .transpose()?;
        let (destination, implied) = self.destination(options, requested)?;
        let format = match requested.or(implied) {
            Some(format) => format,
            None => format(&self.settings.output_format)?,
        };
        if let Destination::Named { folder, stem } = &destination {
            let path = folder.join(format!("{stem}.{}", format.extension));
            if path.symlink_metadata().is_ok() {
                return Err(Error::OutputExists { path });
            }
        }
        let metadata = options.metadata.unwrap_or(self.settings.metadata);
        Ok(OutputPlan { format, quality, metadata, destination })
    }

    /// Encodes one image and writes it, or returns its bytes. The first image of a named file gets exactly that name, image
    /// `n` the suffix `-n`. Files without a name are `<request id>-<index>`, with a number if that exists.
    ///
    /// # Errors
    /// `output_exists`, `output_write_failed`, and `path_not_allowed` if the folder has become a link to elsewhere.
    pub fn deliver(&self, delivery: Delivery, ctx: &Context) -> Result<Delivered> {
        let Delivery { plan, image, index, text } = delivery;
        let text = text.filter(|_| plan.metadata);
        let bytes = ctx.perform(plan.format.encoder, EncodeTask { image, quality: plan.quality, text })?;
        let (folder, stem, count_up) = match &plan.destination {
            Destination::Base64 => {
                let base64 = Some(STANDARD.encode(&bytes));
                return Ok(Delivered { path: None, base64, bytes: bytes.len() as u64 });
            }
            Destination::Automatic { folder } => (folder, format!("{}-{index}", file_stem(ctx.request_id())), true),
            Destination::Named { folder, stem } if index == 0 => (folder, stem.clone(), false),
            Destination::Named { folder, stem } => (folder, format!("{stem}-{index}"), false),
        };
        let real = self.roots.make_folder(folder, "output")?;
        let task = WriteTask { folder: &real, stem: &stem, extension: plan.format.extension, count_up, bytes: &bytes };
        let written = ctx.perform(&WriteFile, task)?;
        // The reported path is relative if the requested folder is.
        let path = written.file_name().map_or(written.clone(), |name| folder.join(name));
        Ok(Delivered { path: Some(path.display().to_string()), base64: None, bytes: bytes.len() as u64 })
    }

    /// The bytes of a PNG without text, for previews.
    ///
    /// # Errors
    /// `cancelled` and `deadline_exceeded`.
    pub fn preview(&self, image: &Rgb8, ctx: &Context) -> Result<Vec<u8>> {
        ctx.perform(FORMATS.get("png")?.encoder, EncodeTask { image, quality: 100, text: None })
    }

    /// The destination of the image, and the format that the name's extension implies.
    fn destination(
        &self,
        options: &OutputOptions,
        requested: Option<&'static Format>,
    ) -> Result<(Destination, Option<&'static Format>)> {
        if options.return_as == Some(ReturnAs::Base64) {
            let given = [("path", &options.path), ("dir", &options.dir), ("name", &options.name)];
            return match given.into_iter().find(|(_, value)| value.is_some()) {
                Some((key, _)) => Err(Error::invalid(
                    format!("output.{key}"),
                    "cannot stand beside `return` `base64`, which writes no file",
                )),
                None => Ok((Destination::Base64, None)),
            };
        }
        let (folder, name, field) = match (&options.path, &options.dir, &options.name) {
            (Some(path), None, None) => {
                let (folder, name) = split_path(path)?;
                (folder, Some(name), "output.path")
            }
            (Some(_), _, _) => {
                return Err(Error::invalid("output.path", "cannot stand beside `output.dir` or `output.name`"));
            }
            (None, dir, name) => {
                let folder = dir.as_ref().map_or_else(|| self.settings.output_dir.clone(), PathBuf::from);
                (folder, name.as_deref(), "output.name")
            }
        };
        let folder_field = if options.dir.is_some() { "output.dir" } else { field };
        self.roots.resolve(&folder, folder_field)?;
        let Some(name) = name else { return Ok((Destination::Automatic { folder }, None)) };
        check_name(name, field)?;
        let (stem, implied) = split_extension(name);
        match (requested, implied) {
            (Some(requested), Some(implied)) if requested.name != implied.name => {
                let message = format!("ends like {}, but `output.format` is `{}`", implied.name, requested.name);
                return Err(Error::invalid(field, message));
            }
            // Another extension of a path is an unknown format; a bare name may contain dots.
            (None, None) if options.path.is_some() => {
                if let Some((_, extension)) = name.rsplit_once('.') {
                    format(extension).map_err(|error| error.at(field))?;
                }
            }
            _ => (),
        }
        Ok((Destination::Named { folder, stem: stem.to_owned() }, implied))
    }

    fn list(&self) -> Result<FormatList> {
        let default = format(&self.settings.output_format)?;
        let entry = |(name, format): (&'static str, &'static Format)| FormatEntry {
            name,
            extension: format.extension,
            media_type: format.media_type,
            lossless: format.lossless,
            default: name == default.name,
        };
        Ok(FormatList { formats: FORMATS.iter().map(entry).collect() })
    }

    fn metadata(&self, request: &MetadataRequest, ctx: &Context) -> Result<ImageMetadata> {
        let file = request.image.read(&self.roots, "image")?;
        let texts = ctx.perform(&ReadImageText, &file)?;
        let media_type = file.format.to_mime_type();
        let name = FORMATS.iter().find(|(_, format)| format.media_type == media_type).map_or("other", |(name, _)| name);
        Ok(ImageMetadata {
            format: name,
            width: file.width,
            height: file.height,
            parameters: texts.parameters,
            request: texts.request.as_deref().and_then(FoundRequest::new),
        })
    }
}

impl Instructor for PostprocessingInstructor {
    type Interface = Postprocessing;
    type Resources<'a> = ();

    fn instruct(&self, request: Request, (): (), ctx: &Context) -> Result<Response> {
        Ok(match request {
            Request::List(_) => Response::List(self.list()?),
            Request::Metadata(request) => Response::Metadata(self.metadata(&request, ctx)?),
        })
    }
}

/// Checks the configuration's own values.
///
/// # Errors
/// `unknown_name` for the format, `invalid_parameter` for the quality.
pub fn check_settings(settings: &Settings) -> Result<()> {
    format(&settings.output_format).map_err(|error| error.at("output_format"))?;
    quality(settings.quality).map(drop).map_err(|message| Error::invalid("quality", message))
}

/// Finds a format by name, ignoring case; `jpg` is `jpeg`.
fn format(name: &str) -> Result<&'static Format> {
    match name.to_ascii_lowercase().as_str() {
        "jpg" => FORMATS.get("jpeg"),
        lower => FORMATS.get(lower),
    }
}

fn quality(quality: i64) -> Result<u8, String> {
    u8::try_from(quality)
        .ok()
        .filter(|quality| (1..=100).contains(quality))
        .ok_or_else(|| format!("must be from 1 to 100, got {quality}"))
}

/// Folder and file name of a path that names a file.
fn split_path(path: &str) -> Result<(PathBuf, &str)> {
    let whole = Path::new(path);
    let name = whole.file_name().and_then(|name| name.to_str()).filter(|name| path.ends_with(name));
    let Some(name) = name else {
        // A final `..` is refused like any other; a final slash names no file.
        if path.split('/').any(|part| part == "..") {
            return Err(Error::PathNotAllowed { path: whole.to_owned() });
        }
        return Err(Error::invalid("output.path", format!("must name a file, got `{path}`")));
    };
    let folder = whole.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((folder.to_owned(), name))
}

/// Most bytes of a name: leaves space for `-<index>` and the extension in the 255 bytes of common file systems.
const MAX_NAME: usize = 200;

/// Refuses unsafe names instead of changing them.
fn check_name(name: &str, field: &str) -> Result<()> {
    let odd = |c: char| c == '/' || c == '\\' || c.is_control();
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || name.contains(odd) {
        let wanted = format!("must be a file name of 1 to {MAX_NAME} bytes without separators or a leading dot");
        return Err(Error::invalid(field, format!("{wanted}, got {name:?}")));
    }
    Ok(())
}

/// Splits `photo.PNG` into `photo` and PNG; an unknown extension is part of the name.
fn split_extension(name: &str) -> (&str, Option<&'static Format>) {
    match name.rsplit_once('.') {
        Some((stem, extension)) => match format(extension) {
            Ok(found) => (stem, Some(found)),
            Err(_) => (name, None),
        },
        None => (name, None),
    }
}

/// A file name from a request's id, which may be any text: keeps letters, digits, `.`, `_` and `-`, drops leading dots, and
/// cuts at 100 bytes.
fn file_stem(request_id: &str) -> String {
    let safe = |c: char| if c.is_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    let mut stem: String = request_id.trim_start_matches('.').chars().map(safe).collect();
    stem.truncate(stem.floor_char_boundary(100));
    if stem.is_empty() { "image".to_owned() } else { stem }
}

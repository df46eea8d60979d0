//! Images of a request, given by path, base64 or `data:` URL and checked before they are decoded.

pub(crate) mod completeness;

use std::borrow::Cow;
use std::io::{Cursor, Read};
use std::path::PathBuf;

use ::image::metadata::Orientation;
use ::image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};
use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

use crate::error::{Error, Result};
use crate::image::pixels::Rgb8;
use crate::roots::Roots;
use crate::units::Bytes;

/// An image file of at most 64 MiB, 64 million pixels and 65,535 pixels a side, PNG, JPEG or WebP.
///
/// On the wire: `{"path": "in.png"}`, `{"base64": "iVBOR…"}`, `"data:image/png;base64,iVBOR…"` or `"in.png"`.
#[derive(Clone, PartialEq, Eq)]
pub enum ImageSource {
    Path(PathBuf),
    Base64(String),
}

/// The bytes of an image with a valid header.
#[derive(Clone, Debug)]
pub struct ImageFile {
    pub bytes: Vec<u8>,
    pub format: ImageFormat,
    /// The width after [`Self::decode`] has applied the EXIF orientation.
    pub width: usize,
    pub height: usize,
    orientation: Orientation,
}

impl ImageSource {
    pub const MAX_BYTES: u64 = 64 * Bytes::MIB;
    pub const MAX_PIXELS: u64 = 64_000_000;
    /// The longest side of a JPEG; WebP's limit is lower.
    pub const MAX_SIDE: u32 = 65_535;

    /// Reads the file and its header, not the pixels. `field` is the request field of the source, for errors.
    ///
    /// # Errors
    /// `path_not_allowed` outside `roots`, `invalid_parameter` for unreadable files and invalid base64,
    /// `image_too_large`, and `image_decode_failed` for anything but PNG, JPEG and WebP.
    pub fn read(&self, roots: &Roots, field: &str) -> Result<ImageFile> {
        let bytes = match self {
            Self::Path(path) => {
                let real = roots.resolve(path, field)?;
                let unreadable = |error: &dyn std::fmt::Display| {
                    Error::invalid(field, format!("names `{}`, which cannot be read: {error}", path.display()))
                };
                // A pipe or a device would block the thread or never end.
                let metadata = real.metadata().map_err(|error| unreadable(&error))?;
                if !metadata.is_file() {
                    return Err(unreadable(&"it is not a file"));
                }
                if metadata.len() > Self::MAX_BYTES {
                    return Err(too_long());
                }
                let file = std::fs::File::open(&real).map_err(|error| unreadable(&error))?;
                let mut bytes = Vec::new();
                file.take(Self::MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| unreadable(&error))?;
                bytes
            }
            Self::Base64(text) => decode_base64(text, field)?,
        };
        ImageFile::inspect(bytes)
    }
}

/// Serializes a path as a string.
impl Serialize for ImageSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Path(path) => serializer.serialize_str(&path.to_string_lossy()),
            Self::Base64(text) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("base64", text)?;
                map.end()
            }
        }
    }
}

impl ImageFile {
    fn inspect(bytes: Vec<u8>) -> Result<Self> {
        if bytes.len() as u64 > ImageSource::MAX_BYTES {
            return Err(too_long());
        }
        let format = image::guess_format(&bytes)
            .ok()
            .filter(|format| matches!(format, ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP));
        let format = format
            .ok_or_else(|| Error::ImageDecodeFailed { message: "it is neither PNG nor JPEG nor WebP".to_owned() })?;
        let mut decoder = decoder(&bytes, format)?;
        let (width, height) = decoder.dimensions();
        let pixels = u64::from(width) * u64::from(height);
        if pixels > ImageSource::MAX_PIXELS {
            let limit = ImageSource::MAX_PIXELS;
            return Err(Error::ImageTooLarge {
                message: format!("{width} × {height} is {pixels} pixels, of at most {limit}"),
            });
        }
        if width.max(height) > ImageSource::MAX_SIDE {
            let limit = ImageSource::MAX_SIDE;
            return Err(Error::ImageTooLarge { message: format!("{width} × {height} has a side of over {limit}") });
        }
        // An unreadable orientation does not make the image invalid.
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        drop(decoder);
        if !completeness::is_complete(&bytes, format) {
            return Err(Error::ImageDecodeFailed { message: "the file ends before the image does".to_owned() });
        }
        let (width, height) = if swaps_sides(orientation) { (height, width) } else { (width, height) };
        Ok(Self { bytes, format, width: width as usize, height: height as usize, orientation })
    }

    /// The pixels, rotated by the file's EXIF orientation. Transparency is dropped, which uncovers the colours under it;
    /// grey, CMYK and 16-bit images become 8-bit RGB; an animation gives its first frame.
    ///
    /// # Errors
    /// `image_decode_failed` if the file is damaged.
    pub fn decode(&self) -> Result<Rgb8> {
        let image =
            DynamicImage::from_decoder(decoder(&self.bytes, self.format)?).map_err(|error| undecodable(&error))?;
        let mut image = DynamicImage::ImageRgb8(image.into_rgb8());
        image.apply_orientation(self.orientation);
        let image = image.into_rgb8();
        Ok(Rgb8 { width: image.width() as usize, height: image.height() as usize, data: image.into_raw() })
    }
}

/// True if the orientation swaps rows and columns.
fn swaps_sides(orientation: Orientation) -> bool {
    match orientation {
        Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH => {
            true
        }
        Orientation::NoTransforms
        | Orientation::Rotate180
        | Orientation::FlipHorizontal
        | Orientation::FlipVertical => false,
    }
}

/// A decoder that has read the header. Its limit applies to data other than pixels: colour profiles can be compression
/// bombs.
fn decoder(bytes: &[u8], format: ImageFormat) -> Result<impl ImageDecoder + '_> {
    let mut limits = Limits::default();
    limits.max_alloc = Some(8 * Bytes::MIB);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits);
    reader.into_decoder().map_err(|error| undecodable(&error))
}

fn too_long() -> Error {
    Error::ImageTooLarge { message: format!("a file may have at most {}", Bytes(ImageSource::MAX_BYTES)) }
}

fn undecodable(error: &ImageError) -> Error {
    match error {
        ImageError::Limits(_) => Error::ImageTooLarge { message: error.to_string() },
        _ => Error::ImageDecodeFailed { message: error.to_string() },
    }
}

/// Standard base64, with or without padding, with or without line breaks.
fn decode_base64(text: &str, field: &str) -> Result<Vec<u8>> {
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let text = if text.contains(|c: char| c.is_ascii_whitespace()) {
        Cow::Owned(text.chars().filter(|c| !c.is_ascii_whitespace()).collect())
    } else {
        Cow::Borrowed(text)
    };
    GeneralPurpose::new(&STANDARD, config)
        .decode(text.as_bytes())
        .map_err(|error| Error::invalid(field, format!("must be base64: {error}")))
}

impl std::fmt::Debug for ImageSource {
    /// Omits the bytes, which would fill the log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => write!(f, "Path({})", path.display()),
            Self::Base64(text) => write!(f, "Base64({} characters)", text.len()),
        }
    }
}

impl<'de> Deserialize<'de> for ImageSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SourceVisitor;

        impl<'de> Visitor<'de> for SourceVisitor {
            type Value = ImageSource;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a path, a data: URL, {\"path\": …} or {\"base64\": …}")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ImageSource, E> {
                let Some(url) = text.strip_prefix("data:") else { return Ok(ImageSource::Path(text.into())) };
                match url.split_once(',') {
                    Some((kind, data)) if kind.ends_with(";base64") => Ok(ImageSource::Base64(data.to_owned())),
                    _ => Err(E::custom("a data: URL must be `data:<type>;base64,<data>`")),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ImageSource, A::Error> {
                let mut source = None;
                while let Some(key) = map.next_key::<Cow<'_, str>>()? {
                    let value = match key.as_ref() {
                        "path" => ImageSource::Path(map.next_value()?),
                        "base64" => {
                            let text: String = map.next_value()?;
                            if text.starts_with("data:") { Self.visit_str(&text)? } else { ImageSource::Base64(text) }
                        }
                        other => return Err(A::Error::unknown_field(other, &["path", "base64"])),
                    };
                    if source.replace(value).is_some() {
                        return Err(A::Error::custom("an image has one of `path` and `base64`, not both"));
                    }
                }
                source.ok_or_else(|| A::Error::missing_field("path"))
            }
        }

        deserializer.deserialize_any(SourceVisitor)
    }
}

impl JsonSchema for ImageSource {
    fn schema_name() -> Cow<'static, str> {
        "ImageSource".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({
            "description": "A PNG, JPEG or WebP of at most 64 MiB, 64 million pixels and 65,535 pixels a side: a path, a data: URL, or an object with `path` or `base64`.",
            "anyOf": [
                { "type": "string" },
                { "type": "object", "properties": { "path": { "type": "string" } }, "required": ["path"], "additionalProperties": false },
                { "type": "object", "properties": { "base64": { "type": "string" } }, "required": ["base64"], "additionalProperties": false }
            ]
        })
    }
}

//! Detects truncated image files from the lengths of their parts, without decoding. Decoders would fill the missing part
//! with grey, or fail after much work.

use ::image::ImageFormat;

/// False if the file stops before the end marker of its format. Data after the end is ignored.
pub(crate) fn is_complete(bytes: &[u8], format: ImageFormat) -> bool {
    match format {
        ImageFormat::Png => png(bytes),
        ImageFormat::Jpeg => jpeg(bytes).is_some(),
        ImageFormat::WebP => webp(bytes),
        _ => true,
    }
}

/// A signature, then chunks of length, name, data and checksum up to `IEND`.
fn png(bytes: &[u8]) -> bool {
    let mut rest = bytes.get(8..).unwrap_or_default();
    while let Some((head, after)) = rest.split_at_checked(8) {
        let (length, name) = head.split_at(4);
        let length = length.iter().fold(0usize, |sum, &byte| sum << 8 | usize::from(byte));
        let Some(next) = length.checked_add(4).and_then(|end| after.get(end..)) else { return false };
        if name == b"IEND" {
            return true;
        }
        rest = next;
    }
    false
}

/// Segments begin with a marker, most with a length; after a start of scan follows data in which 0xff precedes only 0 or a
/// restart marker. `Some` at the end marker.
fn jpeg(bytes: &[u8]) -> Option<()> {
    let mut at = 2;
    loop {
        // 0xff bytes may pad the space before a marker.
        let mark = at + bytes.get(at..)?.iter().position(|&byte| byte != 0xff)?;
        match bytes[mark] {
            0xd9 if mark > at => return Some(()),
            0x00 | 0x01 | 0xd0..=0xd8 if mark > at => at = mark + 1,
            // Not a marker; decoders skip it as well.
            _ if mark == at => at += 1,
            marker => {
                let length = usize::from(*bytes.get(mark + 1)?) << 8 | usize::from(*bytes.get(mark + 2)?);
                at = mark + 1 + length.max(2);
                if marker == 0xda {
                    at = scan_end(bytes, at)?;
                }
            }
        }
    }
}

/// Position of the marker after a scan.
fn scan_end(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        at += bytes.get(at..)?.iter().position(|&byte| byte == 0xff)?;
        match bytes.get(at + 1)? {
            0x00 | 0xd0..=0xd7 => at += 2,
            0xff => at += 1,
            _ => return Some(at),
        }
    }
}

/// The container's length follows `RIFF`.
fn webp(bytes: &[u8]) -> bool {
    let length = bytes.get(4..8).map(|length| length.iter().rev().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte)));
    length.is_some_and(|length| length + 8 <= bytes.len() as u64)
}

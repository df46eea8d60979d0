//! The EXIF block of JPEG and WebP: the parameters as `UserComment`, where AUTOMATIC1111 looks, and the request as
//! `MakerNote`, whose format is up to the writer. CIPA DC-008 (Exif 2.32), 4.6.2 and 4.6.5.
//!
//! ```text
//! header 8 │ IFD0: one entry → Exif IFD │ Exif IFD: one or two entries │ their values
//! ```
//! Everything is big-endian, because readers assume big-endian UTF-16 in `UserComment` whatever the header says.

const EXIF_IFD: u16 = 0x8769;
const MAKER_NOTE: u16 = 0x927c;
const USER_COMMENT: u16 = 0x9286;
/// Type numbers of an entry's value.
const LONG: u16 = 4;
const UNDEFINED: u16 = 7;
/// Marks a comment as UTF-16.
const UNICODE: &[u8; 8] = b"UNICODE\0";
/// Marks a maker note as ours.
const OURS: &[u8] = b"sdxl_worker\0";

const HEADER: usize = 8;
const ENTRY: usize = 12;

/// The texts of an EXIF block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ExifText {
    pub(crate) parameters: Option<String>,
    pub(crate) request: Option<String>,
}

/// A TIFF block without the `Exif\0\0` that JPEG puts before it.
pub(crate) fn write(parameters: &str, request: Option<&str>) -> Vec<u8> {
    let comment: Vec<u8> =
        UNICODE.iter().copied().chain(parameters.encode_utf16().flat_map(u16::to_be_bytes)).collect();
    let note = request.map(|request| [OURS, request.as_bytes()].concat());
    // Entries are sorted by tag.
    let values: Vec<(u16, Vec<u8>)> =
        note.map(|note| (MAKER_NOTE, note)).into_iter().chain([(USER_COMMENT, comment)]).collect();

    let table = |entries: usize| 2 + entries * ENTRY + 4;
    let exif_ifd = HEADER + table(1);
    let mut block = Vec::new();
    block.extend(b"MM\0*");
    block.extend(be32(HEADER));
    push_table(&mut block, &[(EXIF_IFD, LONG, 1, exif_ifd)]);
    let mut offset = exif_ifd + table(values.len());
    let mut entries = Vec::new();
    for (tag, value) in &values {
        entries.push((*tag, UNDEFINED, value.len(), offset));
        offset += value.len();
    }
    push_table(&mut block, &entries);
    block.extend(values.into_iter().flat_map(|(_, value)| value));
    block
}

fn push_table(block: &mut Vec<u8>, entries: &[(u16, u16, usize, usize)]) {
    block.extend(u16::try_from(entries.len()).unwrap_or(u16::MAX).to_be_bytes());
    for &(tag, kind, count, value) in entries {
        block.extend(tag.to_be_bytes());
        block.extend(kind.to_be_bytes());
        block.extend(be32(count));
        block.extend(be32(value));
    }
    block.extend([0; 4]); // no further table
}

/// Saturates: every container refuses blocks far below 4 GiB.
fn be32(value: usize) -> [u8; 4] {
    u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes()
}

/// Both texts of a block, with or without the leading `Exif\0\0`; `None` for missing and damaged ones.
pub(crate) fn read(block: &[u8]) -> ExifText {
    let block = block.strip_prefix(b"Exif\0\0").unwrap_or(block);
    find(block).unwrap_or_default()
}

fn find(block: &[u8]) -> Option<ExifText> {
    let tiff = Tiff { block, big_endian: block.starts_with(b"MM") };
    if !tiff.big_endian && !block.starts_with(b"II") {
        return None;
    }
    let ifd0 = tiff.u32(4)?;
    let (_, exif_ifd) = tiff.entry(ifd0, EXIF_IFD)?;
    let value =
        |tag| tiff.entry(exif_ifd, tag).and_then(|(length, offset)| block.get(offset..offset.checked_add(length)?));
    let request = value(MAKER_NOTE).and_then(|note| note.strip_prefix(OURS));
    Some(ExifText {
        parameters: value(USER_COMMENT).and_then(|comment| tiff.comment(comment)),
        request: request.and_then(|request| String::from_utf8(request.to_vec()).ok()),
    })
}

struct Tiff<'a> {
    block: &'a [u8],
    big_endian: bool,
}

impl Tiff<'_> {
    fn u16(&self, offset: usize) -> Option<u16> {
        let bytes = self.block.get(offset..)?.first_chunk()?;
        Some(if self.big_endian { u16::from_be_bytes(*bytes) } else { u16::from_le_bytes(*bytes) })
    }

    fn u32(&self, offset: usize) -> Option<usize> {
        let bytes = self.block.get(offset..)?.first_chunk()?;
        usize::try_from(if self.big_endian { u32::from_be_bytes(*bytes) } else { u32::from_le_bytes(*bytes) }).ok()
    }

    /// Count and value (or its offset) of the entry `tag` of the table at `table`.
    fn entry(&self, table: usize, tag: u16) -> Option<(usize, usize)> {
        let entries = usize::from(self.u16(table)?);
        (0..entries).find_map(|index| {
            let entry = table.checked_add(2 + index * ENTRY)?;
            if self.u16(entry)? != tag {
                return None;
            }
            Some((self.u32(entry + 4)?, self.u32(entry + 8)?))
        })
    }

    fn comment(&self, comment: &[u8]) -> Option<String> {
        if let Some(text) = comment.strip_prefix(b"ASCII\0\0\0") {
            return String::from_utf8(text.to_vec()).ok();
        }
        let units = comment.strip_prefix(UNICODE)?.chunks_exact(2).filter_map(|pair| pair.first_chunk());
        // Programs that write a little-endian block may still write a big-endian comment, so the text decides: the byte
        // order with more characters below U+0100.
        let big: Vec<u16> = units.map(|pair| u16::from_be_bytes(*pair)).collect();
        let low = |units: &[u16]| units.iter().filter(|unit| **unit < 0x100).count();
        let little: Vec<u16> = big.iter().map(|unit| unit.swap_bytes()).collect();
        let units = if low(&little) > low(&big) { little } else { big };
        String::from_utf16(&units).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::{ExifText, read, write};

    fn check(parameters: &str, request: Option<&str>) {
        let expected = ExifText { parameters: Some(parameters.to_owned()), request: request.map(str::to_owned) };
        assert_eq!(read(&write(parameters, request)), expected);
    }

    #[test]
    fn written_texts_read_back() {
        check("a lighthouse\nSteps: 25", Some(r#"{"prompt":"a lighthouse"}"#));
        check("灯台 🗼", Some(r#"{"prompt":"灯台"}"#));
        check("", None);
    }

    #[test]
    fn damaged_block_does_not_panic() {
        let block = write("a lighthouse", Some("{}"));
        for end in 0..block.len() {
            read(&block[..end]);
        }
        for at in 0..block.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut damaged = block.clone();
                damaged[at] = value;
                read(&damaged);
            }
        }
    }
}

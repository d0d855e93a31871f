//! Telling eStargz from other gzip.

use std::io::{self, BufReader, Read};

use flate2::bufread::GzDecoder;
use oci::{Digest, Digester};

use super::{FOOTER, TABLE_NAME};
use crate::tar::Reader;

/// What a blob's table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    /// Where in the blob it begins: what lies before is the layer.
    pub offset: u64,
    /// Digest of its JSON.
    pub digest: Digest,
}

/// Looks for the table of a blob of `length` bytes; `None` for a blob that has none where its end says that it is.
/// `read_at` fills its buffer from an offset.
///
/// # Errors
/// Those of `read_at`. What does not look like eStargz is none, and is no error.
pub fn find(
    length: u64,
    read_at: impl Fn(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<Option<Table>> {
    let Some(end) = length.checked_sub(FOOTER as u64) else {
        return Ok(None);
    };
    let mut footer = [0; FOOTER];
    read_at(&mut footer, end)?;
    let Some(offset) = parse_footer(&footer).filter(|offset| *offset <= end) else {
        return Ok(None);
    };
    let mut range = Range {
        read_at,
        at: offset,
        end,
        failed: None,
    };
    let digest = table_digest(&mut range);
    match (digest, range.failed) {
        (_, Some(error)) => Err(error),
        (digest, None) => Ok(digest.map(|digest| Table { offset, digest })),
    }
}

fn parse_footer(footer: &[u8; FOOTER]) -> Option<u64> {
    let rest = footer.strip_prefix(&[0x1f, 0x8b, 8, 4])?;
    // Time, flags and system say nothing.
    let rest = rest.get(6..)?.strip_prefix(&[26, 0, b'S', b'G', 22, 0])?;
    let (digits, rest) = rest.split_at_checked(16)?;
    rest.strip_prefix(b"STARGZ")?;
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Digests the table; `None` when it is not the only entry of an archive of its own.
fn table_digest(range: &mut Range<impl Fn(&mut [u8], u64) -> io::Result<()>>) -> Option<Digest> {
    let plain = GzDecoder::new(BufReader::new(range));
    let mut archive = Reader::new(plain);
    let header = archive.next_entry().ok()??;
    if header.name != TABLE_NAME.as_bytes() {
        return None;
    }
    let mut digester = Digester::sha256();
    io::copy(&mut archive, &mut digester).ok()?;
    archive.next_entry().ok()?.is_none().then(|| digester.finish())
}

/// Reads a part of a blob and remembers a failure, which those who decode do not tell from nonsense.
struct Range<F> {
    read_at: F,
    at: u64,
    end: u64,
    failed: Option<io::Error>,
}

impl<F: Fn(&mut [u8], u64) -> io::Result<()>> Read for Range<F> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let count = buf.len().min(left);
        if let Err(error) = (self.read_at)(&mut buf[..count], self.at) {
            let kind = error.kind();
            self.failed = Some(error);
            return Err(kind.into());
        }
        self.at += count as u64;
        Ok(count)
    }
}

//! Compressing and decompressing layers.

mod aside;
mod blocks;
mod density;
pub mod estargz;
mod pack;

use std::io::{self, BufRead, BufReader, Cursor, Read};

pub use pack::{Packed, Packer};

/// A layer's compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Compression {
    /// None.
    Uncompressed,
    /// gzip.
    #[default]
    Gzip,
    /// gzip that can be read file by file; its first bytes are gzip's.
    Estargz,
    /// zstd.
    Zstd,
}

const GZIP: &[u8] = &[0x1f, 0x8b, 0x08];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// The second to fourth byte of a zstd frame that holds no data; the first is 0x50 to 0x5f.
const ZSTD_SKIPPABLE: &[u8] = &[0x2a, 0x4d, 0x18];

impl Compression {
    /// Recognizes a stream by its first bytes; four are enough. eStargz counts as gzip: see [`estargz::find`].
    pub fn sniff(start: &[u8]) -> Self {
        let skippable = start.first().is_some_and(|byte| byte & 0xf0 == 0x50);
        if start.starts_with(GZIP) {
            Self::Gzip
        } else if start.starts_with(ZSTD) || skippable && start[1..].starts_with(ZSTD_SKIPPABLE) {
            Self::Zstd
        } else {
            Self::Uncompressed
        }
    }
}

/// Decompresses a stream of unknown compression, found out by its first bytes. Concatenated gzip members and zstd frames
/// are one stream; a stream cut short is an error.
pub fn decompress<'a>(input: impl Read + 'a) -> io::Result<(Compression, Box<dyn BufRead + 'a>)> {
    let (start, input) = peek(input)?;
    let compression = Compression::sniff(&start);
    Ok((compression, open(compression, input)?))
}

/// Reads the first six bytes of a stream and puts them back.
fn peek<'a>(mut input: impl Read + 'a) -> io::Result<(Vec<u8>, impl BufRead + 'a)> {
    let mut start = Vec::with_capacity(6);
    (&mut input).take(6).read_to_end(&mut start)?;
    let whole = BufReader::with_capacity(128 * 1024, Cursor::new(start.clone()).chain(input));
    Ok((start, whole))
}

fn open<'a>(compression: Compression, input: impl BufRead + 'a) -> io::Result<Box<dyn BufRead + 'a>> {
    Ok(match compression {
        Compression::Uncompressed => Box::new(input),
        Compression::Gzip | Compression::Estargz => Box::new(BufReader::with_capacity(
            128 * 1024,
            flate2::bufread::MultiGzDecoder::new(input),
        )),
        Compression::Zstd => Box::new(BufReader::with_capacity(
            128 * 1024,
            zstd::stream::read::Decoder::with_buffer(input)?,
        )),
    })
}

/// As [`decompress`], for archives that users add: also bzip2 and xz.
pub fn decompress_archive<'a>(input: impl Read + 'a) -> io::Result<Box<dyn BufRead + 'a>> {
    let (start, input) = peek(input)?;
    if start.starts_with(b"BZh") {
        return Ok(Box::new(BufReader::new(bzip2::bufread::MultiBzDecoder::new(
            input,
        ))));
    }
    if start.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
        return Ok(Box::new(BufReader::new(lzma_rust2::XzReader::new(input, true))));
    }
    open(Compression::sniff(&start), input)
}

//! A layer on its way out: digested, compressed, digested again.

use std::fmt;
use std::io::{self, Write};
use std::num::NonZero;

use oci::{Digest, Digester};
use zstd::stream::write::Encoder;

use super::Compression;
use super::blocks::GzipBlocks;

/// What a [`Packer`] made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// Digest of what went in: a layer's diffID.
    pub diff_id: Digest,
    /// Bytes that went in.
    pub uncompressed_bytes: u64,
    /// Digest of what came out: the blob's.
    pub digest: Digest,
    /// Bytes that came out.
    pub size_bytes: u64,
}

/// Level of gzip where none is asked for. libdeflate's fifth makes layers a little smaller than zlib's sixth, the default of
/// other builders, does.
const DEFAULT_GZIP_LEVEL: i32 = 5;

/// Compresses what is written to it and works out both digests.
///
/// gzip comes as members of one MiB each, compressed by several threads; zstd likewise in several threads. The bytes depend
/// on input, compression and level alone. Dropping it unfinished ends the threads.
pub struct Packer<W: Write> {
    stream: Stream<W>,
    digester: Digester,
    count: u64,
}

enum Stream<W: Write> {
    Plain(Counted<W>),
    Gzip(GzipBlocks<Counted<W>>),
    Zstd(Encoder<'static, Counted<W>>),
}

/// Digests what is written through it.
struct Counted<W> {
    inner: W,
    digester: Digester,
    count: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.digester.update(&bytes[..count]);
        self.count += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<W: Write> Packer<W> {
    /// Starts packing into `out`. `level` is the format's own (gzip 0 to 12, zstd 1 to 22); `None` is the
    /// default (5, 3).
    pub fn new(out: W, compression: Compression, level: Option<i32>) -> io::Result<Self> {
        let out = Counted {
            inner: out,
            digester: Digester::sha256(),
            count: 0,
        };
        let stream = match compression {
            Compression::Uncompressed => Stream::Plain(out),
            Compression::Gzip => Stream::Gzip(GzipBlocks::new(out, level.unwrap_or(DEFAULT_GZIP_LEVEL))?),
            Compression::Zstd => {
                let level = level.unwrap_or(3);
                if !(1..=22).contains(&level) {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        format!("zstd level {level}"),
                    ));
                }
                let mut encoder = Encoder::new(out, level)?;
                encoder.include_checksum(true)?;
                // At least one worker: the bytes differ between none and some, but not with their number.
                let workers = std::thread::available_parallelism()
                    .map_or(1, NonZero::get)
                    .min(4);
                encoder.multithread(u32::try_from(workers).unwrap_or(1))?;
                Stream::Zstd(encoder)
            }
        };
        Ok(Self {
            stream,
            digester: Digester::sha256(),
            count: 0,
        })
    }

    /// Writes what is outstanding and returns the output with the result.
    pub fn finish(self) -> io::Result<(W, Packed)> {
        let mut out = match self.stream {
            Stream::Plain(out) => out,
            Stream::Gzip(blocks) => blocks.finish()?,
            Stream::Zstd(encoder) => encoder.finish()?,
        };
        out.flush()?;
        let packed = Packed {
            diff_id: self.digester.finish(),
            uncompressed_bytes: self.count,
            digest: out.digester.finish(),
            size_bytes: out.count,
        };
        Ok((out.inner, packed))
    }
}

impl<W: Write> Write for Packer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = match &mut self.stream {
            Stream::Plain(out) => out.write(bytes)?,
            Stream::Gzip(blocks) => blocks.write(bytes)?,
            Stream::Zstd(encoder) => encoder.write(bytes)?,
        };
        self.digester.update(&bytes[..count]);
        self.count += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<W: Write> fmt::Debug for Packer<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer")
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

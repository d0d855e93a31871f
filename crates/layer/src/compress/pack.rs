//! A layer on its way out: digested, then compressed.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::num::NonZero;

use oci::Digest;
use zstd::stream::write::Encoder;

use super::Compression;
use super::aside::Aside;
use super::blocks::{Effort, GzipBlocks};
use super::estargz::{self, Estargz};

/// Level of gzip where none is asked for. libdeflate's fifth makes layers a little smaller than zlib's sixth, the default of
/// other builders, does.
const DEFAULT_GZIP_LEVEL: i32 = 5;

/// Compresses what is written to it and works out the digest of what goes in; that of what comes out is for whoever stores
/// it.
///
/// gzip comes as members of at most one MiB each, compressed by several threads; zstd likewise in several threads. Without a
/// level, gzip stores what is dense already. eStargz takes nothing but a tar archive, and adds a table to it. The bytes
/// depend on input, compression and level alone. Dropping it unfinished ends the threads.
pub struct Packer<W: Write> {
    stream: Stream<W>,
    count: u64,
}

/// A blob that is done.
#[derive(Debug)]
pub struct Packed<W> {
    /// The output.
    pub out: W,
    /// Digest of what the blob decompresses to: the layer's diffID.
    pub diff_id: Digest,
    /// Annotations that the blob's descriptor has to have; none but with eStargz.
    pub annotations: BTreeMap<String, String>,
}

/// What is gzip is digested in the blocks that are compressed.
enum Stream<W: Write> {
    Plain(W, Aside),
    Gzip(GzipBlocks<W>),
    Estargz(Box<Estargz<W>>),
    Zstd(Encoder<'static, W>, Aside),
}

impl<W: Write> Packer<W> {
    /// Starts packing into `out`. `level` is the format's own (gzip and eStargz 0 to 12, zstd 1 to 22); `None` is the
    /// default (5, 3).
    pub fn new(out: W, compression: Compression, level: Option<i32>) -> io::Result<Self> {
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        Self::with_threads(out, compression, level, threads)
    }

    fn with_threads(
        out: W,
        compression: Compression,
        level: Option<i32>,
        threads: usize,
    ) -> io::Result<Self> {
        let stream = match compression {
            Compression::Uncompressed => Stream::Plain(out, Aside::new()),
            Compression::Gzip => {
                // Whoever asks for a level wants the size it gives.
                let effort = Effort::new(level.unwrap_or(DEFAULT_GZIP_LEVEL), level.is_none())?;
                Stream::Gzip(GzipBlocks::new(out, effort, threads))
            }
            Compression::Estargz => {
                let effort = Effort::new(level.unwrap_or(DEFAULT_GZIP_LEVEL), false)?;
                Stream::Estargz(Box::new(Estargz::new(out, effort, threads)))
            }
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
                let workers = threads.clamp(1, 4);
                encoder.multithread(u32::try_from(workers).unwrap_or(1))?;
                Stream::Zstd(encoder, Aside::new())
            }
        };
        Ok(Self { stream, count: 0 })
    }

    /// Writes what is outstanding and returns the output with the layer's diffID.
    pub fn finish(mut self) -> io::Result<Packed<W>> {
        let mut annotations = BTreeMap::new();
        let (mut out, digester) = match self.stream {
            Stream::Plain(out, digester) => (out, digester),
            Stream::Gzip(blocks) => {
                let ended = blocks.finish()?;
                (ended.out.out, ended.digester)
            }
            Stream::Estargz(stream) => {
                let mut ended = stream.finish()?;
                ended.digester.update(&ended.table)?;
                self.count += ended.table.len() as u64;
                annotations = estargz::annotations(&ended.digest, self.count);
                (ended.out, ended.digester)
            }
            Stream::Zstd(encoder, digester) => (encoder.finish()?, digester),
        };
        out.flush()?;
        Ok(Packed {
            out,
            diff_id: digester.finish()?,
            annotations,
        })
    }
}

impl<W: Write> Write for Packer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = match &mut self.stream {
            Stream::Plain(out, digester) => digested(out, digester, bytes)?,
            Stream::Gzip(blocks) => blocks.write(bytes)?,
            Stream::Estargz(stream) => stream.write(bytes)?,
            Stream::Zstd(encoder, digester) => digested(encoder, digester, bytes)?,
        };
        self.count += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes bytes and digests what was taken of them.
fn digested(out: &mut impl Write, digester: &mut Aside, bytes: &[u8]) -> io::Result<usize> {
    let count = out.write(bytes)?;
    digester.update(&bytes[..count])?;
    Ok(count)
}

impl<W: Write> fmt::Debug for Packer<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer")
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::{EntryKind, Header, Writer};

    /// An archive of two files of several blocks each, a part of which cannot be made smaller.
    fn archive() -> Vec<u8> {
        let mut state = 1_u32;
        let mut archive = Writer::new(Vec::new());
        for name in ["a", "b"] {
            let bytes: Vec<u8> = (0..5_000_000_u32)
                .map(|at| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let noise = state.to_be_bytes()[0];
                    if at < 2_000_000 { noise } else { noise & 7 }
                })
                .collect();
            let mut header = Header::new(EntryKind::Regular, name);
            header.size_bytes = bytes.len() as u64;
            archive.write_header(&header).unwrap();
            archive.write_all(&bytes).unwrap();
        }
        archive.finish().unwrap()
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let archive = archive();
        for compression in [Compression::Gzip, Compression::Estargz, Compression::Zstd] {
            let pack = |threads| {
                let mut packer = Packer::with_threads(Vec::new(), compression, None, threads).unwrap();
                packer.write_all(&archive).unwrap();
                let packed = packer.finish().unwrap();
                (Digest::sha256(&packed.out), packed.diff_id)
            };
            let one = pack(1);
            for threads in [2, 3, 8] {
                assert_eq!(pack(threads), one, "{compression:?} {threads}");
            }
        }
    }
}

//! Compressing and decompressing layers.

use std::io::{self, BufRead, Read, Write};

use oci::Digest;

/// A layer's compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Compression {
    /// None.
    Uncompressed,
    /// gzip.
    #[default]
    Gzip,
    /// zstd.
    Zstd,
}

impl Compression {
    /// Recognizes a stream by its first bytes; four are enough.
    pub fn sniff(start: &[u8]) -> Self {
        todo!()
    }
}

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

/// Compresses what is written to it and works out both digests.
///
/// gzip comes as members of one MiB each, compressed by several threads; the bytes depend on input and level alone.
#[derive(Debug)]
pub struct Packer<W: Write> {
    out: W,
}

impl<W: Write> Packer<W> {
    /// Starts packing into `out`. `level` is the format's own; `None` is its default (gzip 6, zstd 3).
    pub fn new(out: W, compression: Compression, level: Option<i32>) -> io::Result<Self> {
        todo!()
    }

    /// Writes what is outstanding and returns the output with the result.
    pub fn finish(self) -> io::Result<(W, Packed)> {
        todo!()
    }
}

impl<W: Write> Write for Packer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        todo!()
    }

    fn flush(&mut self) -> io::Result<()> {
        todo!()
    }
}

/// Decompresses a stream of unknown compression, found out by its first bytes. Concatenated gzip members and zstd frames
/// are one stream; a stream cut short is an error.
pub fn decompress<'a>(input: impl Read + 'a) -> io::Result<(Compression, Box<dyn BufRead + 'a>)> {
    todo!()
}

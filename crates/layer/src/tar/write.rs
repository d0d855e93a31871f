//! Writing.

use std::io::{self, Write};

use super::Header;

/// Writes an archive: headers in ustar where they fit, in PAX where not.
#[derive(Debug)]
pub struct Writer<W> {
    inner: W,
}

impl<W: Write> Writer<W> {
    /// Starts an archive.
    pub fn new(inner: W) -> Self {
        todo!()
    }

    /// Writes a header; exactly `size_bytes` of data must follow for regular files.
    pub fn write_header(&mut self, header: &Header) -> io::Result<()> {
        todo!()
    }

    /// Ends the archive with its two zero blocks and returns the output.
    pub fn finish(self) -> io::Result<W> {
        todo!()
    }
}

impl<W: Write> Write for Writer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        todo!()
    }

    fn flush(&mut self) -> io::Result<()> {
        todo!()
    }
}

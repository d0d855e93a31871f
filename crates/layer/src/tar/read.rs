//! Reading.

use std::io::{self, Read};

use super::Header;

/// A damaged archive.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The stream failed or ended early.
    #[error("read archive")]
    Io(#[source] io::Error),
    /// A header says what cannot be.
    #[error("invalid tar header at byte {offset}: {reason}")]
    Header {
        /// Where the header begins.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
}

/// Reads an archive entry by entry. Understands ustar, PAX, GNU long names and GNU sparse files.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
}

impl<R: Read> Reader<R> {
    /// Starts at the beginning of an uncompressed archive.
    pub fn new(inner: R) -> Self {
        todo!()
    }

    /// Skips what is left of the current entry and reads the next header; `None` at the archive's end.
    pub fn next_entry(&mut self) -> Result<Option<Header>, ReadError> {
        todo!()
    }
}

/// Reads the current entry's data; holes read as zeros.
impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        todo!()
    }
}

//! Reading one blob.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use oci::{Digest, Digester};

use crate::error::VerifyError;

/// An open blob. The bytes stay readable through this handle even when the blob is deleted meanwhile.
#[derive(Debug)]
pub struct Blob {
    pub(crate) digest: Digest,
    pub(crate) file: File,
    pub(crate) size_bytes: u64,
}

impl Blob {
    /// Returns the digest the blob was opened by.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> u64 {
        self.size_bytes
    }

    /// Reports whether the blob has no bytes.
    pub fn is_empty(&self) -> bool {
        self.size_bytes == 0
    }

    /// Reads at an offset without moving any cursor; safe from many threads at once. Returns 0 at the end.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    /// Fills `buf` from an offset, or fails with `UnexpectedEof`.
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// Reads the whole blob, at most `limit` bytes of it: a larger blob is an error, so that a hostile manifest cannot
    /// fill the memory.
    pub fn read_all(&self, limit: usize) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.size_bytes)
            .ok()
            .filter(|len| *len <= limit)
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{} is larger than {limit} bytes", self.digest),
                )
            })?;
        let mut bytes = vec![0; len];
        self.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Turns the blob into a sequential, seekable reader.
    pub fn into_reader(self) -> BlobReader {
        BlobReader {
            blob: self,
            offset: 0,
        }
    }

    /// Turns the blob into a reader from front to back that fails where it would end if its bytes are not the digest's. The
    /// failure is [`VerifyError::Corrupt`](crate::VerifyError) in an [`io::Error`].
    pub fn into_verified_reader(self) -> VerifiedReader {
        VerifiedReader {
            digester: Digester::new(self.digest.algorithm()),
            reader: self.into_reader(),
        }
    }

    /// Hands out the file, positioned at its start, for `sendfile`, `copy_file_range` and the like. Never write to it.
    pub fn into_file(self) -> File {
        self.file
    }
}

/// Reads a [`Blob`] from front to back.
#[derive(Debug)]
pub struct BlobReader {
    blob: Blob,
    offset: u64,
}

impl Read for BlobReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.blob.read_at(buf, self.offset)?;
        self.offset += u64::try_from(count).map_err(io::Error::other)?;
        Ok(count)
    }
}

/// Reads a [`Blob`] from front to back and checks its digest at the end.
#[derive(Debug)]
pub struct VerifiedReader {
    reader: BlobReader,
    digester: Digester,
}

impl Read for VerifiedReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buf)?;
        self.digester.update(&buf[..count]);
        if count > 0 || buf.is_empty() {
            return Ok(count);
        }
        let (digest, actual) = (self.reader.blob.digest, self.digester.clone().finish());
        if actual == digest {
            return Ok(0);
        }
        let actual = actual.into();
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            VerifyError::Corrupt { digest, actual },
        ))
    }
}

impl Seek for BlobReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(delta) => self.blob.size_bytes.checked_add_signed(delta),
            SeekFrom::Current(delta) => self.offset.checked_add_signed(delta),
        };
        self.offset = target.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.offset)
    }
}

//! Writing: ingests, which become blobs when they prove to be what they claim.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use oci::{Algorithm, Descriptor, Digest, Digester};

use crate::error::{IoContext, StoreError, WriteError};
use crate::store::{Durability, Shared};

/// What is known of an unfinished ingest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IngestStat {
    /// The key its writer opened it with.
    pub ref_key: String,
    /// Bytes written so far.
    pub offset_bytes: u64,
    /// When bytes last arrived.
    pub updated: SystemTime,
}

/// An ingest being written. Holds its reference key exclusively until dropped or committed.
///
/// Dropping it keeps the bytes: a later [`Store::writer`](crate::Store::writer) with the same key goes on at
/// [`offset`](Self::offset). [`commit`](Self::commit) publishes, [`discard`](Self::discard) throws away.
#[derive(Debug)]
pub struct Writer {
    lock: KeyLock,
    dir: PathBuf,
    file: File,
    algorithm: Algorithm,
    digester: Digester,
    offset_bytes: u64,
    expected: Option<(Digest, u64)>,
}

/// Holds a reference key in the table of open writers.
#[derive(Debug)]
struct KeyLock {
    shared: Arc<Shared>,
    ref_key: String,
}

impl Drop for KeyLock {
    fn drop(&mut self) {
        self.shared.writers().remove(&self.ref_key);
    }
}

impl Writer {
    pub(crate) fn open(
        shared: &Arc<Shared>,
        ref_key: &str,
        expected: Option<&Descriptor>,
    ) -> Result<Self, WriteError> {
        if !shared.writers().insert(ref_key.to_owned()) {
            return Err(WriteError::Busy {
                ref_key: ref_key.to_owned(),
            });
        }
        let lock = KeyLock {
            shared: Arc::clone(shared),
            ref_key: ref_key.to_owned(),
        };
        let dir = shared.ingest_dir(ref_key);
        let known = fs::create_dir(&dir);
        match known {
            Ok(()) => fs::write(dir.join("ref"), ref_key).at("write", dir.join("ref"))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(Err::<(), _>(error)
                    .at("create", &dir)
                    .expect_err("an error stays one")
                    .into());
            }
        }
        let path = dir.join("data");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .at("open", &path)?;
        let algorithm = expected
            .map(|descriptor| descriptor.digest.algorithm())
            .unwrap_or_default();
        let mut writer = Self {
            lock,
            dir,
            file,
            algorithm,
            digester: Digester::new(algorithm),
            offset_bytes: 0,
            expected: expected.map(|descriptor| (descriptor.digest, descriptor.size)),
        };
        writer.rehash()?;
        Ok(writer)
    }

    /// Reads what an earlier writer left, so that hashing can go on behind it.
    fn rehash(&mut self) -> Result<(), StoreError> {
        let path = self.dir.join("data");
        let mut buf = vec![0; 128 * 1024];
        loop {
            let count = self.file.read(&mut buf).at("read", &path)?;
            if count == 0 {
                break;
            }
            self.digester.update(&buf[..count]);
            self.offset_bytes += count as u64;
        }
        if self.expected.is_some_and(|(_, size)| self.offset_bytes > size) {
            self.restart()?;
        }
        Ok(())
    }

    /// Returns the key this ingest was opened with.
    pub fn ref_key(&self) -> &str {
        &self.lock.ref_key
    }

    /// Returns how many bytes are there; a resumed download asks its source for what follows.
    pub fn offset(&self) -> u64 {
        self.offset_bytes
    }

    /// Returns the digest of the bytes that are there.
    pub fn digest(&self) -> Digest {
        self.digester.clone().finish()
    }

    /// Drops all bytes and begins at zero, for sources that cannot resume.
    pub fn restart(&mut self) -> Result<(), StoreError> {
        self.file.set_len(0).at("truncate", self.dir.join("data"))?;
        self.digester = Digester::new(self.algorithm);
        self.offset_bytes = 0;
        Ok(())
    }

    /// Throws the ingest away.
    pub fn discard(self) -> Result<(), StoreError> {
        fs::remove_dir_all(&self.dir).at("remove", &self.dir)
    }

    /// Verifies and publishes with [`Durability::Immediate`]; see [`commit_with`](Self::commit_with).
    pub fn commit(self) -> Result<Digest, WriteError> {
        self.commit_with(Durability::Immediate)
    }

    /// Verifies digest and size against what the writer was opened with and makes the blob visible.
    ///
    /// Committing a blob that is already there is a success: the ingest is dropped. On a digest mismatch, or more bytes
    /// than expected, the ingest is dropped too, as resuming it could not help; with too few bytes it stays for a resumption.
    pub fn commit_with(self, durability: Durability) -> Result<Digest, WriteError> {
        if let Some((_, size)) = self.expected
            && size != self.offset_bytes
        {
            let ref_key = self.lock.ref_key.clone();
            let actual = self.offset_bytes;
            if actual > size {
                self.discard()?;
            }
            return Err(WriteError::SizeMismatch {
                ref_key,
                expected: size,
                actual,
            });
        }
        let actual = self.digest();
        if let Some((expected, _)) = self.expected
            && expected != actual
        {
            let ref_key = self.lock.ref_key.clone();
            self.discard()?;
            return Err(WriteError::DigestMismatch {
                ref_key,
                expected: expected.into(),
                actual: actual.into(),
            });
        }
        let Self { lock, dir, file, .. } = self;
        lock.shared
            .publish(&dir.join("data"), &file, &actual, durability)?;
        fs::remove_dir_all(&dir).at("remove", &dir)?;
        Ok(actual)
    }

    fn write_chunk(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write_at(bytes, self.offset_bytes)?;
        self.digester.update(&bytes[..count]);
        self.offset_bytes += count as u64;
        Ok(count)
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self
            .expected
            .map(|(_, size)| size.saturating_sub(self.offset_bytes));
        if !bytes.is_empty() && room.is_some_and(|room| room < bytes.len() as u64) {
            // A source that sends more than it announced must not fill the disk.
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "more bytes than the descriptor announces",
            ));
        }
        self.write_chunk(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads the state of the ingest in `dir`; `None` when it is not (or no longer) one.
pub(crate) fn stat(dir: &Path) -> Option<IngestStat> {
    let ref_key = fs::read_to_string(dir.join("ref")).ok()?;
    let data = fs::metadata(dir.join("data")).ok()?;
    Some(IngestStat {
        ref_key,
        offset_bytes: data.len(),
        updated: data.modified().ok()?,
    })
}

//! Fetched files: refs of one file, kept with what the server said of them.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::time::UNIX_EPOCH;

use build::error::{BuildError, ErrorKind};
use bytes::Bytes;
use cache::{ImmutableRef, MutableRef, RefOptions, Store};
use flate2::write::MultiGzDecoder;
use oci::{Algorithm, Digest, Digester};
use reqwest::Response;
use reqwest::header::CONTENT_DISPOSITION;
use rustix::fs::{Gid, Mode, OFlags, Timespec, Timestamps, Uid};

use super::attributes::Attributes;
use super::{Resolved, blocking, etag_value, name};

/// Name of a file's record among its ref's metadata: digest, ETag and `Last-Modified`, one a line.
const RECORD: &str = "http.file";

/// A file that was fetched before.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    /// The server's ETag, without the mark of weak ones.
    pub etag: String,
    digest: Digest,
    last_modified: Option<String>,
    reference: ImmutableRef,
}

impl Kept {
    /// The ref of a file of that digest.
    pub fn holding(self, digest: &Digest) -> Option<ImmutableRef> {
        (self.digest == *digest).then_some(self.reference)
    }

    /// What the server says is still so.
    pub fn resolved(&self, attributes: &Attributes, response: &Response) -> Resolved {
        let disposition = response
            .headers()
            .get(CONTENT_DISPOSITION)
            .and_then(|value| value.to_str().ok());
        Resolved {
            digest: self.digest,
            filename: attributes.filename(disposition),
            last_modified: self.last_modified.clone(),
            reference: Some(self.reference.clone()),
        }
    }
}

fn internal(error: impl std::error::Error + Send + Sync + 'static) -> BuildError {
    BuildError::from_source(ErrorKind::Internal, error)
}

/// Finds files kept under an index. Blocking.
pub(super) fn find(store: &Store, index: &str) -> Result<Vec<Kept>, BuildError> {
    let mut found = Vec::new();
    for id in store.search_index(index).map_err(internal)? {
        // A ref that went meanwhile is a miss.
        let Ok(reference) = store.get(&id) else { continue };
        let Some(record) = reference.metadata(RECORD).map_err(internal)? else {
            continue;
        };
        let record = String::from_utf8_lossy(&record).into_owned();
        let mut lines = record.lines();
        let Some(digest) = lines.next().and_then(|line| line.parse().ok()) else {
            continue;
        };
        let Some(etag) = lines.next().filter(|etag| !etag.is_empty()) else {
            continue;
        };
        let last_modified = lines.next().filter(|line| !line.is_empty()).map(str::to_owned);
        found.push(Kept {
            etag: etag.to_owned(),
            digest,
            last_modified,
            reference,
        });
    }
    Ok(found)
}

/// Opens the only file of a ref. Blocking.
pub(super) fn open(reference: &ImmutableRef) -> Result<File, BuildError> {
    let mounts = reference.mounts().map_err(internal)?;
    let mount = mounts
        .first()
        .ok_or_else(|| BuildError::internal("a ref has no mount"))?;
    let tree = mount.open().map_err(internal)?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut name = None;
    for entry in rustix::fs::Dir::read_from(&tree).map_err(internal)? {
        let entry = entry.map_err(internal)?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            name = Some(entry.file_name().to_owned());
        }
    }
    let name = name.ok_or_else(|| BuildError::internal("a fetched file is gone"))?;
    let file = rustix::fs::openat(&tree, name, flags, Mode::empty()).map_err(internal)?;
    Ok(File::from(file))
}

/// Checksums the only file of a ref and what is appended to it; returns both. Blocking.
pub(super) fn checksum(
    reference: &ImmutableRef,
    algorithm: Algorithm,
    suffix: &Bytes,
) -> Result<(String, Bytes), BuildError> {
    let mut file = open(reference)?;
    let mut digester = Digester::new(algorithm);
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer).map_err(internal)? {
            0 => break,
            count => digester.update(&buffer[..count]),
        }
    }
    digester.update(suffix);
    Ok((digester.finish().to_string(), suffix.clone()))
}

/// A file being fetched. Dropping it leaves nothing behind.
#[derive(Debug)]
pub(super) struct Body {
    reference: MutableRef,
    /// `None` while bytes are being written.
    sink: Option<Sink>,
    owner: (u32, u32),
}

/// A file and the digest of what was written to it.
#[derive(Debug)]
struct Digested {
    file: File,
    digester: Digester,
}

impl Write for Digested {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.digester.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Where a body goes, decompressed if the server compressed it for the transfer.
#[derive(Debug)]
enum Sink {
    Plain(Box<Digested>),
    Gzip(Box<MultiGzDecoder<Digested>>),
}

impl Sink {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(file) => file.write_all(bytes),
            Self::Gzip(decoder) => decoder.write_all(bytes),
        }
    }

    fn finish(self) -> io::Result<Digested> {
        match self {
            Self::Plain(file) => Ok(*file),
            Self::Gzip(decoder) => decoder.finish(),
        }
    }
}

impl Body {
    /// Makes an empty file in a new ref.
    pub async fn create(
        store: &Store,
        attributes: &Attributes,
        filename: String,
        is_gzip: bool,
    ) -> Result<Self, BuildError> {
        let store = store.clone();
        let description = format!("http url {}", attributes.shown_url());
        let mode = if attributes.perm == 0 {
            0o600
        } else {
            u32::try_from(attributes.perm & 0o777).unwrap_or(0o600)
        };
        let id = |value: i64| {
            u32::try_from(value)
                .map_err(|_| BuildError::user(format!("user or group id {value} is out of range")))
        };
        let owner = (id(attributes.uid)?, id(attributes.gid)?);
        blocking(move || {
            let options = RefOptions {
                description,
                ..RefOptions::default()
            };
            let reference = store.create_mutable(None, options).map_err(internal)?;
            let mounts = reference.mounts(false).map_err(internal)?;
            let mount = mounts
                .first()
                .ok_or_else(|| BuildError::internal("a new ref has no mount"))?;
            let tree = mount.open().map_err(internal)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&tree, filename.as_str(), flags, Mode::from_raw_mode(mode))
                .map_err(internal)?;
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).map_err(internal)?;
            let file = Digested {
                file: File::from(file),
                digester: Digester::sha256(),
            };
            let sink = if is_gzip {
                Sink::Gzip(Box::new(MultiGzDecoder::new(file)))
            } else {
                Sink::Plain(Box::new(file))
            };
            Ok(Self {
                reference,
                sink: Some(sink),
                owner,
            })
        })
        .await
    }

    /// Appends bytes.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), BuildError> {
        let mut sink = self
            .sink
            .take()
            .ok_or_else(|| BuildError::internal("a write was given up"))?;
        let sink = blocking(move || {
            sink.write_all(&bytes)
                .map_err(|error| BuildError::from_source(ErrorKind::Unavailable, error))?;
            Ok(sink)
        });
        self.sink = Some(sink.await?);
        Ok(())
    }

    /// Completes the file and keeps it under `index` if the server gave it an ETag.
    pub async fn finish(
        self,
        etag: Option<&str>,
        last_modified: Option<&str>,
        index: String,
    ) -> Result<(ImmutableRef, Digest), BuildError> {
        let sink = self
            .sink
            .ok_or_else(|| BuildError::internal("a write was given up"))?;
        let etag = etag.map(etag_value).unwrap_or_default().to_owned();
        let last_modified = last_modified.unwrap_or_default().to_owned();
        let (reference, owner) = (self.reference, self.owner);
        blocking(move || {
            let written = sink
                .finish()
                .map_err(|error| BuildError::from_source(ErrorKind::Unavailable, error))?;
            let (file, digest) = (written.file, written.digester.finish());
            if owner != (0, 0) {
                let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
                rustix::fs::fchown(&file, Some(uid), Some(gid)).map_err(internal)?;
            }
            let modified = name::parse_http_date(&last_modified);
            let since = modified
                .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
                .unwrap_or_default();
            let time = Timespec {
                tv_sec: i64::try_from(since.as_secs()).unwrap_or(0),
                tv_nsec: 0,
            };
            let times = Timestamps {
                last_access: time,
                last_modification: time,
            };
            rustix::fs::futimens(&file, &times).map_err(internal)?;
            drop(file);
            // Not before: a part of a file is of no use to anybody.
            reference.retain();
            let reference = reference.commit().map_err(internal)?;
            if !etag.is_empty() {
                let record = format!("{digest}\n{etag}\n{last_modified}\n");
                reference
                    .set_metadata(RECORD, Some(record.as_bytes()))
                    .map_err(internal)?;
                reference.set_index(&index).map_err(internal)?;
            }
            Ok((reference, digest))
        })
        .await
    }
}

//! The blob sources: `docker-image+blob://` and `oci-layout+blob://` are one blob of a repository or layout, as a file.

use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;

use async_trait::async_trait;
use build::blocking::{blocking, internal};
use build::error::{BuildError, ErrorKind};
use build::op::{CacheMap, Op, OpContext, OpProvenance, ResultRef, VertexSpec};
use build::session::SessionGroup;
use bytes::Bytes;
use cache::{ImmutableRef, RecordType, RefOptions, Store};
use futures_util::stream::{StreamExt, TryStreamExt};
use oci::{Descriptor, Digest, Reference};
use rustix::fs::{Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use serde::Serialize;
use tokio::sync::mpsc;

use super::image::attributes::record_type;
use super::image::fetch::BlobBytes;
use super::image::{Images, registry_error};
use super::oci_layout::Place;
use llb::pb;

/// Scheme of blobs in registries.
pub const REGISTRY_SCHEME: &str = "docker-image+blob";
/// Scheme of blobs in layouts at the client.
pub const LAYOUT_SCHEME: &str = "oci-layout+blob";
/// Chunks on their way to the thread that writes them.
const QUEUED_CHUNKS: usize = 16;

/// One blob vertex.
#[derive(Debug)]
pub struct BlobOp {
    images: Arc<Images>,
    location: BlobLocation,
    record_type: RecordType,
    file: BlobFile,
}

/// Where a blob is: in a repository of a registry, or in a layout at the client.
#[derive(Clone, Debug)]
pub(super) struct BlobLocation {
    scheme: String,
    reference: Reference,
    /// The blob's digest.
    pub digest: Digest,
    /// For layouts.
    place: Option<Place>,
}

impl BlobLocation {
    /// Reads an identifier of one of the two schemes. `session` and `layout` say which layout is meant, if one is.
    ///
    /// # Errors
    /// A user error for an identifier that cannot be understood.
    pub fn read(identifier: &str, session: Option<String>, layout: String) -> Result<Self, BuildError> {
        let (scheme, name) = identifier.split_once("://").unwrap_or(("", identifier));
        let reference = Reference::parse(name)
            .map_err(|error| BuildError::user(format!("failed to parse blob reference {name:?}: {error}")))?;
        let Some(digest) = reference.digest().copied() else {
            return Err(BuildError::user(format!(
                "invalid reference digest: {name} has none"
            )));
        };
        let place = match scheme {
            LAYOUT_SCHEME if layout.is_empty() => {
                return Err(BuildError::user("oci-layout blob source requires store id"));
            }
            LAYOUT_SCHEME => Some(Place { session, layout }),
            _ => None,
        };
        Ok(Self {
            scheme: scheme.to_owned(),
            reference,
            digest,
            place,
        })
    }

    /// Opens the blob. Its bytes are not verified.
    ///
    /// # Errors
    /// When it cannot be had.
    pub async fn open(&self, images: &Images, sessions: &SessionGroup) -> Result<BlobBytes, BuildError> {
        if let Some(place) = &self.place {
            // Where a session is named, that client has it, whoever else waits for the step.
            let content = place.content(sessions).await?;
            return super::oci_layout::read(&*content, &self.digest, 0).await;
        }
        let client = images.client(sessions);
        let found: Descriptor = client
            .stat_blob(&self.reference, &self.digest)
            .await
            .map_err(registry_error)?;
        let bytes = client
            .fetch_unverified(&self.reference, &found, 0)
            .await
            .map_err(registry_error)?;
        Ok(bytes.map_err(registry_error).boxed())
    }
}

impl fmt::Display for BlobLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.reference)
    }
}

/// The file that the blob becomes.
#[derive(Clone, Debug, Default)]
struct BlobFile {
    /// Empty: the digest's hexadecimal part.
    name: String,
    /// 0: 0600.
    perm: i64,
    uid: i64,
    gid: i64,
}

impl BlobOp {
    /// Makes the op of a vertex of one of the two schemes.
    ///
    /// # Errors
    /// A user error for an identifier or attributes that cannot be understood.
    pub fn new(vertex: &VertexSpec, images: Arc<Images>) -> Result<Self, BuildError> {
        let Some(pb::op::Op::Source(source)) = &vertex.op.op else {
            return Err(BuildError::internal("not a source op"));
        };
        let mut file = BlobFile::default();
        let (mut session, mut layout) = (None, String::new());
        let mut kind = RecordType::Regular;
        for (key, value) in &source.attrs {
            match key.as_str() {
                llb::attr::HTTP_FILENAME => file.name = safe_name(value),
                llb::attr::HTTP_PERM => file.perm = number(key, value)?,
                llb::attr::HTTP_UID => file.uid = number(key, value)?,
                llb::attr::HTTP_GID => file.gid = number(key, value)?,
                llb::attr::IMAGE_RECORD_TYPE => kind = record_type(value)?,
                llb::attr::OCI_LAYOUT_SESSION_ID if !value.is_empty() => session = Some(value.clone()),
                llb::attr::OCI_LAYOUT_STORE_ID => layout.clone_from(value),
                _ => {}
            }
        }
        Ok(Self {
            images,
            location: BlobLocation::read(&source.identifier, session, layout)?,
            record_type: kind,
            file,
        })
    }

    /// Digest of all that shows in the result, as BuildKit writes it.
    fn key(&self) -> Result<Digest, BuildError> {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Key<'a> {
            digest: Digest,
            filename: &'a str,
            perm: i64,
            #[serde(rename = "UID")]
            uid: i64,
            #[serde(rename = "GID")]
            gid: i64,
        }
        let BlobFile {
            name: filename,
            perm,
            uid,
            gid,
        } = &self.file;
        let key = Key {
            digest: self.location.digest,
            filename,
            perm: *perm,
            uid: *uid,
            gid: *gid,
        };
        Ok(Digest::sha256(oci::json::to_vec(&key).map_err(internal)?))
    }

    async fn fetch(&self, ctx: &OpContext) -> Result<ImmutableRef, BuildError> {
        let mut bytes = self.location.open(&self.images, &ctx.sessions()).await?;
        let digest = self.location.digest;
        let (chunks, queue) = mpsc::channel(QUEUED_CHUNKS);
        let writing = {
            let (store, file) = (self.images.store().clone(), self.file.clone());
            let options = RefOptions {
                description: format!("blob {}", self.location.reference),
                record_type: self.record_type,
                ..RefOptions::default()
            };
            blocking(move || write(&store, options, &file, digest, queue))
        };
        let reading = async move {
            let mut step = ctx.progress().step(digest.to_string(), "");
            let mut count = 0_u64;
            while let Some(chunk) = bytes.next().await {
                let chunk = chunk?;
                count = count.saturating_add(u64::try_from(chunk.len()).unwrap_or(0));
                step.update(count, 0);
                if chunks.send(Some(chunk)).await.is_err() {
                    // The writer failed and says why.
                    return Ok(());
                }
            }
            let _ = chunks.send(None).await;
            Ok(())
        };
        let ((), reference) = tokio::try_join!(reading, writing)?;
        Ok(reference)
    }
}

/// Writes chunks until `None` into the only file of a new ref.
fn write(
    store: &Store,
    options: RefOptions,
    file: &BlobFile,
    digest: Digest,
    mut queue: mpsc::Receiver<Option<Bytes>>,
) -> Result<ImmutableRef, BuildError> {
    let id = |value: i64| {
        u32::try_from(value)
            .map_err(|_| BuildError::user(format!("user or group id {value} is out of range")))
    };
    let owner = (Uid::from_raw(id(file.uid)?), Gid::from_raw(id(file.gid)?));
    let perm = if file.perm == 0 {
        0o600
    } else {
        u32::try_from(file.perm & 0o777).unwrap_or(0o600)
    };
    let mode = Mode::from_raw_mode(perm);
    let name = if file.name.is_empty() {
        digest.hex()
    } else {
        file.name.clone()
    };
    let reference = store.create_mutable(None, options).map_err(internal)?;
    let mounts = reference.mounts(false).map_err(internal)?;
    let mount = mounts
        .first()
        .ok_or_else(|| BuildError::internal("a new ref has no mount"))?;
    let tree = mount.open().map_err(internal)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(tree.as_fd(), name.as_str(), flags, mode).map_err(internal)?;
    rustix::fs::fchmod(&opened, mode).map_err(internal)?;
    let mut out = std::fs::File::from(opened);
    let mut digester = digest.verifier();
    let complete = loop {
        match queue.blocking_recv() {
            Some(Some(chunk)) => {
                digester.update(&chunk);
                out.write_all(&chunk).map_err(internal)?;
            }
            Some(None) => break true,
            None => break false,
        }
    };
    if !complete {
        return Err(BuildError::canceled());
    }
    let actual = digester.finish();
    if actual != digest {
        let text = format!("unexpected digest of {digest}: got {actual}");
        return Err(BuildError::new(ErrorKind::Unavailable, text));
    }
    rustix::fs::fchown(&out, Some(owner.0), Some(owner.1)).map_err(internal)?;
    let epoch = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: epoch,
        last_modification: epoch,
    };
    rustix::fs::futimens(&out, &times).map_err(internal)?;
    drop((out, tree));
    // Not before: a part of a blob is of no use to anybody.
    reference.retain();
    reference.commit().map_err(internal)
}

/// Makes a name that is one path element and shows no control characters.
fn safe_name(name: &str) -> String {
    let base = oci::path::base(name.trim());
    if matches!(base, "" | "." | ".." | "/") || base.chars().any(char::is_control) {
        return "download".to_owned();
    }
    base.to_owned()
}

/// Reads a number in the notations of Go: decimal, `0x`, `0o` or `0` for octal, `0b`.
fn number(key: &str, value: &str) -> Result<i64, BuildError> {
    let (sign, digits) = value.strip_prefix('-').map_or((1, value), |digits| (-1, digits));
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &digits[2..]),
        [b'0', b'o' | b'O', ..] => (8, &digits[2..]),
        [b'0', b'b' | b'B', ..] => (2, &digits[2..]),
        [b'0', _, ..] => (8, &digits[1..]),
        _ => (10, digits),
    };
    i64::from_str_radix(digits, radix)
        .map(|number| sign * number)
        .map_err(|_| BuildError::user(format!("invalid value {value:?} of {key}")))
}

#[async_trait]
impl Op for BlobOp {
    fn shows_cache_map(&self) -> bool {
        false
    }

    async fn cache_map(&self, _: &OpContext, _: u32) -> Result<CacheMap, BuildError> {
        let digests = vec![super::key_digest(&self.key()?.to_string())];
        Ok(CacheMap {
            digests,
            ..CacheMap::default()
        })
    }

    async fn content_digest(
        &self,
        _: &OpContext,
        _: usize,
        _: &ResultRef,
    ) -> Result<Option<Digest>, BuildError> {
        Ok(None)
    }

    async fn exec(&self, ctx: &OpContext, _: &[ResultRef]) -> Result<Vec<Option<ResultRef>>, BuildError> {
        let fetched = tokio::select! {
            fetched = self.fetch(ctx) => fetched?,
            () = ctx.cancel().cancelled() => return Err(BuildError::canceled()),
        };
        Ok(vec![Some(ResultRef::new(fetched))])
    }

    fn provenance(&self) -> Option<OpProvenance> {
        Some(OpProvenance {
            source: Some(self.location.to_string()),
            pin: Some(self.location.digest.to_string()),
            ..OpProvenance::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_gos() {
        for (text, number_) in [
            ("420", 420),
            ("0644", 0o644),
            ("0o644", 0o644),
            ("0x10", 16),
            ("-1", -1),
            ("0", 0),
        ] {
            assert_eq!(number("k", text).unwrap(), number_, "{text}");
        }
        for text in ["", "x", "0x", "0b2"] {
            assert!(number("k", text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_one_element() {
        assert_eq!(safe_name("a/b.txt"), "b.txt");
        assert_eq!(safe_name(".."), "download");
        assert_eq!(safe_name("a\nb"), "download");
    }
}

//! What is kept of builds that have ended: records, logs, errors, traces and statements, as blobs that the engine's store
//! holds by name.
//!
//! A name is that of the build behind [`PREFIX`]; the first of its blobs is the record, the others are those that the
//! record names. A blob that is gone takes away what it said and nothing else.

use std::collections::BTreeMap;

use api::pb::control::{BuildHistoryRecord, Descriptor, StatusResponse};
use engine::cache::Pin;
use engine::content::Durability;
use engine::progress::Subscription;
use futures_util::FutureExt as _;
use oci::Digest;
use prost::Message as _;

use super::progress::response;

/// What names of builds begin with.
const PREFIX: &str = "history/";
/// Media type of a build's progress: status messages, each behind its length in four bytes, the lowest first.
const STATUS_TYPE: &str = "application/vnd.buildkit.status.v0";
/// Media type of statements.
const STATEMENT_TYPE: &str = "application/vnd.in-toto+json";
/// Media type of an error with its details, as a `google.rpc.Status`; the spelling is the one that clients know.
const ERROR_TYPE: &str = "application/vnd.googeapis.google.rpc.status+proto";
/// Media type of spans.
const TRACE_TYPE: &str = "application/vnd.buildkit.otlp.json.v0";
/// Annotation with the type of a statement.
const PREDICATE_KEY: &str = "in-toto.io/predicate-type";
/// Largest manifest that is looked into.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Largest blob that is read: several times what a build's logs may come to.
const MAX_BLOB_BYTES: usize = 128 << 20;

/// Why something was not kept or found.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// A blob cannot be written.
    #[error("write to the build history")]
    Write(#[from] engine::content::WriteError),
    /// A blob cannot be read.
    #[error("read from the build history")]
    Read(#[from] engine::content::StoreError),
    /// A blob's bytes cannot be read.
    #[error("read {digest} of the build history")]
    Io {
        /// The blob.
        digest: Digest,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The store refuses.
    #[error("keep a build's record")]
    Store(#[from] engine::cache::StoreError),
    /// A blob is not what its record says.
    #[error("{digest} of the build history does not read")]
    Damaged {
        /// The blob.
        digest: Digest,
    },
}

/// The builds that have ended. Cheap to clone; all calls block on the disk.
#[derive(Clone, Debug)]
pub struct Archive(engine::cache::Store);

/// Blobs that are held until a record names them.
#[derive(Debug)]
pub struct Draft {
    store: engine::cache::Store,
    pin: Pin,
}

impl Draft {
    fn put(&mut self, bytes: &[u8]) -> Result<Digest, ArchiveError> {
        let digest = Digest::sha256(bytes);
        self.pin.add(digest);
        self.store.content().put(bytes, Durability::Deferred)?;
        Ok(digest)
    }

    fn describe(&mut self, bytes: &[u8], media_type: &str) -> Result<Descriptor, ArchiveError> {
        Ok(Descriptor {
            media_type: media_type.to_owned(),
            digest: self.put(bytes)?.to_string(),
            size: i64::try_from(bytes.len()).unwrap_or(i64::MAX),
            annotations: BTreeMap::new(),
        })
    }

    /// Writes all that a progress has shown; nothing when it showed nothing.
    ///
    /// # Errors
    /// When the blob cannot be written.
    pub fn logs(&mut self, progress: &mut Subscription) -> Result<Option<Descriptor>, ArchiveError> {
        let mut bytes = Vec::new();
        // A closed progress never waits, and one that is not closed has shown all that there is.
        while let Some(Some(batch)) = progress.next().now_or_never() {
            let message = response(batch).encode_to_vec();
            bytes.extend(u32::try_from(message.len()).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend(message);
        }
        if bytes.is_empty() {
            return Ok(None);
        }
        self.describe(&bytes, STATUS_TYPE).map(Some)
    }

    /// Writes an error with its details.
    ///
    /// # Errors
    /// When the blob cannot be written.
    pub fn error(&mut self, error: &api::pb::rpc::Status) -> Result<Descriptor, ArchiveError> {
        self.describe(&error.encode_to_vec(), ERROR_TYPE)
    }

    /// Writes spans.
    ///
    /// # Errors
    /// When the blob cannot be written.
    pub fn trace(&mut self, spans: &[u8]) -> Result<Descriptor, ArchiveError> {
        self.describe(spans, TRACE_TYPE)
    }

    /// Writes a statement.
    ///
    /// # Errors
    /// When the blob cannot be written.
    pub fn statement(&mut self, predicate: &[u8], predicate_type: &str) -> Result<Descriptor, ArchiveError> {
        let mut descriptor = self.describe(predicate, STATEMENT_TYPE)?;
        descriptor
            .annotations
            .insert(PREDICATE_KEY.to_owned(), predicate_type.to_owned());
        Ok(descriptor)
    }
}

impl Archive {
    /// Makes the archive of a store.
    pub fn new(store: engine::cache::Store) -> Self {
        Self(store)
    }

    /// Returns the store that blobs and records are in.
    #[cfg(test)]
    pub fn store(&self) -> &engine::cache::Store {
        &self.0
    }

    /// Begins a record.
    pub fn draft(&self) -> Draft {
        Draft {
            store: self.0.clone(),
            pin: self.0.pin(&[]),
        }
    }

    /// Reads all records. What does not read is let go.
    ///
    /// # Errors
    /// When the store cannot be changed.
    pub fn load(&self) -> Result<Vec<BuildHistoryRecord>, ArchiveError> {
        let mut records = Vec::new();
        for name in self.0.retained_names(PREFIX) {
            let record = self.0.retained(&name).first().map(|digest| self.record(*digest));
            match record {
                Some(Ok(record)) => records.push(record),
                Some(Err(error)) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        name,
                        "a build is forgotten"
                    );
                    self.0.release(&name)?;
                }
                None => {}
            }
        }
        Ok(records)
    }

    fn record(&self, digest: Digest) -> Result<BuildHistoryRecord, ArchiveError> {
        BuildHistoryRecord::decode(self.read(digest)?.as_slice())
            .map_err(|_| ArchiveError::Damaged { digest })
    }

    /// Keeps a record with the blobs that it names, in place of what was kept of its build; those of `draft` are let go
    /// unless they are among these.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn save(&self, record: &BuildHistoryRecord, mut draft: Draft) -> Result<(), ArchiveError> {
        let mut digests = vec![draft.put(&record.encode_to_vec())?];
        digests.extend(self.named(record));
        self.0.retain(&name(&record.r#ref), &digests)?;
        Ok(())
    }

    /// Lets go of a build.
    ///
    /// # Errors
    /// When the store cannot be changed.
    pub fn forget(&self, id: &str) -> Result<(), ArchiveError> {
        Ok(self.0.release(&name(id))?)
    }

    /// Reads a build's progress.
    ///
    /// # Errors
    /// When the blob is gone or is none.
    pub fn logs(&self, logs: &Descriptor) -> Result<Vec<StatusResponse>, ArchiveError> {
        let Ok(digest) = logs.digest.parse::<Digest>() else {
            return Ok(Vec::new());
        };
        let bytes = self.read(digest)?;
        let mut rest = bytes.as_slice();
        let mut messages = Vec::new();
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
            let (message, after) = after
                .split_at_checked(length)
                .ok_or(ArchiveError::Damaged { digest })?;
            messages.push(StatusResponse::decode(message).map_err(|_| ArchiveError::Damaged { digest })?);
            rest = after;
        }
        Ok(messages)
    }

    fn read(&self, digest: Digest) -> Result<Vec<u8>, ArchiveError> {
        let blob = self.0.content().reader(&digest)?;
        blob.read_all(MAX_BLOB_BYTES)
            .map_err(|source| ArchiveError::Io { digest, source })
    }

    /// Lists the blobs that a record names and that are here, and what images among them consist of beside layers.
    fn named(&self, record: &BuildHistoryRecord) -> Vec<Digest> {
        let results = || record.result.iter().chain(record.results.values());
        let parsed = |descriptor: &Descriptor| descriptor.digest.parse::<Digest>().ok();
        let is_here = |digest: &Digest| matches!(self.0.content().info(digest), Ok(Some(_)));
        let attestations = results().flat_map(|result| &result.attestations);
        let own = record
            .logs
            .iter()
            .chain(&record.external_error)
            .chain(&record.trace);
        let mut found: Vec<Digest> = own
            .chain(attestations)
            .filter_map(parsed)
            .filter(is_here)
            .collect();
        // Only what was exported can consist of other blobs.
        let exported = results().flat_map(|result| result.results.values());
        let mut open: Vec<Digest> = exported.filter_map(parsed).collect();
        while let Some(digest) = open.pop() {
            let size = match self.0.content().info(&digest) {
                Ok(Some(stat)) if !found.contains(&digest) => stat.size_bytes,
                _ => continue,
            };
            found.push(digest);
            if size <= MAX_MANIFEST_BYTES
                && let Ok(bytes) = self.read(digest)
            {
                open.extend(parts(&bytes));
            }
        }
        found
    }
}

/// The blobs that a manifest or an index names, except for layers of file systems; none if it is neither.
fn parts(bytes: &[u8]) -> Vec<Digest> {
    let Ok(document) = serde_json::from_slice::<serde_json::Value>(bytes) else {
        return Vec::new();
    };
    let list = |key: &str| {
        document
            .get(key)
            .and_then(|list| list.as_array())
            .into_iter()
            .flatten()
    };
    let statements = list("layers").filter(|layer| layer["mediaType"] == STATEMENT_TYPE);
    list("manifests")
        .chain(statements)
        .chain(document.get("config"))
        .filter_map(|descriptor| descriptor.get("digest")?.as_str()?.parse().ok())
        .collect()
}

fn name(id: &str) -> String {
    format!("{PREFIX}{id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_consist_of_documents() {
        let digest = |text: &str| Digest::sha256(text.as_bytes());
        let manifest = format!(
            r#"{{"config":{{"digest":"{}"}},"layers":[{{"mediaType":"application/vnd.in-toto+json","digest":"{}"}},{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{}"}}]}}"#,
            digest("config"),
            digest("statement"),
            digest("layer"),
        );
        assert_eq!(
            parts(manifest.as_bytes()),
            [digest("statement"), digest("config")]
        );
        let index = format!(r#"{{"manifests":[{{"digest":"{}"}}]}}"#, digest("manifest"));
        assert_eq!(parts(index.as_bytes()), [digest("manifest")]);
        assert!(parts(b"no json").is_empty());
        assert!(parts(br#"{"config":{"Cmd":["sh"]}}"#).is_empty());
    }
}

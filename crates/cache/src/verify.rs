//! Looking for disagreement between metadata, snapshots and blobs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::ControlFlow;

use oci::Digest;
use snapshot::SnapshotKey;

use crate::error::StoreError;
use crate::row::Row;
use crate::store::Store;
use crate::types::{Parents, RefId};

/// Something [`Store::verify`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A blob's bytes do not have its digest.
    CorruptBlob {
        /// What the blob is called.
        digest: Digest,
        /// What its bytes are.
        actual: Digest,
    },
    /// A blob lies there that nothing holds. Harmless: the next open removes it.
    LeakedBlob {
        /// The blob.
        digest: Digest,
    },
    /// A ref's snapshot is gone.
    MissingSnapshot {
        /// The ref.
        id: RefId,
        /// Its snapshot.
        key: SnapshotKey,
    },
    /// A snapshot lies there that no ref has. Harmless: the next open removes it.
    LeakedSnapshot {
        /// The snapshot.
        key: SnapshotKey,
    },
    /// A ref has neither a tree nor blobs nor providers.
    UnloadableRef {
        /// The ref.
        id: RefId,
    },
    /// A ref names a blob that is neither here nor can be fetched.
    MissingBlob {
        /// The ref.
        id: RefId,
        /// The blob.
        digest: Digest,
    },
    /// A ref stands on one that is gone.
    MissingParent {
        /// The ref.
        id: RefId,
        /// What is gone.
        parent: RefId,
    },
    /// A stored result names a ref that is gone. It is never returned.
    DanglingResult {
        /// The record.
        record: String,
        /// The result.
        result: String,
    },
}

impl Finding {
    /// Reports whether it costs nothing but room.
    pub fn is_harmless(&self) -> bool {
        match self {
            Self::LeakedBlob { .. } | Self::LeakedSnapshot { .. } | Self::DanglingResult { .. } => true,
            Self::CorruptBlob { .. }
            | Self::MissingSnapshot { .. }
            | Self::UnloadableRef { .. }
            | Self::MissingBlob { .. }
            | Self::MissingParent { .. } => false,
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CorruptBlob { digest, actual } => {
                write!(
                    f,
                    "blob {digest} is damaged: the stored bytes have digest {actual}"
                )
            }
            Self::LeakedBlob { digest } => write!(f, "blob {digest} is held by nothing"),
            Self::MissingSnapshot { id, key } => write!(f, "ref {id}: files of its snapshot {key} are gone"),
            Self::LeakedSnapshot { key } => write!(f, "snapshot {key} belongs to no ref"),
            Self::UnloadableRef { id } => write!(f, "ref {id} can be neither read nor made"),
            Self::MissingBlob { id, digest } => write!(f, "ref {id}: blob {digest} is gone"),
            Self::MissingParent { id, parent } => write!(f, "ref {id} stands on {parent}, which is gone"),
            Self::DanglingResult { record, result } => {
                write!(f, "record {record} has result {result}, whose refs are gone")
            }
        }
    }
}

/// What is known of the store at one moment.
struct Picture {
    rows: BTreeMap<RefId, Row>,
    held: BTreeSet<Digest>,
}

type Visit<'a> = dyn FnMut(Finding) -> ControlFlow<()> + 'a;

impl Store {
    /// Compares everything with everything, calling `found` for each disagreement until it returns `Break`. With
    /// `read_blobs` every blob is read. Works beside builds; what they are just making or deleting may be reported.
    pub fn verify(&self, read_blobs: bool, found: &mut Visit<'_>) -> Result<(), StoreError> {
        let mut digests = Vec::new();
        self.content().walk(|blob| -> Result<(), StoreError> {
            digests.push(blob.digest);
            Ok(())
        })?;
        let picture = {
            let state = self.shared.state();
            let rows = state
                .iter()
                .map(|(id, entry)| (id.clone(), entry.row.clone()))
                .collect();
            Picture {
                rows,
                held: digests
                    .iter()
                    .filter(|digest| state.is_blob_held(digest))
                    .copied()
                    .collect(),
            }
        };
        // Breaking off is no failure.
        let _ = self.verify_parts(&picture, &digests, read_blobs, found)?;
        Ok(())
    }

    fn verify_parts(
        &self,
        picture: &Picture,
        digests: &[Digest],
        read_blobs: bool,
        found: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, StoreError> {
        if self.verify_refs(picture, found)?.is_break() || self.verify_records(picture, found)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        for digest in digests {
            if !picture.held.contains(digest) && found(Finding::LeakedBlob { digest: *digest }).is_break() {
                return Ok(ControlFlow::Break(()));
            }
            if !read_blobs {
                continue;
            }
            match self.content().verify(digest) {
                Err(content::VerifyError::Corrupt { digest, actual }) => {
                    if found(Finding::CorruptBlob {
                        digest,
                        actual: *actual,
                    })
                    .is_break()
                    {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                // Deleted meanwhile.
                Err(content::VerifyError::Store(content::StoreError::NotFound { .. })) | Ok(()) => {}
                Err(content::VerifyError::Store(error)) => return Err(error.into()),
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn verify_refs(&self, picture: &Picture, found: &mut Visit<'_>) -> Result<ControlFlow<()>, StoreError> {
        let present: BTreeSet<SnapshotKey> = self
            .snapshotter()
            .list()
            .into_iter()
            .map(|stat| stat.key)
            .collect();
        let mut known = BTreeSet::new();
        let mut findings = Vec::new();
        for (id, row) in &picture.rows {
            let gone = row
                .parents
                .ids()
                .into_iter()
                .filter(|parent| !picture.rows.contains_key(parent));
            findings.extend(gone.map(|parent| Finding::MissingParent {
                id: id.clone(),
                parent: parent.clone(),
            }));
            let key = match &row.twin {
                Some(twin) => Some((if row.mutable { id } else { twin }).snapshot_key().clone()),
                None => row.snapshot.clone(),
            };
            for blob in self.lost_blobs(row)? {
                findings.push(Finding::MissingBlob {
                    id: id.clone(),
                    digest: blob,
                });
            }
            match key {
                Some(key) if present.contains(&key) => {
                    if !self.is_whole(&key)? {
                        findings.push(Finding::MissingSnapshot {
                            id: id.clone(),
                            key: key.clone(),
                        });
                    }
                    known.insert(key);
                }
                Some(key) => findings.push(Finding::MissingSnapshot { id: id.clone(), key }),
                None if matches!(row.parents, Parents::Layer { .. }) && !self.has_blob(row)? => {
                    findings.push(Finding::UnloadableRef { id: id.clone() });
                }
                None => {}
            }
        }
        findings.extend(
            present
                .difference(&known)
                .map(|key| Finding::LeakedSnapshot { key: key.clone() }),
        );
        Ok(findings.into_iter().try_for_each(found))
    }

    fn verify_records(
        &self,
        picture: &Picture,
        found: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, StoreError> {
        for (record, result) in self.records().all_results()? {
            let is_dangling = result.refs.iter().any(|id| !picture.rows.contains_key(id));
            if is_dangling
                && found(Finding::DanglingResult {
                    record,
                    result: result.id,
                })
                .is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

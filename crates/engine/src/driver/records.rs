//! The solver's local records in the cache store.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cache::{Batch, CacheResult, RecordDescription};
use oci::Digest;
use solver::{FoundKey, Key, Link, NewRecord, Query, RecordId, StoreId, StoredResult};

use crate::error::{BuildError, ErrorKind};
use crate::op::ResultRef;

/// The result that is the empty tree.
const SCRATCH: &str = "scratch";

/// Reads and writes the local records. All of it is quick: the store keeps records in memory.
#[derive(Clone, Debug)]
pub(crate) struct LocalRecords {
    store: cache::Store,
}

impl LocalRecords {
    pub(crate) fn new(store: cache::Store) -> Self {
        Self { store }
    }

    /// Answers a query. What cannot be read is taken as absent: a broken record is a miss.
    pub(crate) fn answer(&self, query: &Query) -> Vec<FoundKey> {
        let records = self.store.records();
        let found = match query {
            Query::Record(key) => {
                let id = key.record.to_string();
                records
                    .exists(&id)
                    .map(|exists| if exists { vec![id] } else { Vec::new() })
            }
            Query::Children(_, link) | Query::Candidates(_, link) => stored_link(link)
                .map_or(Ok(Vec::new()), |stored| {
                    records.children(&link.parent.to_string(), &stored)
                }),
        };
        let ids = found.unwrap_or_else(|error| {
            tracing::warn!(%error, "cache records cannot be read");
            Vec::new()
        });
        let keys = ids.iter().filter_map(|id| {
            let record = RecordId(id.parse::<Digest>().ok()?);
            let store = StoreId::LOCAL;
            Some((id, Key { store, record }))
        });
        if let Query::Candidates(..) = query {
            keys.map(|(_, key)| FoundKey {
                key,
                results: Vec::new(),
            })
            .collect()
        } else {
            keys.map(|(id, key)| self.found(id, key)).collect()
        }
    }

    fn found(&self, id: &str, key: Key) -> FoundKey {
        let results = self.store.records().results(id).unwrap_or_default();
        let results = results.into_iter().map(|result| StoredResult {
            key,
            created_at_ns: nanoseconds(result.created_at),
            result: result.id,
        });
        FoundKey {
            key,
            results: results.collect(),
        }
    }

    /// Returns the store's records.
    pub(crate) fn records(&self) -> cache::Records {
        self.store.records()
    }

    /// Remembers a record, with a description if it has a result. Links that exist are left alone.
    pub(crate) fn save(
        &self,
        record: &NewRecord,
        result: Option<(&ResultRef, SystemTime)>,
        description: Option<RecordDescription>,
    ) -> Result<(), BuildError> {
        let records = self.store.records();
        let child = record.record.to_string();
        let mut batch = Batch::new();
        for link in &record.links {
            let Some(stored) = stored_link(link) else { continue };
            let parent = link.parent.to_string();
            if !records.has_link(&parent, &stored, &child).unwrap_or(false) {
                batch.link(parent, stored, child.clone());
            }
        }
        if let Some((reference, created_at)) = result {
            let (id, refs) = match reference.get() {
                Some(reference) => (reference.id().to_string(), vec![reference.id().clone()]),
                None => (SCRATCH.to_owned(), Vec::new()),
            };
            if let Some(description) = description {
                batch.describe(child.clone(), description);
            }
            batch.result(child, CacheResult { id, refs, created_at });
        }
        if batch.is_empty() {
            return Ok(());
        }
        records
            .apply(batch)
            .map_err(|error| BuildError::from_source(ErrorKind::Internal, error))
    }

    /// Forgets a local result wherever it is recorded.
    pub(crate) fn forget(&self, stored: &StoredResult) {
        if stored.key.store != StoreId::LOCAL {
            return;
        }
        self.release(&stored.result);
    }

    /// Whether a blob is here; one that cannot be told of is not.
    pub(crate) fn has_blob(&self, digest: &Digest) -> bool {
        self.store.content().exists(digest).unwrap_or(false)
    }

    /// Forgets a ref as a result wherever it is recorded.
    pub(crate) fn forget_ref(&self, reference: &cache::ImmutableRef) {
        self.release(reference.id().as_str());
    }

    fn release(&self, result: &str) {
        if let Err(error) = self.store.records().release(result) {
            tracing::warn!(%error, result, "a lost result cannot be forgotten");
        }
    }

    /// Loads a result; `None` when it is gone.
    pub(crate) fn load(&self, stored: &StoredResult) -> Option<ResultRef> {
        let record = stored.key.record.to_string();
        let result = self
            .store
            .records()
            .load(&record, &stored.result)
            .ok()
            .flatten()?;
        match result.refs.as_slice() {
            [] => Some(ResultRef::SCRATCH),
            [id] => self.store.get(id).ok().map(ResultRef::new),
            _ => None,
        }
    }
}

fn stored_link(link: &Link) -> Option<cache::Link> {
    Some(cache::Link {
        input: u32::try_from(link.input).ok()?,
        output: u32::try_from(link.output).ok()?,
        digest: link.op,
        selector: link.selector,
    })
}

pub(crate) fn nanoseconds(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

pub(crate) fn from_nanoseconds(at: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(u64::try_from(at).unwrap_or(0))
}

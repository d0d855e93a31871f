//! Cache records: what is remembered of earlier computations, and how it is found again.
//!
//! A *record* stands for one output of one step as identified in one way. It has an id and any number of results. A
//! *link* (parent record, input, op digest, output, selector) → child record says: "what the child stands for was
//! computed by this op with the parent as its input number `input`, of which it read what the selector names". A step
//! with several inputs is found by intersection: per input the union over all of the input's known records, then what
//! all inputs have in common. A step without inputs has a record whose id follows from its digest, and so has a content
//! checksum ([`RecordId::root`], [`RecordId::content`]); these ids mean the same in every store, all others only in the
//! store that has them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use oci::Digest;

use crate::ResultId;

/// Names a record within a store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordId(pub Digest);

impl RecordId {
    /// The record of a step without inputs; also how a step is named in cache manifests, whatever its inputs.
    pub fn root(op: &Digest, output: usize) -> Self {
        Self(Digest::sha256(format!("{op}@{output}").as_bytes()))
    }

    /// The record that stands for a content checksum.
    pub fn content(checksum: &Digest) -> Self {
        Self(Digest::sha256(format!("{checksum}@-1").as_bytes()))
    }
}

impl fmt::Display for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.hex()[..12])
    }
}

/// Names a store of records: the local one, or an imported cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreId(pub u32);

impl StoreId {
    /// The local store, the only one that is written.
    pub const LOCAL: Self = Self(0);
}

/// A record and where it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The store.
    pub store: StoreId,
    /// The record.
    pub record: RecordId,
}

/// A result of a record that can be loaded.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StoredResult {
    /// Where the record is.
    pub key: Key,
    /// The store's own name of the result.
    pub result: String,
    /// When it was made, in nanoseconds since the epoch.
    pub created_at_ns: i64,
}

/// One link: its parent is `parent`, its child the record that it is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Link {
    /// The input's record.
    pub parent: RecordId,
    /// The input's number.
    pub input: usize,
    /// The op's digest.
    pub op: Digest,
    /// The op's output.
    pub output: usize,
    /// What is read of the input; `None`: all of it, or what a content checksum covers.
    pub selector: Option<Digest>,
}

/// A question to a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// Does this record exist?
    Record(Key),
    /// Which records does this link lead to?
    Children(StoreId, Link),
    /// The same for one of several links that have to lead to a record: there may be many, most of which the others do not
    /// lead to, so they are told without their results.
    Candidates(StoreId, Link),
}

impl Query {
    /// Returns the store that is asked.
    pub fn store(&self) -> StoreId {
        match self {
            Self::Record(key) => key.store,
            Self::Children(store, _) | Self::Candidates(store, _) => *store,
        }
    }
}

/// A record that answers a [`Query`], with those of its results whose bytes are (believed to be) available, unless it is
/// a candidate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundKey {
    /// The record.
    pub key: Key,
    /// Its results; none for a candidate.
    pub results: Vec<StoredResult>,
}

/// What is to be remembered: a record, the links that lead to it, and perhaps a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewRecord {
    /// The record; may exist already, then links and result are added.
    pub record: RecordId,
    /// Links to it; those that exist already are left alone. Parents that do not exist come into being.
    pub links: Vec<Link>,
    /// A result that was computed or loaded.
    pub result: Option<ResultId>,
}

/// Records in memory: for tests, and for imported caches.
#[derive(Clone, Debug, Default)]
pub struct MemoryRecords {
    records: BTreeMap<RecordId, Vec<(String, i64)>>,
    links: BTreeMap<Link, BTreeSet<RecordId>>,
}

impl MemoryRecords {
    /// Adds a record with links to it.
    pub fn add(&mut self, record: RecordId, links: impl IntoIterator<Item = Link>) {
        self.records.entry(record).or_default();
        for link in links {
            self.records.entry(link.parent).or_default();
            self.links.entry(link).or_default().insert(record);
        }
    }

    /// Adds a result to a record, which comes into being if need be.
    pub fn add_result(&mut self, record: RecordId, result: impl Into<String>, created_at_ns: i64) {
        let results = self.records.entry(record).or_default();
        let result = result.into();
        results.retain(|(known, _)| *known != result);
        results.push((result, created_at_ns));
    }

    /// Forgets a result wherever it is; records and links stay.
    pub fn remove_result(&mut self, result: &str) {
        for results in self.records.values_mut() {
            results.retain(|(known, _)| known != result);
        }
    }

    /// Answers a query; `store` is the name under which this store is asked.
    pub fn answer(&self, query: &Query) -> Vec<FoundKey> {
        let store = query.store();
        let found = |record: &RecordId| -> Option<FoundKey> {
            let key = Key {
                store,
                record: *record,
            };
            let results = self.records.get(record)?;
            let is_candidate = matches!(query, Query::Candidates(..));
            let results = results
                .iter()
                .filter(|_| !is_candidate)
                .map(|(result, at)| StoredResult {
                    key,
                    result: result.clone(),
                    created_at_ns: *at,
                });
            Some(FoundKey {
                key,
                results: results.collect(),
            })
        };
        match query {
            Query::Record(key) => found(&key.record).into_iter().collect(),
            Query::Children(_, link) | Query::Candidates(_, link) => self
                .links
                .get(link)
                .into_iter()
                .flatten()
                .filter_map(found)
                .collect(),
        }
    }

    /// Walks all records with their results.
    pub fn iter(&self) -> impl Iterator<Item = (&RecordId, &[(String, i64)])> {
        self.records
            .iter()
            .map(|(record, results)| (record, results.as_slice()))
    }

    /// Walks all links with the records that they lead to.
    pub fn links(&self) -> impl Iterator<Item = (&Link, &BTreeSet<RecordId>)> {
        self.links.iter()
    }
}

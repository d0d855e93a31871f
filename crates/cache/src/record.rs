//! Solver records: the persistent graph of cache keys, their links and their results.
//!
//! The shape is BuildKit's, so that exports interchange: a record has an id (a text the solver chooses); a link says that
//! the record `parent`, taken as input number `input` with `selector` by the op `digest`, leads to the record `child` for
//! that op's output number `output`; a result says which ref a record's output is.

use std::time::SystemTime;

use oci::Digest;

use crate::error::StoreError;
use crate::store::Store;
use crate::types::RefId;

/// An edge of the key graph, without its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Link {
    /// Which input of the op the parent is.
    pub input: u32,
    /// Which output of the op the child is.
    pub output: u32,
    /// The op.
    pub digest: Digest,
    /// What of the input the op reads.
    pub selector: Option<Digest>,
}

/// A result of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheResult {
    /// Identifies the result; by convention the ref's id, and `scratch` for the empty tree. At most 512 bytes.
    pub id: String,
    /// The refs it consists of; all have to exist for the result to be returned. Empty is the empty tree.
    pub refs: Vec<RefId>,
    /// When it was computed.
    pub created_at: SystemTime,
}

/// What a record's key was made from, for people who ask why something ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordDescription {
    /// What comparable records have in common, for example a hash of a step's name.
    pub group: String,
    /// The inputs, as JSON.
    pub json: Vec<u8>,
    /// When it was written.
    pub created_at: SystemTime,
}

/// Changes that become visible and durable together.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub(crate) links: Vec<(String, Link, String)>,
    pub(crate) results: Vec<(String, CacheResult)>,
    pub(crate) descriptions: Vec<(String, RecordDescription)>,
}

impl Batch {
    /// Starts an empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a link from `parent` to `child`.
    pub fn link(&mut self, parent: impl Into<String>, link: Link, child: impl Into<String>) -> &mut Self {
        self.links.push((parent.into(), link, child.into()));
        self
    }

    /// Adds or replaces a result. Its refs are retained from now on.
    pub fn result(&mut self, record: impl Into<String>, result: CacheResult) -> &mut Self {
        self.results.push((record.into(), result));
        self
    }

    /// Describes a record's inputs.
    pub fn describe(&mut self, record: impl Into<String>, description: RecordDescription) -> &mut Self {
        self.descriptions.push((record.into(), description));
        self
    }

    /// Reports whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty() && self.results.is_empty() && self.descriptions.is_empty()
    }
}

/// The solver records of a [`Store`]. Cheap to clone; a read takes microseconds and sees every applied batch.
#[derive(Clone, Debug)]
pub struct Records {
    pub(crate) store: Store,
}

impl Records {
    /// Applies a batch. On return it is visible to readers; durable with the store's next flush, in order with everything
    /// before it. A result whose ref does not exist (any more) is left out.
    pub fn apply(&self, batch: Batch) -> Result<(), StoreError> {
        todo!()
    }

    /// Reports whether the record is known: has a link or a result.
    pub fn exists(&self, record: &str) -> Result<bool, StoreError> {
        todo!()
    }

    /// Lists up to `limit` record ids after `after`, in order.
    pub fn list(&self, after: Option<&str>, limit: usize) -> Result<Vec<String>, StoreError> {
        todo!()
    }

    /// Lists the results of a record whose refs exist, newest first.
    pub fn results(&self, record: &str) -> Result<Vec<CacheResult>, StoreError> {
        todo!()
    }

    /// Returns one result of a record, if its refs exist.
    pub fn load(&self, record: &str, result: &str) -> Result<Option<CacheResult>, StoreError> {
        todo!()
    }

    /// Lists the records that have this result.
    pub fn by_result(&self, result: &str) -> Result<Vec<String>, StoreError> {
        todo!()
    }

    /// Lists the children reached from `parent` by exactly this link.
    pub fn children(&self, parent: &str, link: &Link) -> Result<Vec<String>, StoreError> {
        todo!()
    }

    /// Reports whether this link exists.
    pub fn has_link(&self, parent: &str, link: &Link, child: &str) -> Result<bool, StoreError> {
        todo!()
    }

    /// Lists all links that leave `parent`.
    pub fn links(&self, parent: &str) -> Result<Vec<(Link, String)>, StoreError> {
        todo!()
    }

    /// Lists all links that lead to `child`, as (parent, link).
    pub fn backlinks(&self, child: &str) -> Result<Vec<(String, Link)>, StoreError> {
        todo!()
    }

    /// Returns what a record's key was made from.
    pub fn description(&self, record: &str) -> Result<Option<RecordDescription>, StoreError> {
        todo!()
    }

    /// Lists described records of a group, newest first, at most `limit`.
    pub fn described(&self, group: &str, limit: usize) -> Result<Vec<(String, RecordDescription)>, StoreError> {
        todo!()
    }

    /// Removes a result everywhere, and the records that lead nowhere without it.
    pub fn release(&self, result: &str) -> Result<(), StoreError> {
        todo!()
    }
}

//! Solver records: the persistent graph of cache keys, their links and their results.
//!
//! The shape is BuildKit's, so that exports interchange: a record has an id (a text the solver chooses); a link says that
//! the record `parent`, taken as input number `input` with `selector` by the op `digest`, leads to the record `child` for
//! that op's output number `output`; a result says which ref a record's output is.

use std::time::SystemTime;

use oci::Digest;

use crate::clock;
use crate::db::{Change, Sequence, Table, Transaction, prefix_range};
use crate::describe::RecordDescription;
use crate::error::StoreError;
use crate::graph::{self, RecordChanges, ResultRow, database_error};
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

    /// Describes a record's inputs; left out if the record does not exist once the rest is applied.
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
        let sequence = self.submit(batch)?;
        self.store.shared.db.wait_visible(sequence)
    }

    pub(crate) fn submit(&self, batch: Batch) -> Result<Sequence, StoreError> {
        let shared = &self.store.shared;
        let mut state = shared.state();
        let mut transaction = Transaction::default();
        let mut changes = RecordChanges {
            links: batch.links,
            descriptions: batch.descriptions,
            results: Vec::new(),
        };
        for (record, result) in batch.results {
            if result.refs.iter().any(|id| state.get(id).is_none()) {
                continue;
            }
            for id in &result.refs {
                state.update(id, &mut transaction, |row| row.retain = true);
            }
            changes.results.push((record, result));
        }
        check(&changes)?;
        transaction.changes.push(Change::Records(changes));
        shared.submit(&mut state, transaction)
    }

    /// Reports whether the record is known: has a link or a result.
    pub fn exists(&self, record: &str) -> Result<bool, StoreError> {
        let read = self.store.shared.db.read()?;
        let links = read.open_table(graph::LINKS).map_err(database_error)?;
        let results = read.open_table(graph::RESULTS).map_err(database_error)?;
        graph::exists(&links, &results, &graph::encode_id(record)).map_err(database_error)
    }

    /// Lists up to `limit` record ids after `after`, in the order of storage.
    pub fn list(&self, after: Option<&str>, limit: usize) -> Result<Vec<String>, StoreError> {
        let read = self.store.shared.db.read()?;
        let links = read.open_table(graph::LINKS).map_err(database_error)?;
        let results = read.open_table(graph::RESULTS).map_err(database_error)?;
        let mut from = after
            .map(|after| prefix_range(graph::encode_id(after)).1)
            .unwrap_or_default();
        let mut out = Vec::new();
        while out.len() < limit {
            let first = |table: &redb::ReadOnlyTable<&'static [u8], &'static [u8]>| -> Result<Option<Vec<u8>>, StoreError> {
                let row = table.range(&from[..]..).map_err(database_error)?.next();
                let row = row.transpose().map_err(database_error)?;
                Ok(row.and_then(|row| graph::first_id(row.0.value())))
            };
            let Some(next) = first(&links)?.into_iter().chain(first(&results)?).min() else {
                break;
            };
            out.extend(graph::decode_id(&next));
            from = prefix_range(next).1;
        }
        Ok(out)
    }

    /// Lists the results of a record whose refs exist, newest first.
    pub fn results(&self, record: &str) -> Result<Vec<CacheResult>, StoreError> {
        let read = self.store.shared.db.read()?;
        let table = read.open_table(graph::RESULTS).map_err(database_error)?;
        let prefix = graph::encode_id(record);
        let (from, to) = prefix_range(prefix.clone());
        let mut found = Vec::new();
        for row in table.range(&from[..]..&to[..]).map_err(database_error)? {
            let (key, value) = row.map_err(database_error)?;
            found.extend(decode_result(&key.value()[prefix.len()..], value.value()));
        }
        let state = self.store.shared.state();
        found.retain(|result: &CacheResult| result.refs.iter().all(|id| state.get(id).is_some()));
        found.sort_by_key(|result| std::cmp::Reverse(result.created_at));
        Ok(found)
    }

    /// Returns one result of a record, if its refs exist.
    pub fn load(&self, record: &str, result: &str) -> Result<Option<CacheResult>, StoreError> {
        Ok(self.results(record)?.into_iter().find(|found| found.id == result))
    }

    /// Lists the records that have this result.
    pub fn by_result(&self, result: &str) -> Result<Vec<String>, StoreError> {
        let prefix = graph::by_result_key(result.as_bytes(), &[]);
        let found = self.keys(graph::BY_RESULT, prefix.clone())?;
        Ok(found
            .iter()
            .filter_map(|key| graph::decode_id(&key[prefix.len()..]))
            .collect())
    }

    /// Lists all results with their records, whether their refs exist or not.
    pub(crate) fn all_results(&self) -> Result<Vec<(String, CacheResult)>, StoreError> {
        let read = self.store.shared.db.read()?;
        let table = read.open_table(graph::RESULTS).map_err(database_error)?;
        let mut found = Vec::new();
        for row in table.range::<&[u8]>(..).map_err(database_error)? {
            let (key, value) = row.map_err(database_error)?;
            let Some(prefix) = graph::first_id(key.value()) else {
                continue;
            };
            let result = decode_result(&key.value()[prefix.len()..], value.value());
            found.extend(graph::decode_id(&prefix).zip(result));
        }
        Ok(found)
    }

    fn keys(&self, table: Table, prefix: Vec<u8>) -> Result<Vec<Vec<u8>>, StoreError> {
        let read = self.store.shared.db.read()?;
        let table = read.open_table(table).map_err(database_error)?;
        graph::keys(&table, prefix).map_err(database_error)
    }

    /// Lists the children reached from `parent` by exactly this link.
    pub fn children(&self, parent: &str, link: &Link) -> Result<Vec<String>, StoreError> {
        let prefix = [graph::encode_id(parent), graph::encode_link(link)].concat();
        let (from, to) = prefix_range(prefix.clone());
        let read = self.store.shared.db.read()?;
        let links = read.open_table(graph::LINKS).map_err(database_error)?;
        let mut children = Vec::new();
        // There may be as many as a base image ever had builds on it.
        for row in links.range(&from[..]..&to[..]).map_err(database_error)? {
            let (key, _) = row.map_err(database_error)?;
            children.extend(graph::decode_id(&key.value()[prefix.len()..]));
        }
        Ok(children)
    }

    /// Reports whether this link exists.
    pub fn has_link(&self, parent: &str, link: &Link, child: &str) -> Result<bool, StoreError> {
        let key = [
            graph::encode_id(parent),
            graph::encode_link(link),
            graph::encode_id(child),
        ]
        .concat();
        let read = self.store.shared.db.read()?;
        let links = read.open_table(graph::LINKS).map_err(database_error)?;
        Ok(links.get(&key[..]).map_err(database_error)?.is_some())
    }

    /// Lists all links that leave `parent`.
    pub fn links(&self, parent: &str) -> Result<Vec<(Link, String)>, StoreError> {
        let found = self.keys(graph::LINKS, graph::encode_id(parent))?;
        let decoded = found.iter().filter_map(|key| graph::decode_link_key(key));
        Ok(decoded.map(|(_, link, child)| (link, child)).collect())
    }

    /// Lists all links that lead to `child`, as (parent, link).
    pub fn backlinks(&self, child: &str) -> Result<Vec<(String, Link)>, StoreError> {
        let found = self.keys(graph::BACKLINKS, graph::encode_id(child))?;
        let decoded = found.iter().filter_map(|key| graph::decode_backlink_key(key));
        Ok(decoded.map(|(_, parent, link)| (parent, link)).collect())
    }

    /// Removes a result everywhere, and the records that lead nowhere without it.
    pub fn release(&self, result: &str) -> Result<(), StoreError> {
        let shared = &self.store.shared;
        let sequence = {
            let mut state = shared.state();
            let changes = vec![Change::DeleteResult(result.to_owned())];
            shared.submit(
                &mut state,
                Transaction {
                    changes,
                    ..Transaction::default()
                },
            )?
        };
        shared.db.wait_visible(sequence)
    }
}

fn decode_result(id: &[u8], row: &[u8]) -> Option<CacheResult> {
    let id = String::from_utf8(id.to_vec()).ok()?;
    let row: ResultRow = serde_json::from_slice(row).ok()?;
    Some(CacheResult {
        id,
        refs: row.refs,
        created_at: clock::from_nanos(row.created_at_ns),
    })
}

/// Refuses ids that no key can hold.
fn check(changes: &RecordChanges) -> Result<(), StoreError> {
    let links = changes
        .links
        .iter()
        .flat_map(|(parent, _, child)| [parent, child]);
    let results = changes
        .results
        .iter()
        .flat_map(|(record, result)| [record, &result.id]);
    let descriptions = changes
        .descriptions
        .iter()
        .flat_map(|(record, description)| std::iter::once(record).chain(&description.groups));
    for id in links.chain(results).chain(descriptions) {
        if id.is_empty() || id.len() > graph::ID_MAX || id.contains('\0') {
            return Err(StoreError::InvalidRecordId { id: id.clone() });
        }
    }
    Ok(())
}

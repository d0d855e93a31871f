//! A ref's row: small in memory, as there are many; JSON in the database.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use oci::{Descriptor, Digest};
use serde::{Deserialize, Serialize};
use snapshot::SnapshotKey;

use crate::clock;
use crate::types::{Parents, Provider, RecordType, RefId, RefOptions, RefStat};

/// A ref as it is stored.
///
/// Every step of every build leaves some for as long as its result is cached, so each byte here is a byte per step: what few
/// refs have is boxed, and texts are shared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StoredRow", into = "StoredRow")]
pub(crate) struct Row {
    pub parents: Parents,
    pub mutable: bool,
    /// Key of the active or name of the committed snapshot; for an immutable ref with `twin`, the name to be.
    pub snapshot: Option<SnapshotKey>,
    /// The mutable ref whose active snapshot this immutable one still stands for, and the other way round.
    pub twin: Option<RefId>,
    layer: Option<Box<Layer>>,
    #[expect(
        clippy::box_collection,
        reason = "a set is three words even when it is empty, as nearly all are"
    )]
    index: Option<Box<BTreeSet<String>>>,
    pub description: Arc<str>,
    pub record_type: RecordType,
    pub created_at_ns: i64,
    pub last_used_at_ns: Option<i64>,
    pub usage_count: u64,
    pub size_bytes: Option<u64>,
    pub retain: bool,
    /// What this row needs on disk is durable once the database's epoch has reached this one.
    pub epoch: u64,
}

/// What is known of a ref's layer once it has been packed or came from elsewhere; most refs' never is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layer {
    /// Digest of the layer uncompressed.
    pub diff_id: Option<Digest>,
    /// Identity of the stack of uncompressed layers.
    pub chain_id: Option<Digest>,
    /// Identity of the stack of blobs as they came.
    pub blob_chain_id: Option<Digest>,
    pub blobs: Vec<Descriptor>,
    /// Digests uncompressed of those blobs that hold more than the layer and therefore have others.
    pub variants: BTreeMap<Digest, Digest>,
    pub providers: BTreeMap<Digest, Vec<Provider>>,
}

impl Layer {
    /// Returns the digest of one of its blobs uncompressed.
    pub fn diff_id_of(&self, blob: &Digest) -> Option<Digest> {
        self.variants.get(blob).copied().or(self.diff_id)
    }
}

static NO_LAYER: Layer = Layer {
    diff_id: None,
    chain_id: None,
    blob_chain_id: None,
    blobs: Vec::new(),
    variants: BTreeMap::new(),
    providers: BTreeMap::new(),
};

impl Row {
    pub fn new(parents: Parents, options: &RefOptions, epoch: u64) -> Self {
        Self {
            parents,
            mutable: false,
            snapshot: None,
            twin: None,
            layer: None,
            index: None,
            description: options.description.as_str().into(),
            record_type: options.record_type,
            created_at_ns: options.created_at.map_or_else(clock::now_nanos, clock::to_nanos),
            last_used_at_ns: None,
            usage_count: 0,
            size_bytes: None,
            retain: options.retain,
            epoch,
        }
    }

    /// Returns what is known of the layer.
    pub fn layer(&self) -> &Layer {
        self.layer.as_deref().unwrap_or(&NO_LAYER)
    }

    /// Changes what is known of the layer.
    pub fn change_layer<T>(&mut self, change: impl FnOnce(&mut Layer) -> T) -> T {
        let mut layer = self.layer.take().unwrap_or_default();
        let answer = change(&mut layer);
        self.layer = Some(layer).filter(|layer| **layer != NO_LAYER);
        answer
    }

    /// Lists the texts by which the ref is found.
    pub fn index(&self) -> impl Iterator<Item = &String> {
        self.index.iter().flat_map(|index| index.iter())
    }

    /// Reports whether the ref is found by some text.
    pub fn is_indexed(&self) -> bool {
        self.index.is_some()
    }

    /// Has the ref found by `text`.
    pub fn add_index(&mut self, text: &str) {
        self.index.get_or_insert_default().insert(text.to_owned());
    }

    /// Has the ref no longer found by `text`.
    pub fn remove_index(&mut self, text: &str) {
        if let Some(index) = &mut self.index {
            index.remove(text);
            if index.is_empty() {
                self.index = None;
            }
        }
    }

    /// Reports whether this layer has a blob but no identity of its stack.
    pub fn lacks_chain(&self) -> bool {
        let layer = self.layer();
        matches!(self.parents, Parents::Layer { .. }) && !layer.blobs.is_empty() && layer.chain_id.is_none()
    }

    /// Returns the committed snapshot.
    pub fn committed(&self) -> Option<SnapshotKey> {
        if self.mutable || self.twin.is_some() {
            None
        } else {
            self.snapshot.clone()
        }
    }

    /// Reports whether the tree exists on disk.
    pub fn has_tree(&self) -> bool {
        self.snapshot.is_some()
    }

    pub fn stat(&self, id: &RefId) -> RefStat {
        let layer = self.layer();
        RefStat {
            id: id.clone(),
            parents: self.parents.clone(),
            mutable: self.mutable,
            diff_id: layer.diff_id,
            chain_id: layer.chain_id,
            blobs: layer.blobs.clone(),
            providers: layer.providers.clone(),
            description: self.description.as_ref().to_owned(),
            record_type: self.record_type,
            created_at: clock::from_nanos(self.created_at_ns),
            last_used_at: self.last_used_at_ns.map(clock::from_nanos),
            usage_count: self.usage_count,
            size_bytes: self.size_bytes,
            retain: self.retain,
        }
    }
}

/// The row in the database.
#[derive(Serialize, Deserialize)]
struct StoredRow {
    parents: Parents,
    mutable: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    snapshot: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    twin: Option<RefId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    diff_id: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    chain_id: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    blob_chain_id: Option<Digest>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    blobs: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    variants: BTreeMap<Digest, Digest>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    providers: BTreeMap<Digest, Vec<Provider>>,
    #[serde(default)]
    description: String,
    #[serde(default)]
    record_type: RecordType,
    created_at_ns: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last_used_at_ns: Option<i64>,
    #[serde(default)]
    usage_count: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size_bytes: Option<u64>,
    #[serde(default)]
    retain: bool,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    index: BTreeSet<String>,
    epoch: u64,
}

impl From<StoredRow> for Row {
    fn from(stored: StoredRow) -> Self {
        let layer = Layer {
            diff_id: stored.diff_id,
            chain_id: stored.chain_id,
            blob_chain_id: stored.blob_chain_id,
            blobs: stored.blobs,
            variants: stored.variants,
            providers: stored.providers,
        };
        Self {
            parents: stored.parents,
            mutable: stored.mutable,
            // A text that names no snapshot is none.
            snapshot: stored.snapshot.and_then(|text| SnapshotKey::new(&text).ok()),
            twin: stored.twin,
            layer: Some(layer).filter(|layer| *layer != NO_LAYER).map(Box::new),
            index: Some(stored.index).filter(|index| !index.is_empty()).map(Box::new),
            description: stored.description.into(),
            record_type: stored.record_type,
            created_at_ns: stored.created_at_ns,
            last_used_at_ns: stored.last_used_at_ns,
            usage_count: stored.usage_count,
            size_bytes: stored.size_bytes,
            retain: stored.retain,
            epoch: stored.epoch,
        }
    }
}

impl From<Row> for StoredRow {
    fn from(row: Row) -> Self {
        let Layer {
            diff_id,
            chain_id,
            blob_chain_id,
            blobs,
            variants,
            providers,
        } = row.layer.map(|layer| *layer).unwrap_or_default();
        Self {
            parents: row.parents,
            mutable: row.mutable,
            snapshot: row.snapshot.map(|key| key.as_str().to_owned()),
            twin: row.twin,
            diff_id,
            chain_id,
            blob_chain_id,
            blobs,
            variants,
            providers,
            description: row.description.as_ref().to_owned(),
            record_type: row.record_type,
            created_at_ns: row.created_at_ns,
            last_used_at_ns: row.last_used_at_ns,
            usage_count: row.usage_count,
            size_bytes: row.size_bytes,
            retain: row.retain,
            index: row.index.map(|index| *index).unwrap_or_default(),
            epoch: row.epoch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_what_the_database_holds() {
        let digest = |byte: char| format!("sha256:{}", byte.to_string().repeat(64));
        let full = format!(
            r#"{{"parents":{{"kind":"layer","parent":"below"}},"mutable":false,"snapshot":"tree","twin":"other","diff_id":"{}","chain_id":"{}","blob_chain_id":"{}","blobs":[{{"mediaType":"a/b","digest":"{}","size":3}}],"providers":{{"{}":[{{"scheme":"registry","locator":"x"}}]}},"description":"step","record_type":"source.local","created_at_ns":5,"last_used_at_ns":6,"usage_count":7,"size_bytes":8,"retain":true,"index":["a","b"],"epoch":9}}"#,
            digest('1'),
            digest('2'),
            digest('3'),
            digest('4'),
            digest('4'),
        );
        let bare = r#"{"parents":{"kind":"layer","parent":null},"mutable":true,"description":"","record_type":"regular","created_at_ns":5,"usage_count":0,"retain":false,"epoch":9}"#;
        for text in [&full, bare] {
            let row: Row = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&row).unwrap(), text);
        }
        let row: Row = serde_json::from_str(&full).unwrap();
        assert_eq!(row.index().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(row.layer().blobs[0].size, 3);
        assert_eq!(row.layer().diff_id.unwrap().to_string(), digest('1'));
    }

    #[test]
    fn what_becomes_empty_takes_no_memory() {
        let mut row = Row::new(Parents::Layer { parent: None }, &RefOptions::default(), 1);
        let plain = row.clone();
        row.add_index("a");
        row.change_layer(|layer| layer.diff_id = Some(Digest::sha256("a")));
        assert!(row.is_indexed() && row.layer.is_some());
        row.remove_index("a");
        row.change_layer(|layer| layer.diff_id = None);
        assert!(row.index.is_none() && row.layer.is_none());
        assert_eq!(row, plain);
    }
}

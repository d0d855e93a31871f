//! What the store knows in memory: refs, who holds them, and what they share.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, Weak};

use oci::{Descriptor, Digest};
use slab::Slab;
use snapshot::SnapshotKey;

use crate::db::{After, Change, Everything, REFS, Transaction};
use crate::row::Row;
use crate::types::{Parents, RefId};

/// A ref in memory.
#[derive(Debug)]
pub(crate) struct Entry {
    pub row: Row,
    /// Handles.
    pub holds: u32,
    /// Refs that have this one as a parent.
    pub children: u32,
}

/// How often each of some things is named.
type Counts<K> = BTreeMap<K, u32>;

/// Everything in memory. Changes go to the database in the order in which they are made under the lock around this.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Where in `entries` a ref is. Many live long: one allocation for all keeps less memory around them that is free.
    refs: BTreeMap<RefId, usize>,
    entries: Slab<Entry>,
    by_chain: BTreeMap<Digest, BTreeSet<RefId>>,
    by_blob_chain: BTreeMap<Digest, BTreeSet<RefId>>,
    by_index: BTreeMap<String, BTreeSet<RefId>>,
    /// Layers with a blob that stand on one without: what they are a stack of cannot be told yet.
    chainless: BTreeSet<RefId>,
    /// How many refs name a blob.
    blobs: Counts<Digest>,
    /// How many refs use a snapshot that was made for another one, by key or name.
    snapshots: Counts<SnapshotKey>,
    /// How many refs have a description. Steps of many builds are the same, so each text is in memory once.
    descriptions: Counts<Arc<str>>,
    /// How many pins hold a blob.
    pins: Counts<Digest>,
    /// Blobs held by name.
    pub names: BTreeMap<String, Vec<Digest>>,
    named: Counts<Digest>,
    /// The epoch new rows belong to.
    pub epoch: u64,
    /// Numbers markers of refs that are being written.
    pub markers: u64,
    /// Markers by ref.
    pub writing: BTreeMap<RefId, std::path::PathBuf>,
    /// What is held while a ref's snapshot is being made or committed; of refs for which that was done last.
    works: BTreeMap<RefId, Weak<Mutex<()>>>,
}

fn raise<K: Ord + Clone>(counts: &mut Counts<K>, key: &K) {
    *counts.entry(key.clone()).or_default() += 1;
}

/// Lowers a count; `true` when it reached zero.
fn lower<K: Ord>(counts: &mut Counts<K>, key: &K) -> bool {
    match counts.get_mut(key) {
        Some(count) if *count > 1 => {
            *count -= 1;
            false
        }
        Some(_) => {
            counts.remove(key);
            true
        }
        None => false,
    }
}

fn unindex<K: Ord>(index: &mut BTreeMap<K, BTreeSet<RefId>>, key: &K, id: &RefId) {
    if let Some(ids) = index.get_mut(key) {
        ids.remove(id);
        if ids.is_empty() {
            index.remove(key);
        }
    }
}

impl State {
    pub fn new(epoch: u64) -> Self {
        Self {
            epoch,
            ..Self::default()
        }
    }

    pub fn get(&self, id: &RefId) -> Option<&Entry> {
        self.entries.get(*self.refs.get(id)?)
    }

    fn get_mut(&mut self, id: &RefId) -> Option<&mut Entry> {
        self.entries.get_mut(*self.refs.get(id)?)
    }

    /// Lists all refs in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = (&RefId, &Entry)> {
        let entry = |at: &usize| self.entries.get(*at);
        self.refs
            .iter()
            .filter_map(move |(id, at)| Some((id, entry(at)?)))
    }

    pub fn len(&self) -> usize {
        self.refs.len()
    }

    /// Adds a ref nobody holds. Its parents have to be there.
    pub fn insert(&mut self, id: &RefId, mut row: Row, transaction: &mut Transaction) {
        self.share(&mut row);
        for parent in row.parents.ids() {
            if let Some(parent) = self.get_mut(parent) {
                parent.children += 1;
            }
        }
        self.note(id, &row);
        transaction.put_json(REFS, id.as_str(), &row);
        let at = self.entries.insert(Entry {
            row,
            holds: 0,
            children: 0,
        });
        self.refs.insert(id.clone(), at);
    }

    /// Has a row's description be the text that is in memory already.
    fn share(&self, row: &mut Row) {
        if let Some((known, _)) = self.descriptions.get_key_value(&row.description) {
            row.description = Arc::clone(known);
        }
    }

    fn note(&mut self, id: &RefId, row: &Row) {
        for blob in &row.layer().blobs {
            raise(&mut self.blobs, &blob.digest);
        }
        if let Some(key) = row.snapshot.as_ref().filter(|key| *key != id.snapshot_key()) {
            raise(&mut self.snapshots, key);
        }
        raise(&mut self.descriptions, &row.description);
        self.enter(id, row);
    }

    /// Lets a ref be found by what its row says.
    fn enter(&mut self, id: &RefId, row: &Row) {
        let layer = row.layer();
        if let Some(chain_id) = layer.chain_id {
            self.by_chain.entry(chain_id).or_default().insert(id.clone());
        }
        if let Some(chain_id) = layer.blob_chain_id {
            self.by_blob_chain.entry(chain_id).or_default().insert(id.clone());
        }
        for index in row.index() {
            self.by_index.entry(index.clone()).or_default().insert(id.clone());
        }
        if row.lacks_chain() {
            self.chainless.insert(id.clone());
        }
    }

    /// Undoes `note` of a row that is not the ref's any more; adds what nobody names now to what is deleted once durable.
    fn forget(&mut self, id: &RefId, row: &Row, after: &mut Vec<After>) {
        if let Some(key) = row.snapshot.as_ref().filter(|key| *key != id.snapshot_key()) {
            lower(&mut self.snapshots, key);
        }
        if let Some(key) = row.snapshot.as_ref().filter(|key| !self.has_snapshot(key)) {
            // Of twins, the active snapshot is the mutable one's alone, and the name does not exist yet.
            if row.mutable || row.twin.is_none() {
                after.push(After::DeleteSnapshot(key.clone()));
            }
        }
        lower(&mut self.descriptions, &row.description);
        let layer = row.layer();
        for blob in &layer.blobs {
            if lower(&mut self.blobs, &blob.digest) {
                after.push(After::DeleteBlob(blob.digest));
            }
        }
        if let Some(chain_id) = &layer.chain_id {
            unindex(&mut self.by_chain, chain_id, id);
        }
        if let Some(chain_id) = &layer.blob_chain_id {
            unindex(&mut self.by_blob_chain, chain_id, id);
        }
        for index in row.index() {
            unindex(&mut self.by_index, index, id);
        }
        self.chainless.remove(id);
    }

    /// Changes a row; `None` if there is no such ref. What it shares with others is kept right.
    pub fn update<T>(
        &mut self,
        id: &RefId,
        transaction: &mut Transaction,
        change: impl FnOnce(&mut Row) -> T,
    ) -> Option<T> {
        let mut row = self.get(id)?.row.clone();
        let old = row.clone();
        let answer = change(&mut row);
        if row != old {
            self.share(&mut row);
            // First the new, so that nothing both name is deleted in between.
            self.note(id, &row);
            let mut after = Vec::new();
            self.forget(id, &old, &mut after);
            // Both may be found by the same.
            self.enter(id, &row);
            // Whoever changes a row's snapshot decides about the old one.
            after.retain(|after| !matches!(after, After::DeleteSnapshot(_)));
            transaction.after.extend(after);
            transaction.put_json(REFS, id.as_str(), &row);
            self.get_mut(id)?.row = row;
        }
        Some(answer)
    }

    /// Removes a ref without holds and children; `None` when it is not there or not removable.
    pub fn remove(&mut self, id: &RefId, transaction: &mut Transaction) -> Option<Row> {
        let entry = self.get(id)?;
        if entry.holds > 0 || entry.children > 0 {
            return None;
        }
        let at = self.refs.remove(id)?;
        let Entry { row, .. } = self.entries.remove(at);
        for parent in row.parents.ids() {
            if let Some(parent) = self.get_mut(parent) {
                parent.children = parent.children.saturating_sub(1);
            }
        }
        // Nobody could come back to it, not even after a crash.
        let is_scrap = row.mutable && !row.retain && row.twin.is_none();
        let after = if is_scrap {
            &mut transaction.now
        } else {
            &mut transaction.after
        };
        self.forget(id, &row, after);
        self.unmeasure_sharers(&row, transaction);
        if let Some(marker) = self.writing.remove(id) {
            transaction.after.push(After::DeleteFile(marker));
        }
        transaction.changes.push(Change::DeleteRef(id.clone()));
        Some(row)
    }

    /// Has refs that share a tree or a blob with one that is gone measured again: it may have been the one it counted for.
    fn unmeasure_sharers(&mut self, gone: &Row, transaction: &mut Transaction) {
        let chain_id = gone.layer().chain_id.as_ref();
        let mut sharers: Vec<RefId> = chain_id
            .into_iter()
            .flat_map(|id| self.by_chain(id))
            .cloned()
            .collect();
        let left: Vec<Digest> = gone.layer().blobs.iter().map(|blob| blob.digest).collect();
        let left: Vec<Digest> = left
            .into_iter()
            .filter(|digest| self.blobs.contains_key(digest))
            .collect();
        if !left.is_empty() {
            let shares = |row: &Row| row.layer().blobs.iter().any(|blob| left.contains(&blob.digest));
            let all = self.iter().filter(|(_, entry)| shares(&entry.row));
            sharers.extend(all.map(|(id, _)| id.clone()));
        }
        for id in sharers {
            self.update(&id, transaction, |row| row.size_bytes = None);
        }
    }

    /// Reports whether `id` is the ref that a blob counts for: the first of those that name it.
    pub fn counts_blob(&self, id: &RefId, digest: &Digest) -> bool {
        if self.blobs.get(digest).is_none_or(|count| *count < 2) {
            return true;
        }
        let names = |entry: &Entry| entry.row.layer().blobs.iter().any(|blob| blob.digest == *digest);
        let first = self.iter().find(|(_, entry)| names(entry));
        first.is_none_or(|(first, _)| first == id)
    }

    /// Encodes all refs and names.
    pub fn everything(&self) -> Everything {
        let mut all = Everything::default();
        for (id, entry) in self.iter() {
            let row = serde_json::to_vec(&entry.row).expect("a row serializes");
            all.refs.insert(id.as_str().as_bytes().to_vec(), row);
        }
        for (name, digests) in &self.names {
            let digests = serde_json::to_vec(digests).expect("digests serialize");
            all.names.insert(name.as_bytes().to_vec(), digests);
        }
        all
    }

    /// Removes a ref together with its twin; `None` when either is held or has children.
    pub fn remove_with_twin(&mut self, id: &RefId, transaction: &mut Transaction) -> Option<Row> {
        let twin = self.get(id)?.row.twin.clone();
        if let Some(twin) = twin.as_ref().and_then(|twin| self.get(twin))
            && (twin.holds > 0 || twin.children > 0)
        {
            return None;
        }
        let row = self.remove(id, transaction)?;
        if let Some(twin) = twin {
            self.remove(&twin, transaction);
        }
        Some(row)
    }

    pub fn hold(&mut self, id: &RefId) -> bool {
        self.get_mut(id).map(|entry| entry.holds += 1).is_some()
    }

    /// Drops a hold; returns how many are left.
    pub fn unhold(&mut self, id: &RefId) -> u32 {
        self.get_mut(id).map_or(0, |entry| {
            entry.holds = entry.holds.saturating_sub(1);
            entry.holds
        })
    }

    /// Returns what is to be held while the ref's snapshot is made or committed; `None` if there is no such ref.
    pub fn work(&mut self, id: &RefId) -> Option<Arc<Mutex<()>>> {
        let id = self.refs.get_key_value(id)?.0;
        if let Some(work) = self.works.get(id).and_then(Weak::upgrade) {
            return Some(work);
        }
        // Only what is worked at now stays.
        self.works.retain(|_, work| work.strong_count() > 0);
        let work = Arc::default();
        self.works.insert(id.clone(), Arc::downgrade(&work));
        Some(work)
    }

    pub fn by_chain(&self, chain_id: &Digest) -> impl Iterator<Item = &RefId> {
        self.by_chain.get(chain_id).into_iter().flatten()
    }

    pub fn by_blob_chain(&self, chain_id: &Digest) -> impl Iterator<Item = &RefId> {
        self.by_blob_chain.get(chain_id).into_iter().flatten()
    }

    pub fn by_index(&self, index: &str) -> impl Iterator<Item = &RefId> {
        self.by_index.get(index).into_iter().flatten()
    }

    /// Lists the indexes that begin with `prefix`.
    pub fn indexes_below(&self, prefix: &str) -> Vec<String> {
        let from = self.by_index.range(prefix.to_owned()..);
        from.map(|(index, _)| index)
            .take_while(|index| index.starts_with(prefix))
            .cloned()
            .collect()
    }

    pub fn pin(&mut self, digest: &Digest) {
        raise(&mut self.pins, digest);
    }

    /// Drops a pin; `true` when nothing holds the blob any more.
    pub fn unpin(&mut self, digest: &Digest) -> bool {
        lower(&mut self.pins, digest);
        !self.is_blob_held(digest)
    }

    /// Replaces what a name holds; returns what nothing holds any more.
    pub fn set_name(&mut self, name: &str, digests: Vec<Digest>) -> Vec<Digest> {
        for digest in &digests {
            raise(&mut self.named, digest);
        }
        let old = if digests.is_empty() {
            self.names.remove(name)
        } else {
            self.names.insert(name.to_owned(), digests)
        };
        let mut free = old.unwrap_or_default();
        free.retain(|digest| {
            lower(&mut self.named, digest);
            !self.is_blob_held(digest)
        });
        free
    }

    pub fn is_named(&self, digest: &Digest) -> bool {
        self.named.contains_key(digest)
    }

    /// Reports whether a ref, a pin or a name holds the blob.
    pub fn is_blob_held(&self, digest: &Digest) -> bool {
        self.blobs.contains_key(digest) || self.pins.contains_key(digest) || self.named.contains_key(digest)
    }

    /// Reports whether a ref uses the snapshot of that key or name.
    pub fn has_snapshot(&self, key: &SnapshotKey) -> bool {
        let maker = || self.get(&RefId::of_snapshot(key)?);
        self.snapshots.contains_key(key)
            || maker().is_some_and(|entry| entry.row.snapshot.as_ref() == Some(key))
    }

    /// Gives layers the identity of their stack that could not have it because a layer below had no blob yet: blobs are made
    /// in any order.
    pub fn settle_chains(&mut self, transaction: &mut Transaction) {
        loop {
            let chain_of = |id: &RefId| Some((id.clone(), self.chain_above(id)?));
            let known: Vec<_> = self.chainless.iter().filter_map(chain_of).collect();
            if known.is_empty() {
                return;
            }
            for (id, (chain_id, blob_chain_id)) in known {
                self.update(&id, transaction, |row| {
                    row.change_layer(|layer| {
                        (layer.chain_id, layer.blob_chain_id) = (Some(chain_id), Some(blob_chain_id));
                    });
                });
            }
        }
    }

    /// As [`chain_of`](Self::chain_of), from what is known of the layer below alone.
    fn chain_above(&self, id: &RefId) -> Option<(Digest, Digest)> {
        let row = &self.get(id)?.row;
        let Parents::Layer { parent } = &row.parents else {
            return None;
        };
        let below = match parent {
            None => None,
            Some(parent) => {
                let below = &self.get(parent)?.row;
                if !matches!(below.parents, Parents::Layer { .. }) {
                    return self.chain_of(id);
                }
                Some((below.layer().chain_id?, below.layer().blob_chain_id?))
            }
        };
        let layer = row.layer();
        Some(next_chain(below, layer.diff_id?, layer.blobs.first()?.digest))
    }

    /// Identities of the stack of layers up to `id`: of the uncompressed layers, and of the blobs as they came.
    pub fn chain_of(&self, id: &RefId) -> Option<(Digest, Digest)> {
        let mut chain: Option<(Digest, Digest)> = None;
        for layer in self.layers(id) {
            let layer = self.get(&layer)?.row.layer();
            chain = Some(next_chain(chain, layer.diff_id?, layer.blobs.first()?.digest));
        }
        chain
    }

    /// The first blobs of the layers that make up `id`, where all have one.
    pub fn blob_chain(&self, id: &RefId) -> Option<Vec<Descriptor>> {
        // Layers without a blob are the rule, and the topmost then says it all.
        let row = &self.get(id)?.row;
        if matches!(row.parents, Parents::Layer { .. }) && row.layer().blobs.is_empty() {
            return None;
        }
        let layers = self.layers(id);
        let blob = |layer: &RefId| self.get(layer)?.row.layer().blobs.first().cloned();
        layers.iter().map(blob).collect()
    }

    /// Identity of the stack of uncompressed layers up to `id`, where all are known.
    pub fn diff_chain_of(&self, id: &RefId) -> Option<Digest> {
        let diff_ids: Option<Vec<Digest>> = self
            .layers(id)
            .iter()
            .map(|layer| self.get(layer)?.row.layer().diff_id)
            .collect();
        oci::chain_id(&diff_ids?)
    }

    /// Lists the refs whose layers, bottom first, make up `id`.
    pub fn layers(&self, id: &RefId) -> Vec<RefId> {
        let mut out = Vec::new();
        self.collect_layers(id, &mut out);
        out
    }

    fn collect_layers(&self, id: &RefId, out: &mut Vec<RefId>) {
        // Down the chain without recursion, as chains are long; merges and diffs nest rarely.
        let (mut chain, mut at) = (Vec::new(), Some(id.clone()));
        while let Some(id) = at.take() {
            let Some(entry) = self.get(&id) else { break };
            match &entry.row.parents {
                Parents::Layer { parent } => {
                    at.clone_from(parent);
                    chain.push(id);
                }
                Parents::Merge { inputs } => {
                    for input in inputs {
                        self.collect_layers(input, out);
                    }
                }
                Parents::Diff {
                    lower: Some(lower),
                    upper: Some(upper),
                } => match self.layers_between(lower, upper) {
                    Some(between) => out.extend(between),
                    None => out.push(id),
                },
                Parents::Diff { .. } => out.push(id),
            }
        }
        out.extend(chain.into_iter().rev());
    }

    /// Finds the layer that `upper` stands on and whose stack is the same as that of `lower`: the same image can be here twice,
    /// with other times of its files.
    pub fn equal_below(&self, lower: &RefId, upper: &RefId) -> Option<RefId> {
        let chain_id = self.get(lower)?.row.layer().chain_id?;
        let mut at = Some(upper);
        while let Some(id) = at {
            let row = &self.get(id)?.row;
            if row.layer().chain_id == Some(chain_id) {
                return Some(id.clone());
            }
            at = match &row.parents {
                Parents::Layer { parent } => parent.as_ref(),
                Parents::Merge { .. } | Parents::Diff { .. } => None,
            };
        }
        None
    }

    /// Lists the refs from above `lower` up to `upper`, if `upper` stands on `lower` through layers alone.
    pub fn layers_between(&self, lower: &RefId, upper: &RefId) -> Option<Vec<RefId>> {
        let mut between = Vec::new();
        let mut at = upper.clone();
        while at != *lower {
            let Parents::Layer { parent } = &self.get(&at)?.row.parents else {
                return None;
            };
            let below = parent.clone()?;
            between.push(std::mem::replace(&mut at, below));
        }
        between.reverse();
        Some(between)
    }
}

/// Puts one more layer on a stack.
pub(crate) fn next_chain(below: Option<(Digest, Digest)>, diff_id: Digest, blob: Digest) -> (Digest, Digest) {
    let join = |a: Digest, b: Digest| Digest::sha256(format!("{a} {b}"));
    let blob = join(blob, diff_id);
    match below {
        None => (diff_id, blob),
        Some((chain, blobs)) => (join(chain, diff_id), join(blobs, blob)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::RefOptions;

    fn id(text: &str) -> RefId {
        text.parse().unwrap()
    }

    /// Makes a row that shares nothing.
    fn stored(parent: &str, own: &str, description: &str) -> Row {
        let options = RefOptions {
            description: description.to_owned(),
            ..RefOptions::default()
        };
        let parents = Parents::Layer {
            parent: Some(id(parent)),
        };
        let mut row = Row::new(parents, &options, 1);
        row.snapshot = Some(SnapshotKey::new(own).unwrap());
        row
    }

    #[test]
    fn a_ref_is_small() {
        // There is one of them, and one of its twin, for every step that is cached.
        assert!(size_of::<Entry>() <= 200, "{}", size_of::<Entry>());
    }

    #[test]
    fn descriptions_are_in_memory_once() {
        let mut state = State::new(1);
        let mut transaction = Transaction::default();
        for name in ["base", "one", "two"] {
            state.insert(&id(name), stored("base", name, "RUN make"), &mut transaction);
        }
        let row = |name| &state.get(&id(name)).unwrap().row;
        assert!(Arc::ptr_eq(&row("one").description, &row("two").description));
        assert_eq!(state.descriptions.values().copied().collect::<Vec<_>>(), [3]);
        state.update(&id("one"), &mut transaction, |row| {
            row.description = "RUN test".into()
        });
        assert_eq!(state.descriptions.values().copied().collect::<Vec<_>>(), [2, 1]);
    }

    #[test]
    fn nothing_remains_of_refs_that_are_gone() {
        let mut state = State::new(1);
        let mut transaction = Transaction::default();
        for round in 0..3 {
            let name = format!("a{round}");
            let mut row = stored("none", &name, &format!("step {round}"));
            row.add_index(&name);
            row.change_layer(|layer| layer.chain_id = Some(oci::Digest::sha256(&name)));
            state.insert(&id(&name), row, &mut transaction);
            assert!(state.work(&id(&name)).is_some());
            state.update(&id(&name), &mut transaction, |row| {
                row.description = "other".into()
            });
            assert!(state.remove(&id(&name), &mut transaction).is_some());
        }
        assert_eq!(state.len(), 0);
        let left = [
            state.descriptions.len(),
            state.snapshots.len(),
            state.by_index.len(),
            state.by_chain.len(),
        ];
        assert_eq!(left, [0; 4]);
        // Nobody works; what the last one held is dropped by the next one.
        assert!(state.works.len() <= 1);
    }

    #[test]
    fn work_on_a_ref_is_shared_while_it_lasts() {
        let mut state = State::new(1);
        state.insert(&id("a"), stored("none", "a", ""), &mut Transaction::default());
        let (one, two) = (state.work(&id("a")).unwrap(), state.work(&id("a")).unwrap());
        assert!(Arc::ptr_eq(&one, &two));
        assert!(state.work(&id("b")).is_none());
    }
}

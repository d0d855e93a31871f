//! Immutable refs from blobs and from other refs; finding and describing them.

use oci::media_type::is_layer;
use oci::{Descriptor, Digest};
use snapshot::SnapshotKey;

use crate::clock;
use crate::db::{After, Transaction};
use crate::error::StoreError;
use crate::handle::{Hold, ImmutableRef};
use crate::row::Row;
use crate::state::{State, next_chain};
use crate::store::{Store, new_id};
use crate::types::{LayerBlob, Parents, Provider, RefId, RefOptions};

/// Most layers a merge may have in sum: nested merges multiply.
const MAX_LAYERS: usize = 4096;
/// Most places remembered for one blob.
const MAX_PROVIDERS: usize = 16;

/// Tells whether a ref has another size for a blob than somebody who brings it, or whether just one of them takes it for a
/// layer. One of the two is wrong, and must not keep the other one from being used.
fn contradicts(row: &Row, blob: &Descriptor) -> bool {
    let layer = row.layer();
    let mut same = layer.blobs.iter().filter(|own| own.digest == blob.digest);
    same.any(|own| own.size != blob.size || is_layer(&own.media_type) != is_layer(&blob.media_type))
}

/// A layer that a ref is looked for of.
struct Wanted<'a> {
    blob_chain: &'a Digest,
    blob: &'a Descriptor,
    parent: Option<&'a RefId>,
    /// The parent, or one below it, was made just now.
    is_parent_new: bool,
}

impl Store {
    /// Takes a ref for reading. `NotFound` is a miss: no such ref, or neither tree nor blobs nor providers left. A committed
    /// but not finalized mutable ref is found under both ids; one that is being written to is `Locked`.
    pub fn get(&self, id: &RefId) -> Result<ImmutableRef, StoreError> {
        self.find(id, true)
    }

    /// Does what [`get`](Self::get) does without counting it as a use.
    pub fn peek(&self, id: &RefId) -> Result<ImmutableRef, StoreError> {
        self.find(id, false)
    }

    fn find(&self, id: &RefId, is_use: bool) -> Result<ImmutableRef, StoreError> {
        let not_found = || StoreError::NotFound { id: id.clone() };
        let mut state = self.shared.state();
        let row = &state.get(id).ok_or_else(not_found)?.row;
        let id = match (row.mutable, &row.twin) {
            (false, _) => id.clone(),
            (true, Some(twin)) => twin.clone(),
            (true, None) => return Err(StoreError::Locked { id: id.clone() }),
        };
        if !self.is_loadable(&state, &id)? {
            let mut transaction = Transaction::default();
            self.forget_lost_trees(&mut state, &id, &mut transaction)?;
            if self.is_loadable(&state, &id)? {
                self.shared.submit(&mut state, transaction)?;
                return Hold::new(self, &mut state, &id, is_use)
                    .map(ImmutableRef::new)
                    .ok_or_else(not_found);
            }
            if state.remove_with_twin(&id, &mut transaction).is_none() {
                tracing::warn!(ref_id = %id, "a ref in use can be neither read nor made again");
            }
            self.shared.submit(&mut state, transaction)?;
            return Err(not_found());
        }
        Hold::new(self, &mut state, &id, is_use)
            .map(ImmutableRef::new)
            .ok_or_else(not_found)
    }

    /// Proves that the tree is there or can be made: as far down as trees are missing.
    fn is_loadable(&self, state: &State, id: &RefId) -> Result<bool, StoreError> {
        let mut pending = vec![id.clone()];
        let mut seen = std::collections::BTreeSet::new();
        while let Some(id) = pending.pop() {
            let Some(row) = state.get(&id).map(|entry| &entry.row) else {
                return Ok(false);
            };
            let key = match &row.twin {
                Some(twin) => Some(twin.snapshot_key().clone()),
                None => row.snapshot.clone(),
            };
            if let Some(key) = key {
                if self.is_whole(&key)? {
                    continue;
                }
                return Ok(false);
            }
            let is_layer = matches!(row.parents, Parents::Layer { .. });
            if is_layer && !self.has_blob(row)? {
                return Ok(false);
            }
            pending.extend(
                row.parents
                    .ids()
                    .into_iter()
                    .filter(|id| seen.insert((*id).clone()))
                    .cloned(),
            );
        }
        Ok(true)
    }

    /// Reports whether the files of a snapshot and all it stands on are on disk.
    pub(crate) fn is_whole(&self, key: &SnapshotKey) -> Result<bool, StoreError> {
        match self.shared.snapshotter.check(key) {
            Ok(()) => Ok(true),
            Err(error) if error.is_not_found() => {
                tracing::warn!(error = &error as &dyn std::error::Error, snapshot = %key, "files are gone from disk");
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Forgets trees whose files someone removed from disk, from `id` downwards, so that they are made again from their
    /// blobs where there are some. A ref that is held keeps what it has: its holder may have it mounted.
    fn forget_lost_trees(
        &self,
        state: &mut State,
        id: &RefId,
        transaction: &mut Transaction,
    ) -> Result<(), StoreError> {
        let mut pending = vec![id.clone()];
        let mut seen = std::collections::BTreeSet::new();
        while let Some(id) = pending.pop() {
            let Some(entry) = state.get(&id) else { continue };
            if !seen.insert(id.clone()) {
                continue;
            }
            let lost = match entry.row.committed() {
                Some(key) if self.is_whole(&key)? => continue,
                Some(key) if entry.holds == 0 => Some(key),
                _ => None,
            };
            pending.extend(entry.row.parents.ids().into_iter().cloned());
            let Some(key) = lost else { continue };
            state.update(&id, transaction, |row| {
                (row.snapshot, row.size_bytes) = (None, None)
            });
            if !state.has_snapshot(&key) {
                transaction.after.push(After::DeleteSnapshot(key));
            }
        }
        Ok(())
    }

    /// Reports whether one of a row's blobs is here or can be fetched.
    pub(crate) fn has_blob(&self, row: &Row) -> Result<bool, StoreError> {
        let layer = row.layer();
        for blob in &layer.blobs {
            let is_provided = layer
                .providers
                .get(&blob.digest)
                .is_some_and(|providers| !providers.is_empty());
            if is_provided || self.shared.content.exists(&blob.digest)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Lists a row's blobs that are neither here nor can be fetched.
    pub(crate) fn lost_blobs(&self, row: &Row) -> Result<Vec<Digest>, StoreError> {
        let mut lost = Vec::new();
        let layer = row.layer();
        for blob in &layer.blobs {
            let places = layer.providers.get(&blob.digest);
            if places.is_none_or(Vec::is_empty) && !self.shared.content.exists(&blob.digest)? {
                lost.push(blob.digest);
            }
        }
        Ok(lost)
    }

    /// Returns the ref for a stack of layers, bottom first, making the refs that do not exist yet. No layers, no ref.
    ///
    /// Lazy: no blob has to be there. A layer whose blob chain is known already is that ref; its providers are added.
    pub fn from_blob_chain(
        &self,
        layers: &[LayerBlob],
        options: &RefOptions,
    ) -> Result<Option<ImmutableRef>, StoreError> {
        let mut state = self.shared.state();
        let mut transaction = Transaction::default();
        let mut chain = None;
        let mut parent: Option<RefId> = None;
        let mut is_parent_new = false;
        for layer in layers {
            let next = next_chain(chain, layer.diff_id, layer.descriptor.digest);
            chain = Some(next);
            let wanted = Wanted {
                blob_chain: &next.1,
                blob: &layer.descriptor,
                parent: parent.as_ref(),
                is_parent_new,
            };
            let id = match self.known_layer(&mut state, &wanted, &mut transaction)? {
                Some(id) => {
                    state.update(&id, &mut transaction, |row| {
                        add_providers(row, &layer.descriptor.digest, &layer.providers)
                    });
                    id
                }
                None => {
                    is_parent_new = true;
                    let id = new_id();
                    let mut row = layer_row(&state, layer, parent.clone(), next, options);
                    if let Some(key) = &row.snapshot
                        && !self.is_whole(key)?
                    {
                        row.snapshot = None;
                    }
                    state.insert(&id, row, &mut transaction);
                    id
                }
            };
            parent = Some(id);
        }
        self.shared.submit(&mut state, transaction)?;
        Ok(parent
            .and_then(|id| Hold::new(self, &mut state, &id, true))
            .map(ImmutableRef::new))
    }

    /// Finds a usable ref with this identity. It need not have the same parent: its own chain is equal.
    fn known_layer(
        &self,
        state: &mut State,
        wanted: &Wanted<'_>,
        transaction: &mut Transaction,
    ) -> Result<Option<RefId>, StoreError> {
        let mut usable = None;
        let known: Vec<RefId> = state.by_blob_chain(wanted.blob_chain).cloned().collect();
        for id in known {
            let Some(entry) = state.get(&id) else { continue };
            let is_on_parent =
                matches!(&entry.row.parents, Parents::Layer { parent: own } if own.as_ref() == wanted.parent);
            // What has just been made was not there or is doubtful; so is what else stands on that.
            if wanted.is_parent_new && !is_on_parent && !entry.row.has_tree() {
                continue;
            }
            if entry.row.twin.is_some() || contradicts(&entry.row, wanted.blob) {
                continue;
            }
            if !self.is_loadable(state, &id)? {
                self.forget_lost_trees(state, &id, transaction)?;
                if !self.is_loadable(state, &id)? {
                    continue;
                }
            }
            usable = Some(id);
            if is_on_parent {
                break;
            }
        }
        Ok(usable)
    }

    /// Makes the ref of several trees on top of each other, first lowest. One input is that ref itself; none is an error.
    pub fn merge(&self, inputs: &[ImmutableRef], options: RefOptions) -> Result<ImmutableRef, StoreError> {
        if let [only] = inputs {
            return Ok(only.clone());
        }
        let id = new_id();
        let invalid = |reason| StoreError::Invalid {
            id: id.clone(),
            reason,
        };
        let mut state = self.shared.state();
        let (mut flat, mut layers) = (Vec::new(), 0usize);
        for input in inputs {
            layers = layers.saturating_add(state.layers(input.id()).len());
            match state.get(input.id()).map(|entry| &entry.row.parents) {
                Some(Parents::Merge { inputs }) => flat.extend(inputs.iter().cloned()),
                _ => flat.push(input.id().clone()),
            }
        }
        if flat.is_empty() {
            return Err(invalid("a merge needs inputs"));
        }
        if layers > MAX_LAYERS || flat.len() > MAX_LAYERS {
            return Err(invalid("a merge of too many layers"));
        }
        self.insert_derived(&mut state, &id, Parents::Merge { inputs: flat }, &options)
    }

    /// Makes the ref of what turns `lower` into `upper`. The absence of a tree is the empty tree; what turns it into `upper`
    /// is `upper` itself.
    pub fn diff(
        &self,
        lower: Option<&ImmutableRef>,
        upper: Option<&ImmutableRef>,
        options: RefOptions,
    ) -> Result<ImmutableRef, StoreError> {
        if let (None, Some(upper)) = (lower, upper) {
            return Ok(upper.clone());
        }
        let id = new_id();
        if lower.is_none() && upper.is_none() {
            return Err(StoreError::Invalid {
                id,
                reason: "a diff of nothing",
            });
        }
        let id_of = |side: Option<&ImmutableRef>| side.map(|side| side.id().clone());
        let mut state = self.shared.state();
        if let (Some(lower), Some(upper)) = (lower, upper)
            && let Some(added) = added_layers(&state, lower.id(), upper.id())
        {
            return self.stack(&mut state, &id, &added, &options);
        }
        let below = lower.zip(upper);
        let below = below.and_then(|(lower, upper)| state.equal_below(lower.id(), upper.id()));
        let parents = Parents::Diff {
            lower: below.or_else(|| id_of(lower)).map(Box::new),
            upper: id_of(upper).map(Box::new),
        };
        self.insert_derived(&mut state, &id, parents, &options)
    }

    /// Makes the ref of what each of `layers` changed, one after the other.
    fn stack(
        &self,
        state: &mut State,
        id: &RefId,
        layers: &[RefId],
        options: &RefOptions,
    ) -> Result<ImmutableRef, StoreError> {
        let mut transaction = Transaction::default();
        let mut inputs = Vec::with_capacity(layers.len());
        for layer in layers {
            let parent = match state.get(layer).map(|entry| &entry.row.parents) {
                Some(Parents::Layer { parent }) => parent.clone(),
                _ => None,
            };
            let Some(parent) = parent else {
                // It stands on nothing, or is a difference already.
                inputs.push(layer.clone());
                continue;
            };
            let parents = Parents::Diff {
                lower: Some(Box::new(parent)),
                upper: Some(Box::new(layer.clone())),
            };
            let change = new_id();
            let row = Row::new(parents, options, state.epoch);
            state.insert(&change, row, &mut transaction);
            inputs.push(change);
        }
        self.insert_with(state, id, (Parents::Merge { inputs }, transaction), options)
    }

    fn insert_derived(
        &self,
        state: &mut State,
        id: &RefId,
        parents: Parents,
        options: &RefOptions,
    ) -> Result<ImmutableRef, StoreError> {
        self.insert_with(state, id, (parents, Transaction::default()), options)
    }

    /// Adds a ref at the end of `transaction`, which made some of its parents.
    fn insert_with(
        &self,
        state: &mut State,
        id: &RefId,
        (parents, mut transaction): (Parents, Transaction),
        options: &RefOptions,
    ) -> Result<ImmutableRef, StoreError> {
        let row = Row::new(parents, options, state.epoch);
        state.insert(id, row, &mut transaction);
        self.shared.submit(state, transaction)?;
        Ok(ImmutableRef::new(
            Hold::new(self, state, id, true).expect("inserted above"),
        ))
    }
}

/// Lists the layers that `upper` has above those of `lower`, if it has all of `lower`'s first and at least two more; what one
/// layer changed is found by comparing just as well. Such a difference is what the layers changed and not how the two trees
/// differ: a file that a layer in between made and a later one removed is removed by it too.
fn added_layers(state: &State, lower: &RefId, upper: &RefId) -> Option<Vec<RefId>> {
    if state.layers_between(lower, upper).is_some() {
        // Seen as a run of layers without a ref of its own.
        return None;
    }
    let (below, mut all) = (state.layers(lower), state.layers(upper));
    if !all.starts_with(&below) || all.len() < below.len() + 2 || all.len() > MAX_LAYERS {
        return None;
    }
    Some(all.split_off(below.len()))
}

fn layer_row(
    state: &State,
    layer: &LayerBlob,
    parent: Option<RefId>,
    (chain_id, blob_chain_id): (Digest, Digest),
    options: &RefOptions,
) -> Row {
    let mut row = Row::new(Parents::Layer { parent }, options, state.epoch);
    // The same layers in another compression are the same tree.
    let equal = state
        .by_chain(&chain_id)
        .filter_map(|id| state.get(id))
        .find_map(|entry| entry.row.committed());
    row.snapshot = equal;
    row.change_layer(|own| {
        own.diff_id = Some(layer.diff_id);
        (own.chain_id, own.blob_chain_id) = (Some(chain_id), Some(blob_chain_id));
        own.blobs = vec![layer.descriptor.clone()];
    });
    add_providers(&mut row, &layer.descriptor.digest, &layer.providers);
    if !layer.description.is_empty() {
        row.description = layer.description.as_str().into();
    }
    if let Some(created_at) = layer.created_at {
        row.created_at_ns = clock::to_nanos(created_at);
    }
    row
}

/// Puts providers first, without those known already; the oldest go when there are too many.
fn add_providers(row: &mut Row, blob: &Digest, providers: &[Provider]) {
    if providers.is_empty() {
        return;
    }
    let mut all = providers.to_vec();
    row.change_layer(|layer| {
        let known = layer.providers.remove(blob).unwrap_or_default();
        all.extend(known.into_iter().filter(|known| !providers.contains(known)));
        all.truncate(MAX_PROVIDERS);
        layer.providers.insert(*blob, all);
    });
}

/// Forgets blobs of a held ref's layer that are neither in the content store nor anywhere known, if the layer can be made
/// from the tree again; returns those left.
pub(crate) fn usable_blobs(hold: &Hold) -> Result<Vec<Descriptor>, StoreError> {
    let row = hold.with_row(Clone::clone);
    let lost = hold.store.lost_blobs(&row)?;
    if lost.is_empty() || !row.has_tree() {
        return Ok(row.layer().blobs.clone());
    }
    tracing::warn!(ref_id = %hold.id, ?lost, "layer blobs are gone from disk");
    Ok(hold.update(|row| {
        row.size_bytes = None;
        row.change_layer(|layer| {
            layer.blobs.retain(|blob| !lost.contains(&blob.digest));
            layer.variants.retain(|blob, _| !lost.contains(blob));
            layer.blobs.clone()
        })
    }))
}

/// Records a blob of a held ref's layer.
pub(crate) fn set_blob(
    hold: &Hold,
    diff_id: Digest,
    descriptor: Descriptor,
    providers: Vec<Provider>,
    first: bool,
) -> Result<(), StoreError> {
    let invalid = |reason| {
        Err(StoreError::Invalid {
            id: hold.id.clone(),
            reason,
        })
    };
    if providers.is_empty() && !hold.store.content().exists(&descriptor.digest)? {
        return invalid("a blob that is neither here nor anywhere known");
    }
    let shared = &hold.store.shared;
    let mut state = shared.state();
    let Some(row) = state.get(&hold.id).map(|entry| entry.row.clone()) else {
        return Err(StoreError::NotFound { id: hold.id.clone() });
    };
    let is_variant = row.layer().diff_id.is_some_and(|known| known != diff_id);
    if row.mutable || first && is_variant {
        return invalid("another diffID is known");
    }
    let mut transaction = Transaction::default();
    let epoch = state.epoch;
    state.update(&hold.id, &mut transaction, |row| {
        add_providers(row, &descriptor.digest, &providers);
        row.change_layer(|layer| {
            if is_variant {
                layer.variants.insert(descriptor.digest, diff_id);
            } else {
                layer.variants.remove(&descriptor.digest);
                layer.diff_id = Some(diff_id);
            }
            layer.blobs.retain(|blob| blob.digest != descriptor.digest);
            let at = if first { 0 } else { layer.blobs.len() };
            layer.blobs.insert(at, descriptor);
        });
        (row.size_bytes, row.epoch) = (None, epoch);
    });
    let chain = match &row.parents {
        Parents::Layer { .. } => state.chain_of(&hold.id),
        _ => None,
    };
    if let Some((chain_id, blob_chain_id)) = chain {
        state.update(&hold.id, &mut transaction, |row| {
            row.change_layer(|layer| {
                (layer.chain_id, layer.blob_chain_id) = (Some(chain_id), Some(blob_chain_id));
            });
        });
        state.settle_chains(&mut transaction);
    }
    shared.submit(&mut state, transaction)?;
    Ok(())
}

//! Handles on refs: as long as one lives, the ref and all it stands on stay.

use std::sync::Arc;
use std::time::SystemTime;

use layer::Stop;
use oci::{Descriptor, Digest};
use snapshot::{Mount, SnapshotKey};

use crate::clock;
use crate::db::{After, Change, Transaction, VALUES, value_key};
use crate::error::StoreError;
use crate::graph::database_error;
use crate::mutable;
use crate::row::Row;
use crate::state::State;
use crate::store::Store;
use crate::types::{MissingBlob, Parents, Provider, RecordType, RefId, RefStat};
use crate::unpack;

/// Name of the value that holds the checksum tree; callers' names begin with `m`.
pub(crate) const CHECKSUMS: &str = "checksums";

/// One hold on a ref.
#[derive(Debug)]
pub(crate) struct Hold {
    pub store: Store,
    pub id: RefId,
    /// Whether this counts as a use.
    pub is_use: bool,
}

impl Hold {
    /// Holds a ref that exists; the caller still has the lock under which it found it.
    pub fn new(store: &Store, state: &mut State, id: &RefId, is_use: bool) -> Option<Self> {
        state.hold(id).then(|| Self {
            store: store.clone(),
            id: id.clone(),
            is_use,
        })
    }

    /// Looks at the row. A held ref has one.
    pub fn with_row<T>(&self, look: impl FnOnce(&Row) -> T) -> T {
        let state = self.store.shared.state();
        look(&state.get(&self.id).expect("a held ref exists").row)
    }

    pub fn update<T>(&self, change: impl FnOnce(&mut Row) -> T) -> T {
        let updated = self
            .store
            .shared
            .change(|state, transaction| state.update(&self.id, transaction, change));
        updated.expect("a held ref exists")
    }

    pub fn value(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        read_value(&self.store, &self.id, name)
    }

    pub fn set_value(&self, name: &str, value: Option<&[u8]>) -> Result<(), StoreError> {
        let key = value_key(&self.id, name);
        let change = match value {
            Some(value) => Change::Put(VALUES, key, value.to_vec()),
            None => Change::Delete(VALUES, key),
        };
        let shared = &self.store.shared;
        let sequence = {
            let mut state = shared.state();
            shared.submit(
                &mut state,
                Transaction {
                    changes: vec![change],
                    ..Transaction::default()
                },
            )?
        };
        shared.db.wait_visible(sequence)
    }
}

pub(crate) fn read_value(store: &Store, id: &RefId, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
    let read = store.shared.db.read()?;
    let table = read.open_table(VALUES).map_err(database_error)?;
    let value = table.get(&value_key(id, name)[..]).map_err(database_error)?;
    Ok(value.map(|value| value.value().to_vec()))
}

fn caller_name(name: &str) -> String {
    format!("m{name}")
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.store.shared.change(|state, transaction| {
            if state.unhold(&self.id) > 0 {
                return;
            }
            if self.is_use {
                state.update(&self.id, transaction, |row| {
                    row.usage_count = row.usage_count.saturating_add(1);
                    row.last_used_at_ns = Some(clock::now_nanos());
                });
            }
            let Some(row) = state.get(&self.id).map(|entry| entry.row.clone()) else {
                return;
            };
            if row.mutable {
                if let Some(marker) = state.writing.remove(&self.id) {
                    transaction.after.push(After::DeleteFile(marker));
                }
                if !row.retain && row.twin.is_none() {
                    state.remove(&self.id, transaction);
                }
                return;
            }
            let is_kept = row.retain
                || row
                    .twin
                    .as_ref()
                    .and_then(|twin| state.get(twin))
                    .is_some_and(|twin| twin.row.retain);
            // Nobody could find it again.
            let is_lost = row.layer().blobs.is_empty() && !row.is_indexed();
            if !is_kept && is_lost {
                state.remove_with_twin(&self.id, transaction);
            }
        });
    }
}

/// A ref nobody writes any more. Cloning shares the hold; the ref is released with the last clone.
#[derive(Clone, Debug)]
pub struct ImmutableRef {
    hold: Arc<Hold>,
}

/// A ref only this handle may write to. Dropping it removes the ref unless it is retained.
#[derive(Debug)]
pub struct MutableRef {
    hold: Hold,
    checksums: std::sync::Mutex<Option<Vec<u8>>>,
}

impl ImmutableRef {
    pub(crate) fn new(hold: Hold) -> Self {
        Self { hold: Arc::new(hold) }
    }

    /// Returns the id.
    pub fn id(&self) -> &RefId {
        &self.hold.id
    }

    /// Returns the store it belongs to.
    pub fn store(&self) -> &Store {
        &self.hold.store
    }

    /// Returns a picture of the metadata.
    pub fn stat(&self) -> RefStat {
        self.hold.with_row(|row| row.stat(&self.hold.id))
    }

    /// Returns handles on what this stands on, in order.
    pub fn parents(&self) -> Vec<ImmutableRef> {
        let store = &self.hold.store;
        let mut state = store.shared.state();
        let parents = state.get(self.id()).map(|entry| entry.row.parents.clone());
        let ids: Vec<RefId> = parents.iter().flat_map(Parents::ids).cloned().collect();
        ids.iter()
            .filter_map(|id| Hold::new(store, &mut state, id, false))
            .map(Self::new)
            .collect()
    }

    /// Returns the layers that make up this ref, bottom first, itself included: through merges, the inputs' layers; a diff is a
    /// layer of its own, unless `upper` stands directly on `lower`, when it is `upper`'s layers above `lower`.
    pub fn layer_chain(&self) -> Vec<ImmutableRef> {
        let store = &self.hold.store;
        let mut state = store.shared.state();
        let ids = state.layers(self.id());
        ids.iter()
            .filter_map(|id| Hold::new(store, &mut state, id, false))
            .map(Self::new)
            .collect()
    }

    /// Returns the first blob of each of the layers that make up this ref, bottom first, if all of them have one. Looks at no
    /// more layers than it takes to know that, from the top.
    pub fn blob_chain(&self) -> Option<Vec<Descriptor>> {
        self.hold.store.shared.state().blob_chain(self.id())
    }

    /// Returns the identity of the stack of uncompressed layers, when all of them have a diffID.
    pub fn chain_id(&self) -> Option<Digest> {
        self.hold.store.shared.state().diff_chain_of(self.id())
    }

    /// Returns the digest of this layer uncompressed, when known.
    pub fn diff_id(&self) -> Option<Digest> {
        self.hold.with_row(|row| row.layer().diff_id)
    }

    /// Returns the digest of one of this layer's blobs uncompressed, when known. It is another than that of the layer where
    /// the blob's form adds something to the layer.
    pub fn diff_id_of(&self, blob: &Digest) -> Option<Digest> {
        self.hold.with_row(|row| row.layer().diff_id_of(blob))
    }

    /// Returns this layer's blobs in all compressions; the first is the one it came as or was first exported as.
    pub fn blobs(&self) -> Vec<Descriptor> {
        self.hold.with_row(|row| row.layer().blobs.clone())
    }

    /// Does what [`blobs`](Self::blobs) does after forgetting those that are neither in the content store nor can be
    /// fetched, as long as the layer can be made from the tree again.
    pub fn usable_blobs(&self) -> Result<Vec<Descriptor>, StoreError> {
        crate::chain::usable_blobs(&self.hold)
    }

    /// Returns where a blob of this layer can be fetched.
    pub fn providers(&self, blob: &Digest) -> Vec<Provider> {
        self.hold
            .with_row(|row| row.layer().providers.get(blob).cloned().unwrap_or_default())
    }

    /// Records a blob of this layer, so that it need not be made again. The blob has to be in the content store, held by a
    /// [`Pin`](crate::Pin) until this returns, or to have providers. With `first` it becomes the preferred one. A diffID
    /// other than that of the layer is taken for what a further form of the layer is uncompressed, but not with `first`.
    pub fn set_blob(
        &self,
        diff_id: Digest,
        descriptor: Descriptor,
        providers: Vec<Provider>,
        first: bool,
    ) -> Result<(), StoreError> {
        crate::chain::set_blob(&self.hold, diff_id, descriptor, providers, first)
    }

    /// Reports whether the snapshot still has to be made, here or below.
    pub fn is_lazy(&self) -> bool {
        self.hold.with_row(|row| !row.has_tree())
    }

    /// Reports whether this layer's own first blob is known but not in the content store.
    pub fn is_blob_lazy(&self) -> bool {
        let first = self
            .hold
            .with_row(|row| row.layer().blobs.first().map(|blob| blob.digest));
        first.is_some_and(|digest| !self.hold.store.content().exists(&digest).unwrap_or(false))
    }

    /// Lists the blobs that have to be in the content store before [`unpack`](Self::unpack) can work; none when the
    /// snapshot exists.
    pub fn missing_blobs(&self) -> Result<Vec<MissingBlob>, StoreError> {
        unpack::missing_blobs(&self.hold.store, self.id())
    }

    /// Makes the snapshot from blobs (and merges and diffs), whatever is below first. Only one caller works, the others wait
    /// for it. Fails with `Lazy` when blobs are missing.
    pub fn unpack(&self) -> Result<(), StoreError> {
        self.unpack_until(&Stop::default())
    }

    /// As [`unpack`](Self::unpack), until told to stop: then what is half unpacked is removed, and the error is `Unwanted`.
    /// Layers that are unpacked stay. Whoever waits for another caller to finish is not asked.
    pub fn unpack_until(&self, stop: &Stop) -> Result<(), StoreError> {
        unpack::unpack(&self.hold.store, self.id(), stop)
    }

    /// Commits the active snapshot behind this ref, if there is still one; from then on it cannot become mutable again.
    /// Making a child does this by itself.
    pub fn finalize(&self) -> Result<(), StoreError> {
        mutable::finalize(&self.hold.store, self.id())
    }

    /// Describes how to mount the tree read-only, unpacking it before. The mounts are good as long as the handle; those of a
    /// committed, not finalized ref whose mutable one is retained only until someone finalizes it: mount those soon.
    pub fn mounts(&self) -> Result<Vec<Mount>, StoreError> {
        unpack::read_mounts(&self.hold.store, self.id())
    }

    /// Returns the name of the committed snapshot, after [`unpack`](Self::unpack) and [`finalize`](Self::finalize).
    pub fn snapshot(&self) -> Result<Option<SnapshotKey>, StoreError> {
        Ok(self.hold.with_row(Row::committed))
    }

    /// Measures the bytes on disk: snapshot and blobs. Remembered once measured.
    pub fn size_bytes(&self) -> Result<u64, StoreError> {
        crate::usage::measure(&self.hold.store, self.id())
    }

    /// Keeps the ref after its last handle.
    pub fn retain(&self) {
        self.hold.update(|row| row.retain = true);
    }

    /// Replaces the description.
    pub fn set_description(&self, description: &str) {
        self.hold.update(|row| row.description = description.into());
    }

    /// Replaces the record type.
    pub fn set_record_type(&self, record_type: RecordType) {
        self.hold.update(|row| row.record_type = record_type);
    }

    /// Replaces the creation time.
    pub fn set_created_at(&self, created_at: SystemTime) {
        self.hold
            .update(|row| row.created_at_ns = clock::to_nanos(created_at));
    }

    /// Reads a value stored with the ref.
    pub fn metadata(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.hold.value(&caller_name(key))
    }

    /// Stores a value with the ref. `None` removes it. Visible on return, gone with the ref.
    pub fn set_metadata(&self, key: &str, value: Option<&[u8]>) -> Result<(), StoreError> {
        self.hold.set_value(&caller_name(key), value)
    }

    /// Makes the ref findable by [`Store::search_index`] with `index`.
    pub fn set_index(&self, index: &str) -> Result<(), StoreError> {
        self.hold.update(|row| row.add_index(index));
        Ok(())
    }

    /// Reads the persisted checksum tree: what [`set_checksums`](Self::set_checksums) stored.
    pub fn checksums(&self) -> Result<Option<Vec<u8>>, StoreError> {
        self.hold.value(CHECKSUMS)
    }

    /// Persists a checksum tree (an encoded `layer::checksum::ChecksumTree`).
    pub fn set_checksums(&self, tree: &[u8]) -> Result<(), StoreError> {
        self.hold.set_value(CHECKSUMS, Some(tree))
    }
}

impl MutableRef {
    pub(crate) fn new(hold: Hold, checksums: Option<Vec<u8>>) -> Self {
        Self {
            hold,
            checksums: std::sync::Mutex::new(checksums),
        }
    }

    /// Returns the id. The ref made by [`commit`](Self::commit) has another.
    pub fn id(&self) -> &RefId {
        &self.hold.id
    }

    /// Returns a picture of the metadata.
    pub fn stat(&self) -> RefStat {
        self.hold.with_row(|row| row.stat(&self.hold.id))
    }

    /// Describes how to mount the tree for writing, or read-only with `read_only`.
    pub fn mounts(&self, read_only: bool) -> Result<Vec<Mount>, StoreError> {
        let mounts = self.hold.store.snapshotter().mounts(&self.snapshot())?;
        Ok(if read_only {
            mounts.iter().map(unpack::read_only).collect()
        } else {
            mounts
        })
    }

    /// Returns the key of the active snapshot.
    pub fn snapshot(&self) -> SnapshotKey {
        self.hold.id.snapshot_key().clone()
    }

    /// Makes an immutable ref of it. Costs no IO: the snapshot stays active until [`ImmutableRef::finalize`]. Until then
    /// [`Store::get_mutable`] with this ref's id takes it back for writing, if it is retained and nobody holds the
    /// immutable one; the immutable one is gone then. Values and the index stay with the mutable one.
    pub fn commit(self) -> Result<ImmutableRef, StoreError> {
        mutable::commit(&self.hold.store, &self.hold.id)
    }

    /// Keeps the ref after its last handle, for [`Store::get_mutable`].
    pub fn retain(&self) {
        self.hold.update(|row| row.retain = true);
    }

    /// Replaces the description.
    pub fn set_description(&self, description: &str) {
        self.hold.update(|row| row.description = description.into());
    }

    /// Replaces the record type.
    pub fn set_record_type(&self, record_type: RecordType) {
        self.hold.update(|row| row.record_type = record_type);
    }

    /// Reads a value stored with the ref.
    pub fn metadata(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.hold.value(&caller_name(key))
    }

    /// Stores a value with the ref. `None` removes it.
    pub fn set_metadata(&self, key: &str, value: Option<&[u8]>) -> Result<(), StoreError> {
        self.hold.set_value(&caller_name(key), value)
    }

    /// Makes the ref findable by [`Store::search_index`] with `index`.
    pub fn set_index(&self, index: &str) -> Result<(), StoreError> {
        self.hold.update(|row| row.add_index(index));
        Ok(())
    }

    /// Returns the checksum tree that described the files when the ref was last committed. It is not persisted any more:
    /// store the updated tree on the committed ref. After a crash in between there is none, nor any of the values stored
    /// with this ref: what is known of the files does not hold then.
    pub fn take_checksums(&self) -> Option<Vec<u8>> {
        crate::store::locked(&self.checksums).take()
    }

    /// Gives the handle up, like dropping it.
    pub fn release(self) {}
}

//! Handles on refs: as long as one lives, the ref and all it stands on stay.

use std::time::SystemTime;

use oci::{Descriptor, Digest};
use snapshot::Mount;

use crate::error::StoreError;
use crate::store::Store;
use crate::types::{MissingBlob, Provider, RecordType, RefId, RefStat};

/// A ref nobody writes any more. Cloning shares the hold; the ref is released with the last clone.
#[derive(Clone, Debug)]
pub struct ImmutableRef {
    hold: (),
}

/// A ref only this handle may write to. Dropping it removes the ref unless it is retained.
#[derive(Debug)]
pub struct MutableRef {
    hold: (),
}

impl ImmutableRef {
    /// Returns the id.
    pub fn id(&self) -> &RefId {
        todo!()
    }

    /// Returns the store it belongs to.
    pub fn store(&self) -> &Store {
        todo!()
    }

    /// Returns a picture of the metadata.
    pub fn stat(&self) -> RefStat {
        todo!()
    }

    /// Returns handles on what this stands on, in order.
    pub fn parents(&self) -> Vec<ImmutableRef> {
        todo!()
    }

    /// Returns the layers that make up this ref, bottom first, itself included: through merges, the inputs' layers; a diff is a
    /// layer of its own, unless `upper` stands directly on `lower`, when it is `upper`'s layers above `lower`.
    pub fn layer_chain(&self) -> Vec<ImmutableRef> {
        todo!()
    }

    /// Returns the identity of the stack of uncompressed layers, when all of them have a diffID.
    pub fn chain_id(&self) -> Option<Digest> {
        todo!()
    }

    /// Returns the digest of this layer uncompressed, when known.
    pub fn diff_id(&self) -> Option<Digest> {
        todo!()
    }

    /// Returns this layer's blobs in all compressions; the first is the one it came as or was first exported as.
    pub fn blobs(&self) -> Vec<Descriptor> {
        todo!()
    }

    /// Returns where a blob of this layer can be fetched.
    pub fn providers(&self, blob: &Digest) -> Vec<Provider> {
        todo!()
    }

    /// Records a blob of this layer, so that it need not be made again. The blob has to be in the content store, held by a
    /// [`Pin`](crate::Pin) until this returns, or to have providers. With `first` it becomes the preferred one.
    pub fn set_blob(
        &self,
        diff_id: Digest,
        descriptor: Descriptor,
        providers: Vec<Provider>,
        first: bool,
    ) -> Result<(), StoreError> {
        todo!()
    }

    /// Reports whether the snapshot still has to be made, here or below.
    pub fn is_lazy(&self) -> bool {
        todo!()
    }

    /// Reports whether this layer's own first blob is known but not in the content store.
    pub fn is_blob_lazy(&self) -> bool {
        todo!()
    }

    /// Lists the blobs that have to be in the content store before [`unpack`](Self::unpack) can work; none when the
    /// snapshot exists.
    pub fn missing_blobs(&self) -> Result<Vec<MissingBlob>, StoreError> {
        todo!()
    }

    /// Makes the snapshot from blobs (and merges and diffs), whatever is below first. Only one caller works, the others wait
    /// for it. Fails with `Lazy` when blobs are missing.
    pub fn unpack(&self) -> Result<(), StoreError> {
        todo!()
    }

    /// Commits the active snapshot behind this ref, if there is still one; from then on it cannot become mutable again.
    /// Making a child does this by itself.
    pub fn finalize(&self) -> Result<(), StoreError> {
        todo!()
    }

    /// Describes how to mount the tree read-only, unpacking it before. The mounts are good as long as the handle.
    pub fn mounts(&self) -> Result<Vec<Mount>, StoreError> {
        todo!()
    }

    /// Returns the name of the committed snapshot, after [`unpack`](Self::unpack) and [`finalize`](Self::finalize).
    pub fn snapshot(&self) -> Result<Option<snapshot::SnapshotKey>, StoreError> {
        todo!()
    }

    /// Measures the bytes on disk: snapshot and blobs. Remembered once measured.
    pub fn size_bytes(&self) -> Result<u64, StoreError> {
        todo!()
    }

    /// Keeps the ref after its last handle.
    pub fn retain(&self) {
        todo!()
    }

    /// Replaces the description.
    pub fn set_description(&self, description: &str) {
        todo!()
    }

    /// Replaces the record type.
    pub fn set_record_type(&self, record_type: RecordType) {
        todo!()
    }

    /// Replaces the creation time.
    pub fn set_created_at(&self, created_at: SystemTime) {
        todo!()
    }

    /// Reads a value stored with the ref.
    pub fn metadata(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        todo!()
    }

    /// Stores a value with the ref. `None` removes it. Visible on return, gone with the ref.
    pub fn set_metadata(&self, key: &str, value: Option<&[u8]>) -> Result<(), StoreError> {
        todo!()
    }

    /// Makes the ref findable by [`Store::search_index`] with `index`.
    pub fn set_index(&self, index: &str) -> Result<(), StoreError> {
        todo!()
    }

    /// Reads the persisted checksum tree: what [`set_checksums`](Self::set_checksums) stored.
    pub fn checksums(&self) -> Result<Option<Vec<u8>>, StoreError> {
        todo!()
    }

    /// Persists a checksum tree (an encoded `layer::checksum::ChecksumTree`).
    pub fn set_checksums(&self, tree: &[u8]) -> Result<(), StoreError> {
        todo!()
    }
}

impl MutableRef {
    /// Returns the id. The ref made by [`commit`](Self::commit) has another.
    pub fn id(&self) -> &RefId {
        todo!()
    }

    /// Returns a picture of the metadata.
    pub fn stat(&self) -> RefStat {
        todo!()
    }

    /// Describes how to mount the tree for writing, or read-only with `read_only`.
    pub fn mounts(&self, read_only: bool) -> Result<Vec<Mount>, StoreError> {
        todo!()
    }

    /// Returns the key of the active snapshot.
    pub fn snapshot(&self) -> snapshot::SnapshotKey {
        todo!()
    }

    /// Makes an immutable ref of it. Costs no IO: the snapshot stays active until [`ImmutableRef::finalize`]. Until then
    /// [`Store::get_mutable`] with this ref's id takes it back for writing, if it is retained and nobody holds the
    /// immutable one; the immutable one is gone then. Metadata values and checksums move to the immutable ref.
    pub fn commit(self) -> Result<ImmutableRef, StoreError> {
        todo!()
    }

    /// Keeps the ref after its last handle, for [`Store::get_mutable`].
    pub fn retain(&self) {
        todo!()
    }

    /// Replaces the description.
    pub fn set_description(&self, description: &str) {
        todo!()
    }

    /// Replaces the record type.
    pub fn set_record_type(&self, record_type: RecordType) {
        todo!()
    }

    /// Reads a value stored with the ref.
    pub fn metadata(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        todo!()
    }

    /// Stores a value with the ref. `None` removes it.
    pub fn set_metadata(&self, key: &str, value: Option<&[u8]>) -> Result<(), StoreError> {
        todo!()
    }

    /// Makes the ref findable by [`Store::search_index`] with `index`.
    pub fn set_index(&self, index: &str) -> Result<(), StoreError> {
        todo!()
    }

    /// Returns the checksum tree that described the files when the ref was last committed. It is not persisted any more:
    /// store the updated tree on the committed ref. After a crash in between there is none, and the files have to be read again.
    pub fn take_checksums(&self) -> Option<Vec<u8>> {
        todo!()
    }

    /// Gives the handle up, like dropping it.
    pub fn release(self) {}
}

//! The store: opening a state directory and finding refs in it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use oci::Digest;
use snapshot::Snapshotter;

use crate::error::{OpenError, StoreError};
use crate::gc::{DiskStat, PruneOptions};
use crate::handle::{ImmutableRef, MutableRef};
use crate::pin::Pin;
use crate::record::Records;
use crate::types::{LayerBlob, RefId, RefOptions};
use crate::usage::{UsageOptions, UsageRecord};

/// Where the database lives.
#[derive(Debug, Default)]
pub enum Backend {
    /// In `metadata.redb` of the state directory.
    #[default]
    File,
    /// In the given storage; for tests.
    Custom(Box<dyn redb::StorageBackend>),
}

/// How to open a store.
#[derive(Debug)]
pub struct StoreOptions {
    /// Waits so long for another process to let the directory go; `None` does not wait.
    pub lock_timeout: Option<Duration>,
    /// Changes become durable after at most about this time.
    pub flush_interval: Duration,
    /// Where the database lives.
    pub backend: Backend,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { lock_timeout: None, flush_interval: Duration::from_millis(500), backend: Backend::File }
    }
}

/// All that is cached in one state directory. Cheap to clone; works from any thread; calls may do disk IO.
#[derive(Clone, Debug)]
pub struct Store {
    shared: Arc<()>,
}

/// A promise that everything done before it was taken becomes durable.
#[derive(Debug)]
pub struct Ticket {}

impl Ticket {
    /// Waits until it is durable, hurrying the flush.
    pub fn wait(self) -> Result<(), StoreError> {
        todo!()
    }
}

impl Store {
    /// Opens the state directory `root`, alone: a lock file keeps other processes out. Brings database and disk together:
    /// what nobody refers to is removed, refs whose snapshot is gone are forgotten.
    ///
    /// `content` and `snapshotter` belong to this store from now on: whatever lies in them without a ref, a pin or a name
    /// holding it goes.
    pub fn open(
        root: &Path,
        content: content::Store,
        snapshotter: Arc<dyn Snapshotter>,
        options: StoreOptions,
    ) -> Result<Self, OpenError> {
        todo!()
    }

    /// Returns the blob store.
    pub fn content(&self) -> &content::Store {
        todo!()
    }

    /// Returns the snapshotter.
    pub fn snapshotter(&self) -> &Arc<dyn Snapshotter> {
        todo!()
    }

    /// Returns the solver records.
    pub fn records(&self) -> Records {
        todo!()
    }

    /// Makes an empty writable ref on `parent`, which has to be unpacked ([`Lazy`](StoreError::Lazy) otherwise).
    pub fn create_mutable(
        &self,
        parent: Option<&ImmutableRef>,
        options: RefOptions,
    ) -> Result<MutableRef, StoreError> {
        todo!()
    }

    /// Takes a ref for reading. `NotFound` is a miss: no such ref, or lazy without any provider left. A committed but not
    /// finalized mutable ref is found under both ids.
    pub fn get(&self, id: &RefId) -> Result<ImmutableRef, StoreError> {
        todo!()
    }

    /// Takes a ref for writing again: a cache mount, or the files of an earlier local source. `Locked` while anyone holds
    /// it. If it had been committed, that immutable ref and the records with it are gone, even after a crash.
    pub fn get_mutable(&self, id: &RefId) -> Result<MutableRef, StoreError> {
        todo!()
    }

    /// Finds refs by [`set_index`](ImmutableRef::set_index), oldest first.
    pub fn search_index(&self, index: &str) -> Result<Vec<RefId>, StoreError> {
        todo!()
    }

    /// Returns the ref for a stack of layers, bottom first, making the refs that do not exist yet. No layers, no ref.
    ///
    /// Lazy: no blob has to be there. A layer whose blob chain is known already is that ref; its providers are added.
    pub fn from_blob_chain(
        &self,
        layers: &[LayerBlob],
        options: &RefOptions,
    ) -> Result<Option<ImmutableRef>, StoreError> {
        todo!()
    }

    /// Makes the ref of several trees on top of each other, first lowest. One input is that ref itself; none is an error.
    pub fn merge(&self, inputs: &[ImmutableRef], options: RefOptions) -> Result<ImmutableRef, StoreError> {
        todo!()
    }

    /// Makes the ref of what turns `lower` into `upper`. The absence of a tree is the empty tree.
    pub fn diff(
        &self,
        lower: Option<&ImmutableRef>,
        upper: Option<&ImmutableRef>,
        options: RefOptions,
    ) -> Result<ImmutableRef, StoreError> {
        todo!()
    }

    /// Holds blobs until the pin is dropped.
    pub fn pin(&self, digests: &[Digest]) -> Pin {
        todo!()
    }

    /// Holds blobs under a name, also over restarts, replacing what the name held before.
    pub fn retain(&self, name: &str, digests: &[Digest]) -> Result<(), StoreError> {
        todo!()
    }

    /// Lets go what a name holds. Blobs nobody else holds are removed.
    pub fn release(&self, name: &str) -> Result<(), StoreError> {
        todo!()
    }

    /// Returns what a name holds; nothing for an unknown name.
    pub fn retained(&self, name: &str) -> Vec<Digest> {
        todo!()
    }

    /// Lists the names that begin with `prefix`.
    pub fn retained_names(&self, prefix: &str) -> Vec<String> {
        todo!()
    }

    /// Removes what the steps allow, in order, calling `removed` for each. Returns when the space is free. `removed` may stop
    /// it by returning `Break`.
    pub fn prune(
        &self,
        steps: &[PruneOptions],
        removed: &mut dyn FnMut(UsageRecord) -> std::ops::ControlFlow<()>,
    ) -> Result<(), StoreError> {
        todo!()
    }

    /// Lists refs and what they take on disk.
    pub fn disk_usage(&self, options: &UsageOptions) -> Result<Vec<UsageRecord>, StoreError> {
        todo!()
    }

    /// Measures the file system of the state directory.
    pub fn disk_stat(&self) -> Result<DiskStat, StoreError> {
        todo!()
    }

    /// Returns a ticket for everything done so far.
    pub fn ticket(&self) -> Ticket {
        todo!()
    }

    /// Waits until everything done so far is durable.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.ticket().wait()
    }
}

//! The store: what everything hangs together by.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oci::Digest;
use snapshot::Snapshotter;

use crate::db::{After, Change, Db, NAMES, Sequence, Transaction};
use crate::error::{OpenError, StoreError};
use crate::gc::DiskStat;
use crate::open::{Recovered, StateLock};
use crate::pin::Pin;
use crate::record::Records;
use crate::state::State;
use crate::types::RefId;

/// Makes the storage of a database each time it is opened.
pub type StorageFactory = Box<dyn FnMut() -> Box<dyn redb::StorageBackend> + Send>;

/// Where the database lives.
#[derive(Default)]
pub enum Backend {
    /// In `metadata.redb` of the state directory.
    #[default]
    File,
    /// In storage made by this; for tests.
    Custom(StorageFactory),
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "File",
            Self::Custom(_) => "Custom",
        })
    }
}

/// How to open a store.
#[derive(Debug)]
pub struct StoreOptions {
    /// The lock of the directory, when it is held already.
    pub lock: Option<StateLock>,
    /// Waits so long for another process to let the directory go; `None` does not wait.
    pub lock_timeout: Option<Duration>,
    /// Changes become durable after at most about this time.
    pub flush_interval: Duration,
    /// Where the database lives.
    pub backend: Backend,
    /// Takes this for the machine's boot identity instead of asking the kernel; for tests.
    pub boot_id: Option<String>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        let flush_interval = Duration::from_millis(500);
        Self {
            lock: None,
            lock_timeout: None,
            flush_interval,
            backend: Backend::File,
            boot_id: None,
        }
    }
}

/// All that is cached in one state directory. Cheap to clone; works from any thread; calls may do disk IO.
///
/// Handles keep the store open: it closes, flushing, when the last clone and the last handle are gone.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub root: PathBuf,
    pub content: content::Store,
    pub snapshotter: Arc<dyn Snapshotter>,
    pub state: Arc<Mutex<State>>,
    /// One prune at a time.
    pub pruning: Mutex<()>,
    // Dropped in this order: the database's threads end before the lock on the directory does.
    pub db: Db,
    pub recovered: Recovered,
    pub _lock: File,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

/// Locks a mutex whose value a panic cannot leave half changed.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Queues what was done to `state`, whose lock the caller still holds: that gives the order.
    pub fn submit(&self, _state: &mut State, transaction: Transaction) -> Result<Sequence, StoreError> {
        if transaction.changes.is_empty() && transaction.after.is_empty() && transaction.now.is_empty() {
            return Ok(self.db.last_submitted());
        }
        self.db.submit(transaction)
    }

    /// Changes the state and queues the changes. Infallible callers learn of a failed database at their next fallible call.
    pub fn change<T>(&self, work: impl FnOnce(&mut State, &mut Transaction) -> T) -> T {
        let mut state = self.state();
        let mut transaction = Transaction::default();
        let answer = work(&mut state, &mut transaction);
        if let Err(error) = self.submit(&mut state, transaction) {
            tracing::warn!(error = &error as &dyn std::error::Error, "a change is lost");
        }
        answer
    }
}

/// What the flushing thread does: everything that rows of earlier epochs need becomes durable.
pub(crate) fn sync(
    content: &content::Store,
    snapshotter: &dyn Snapshotter,
    state: &Mutex<State>,
) -> Result<u64, StoreError> {
    let epoch = {
        let mut state = locked(state);
        state.epoch += 1;
        state.epoch - 1
    };
    content.sync()?;
    snapshotter.sync()?;
    Ok(epoch)
}

/// What the deleting thread does. Failures leave something for the next sweep.
pub(crate) fn reap(
    content: &content::Store,
    snapshotter: &dyn Snapshotter,
    state: &Mutex<State>,
    after: After,
) {
    match after {
        After::DeleteSnapshot(key) => match snapshotter.remove(&key) {
            Err(error) if !error.is_not_found() => {
                tracing::warn!(error = &error as &dyn std::error::Error, %key, "remove snapshot");
            }
            _ => {}
        },
        After::DeleteBlob(digest) => {
            // Under the lock: whoever holds the blob from now on finds out first whether it is there.
            let state = locked(state);
            if !state.is_blob_held(&digest)
                && let Err(error) = content.delete(&digest)
            {
                tracing::warn!(error = &error as &dyn std::error::Error, %digest, "delete blob");
            }
        }
        After::DeleteFile(path) => {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(error = &error as &dyn std::error::Error, path = %path.display(), "remove marker");
            }
        }
        After::Notify(sender) => {
            // Whoever waited may have given up.
            let _ = sender.send(());
        }
    }
}

/// A promise that everything done before it was taken becomes durable.
#[derive(Debug)]
pub struct Ticket {
    store: Store,
    sequence: Sequence,
}

impl Ticket {
    /// Waits until it is durable, hurrying the flush.
    pub fn wait(self) -> Result<(), StoreError> {
        self.store.shared.db.wait_durable(self.sequence)
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
        crate::open::open(root, content, snapshotter, options)
    }

    /// Lets what is loaded from now on be looked for on disk again: what was found is not looked for twice. To be called when
    /// a build starts.
    pub fn expire_checks(&self) {
        self.shared.snapshotter.expire_checks();
    }

    /// Tells what opening the store had to put right.
    pub fn recovered(&self) -> Recovered {
        self.shared.recovered
    }

    /// Returns the blob store.
    pub fn content(&self) -> &content::Store {
        &self.shared.content
    }

    /// Returns the snapshotter.
    pub fn snapshotter(&self) -> &Arc<dyn Snapshotter> {
        &self.shared.snapshotter
    }

    /// Returns the state directory.
    pub fn root(&self) -> &Path {
        &self.shared.root
    }

    /// Returns the solver records.
    pub fn records(&self) -> Records {
        Records { store: self.clone() }
    }

    /// Finds refs by [`set_index`](crate::ImmutableRef::set_index), oldest first.
    pub fn search_index(&self, index: &str) -> Result<Vec<RefId>, StoreError> {
        let state = self.shared.state();
        let mut found: Vec<_> = state
            .by_index(index)
            .filter_map(|id| state.get(id).map(|entry| (entry.row.created_at_ns, id.clone())))
            .collect();
        found.sort();
        Ok(found.into_iter().map(|(_, id)| id).collect())
    }

    /// Takes an index off all refs that are found by it, and no longer retains them: who holds one keeps it for as long,
    /// and what nobody holds goes now. With `nested` the indexes that begin with `index` and a colon are meant instead.
    pub fn forget_index(&self, index: &str, nested: bool) -> Result<(), StoreError> {
        let mut state = self.shared.state();
        let mut transaction = Transaction::default();
        let indexes = if nested {
            state.indexes_below(&format!("{index}:"))
        } else {
            vec![index.to_owned()]
        };
        for index in indexes {
            let ids: Vec<RefId> = state.by_index(&index).cloned().collect();
            for id in ids {
                state.update(&id, &mut transaction, |row| {
                    row.remove_index(&index);
                    row.retain = false;
                });
                // One that is held or stood on stays.
                state.remove_with_twin(&id, &mut transaction);
            }
        }
        self.shared.submit(&mut state, transaction)?;
        Ok(())
    }

    /// Holds blobs until the pin is dropped.
    pub fn pin(&self, digests: &[Digest]) -> Pin {
        let mut pin = Pin::new(self.clone());
        for digest in digests {
            pin.add(*digest);
        }
        pin
    }

    /// Holds blobs under a name, also over restarts, replacing what the name held before. Names are not empty.
    pub fn retain(&self, name: &str, digests: &[Digest]) -> Result<(), StoreError> {
        let mut state = self.shared.state();
        let mut transaction = Transaction::default();
        let free = state.set_name(name, digests.to_vec());
        transaction.after.extend(free.into_iter().map(After::DeleteBlob));
        if digests.is_empty() {
            transaction
                .changes
                .push(Change::Delete(NAMES, name.as_bytes().to_vec()));
        } else {
            transaction.put_json(NAMES, name, &digests);
        }
        self.shared.submit(&mut state, transaction).map(|_| ())
    }

    /// Lets go what a name holds. Blobs nobody else holds are removed.
    pub fn release(&self, name: &str) -> Result<(), StoreError> {
        self.retain(name, &[])
    }

    /// Returns what a name holds; nothing for an unknown name.
    pub fn retained(&self, name: &str) -> Vec<Digest> {
        self.shared.state().names.get(name).cloned().unwrap_or_default()
    }

    /// Lists the names that begin with `prefix`.
    pub fn retained_names(&self, prefix: &str) -> Vec<String> {
        let state = self.shared.state();
        let from = state
            .names
            .range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.map(|(name, _)| name.clone())
            .take_while(|name| name.starts_with(prefix))
            .collect()
    }

    /// Measures the file system of the state directory.
    pub fn disk_stat(&self) -> Result<DiskStat, StoreError> {
        let root = &self.shared.root;
        let stat = rustix::fs::statvfs(root).map_err(|error| StoreError::Io {
            action: "stat file system",
            path: root.clone(),
            source: error.into(),
        })?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Ok(DiskStat {
            total_bytes: bytes(stat.f_blocks),
            free_bytes: bytes(stat.f_bfree),
            available_bytes: bytes(stat.f_bavail),
        })
    }

    /// Returns a ticket for everything done so far.
    pub fn ticket(&self) -> Ticket {
        Ticket {
            sequence: self.shared.db.last_submitted(),
            store: self.clone(),
        }
    }

    /// Waits until everything done so far is durable.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.ticket().wait()
    }
}

/// Makes a new random id, 25 letters and digits as BuildKit's.
pub(crate) fn new_id() -> RefId {
    use std::io::Read;
    let mut bytes = [0u8; 16];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .expect("the system has randomness");
    let mut number = u128::from_be_bytes(bytes);
    let mut text = String::with_capacity(25);
    for _ in 0..25 {
        let digit = u32::try_from(number % 36).expect("less than 36");
        text.push(char::from_digit(digit, 36).expect("a digit of base 36"));
        number /= 36;
    }
    text.parse().expect("letters and digits make an id")
}

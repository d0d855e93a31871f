//! The metadata database: tables, the one writer, grouped commits.
//!
//! Callers hand in transactions and go on; a writer thread puts those that have piled up into one commit of redb, without
//! flushing. From time to time, or when someone waits for it, a second thread first makes blobs and snapshots durable and
//! then has the writer commit durably. What may only be deleted from disk after that, a third thread deletes.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use redb::{Database, Durability, ReadTransaction, ReadableDatabase, TableDefinition, WriteTransaction};
use snapshot::SnapshotKey;

use crate::error::StoreError;
use crate::graph::{self, RecordChanges};
use crate::space::RoomyFile;
use crate::types::RefId;

/// Transactions that may wait for the writer before callers do.
const QUEUE: usize = 1024;
/// Transactions put into one commit.
const GROUP: usize = 256;

/// A table of bytes by bytes.
pub(crate) type Table = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// Single values: `boot` (identity of the machine's run), `clean` (present after closing in good order), `epoch`.
pub(crate) const META: Table = TableDefinition::new("meta");
/// Ref id → row, JSON.
pub(crate) const REFS: Table = TableDefinition::new("refs");
/// Ref id, NUL, name → value.
pub(crate) const VALUES: Table = TableDefinition::new("values");
/// Name → digests, JSON.
pub(crate) const NAMES: Table = TableDefinition::new("names");

/// One step of a transaction.
pub(crate) enum Change {
    Put(Table, Vec<u8>, Vec<u8>),
    Delete(Table, Vec<u8>),
    /// Deletes all values of a ref.
    DeleteValues(RefId),
    /// Deletes a ref with its values, the results it is part of, and records that lead nowhere without them.
    DeleteRef(RefId),
    Records(RecordChanges),
    /// Deletes a result, and records that lead nowhere without it.
    DeleteResult(String),
}

/// What follows once a transaction is durable.
#[derive(Debug)]
pub(crate) enum After {
    DeleteSnapshot(SnapshotKey),
    /// Deletes the blob unless something holds it by then.
    DeleteBlob(oci::Digest),
    DeleteFile(PathBuf),
    /// Tells that everything before is done.
    Notify(Sender<()>),
}

/// Changes that become visible and durable together.
#[derive(Default)]
pub(crate) struct Transaction {
    pub changes: Vec<Change>,
    pub after: Vec<After>,
}

impl Transaction {
    pub fn put_json(&mut self, table: Table, key: &str, value: &impl serde::Serialize) {
        // The rows are our own plain structures.
        let bytes = serde_json::to_vec(value).expect("a row serializes");
        self.changes
            .push(Change::Put(table, key.as_bytes().to_vec(), bytes));
    }
}

enum Command {
    Apply(Transaction),
    /// Commit durably: everything a snapshot or blob of an epoch up to this needs is durable.
    Commit {
        epoch: u64,
    },
    /// Someone waits: wakes the writer.
    Hurry,
    Close,
}

#[derive(Debug, Default)]
struct Progress {
    submitted: u64,
    visible: u64,
    durable: u64,
    /// Someone waits for durability up to here.
    wanted: u64,
    failed: Option<String>,
}

/// The number of a transaction, in the order of submission.
pub(crate) type Sequence = u64;

#[derive(Debug)]
struct Shared {
    database: Database,
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: &dyn std::error::Error) {
        tracing::error!(%error, "metadata database failed");
        self.progress().failed.get_or_insert_with(|| error.to_string());
        self.changed.notify_all();
    }
}

/// What the flushing thread does before a durable commit: makes blobs and snapshots durable, returns the epoch that is.
pub(crate) type Sync = Box<dyn FnMut() -> Result<u64, StoreError> + Send>;
/// What the deleting thread does.
pub(crate) type Reap = Box<dyn FnMut(After) + Send>;

/// The open database with its threads.
#[derive(Debug)]
pub(crate) struct Db {
    shared: Arc<Shared>,
    queue: SyncSender<Command>,
    threads: Vec<JoinHandle<()>>,
}

impl Db {
    pub fn start(database: Database, interval: Duration, mut sync: Sync, mut reap: Reap) -> Self {
        let shared = Arc::new(Shared {
            database,
            progress: Mutex::default(),
            changed: Condvar::new(),
        });
        let (queue, commands) = mpsc::sync_channel(QUEUE);
        let (flush, flushes) = mpsc::sync_channel::<()>(1);
        // Unbounded, as the deleting thread may wait for whoever fills the bounded queue; one entry per thing deleted.
        let (dead, deaths) = mpsc::channel();
        let mut writer = Writer::new(Arc::clone(&shared), interval, flush, dead);
        let (from_flusher, failing) = (queue.clone(), Arc::clone(&shared));
        let threads = vec![
            std::thread::spawn(move || writer.run(&commands)),
            std::thread::spawn(move || {
                while flushes.recv().is_ok() {
                    let sent = match sync() {
                        Ok(epoch) => from_flusher.send(Command::Commit { epoch }).is_ok(),
                        Err(error) => {
                            failing.fail(&error);
                            false
                        }
                    };
                    if !sent {
                        break;
                    }
                }
            }),
            std::thread::spawn(move || deaths.into_iter().for_each(&mut reap)),
        ];
        Self {
            shared,
            queue,
            threads,
        }
    }

    /// Queues a transaction. Callers that need a certain order hold a lock over this call.
    pub fn submit(&self, transaction: Transaction) -> Result<Sequence, StoreError> {
        // The number and the place in the queue have to agree.
        let mut progress = self.shared.progress();
        if let Some(message) = &progress.failed {
            return Err(StoreError::Database {
                message: message.clone(),
            });
        }
        progress.submitted += 1;
        let sequence = progress.submitted;
        let mut command = Command::Apply(transaction);
        loop {
            match self.queue.try_send(command) {
                Ok(()) => return Ok(sequence),
                Err(mpsc::TrySendError::Disconnected(_)) => return Err(StoreError::Closed),
                Err(mpsc::TrySendError::Full(back)) => {
                    command = back;
                    // The writer needs the lock to get on.
                    let waited = self.shared.changed.wait(progress);
                    progress = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    pub fn last_submitted(&self) -> Sequence {
        self.shared.progress().submitted
    }

    fn wait(&self, reached: impl Fn(&Progress) -> bool) -> Result<(), StoreError> {
        let mut progress = self.shared.progress();
        loop {
            if reached(&progress) {
                return Ok(());
            }
            if let Some(message) = &progress.failed {
                return Err(StoreError::Database {
                    message: message.clone(),
                });
            }
            progress = self
                .shared
                .changed
                .wait(progress)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until readers see the transaction.
    pub fn wait_visible(&self, sequence: Sequence) -> Result<(), StoreError> {
        self.wait(|progress| progress.visible >= sequence)
    }

    /// Waits until the transaction is durable.
    pub fn wait_durable(&self, sequence: Sequence) -> Result<(), StoreError> {
        self.hurry(sequence)?;
        self.wait(|progress| progress.durable >= sequence)
    }

    /// Has the transaction made durable soon.
    pub fn hurry(&self, sequence: Sequence) -> Result<(), StoreError> {
        {
            let mut progress = self.shared.progress();
            if progress.durable >= sequence || progress.wanted >= sequence {
                return Ok(());
            }
            progress.wanted = sequence;
        }
        self.queue.send(Command::Hurry).map_err(|_| StoreError::Closed)
    }

    /// Begins reading what is visible now.
    pub fn read(&self) -> Result<ReadTransaction, StoreError> {
        self.shared
            .database
            .begin_read()
            .map_err(|error| StoreError::Database {
                message: error.to_string(),
            })
    }
}

impl Drop for Db {
    fn drop(&mut self) {
        let last = self.last_submitted();
        if let Err(error) = self.wait_durable(last) {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "closing the metadata database"
            );
        }
        // Should the writer be gone, so is its queue.
        let _ = self.queue.send(Command::Close);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the metadata database panicked");
            }
        }
    }
}

struct Writer {
    shared: Arc<Shared>,
    interval: Duration,
    flush: SyncSender<()>,
    dead: Sender<After>,
    /// When the oldest commit that is not durable wants to be.
    due: Option<Instant>,
    /// A flush is under way.
    flushing: bool,
    /// Waiting for durability.
    after: Vec<After>,
}

impl Writer {
    fn new(shared: Arc<Shared>, interval: Duration, flush: SyncSender<()>, dead: Sender<After>) -> Self {
        Self {
            shared,
            interval,
            flush,
            dead,
            due: None,
            flushing: false,
            after: Vec::new(),
        }
    }

    fn run(&mut self, commands: &Receiver<Command>) {
        loop {
            let first = match self.due.filter(|_| !self.flushing) {
                Some(due) => match commands.recv_timeout(due.saturating_duration_since(Instant::now())) {
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return,
                    Ok(command) => Some(command),
                },
                None => match commands.recv() {
                    Err(_) => return,
                    Ok(command) => Some(command),
                },
            };
            let mut group = Vec::new();
            let mut commit = None;
            for command in first.into_iter().chain(commands.try_iter()) {
                match command {
                    Command::Apply(transaction) => group.push(transaction),
                    Command::Commit { epoch } => commit = Some(epoch),
                    Command::Hurry => {}
                    Command::Close => {
                        if let Err(error) = self.close() {
                            self.shared.fail(&*error);
                        }
                        return;
                    }
                }
                if group.len() >= GROUP || commit.is_some() {
                    break;
                }
            }
            if let Err(error) = self.step(group, commit) {
                self.shared.fail(&*error);
                // Nothing is written any more; callers see the failure.
                while !matches!(commands.recv(), Ok(Command::Close) | Err(_)) {}
                return;
            }
        }
    }

    /// Notes that nothing was left undone.
    fn close(&self) -> Result<(), BoxError> {
        let mut write = self.shared.database.begin_write()?;
        write.set_quick_repair(true);
        write.open_table(META)?.insert(&b"clean"[..], &[1][..])?;
        write.commit()?;
        Ok(())
    }

    fn step(&mut self, group: Vec<Transaction>, commit: Option<u64>) -> Result<(), BoxError> {
        if !group.is_empty() {
            let count = u64::try_from(group.len())?;
            self.apply(group)?;
            self.due.get_or_insert_with(|| Instant::now() + self.interval);
            self.shared.progress().visible += count;
            self.shared.changed.notify_all();
        }
        if let Some(epoch) = commit {
            self.commit(epoch)?;
        }
        let hurried = {
            let progress = self.shared.progress();
            progress.wanted > progress.durable
        };
        let is_due = self.due.is_some_and(|due| due <= Instant::now());
        if !self.flushing && (hurried || is_due) {
            self.flushing = self.flush.try_send(()).is_ok();
        }
        Ok(())
    }

    fn apply(&mut self, group: Vec<Transaction>) -> Result<(), BoxError> {
        let mut write = self.shared.database.begin_write()?;
        write.set_durability(Durability::None)?;
        for transaction in group {
            for change in transaction.changes {
                apply(&write, change)?;
            }
            self.after.extend(transaction.after);
        }
        write.commit()?;
        Ok(())
    }

    fn commit(&mut self, epoch: u64) -> Result<(), BoxError> {
        let mut write = self.shared.database.begin_write()?;
        write.set_quick_repair(true);
        write
            .open_table(META)?
            .insert(&b"epoch"[..], &epoch.to_be_bytes()[..])?;
        write.commit()?;
        (self.flushing, self.due) = (false, None);
        for after in self.after.drain(..) {
            // The deleting thread lives as long as this one.
            let _ = self.dead.send(after);
        }
        let mut progress = self.shared.progress();
        progress.durable = progress.visible;
        self.shared.changed.notify_all();
        Ok(())
    }
}

pub(crate) type BoxError = Box<dyn std::error::Error + Send + std::marker::Sync>;

/// Applies one change; also used when the store opens, before the threads run.
pub(crate) fn apply(write: &WriteTransaction, change: Change) -> Result<(), BoxError> {
    match change {
        Change::Put(table, key, value) => {
            write.open_table(table)?.insert(&key[..], &value[..])?;
        }
        Change::Delete(table, key) => {
            write.open_table(table)?.remove(&key[..])?;
        }
        Change::DeleteValues(id) => delete_values(write, &id)?,
        Change::DeleteRef(id) => {
            write.open_table(REFS)?.remove(id.as_str().as_bytes())?;
            delete_values(write, &id)?;
            graph::delete_ref(write, &id)?;
        }
        Change::Records(changes) => graph::apply(write, changes)?,
        Change::DeleteResult(result) => graph::delete_result(write, result.as_bytes())?,
    }
    Ok(())
}

fn delete_values(write: &WriteTransaction, id: &RefId) -> Result<(), BoxError> {
    let mut table = write.open_table(VALUES)?;
    let range = prefix_range(value_key(id, ""));
    table.retain_in(&range.0[..]..&range.1[..], |_, _| false)?;
    Ok(())
}

/// Returns the key of a ref's value.
pub(crate) fn value_key(id: &RefId, name: &str) -> Vec<u8> {
    [id.as_str().as_bytes(), &[0], name.as_bytes()].concat()
}

/// Returns the range of keys that begin with `prefix`, which does not consist of 0xff alone.
pub(crate) fn prefix_range(prefix: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
    let mut end = prefix.clone();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    (prefix, end)
}

/// Opens or creates the database file; one that is damaged is set aside, as all it holds can be computed again.
pub(crate) fn open_file(path: &Path) -> Result<Database, BoxError> {
    let open = || {
        let file = RoomyFile::open(path).map_err(redb::StorageError::from)?;
        redb::Builder::new()
            .set_cache_size(CACHE_BYTES)
            .create_with_backend(file)
    };
    match open() {
        Err(redb::DatabaseError::Storage(redb::StorageError::Corrupted(reason))) => {
            let aside = path.with_extension("damaged");
            tracing::error!(reason, aside = %aside.display(), "the metadata database is damaged; starting afresh");
            std::fs::rename(path, aside)?;
            Ok(open()?)
        }
        opened => Ok(opened?),
    }
}

/// Memory redb may use to cache pages.
pub(crate) const CACHE_BYTES: usize = 64 << 20;

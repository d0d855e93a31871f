//! The metadata database: tables, the one writer, grouped commits.
//!
//! Callers hand in transactions and go on; a writer thread puts those that have piled up into one commit of redb, without
//! flushing. From time to time, or when someone waits for it, a second thread first makes blobs and snapshots durable and
//! then has the writer commit durably. What may only be deleted from disk after that, a third thread deletes.
//!
//! When writing fails, as on a full disk, callers are told so until it works again: the writer opens the database anew from
//! time to time and writes down what is in memory. Records made meanwhile are lost, which makes misses of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use redb::{
    Database, Durability, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};
use snapshot::SnapshotKey;

use crate::error::StoreError;
use crate::graph::{self, RecordChanges};
use crate::space::RoomyFile;
use crate::types::RefId;

/// Transactions that may wait for the writer before callers do.
const QUEUE: usize = 1024;
/// Transactions put into one commit.
const GROUP: usize = 256;
/// How long after a failure the database is opened again, and after a failure of that.
const RETRY: Duration = Duration::from_millis(250);

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
    /// Makes refs and names what they are in memory.
    Restate(Everything),
    /// Deletes a result, and records that lead nowhere without it.
    DeleteResult(String),
}

/// All refs and names as they are stored.
#[derive(Default)]
pub(crate) struct Everything {
    pub refs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub names: BTreeMap<Vec<u8>, Vec<u8>>,
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
    /// Follows at once: deletes what a crash would lose anyway. A full disk gets room by this.
    pub now: Vec<After>,
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
    /// Commit durably: everything a snapshot or blob of an epoch up to this needs is durable, or could not be made so.
    Commit {
        epoch: Result<u64, StoreError>,
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
    /// What follows from transactions that were refused after a failure.
    refused: Vec<After>,
}

/// The number of a transaction, in the order of submission.
pub(crate) type Sequence = u64;

#[derive(Debug)]
struct Shared {
    /// `None` while it cannot be opened after a failure.
    database: RwLock<Option<Database>>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_database<T>(&self, work: impl FnOnce(&Database) -> Result<T, BoxError>) -> Result<T, BoxError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        work(database.as_ref().ok_or("not open after a failure")?)
    }

    fn replace(&self, database: Option<Database>) {
        *self.database.write().unwrap_or_else(PoisonError::into_inner) = database;
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
/// Opens the database again after it failed.
pub(crate) type Reopen = Box<dyn FnMut() -> Result<Database, BoxError> + Send>;
/// Calls back with everything in memory, holding the lock that orders transactions.
pub(crate) type Restate = Arc<dyn Fn(&mut dyn FnMut(Everything)) + Send + std::marker::Sync>;

/// What the threads do that the database itself does not know.
pub(crate) struct Parts {
    pub sync: Sync,
    pub reap: Reap,
    pub reopen: Reopen,
    pub restate: Restate,
}

/// The open database with its threads.
#[derive(Debug)]
pub(crate) struct Db {
    shared: Arc<Shared>,
    queue: SyncSender<Command>,
    /// To the deleting thread, which ends when this and the writer are gone.
    dead: Option<Sender<After>>,
    threads: Vec<JoinHandle<()>>,
}

impl Db {
    pub fn start(database: Database, interval: Duration, parts: Parts) -> Self {
        let Parts {
            mut sync,
            mut reap,
            reopen,
            restate,
        } = parts;
        let shared = Arc::new(Shared {
            database: RwLock::new(Some(database)),
            progress: Mutex::default(),
            changed: Condvar::new(),
        });
        let (queue, commands) = mpsc::sync_channel(QUEUE);
        let (flush, flushes) = mpsc::sync_channel::<()>(1);
        // Unbounded, as the deleting thread may wait for whoever fills the bounded queue; one entry per thing deleted.
        let (dead, deaths) = mpsc::channel();
        let mut writer = Writer {
            shared: Arc::clone(&shared),
            interval,
            flush,
            dead: dead.clone(),
            reopen,
            restate,
            due: None,
            flushing: false,
            after: Vec::new(),
        };
        let from_flusher = queue.clone();
        let threads = vec![
            std::thread::spawn(move || writer.run(&commands)),
            std::thread::spawn(move || {
                while flushes.recv().is_ok() {
                    if from_flusher.send(Command::Commit { epoch: sync() }).is_err() {
                        break;
                    }
                }
            }),
            std::thread::spawn(move || deaths.into_iter().for_each(&mut reap)),
        ];
        Self {
            shared,
            queue,
            dead: Some(dead),
            threads,
        }
    }

    /// Queues a transaction. Callers that need a certain order hold a lock over this call.
    pub fn submit(&self, mut transaction: Transaction) -> Result<Sequence, StoreError> {
        for after in transaction.now.drain(..) {
            // Without its thread the deletion is left to the next sweep.
            let _ = self.dead.as_ref().map(|dead| dead.send(after));
        }
        // The number and the place in the queue have to agree.
        let mut progress = self.shared.progress();
        loop {
            if let Some(message) = progress.failed.clone() {
                progress.refused.append(&mut transaction.after);
                return Err(StoreError::Database { message });
            }
            match self.queue.try_send(Command::Apply(transaction)) {
                Ok(()) => {
                    progress.submitted += 1;
                    return Ok(progress.submitted);
                }
                Err(mpsc::TrySendError::Full(Command::Apply(back))) => {
                    transaction = back;
                    // The writer needs the lock to get on.
                    let waited = self.shared.changed.wait(progress);
                    progress = waited.unwrap_or_else(PoisonError::into_inner);
                }
                Err(_) => return Err(StoreError::Closed),
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
        let read = self.shared.with_database(|database| Ok(database.begin_read()?));
        read.map_err(|error| StoreError::Database {
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
        self.dead = None;
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
    reopen: Reopen,
    restate: Restate,
    /// When the oldest commit that is not durable wants to be.
    due: Option<Instant>,
    /// A flush is under way.
    flushing: bool,
    /// Waiting for durability.
    after: Vec<After>,
}

impl Writer {
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
                if !self.recover(commands) {
                    return;
                }
            }
        }
    }

    /// Tries until the database can be written again; `false` when it is to be closed before that.
    fn recover(&mut self, commands: &Receiver<Command>) -> bool {
        loop {
            let again = Instant::now() + RETRY;
            loop {
                match commands.recv_timeout(again.saturating_duration_since(Instant::now())) {
                    Err(RecvTimeoutError::Timeout) => break,
                    Ok(Command::Close) | Err(RecvTimeoutError::Disconnected) => return false,
                    // What it changes is in memory.
                    Ok(Command::Apply(transaction)) => self.after.extend(transaction.after),
                    Ok(Command::Commit { .. }) => self.flushing = false,
                    Ok(Command::Hurry) => {}
                }
            }
            match self.restart() {
                Ok(()) => {
                    tracing::info!("the metadata database works again");
                    return true;
                }
                Err(error) => tracing::debug!(error = &*error, "the metadata database fails still"),
            }
        }
    }

    /// Opens the database again and writes down what is in memory.
    fn restart(&mut self) -> Result<(), BoxError> {
        // The old one goes first, as it holds the lock of its file.
        self.shared.replace(None);
        self.shared.replace(Some((self.reopen)()?));
        let restate = Arc::clone(&self.restate);
        let mut outcome = Ok(());
        restate(&mut |everything| outcome = self.resume(everything));
        outcome
    }

    fn resume(&mut self, everything: Everything) -> Result<(), BoxError> {
        self.after.append(&mut self.shared.progress().refused);
        self.apply(vec![Transaction {
            changes: vec![Change::Restate(everything)],
            ..Transaction::default()
        }])?;
        self.due = Some(Instant::now());
        let mut progress = self.shared.progress();
        (progress.failed, progress.visible) = (None, progress.submitted);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Notes that nothing was left undone.
    fn close(&self) -> Result<(), BoxError> {
        self.shared.with_database(|database| {
            let mut write = database.begin_write()?;
            write.set_quick_repair(true);
            write.open_table(META)?.insert(&b"clean"[..], &[1][..])?;
            write.commit()?;
            Ok(())
        })
    }

    fn step(
        &mut self,
        group: Vec<Transaction>,
        commit: Option<Result<u64, StoreError>>,
    ) -> Result<(), BoxError> {
        if !group.is_empty() {
            let count = u64::try_from(group.len())?;
            self.apply(group)?;
            self.due.get_or_insert_with(|| Instant::now() + self.interval);
            self.shared.progress().visible += count;
            self.shared.changed.notify_all();
        }
        if let Some(epoch) = commit {
            self.flushing = false;
            self.commit(epoch?)?;
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

    fn apply(&mut self, mut group: Vec<Transaction>) -> Result<(), BoxError> {
        for transaction in &mut group {
            self.after.append(&mut transaction.after);
        }
        self.shared.with_database(|database| {
            let mut write = database.begin_write()?;
            write.set_durability(Durability::None)?;
            for change in group.into_iter().flat_map(|transaction| transaction.changes) {
                apply(&write, change)?;
            }
            write.commit()?;
            Ok(())
        })
    }

    fn commit(&mut self, epoch: u64) -> Result<(), BoxError> {
        self.shared.with_database(|database| {
            let mut write = database.begin_write()?;
            write.set_quick_repair(true);
            write
                .open_table(META)?
                .insert(&b"epoch"[..], &epoch.to_be_bytes()[..])?;
            write.commit()?;
            Ok(())
        })?;
        self.due = None;
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
        Change::Restate(everything) => restate(write, everything)?,
        Change::DeleteResult(result) => graph::delete_result(write, result.as_bytes())?,
    }
    Ok(())
}

fn restate(write: &WriteTransaction, everything: Everything) -> Result<(), BoxError> {
    let mut gone = Vec::new();
    for row in write.open_table(REFS)?.iter()? {
        let key = row?.0.value().to_vec();
        if !everything.refs.contains_key(&key) {
            gone.push(String::from_utf8_lossy(&key).parse()?);
        }
    }
    for id in gone {
        apply(write, Change::DeleteRef(id))?;
    }
    let mut refs = write.open_table(REFS)?;
    for (id, row) in &everything.refs {
        refs.insert(&id[..], &row[..])?;
    }
    let mut names = write.open_table(NAMES)?;
    names.retain(|name, _| everything.names.contains_key(name))?;
    for (name, digests) in &everything.names {
        names.insert(&name[..], &digests[..])?;
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

/// Memory redb may use to cache pages. The kernel caches the file too: this only spares calls, and a daemon shall not grow
/// with its records.
pub(crate) const CACHE_BYTES: usize = 512 << 10;

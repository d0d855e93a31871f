//! Opening a state directory: alone, in a known version, and with disk and database in agreement.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use oci::Digest;
use redb::{Database, ReadableDatabase, ReadableTable};
use rustix::fs::FlockOperation;
use snapshot::{Kind, SnapshotKey, Snapshotter};

use crate::db::{
    self, BoxError, CACHE_BYTES, Change, Db, Everything, META, NAMES, Parts, REFS, Reopen, Transaction,
};
use crate::error::{OpenError, StoreError};
use crate::graph;
use crate::row::{Layer, Row};
use crate::state::State;
use crate::store::{Backend, Shared, Store, StoreOptions};
use crate::types::RefId;

/// The version of the state directory this program writes.
const VERSION: u64 = 1;
/// How often a directory in use is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(20);

type Refs = BTreeMap<RefId, Row>;

pub(crate) fn open(
    root: &Path,
    content: content::Store,
    snapshotter: Arc<dyn Snapshotter>,
    options: StoreOptions,
) -> Result<Store, OpenError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Io { action, path, source }
    };
    let markers = root.join("writing");
    private_dir(&markers).map_err(failed("create", &markers))?;
    let StateLock(lock) = match options.lock {
        Some(lock) => lock,
        None => StateLock::acquire(root, options.lock_timeout)?,
    };
    let database_error = |source| OpenError::Database {
        root: root.to_owned(),
        source,
    };
    let mut reopen = opener(root, options.backend);
    let database = reopen().map_err(database_error)?;
    let boot_id = options.boot_id.unwrap_or_else(boot_id);
    let mut loaded = load(&database).map_err(database_error)?;
    let written = written(&markers).map_err(failed("list", &markers))?;
    let recovered = recover(&mut loaded, &written, &boot_id, &content, &*snapshotter);
    let (changes, mut report) = recovered.map_err(|source| OpenError::Recover {
        root: root.to_owned(),
        source: Box::new(source),
    })?;
    settle(&database, changes, &boot_id).map_err(database_error)?;
    for marker in written.values() {
        fs::remove_file(marker).map_err(failed("remove", marker))?;
    }
    let state = Arc::new(Mutex::new(build_state(loaded)));
    (report.snapshots, report.blobs) =
        sweep(&state, &content, &*snapshotter).map_err(|source| OpenError::Recover {
            root: root.to_owned(),
            source: Box::new(source),
        })?;
    let parts = parts(&content, &snapshotter, &state, reopen);
    let db = Db::start(database, options.flush_interval, parts);
    let root = root.to_owned();
    let shared = Shared {
        root,
        content,
        snapshotter,
        state,
        pruning: Mutex::default(),
        db,
        recovered: report,
        _lock: lock,
    };
    Ok(Store {
        shared: Arc::new(shared),
    })
}

/// What opening a store had to put right. After `kill -9` some of it is usual; after a close in good order nothing is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Refs forgotten: unfinished, not to be found again, or without their files.
    pub refs: usize,
    /// Snapshots removed that nothing referred to.
    pub snapshots: usize,
    /// Blobs removed that nothing referred to.
    pub blobs: usize,
}

/// Returns what opens the database, and opens it again after a failure.
fn opener(root: &Path, backend: Backend) -> Reopen {
    match backend {
        Backend::File => {
            let path = root.join("metadata.redb");
            Box::new(move || {
                // The database's own way of making it would let everyone write where the umask does.
                let mut options = OpenOptions::new();
                options.append(true).create(true).mode(0o600).open(&path)?;
                db::open_file(&path)
            })
        }
        Backend::Custom(mut make) => Box::new(move || {
            let mut builder = redb::Builder::new();
            let builder = builder.set_cache_size(CACHE_BYTES);
            Ok(builder.create_with_backend(Boxed(make()))?)
        }),
    }
}

/// Puts together what the database's threads do.
fn parts(
    content: &content::Store,
    snapshotter: &Arc<dyn Snapshotter>,
    state: &Arc<Mutex<State>>,
    reopen: Reopen,
) -> Parts {
    let shared = || (content.clone(), Arc::clone(snapshotter), Arc::clone(state));
    let (content, snapshotter, state) = shared();
    let sync = Box::new(move || crate::store::sync(&content, &*snapshotter, &state));
    let (content, snapshotter, state) = shared();
    let reap = Box::new(move |after| crate::store::reap(&content, &*snapshotter, &state, after));
    let (_, _, state) = shared();
    let restate = Arc::new(move |write: &mut dyn FnMut(Everything)| {
        let state = crate::store::locked(&state);
        write(state.everything());
    });
    Parts {
        sync,
        reap,
        reopen,
        restate,
    }
}

/// Makes a directory that only its owner may enter, whatever the umask; closes one that others may.
fn private_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    if fs::metadata(dir)?.mode() & 0o077 == 0 {
        return Ok(());
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

/// The right to use a state directory, held against other processes until it is dropped. Whoever opens a content store or
/// a snapshotter in a state directory needs it before: opening sweeps.
#[derive(Debug)]
pub struct StateLock(File);

impl StateLock {
    /// Takes the lock of an existing directory, waiting at most `timeout`, and checks that this program knows the
    /// directory's version.
    pub fn acquire(root: &Path, timeout: Option<Duration>) -> Result<Self, OpenError> {
        let lock = lock(root, timeout)?;
        check_version(root)?;
        Ok(Self(lock))
    }
}

/// Takes the lock file, waiting at most `timeout`.
fn lock(root: &Path, timeout: Option<Duration>) -> Result<File, OpenError> {
    let path = root.join("lock");
    let failed = |action| {
        let path = path.clone();
        move |source: io::Error| OpenError::Io { action, path, source }
    };
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path);
    let mut file = open.map_err(failed("open"))?;
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(failed("lock")(error.into())),
        }
        if deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            let mut owner = String::new();
            // The text is for people; whoever holds the lock may be writing it.
            let _ = file.take(20).read_to_string(&mut owner);
            return Err(OpenError::Locked {
                root: root.to_owned(),
                owner: owner.trim().parse().ok(),
            });
        }
        // There is no lock with a time limit.
        std::thread::sleep(LOCK_RETRY);
    }
    let own = format!("{}\n", std::process::id());
    // The text is for people, and a full disk is no reason not to open what may have to be emptied.
    let _ = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(own.as_bytes()));
    Ok(file)
}

/// Reads or writes the file `version`.
fn check_version(root: &Path) -> Result<(), OpenError> {
    let path = root.join("version");
    let failed = |action| {
        let path = path.clone();
        move |source: io::Error| OpenError::Io { action, path, source }
    };
    match fs::read_to_string(&path) {
        Ok(text) => {
            let invalid =
                |_| failed("parse")(io::Error::new(io::ErrorKind::InvalidData, format!("{text:?}")));
            let found = text.trim().parse().map_err(invalid)?;
            if found > VERSION {
                return Err(OpenError::NewerVersion {
                    root: root.to_owned(),
                    found,
                    supported: VERSION,
                });
            }
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let new = root.join("version.new");
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o644);
            let written = options.open(&new).and_then(|mut file| {
                file.write_all(format!("{VERSION}\n").as_bytes())?;
                file.sync_all()
            });
            written
                .and_then(|()| fs::rename(&new, &path))
                .map_err(failed("write"))
        }
        Err(error) => Err(failed("read")(error)),
    }
}

/// Identifies the time since the machine was started; empty where the kernel does not tell.
fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Lists the refs that were being written to, with their markers.
fn written(dir: &Path) -> io::Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if let Some(name) = entry.file_name().to_str() {
            found.insert(name.to_owned(), entry.path());
        }
    }
    Ok(found)
}

/// What the database holds.
#[derive(Default)]
struct Loaded {
    refs: Refs,
    names: BTreeMap<String, Vec<Digest>>,
    epoch: u64,
    boot_id: Option<String>,
    /// The store was closed in good order.
    clean: bool,
    /// Rows that do not read.
    damaged: Vec<RefId>,
}

fn load(database: &Database) -> Result<Loaded, BoxError> {
    let write = database.begin_write()?;
    graph::create_tables(&write)?;
    write.commit()?;
    let read = database.begin_read()?;
    let mut loaded = Loaded::default();
    for row in read.open_table(REFS)?.iter()? {
        let (key, value) = row?;
        let id: RefId = String::from_utf8_lossy(key.value()).parse()?;
        match serde_json::from_slice(value.value()) {
            Ok(row) => {
                loaded.refs.insert(id, row);
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, %id, "a ref's row does not read");
                loaded.damaged.push(id);
            }
        }
    }
    for row in read.open_table(NAMES)?.iter()? {
        let (key, value) = row?;
        let digests = serde_json::from_slice(value.value())?;
        loaded
            .names
            .insert(String::from_utf8_lossy(key.value()).into_owned(), digests);
    }
    let meta = read.open_table(META)?;
    if let Some(epoch) = meta.get(&b"epoch"[..])? {
        loaded.epoch = epoch.value().try_into().map_or(0, u64::from_be_bytes);
    }
    if let Some(boot_id) = meta.get(&b"boot"[..])? {
        loaded.boot_id = Some(String::from_utf8_lossy(boot_id.value()).into_owned());
    }
    loaded.clean = meta.get(&b"clean"[..])?.is_some();
    Ok(loaded)
}

/// Makes the rows agree with what is on disk; returns the changes for the database.
fn recover(
    loaded: &mut Loaded,
    written: &BTreeMap<String, PathBuf>,
    boot_id: &str,
    content: &content::Store,
    snapshotter: &dyn Snapshotter,
) -> Result<(Vec<Change>, Recovered), StoreError> {
    let mut blobs = BTreeSet::new();
    content.walk(|blob| -> Result<(), content::StoreError> {
        blobs.insert(blob.digest);
        Ok(())
    })?;
    let snapshots = snapshotter
        .list()
        .into_iter()
        .map(|stat| (stat.key, stat.kind))
        .collect();
    let before = loaded.refs.clone();
    let mut changes = Vec::new();
    let mut report = Recovered::default();
    let refs = &mut loaded.refs;
    let mut doubtful: BTreeSet<RefId> = written
        .keys()
        .filter_map(|marker| marker.rsplit_once('.')?.0.parse().ok())
        .collect();
    if !loaded.clean && loaded.boot_id.as_deref().is_some_and(|last| last != boot_id) {
        // The machine went down. What was not flushed may be there in part, and marks may not be.
        let epoch = loaded.epoch;
        refs.retain(|_, row| row.epoch <= epoch);
        // Only a ref that is kept for it can have been taken back and written to.
        doubtful.extend(
            refs.iter()
                .filter(|(_, row)| row.mutable && row.retain)
                .map(|(id, _)| id.clone()),
        );
    }
    for id in doubtful {
        // Someone may have changed the files: nothing that is known of them holds.
        if let Some(twin) = refs.get_mut(&id).and_then(|row| row.twin.take()) {
            refs.remove(&twin);
        }
        changes.push(Change::DeleteValues(id));
    }
    let disk = Disk { blobs, snapshots };
    disk.settle_snapshots(refs);
    for row in refs.values_mut() {
        disk.settle_blobs(row);
    }
    disk.drop_unloadable(refs);
    drop_unfindable(refs);
    for (id, row) in &before {
        match refs.get(id) {
            None => {
                report.refs += 1;
                changes.push(Change::DeleteRef(id.clone()));
            }
            Some(now) if now != row => {
                let mut transaction = Transaction::default();
                transaction.put_json(REFS, id.as_str(), now);
                changes.append(&mut transaction.changes);
            }
            Some(_) => {}
        }
    }
    report.refs += loaded.damaged.len();
    changes.extend(loaded.damaged.drain(..).map(Change::DeleteRef));
    Ok((changes, report))
}

/// What is on disk.
struct Disk {
    blobs: BTreeSet<Digest>,
    snapshots: BTreeMap<SnapshotKey, Kind>,
}

impl Disk {
    fn is(&self, row: &Row, kind: Kind) -> bool {
        let kind_of = |key| self.snapshots.get(key);
        row.snapshot.as_ref().and_then(kind_of) == Some(&kind)
    }

    fn settle_snapshots(&self, refs: &mut Refs) {
        // A mutable ref is nothing without its snapshot, and without anyone to hold it unless it is retained.
        let retained: BTreeSet<RefId> = refs
            .iter()
            .filter(|(_, row)| row.mutable)
            .filter(|(_, row)| {
                let twin = row.twin.as_ref().and_then(|twin| refs.get(twin));
                row.retain || twin.is_some_and(|twin| twin.retain)
            })
            .map(|(id, _)| id.clone())
            .collect();
        refs.retain(|id, row| !row.mutable || (self.is(row, Kind::Active) && retained.contains(id)));
        let mutable: BTreeSet<RefId> = refs
            .iter()
            .filter(|(_, row)| row.mutable)
            .map(|(id, _)| id.clone())
            .collect();
        for row in refs.values_mut().filter(|row| !row.mutable) {
            // If the twin is gone, its snapshot was committed just before the end, or removed.
            if row.twin.as_ref().is_some_and(|twin| !mutable.contains(twin)) {
                row.twin = None;
            }
            if row.twin.is_none() && !self.is(row, Kind::Committed) {
                row.snapshot = None;
            }
        }
        let immutable: BTreeSet<RefId> = refs
            .iter()
            .filter(|(_, row)| !row.mutable)
            .map(|(id, _)| id.clone())
            .collect();
        for row in refs.values_mut().filter(|row| row.mutable) {
            row.twin = row.twin.take().filter(|twin| immutable.contains(twin));
        }
    }

    /// Forgets blobs that are neither here nor anywhere known.
    fn settle_blobs(&self, row: &mut Row) {
        row.change_layer(|Layer { blobs, providers, .. }| {
            let is_provided =
                |digest: &Digest| providers.get(digest).is_some_and(|places| !places.is_empty());
            blobs.retain(|blob| self.blobs.contains(&blob.digest) || is_provided(&blob.digest));
        });
    }

    /// Drops refs that have neither a tree nor a way to make one, and what stands on them.
    fn drop_unloadable(&self, refs: &mut Refs) {
        loop {
            let known: BTreeSet<RefId> = refs.keys().cloned().collect();
            let count = refs.len();
            refs.retain(|_, row| {
                let is_whole = row.has_tree()
                    || !row.layer().blobs.is_empty()
                    || !matches!(row.parents, crate::types::Parents::Layer { .. });
                is_whole && row.parents.ids().into_iter().all(|parent| known.contains(parent))
            });
            if refs.len() == count {
                break;
            }
        }
    }
}

/// Drops refs that only a handle could lead to, from the top down.
fn drop_unfindable(refs: &mut Refs) {
    loop {
        let parents: BTreeSet<RefId> = refs.values().flat_map(|row| row.parents.ids()).cloned().collect();
        let count = refs.len();
        refs.retain(|id, row| {
            let is_findable = row.retain || !row.layer().blobs.is_empty() || row.is_indexed();
            row.mutable || row.twin.is_some() || is_findable || parents.contains(id)
        });
        if refs.len() == count {
            return;
        }
    }
}

fn settle(database: &Database, changes: Vec<Change>, boot_id: &str) -> Result<(), BoxError> {
    let mut write = database.begin_write()?;
    write.set_quick_repair(true);
    for change in changes {
        db::apply(&write, change)?;
    }
    let mut meta = write.open_table(META)?;
    meta.insert(&b"boot"[..], boot_id.as_bytes())?;
    meta.remove(&b"clean"[..])?;
    drop(meta);
    write.commit()?;
    Ok(())
}

fn build_state(loaded: Loaded) -> State {
    let newest = loaded
        .refs
        .values()
        .map(|row| row.epoch)
        .max()
        .unwrap_or_default();
    let mut state = State::new(newest.max(loaded.epoch) + 1);
    // These rows are in the database already.
    let mut ignored = Transaction::default();
    let mut pending: Vec<(RefId, Row)> = loaded.refs.into_iter().collect();
    while !pending.is_empty() {
        // Parents first; none is missing.
        let (ready, rest): (Vec<_>, Vec<_>) = pending.into_iter().partition(|(_, row)| {
            row.parents
                .ids()
                .into_iter()
                .all(|parent| state.get(parent).is_some())
        });
        if ready.is_empty() {
            tracing::error!(count = rest.len(), "refs in a circle are forgotten");
            break;
        }
        for (id, row) in ready {
            state.insert(&id, row, &mut ignored);
        }
        pending = rest;
    }
    for (name, digests) in loaded.names {
        state.set_name(&name, digests);
    }
    state
}

/// Removes from disk what nothing refers to; returns how many snapshots and blobs.
fn sweep(
    state: &Mutex<State>,
    content: &content::Store,
    snapshotter: &dyn Snapshotter,
) -> Result<(usize, usize), StoreError> {
    let state = crate::store::locked(state);
    let swept = snapshotter.sweep(&|key| state.has_snapshot(key))?;
    let mut garbage = Vec::new();
    content.walk(|blob| -> Result<(), content::StoreError> {
        if !state.is_blob_held(&blob.digest) {
            garbage.push(blob.digest);
        }
        Ok(())
    })?;
    for digest in &garbage {
        content.delete(digest)?;
    }
    tracing::debug!(snapshots = swept.removed.len(), blobs = garbage.len(), "swept");
    Ok((swept.removed.len(), garbage.len()))
}

/// redb takes backends by value.
#[derive(Debug)]
struct Boxed(Box<dyn redb::StorageBackend>);

impl redb::StorageBackend for Boxed {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }
}

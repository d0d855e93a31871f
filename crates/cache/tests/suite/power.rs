//! The machine loses power at the nth flush of anything: of a blob, of a directory, of the snapshots, of the database.
//! What was acknowledged as durable before is there afterwards, and everything agrees.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use cache::{Backend, Batch, CacheResult, Link, PruneOptions, RefOptions, Store, StoreError, StoreOptions};
use content::Durability;
use oci::Digest;
use snapshot::{
    Diff, Mount, Native, SnapshotError, SnapshotKey, SnapshotStat, Snapshotter, Storage, Swept, Usage,
};

use crate::fixture::*;

/// A machine whose disk has, beside what processes see, what would be left without power.
#[derive(Clone, Debug)]
struct Machine(Arc<Mutex<Disk>>);

#[derive(Debug)]
struct Disk {
    /// The state directory that processes see.
    root: PathBuf,
    /// Flushes until the power goes.
    left: usize,
    /// The database as it is read, and as it is on the disk.
    database: Vec<u8>,
    durable_database: Vec<u8>,
    /// Bytes that were flushed, by inode.
    files: BTreeMap<u64, Vec<u8>>,
    /// Names that were flushed, by directory.
    names: BTreeMap<PathBuf, BTreeMap<String, u64>>,
    /// The snapshots when they were last flushed.
    snapshots: tempfile::TempDir,
}

fn no_power() -> io::Error {
    io::Error::other("no power")
}

/// Copies a tree that others may remove things from meanwhile.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let Ok(entries) = fs::read_dir(from) else { return };
    for entry in entries.flatten() {
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        match fs::symlink_metadata(&source) {
            Ok(kind) if kind.is_dir() => copy(&source, &target),
            Ok(kind) if kind.is_symlink() => {
                if let Ok(link) = fs::read_link(&source) {
                    std::os::unix::fs::symlink(link, target).unwrap();
                }
            }
            // What has gone by now is not flushed.
            _ => drop(fs::copy(&source, &target)),
        }
    }
}

impl Machine {
    /// Starts on what a disk holds; the power goes at the flush after `left`.
    fn start(root: &Path, database: Vec<u8>, left: usize) -> Self {
        let snapshots = tempfile::tempdir().unwrap();
        copy(&root.join("snapshots"), &snapshots.path().join("s"));
        let (mut files, mut names) = (BTreeMap::new(), BTreeMap::new());
        let dir = root.join("content/blobs/sha256");
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let inode = entry.metadata().unwrap().ino();
            files.insert(inode, fs::read(entry.path()).unwrap());
            found.insert(entry.file_name().into_string().unwrap(), inode);
        }
        names.insert(dir, found);
        Self(Arc::new(Mutex::new(Disk {
            root: root.to_owned(),
            left,
            database: database.clone(),
            durable_database: database,
            files,
            names,
            snapshots,
        })))
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }

    /// Takes one flush, unless there is no power.
    fn flush(&self) -> io::Result<MutexGuard<'_, Disk>> {
        let mut disk = self.disk();
        disk.left = disk.left.checked_sub(1).ok_or_else(no_power)?;
        Ok(disk)
    }

    fn has_power(&self) -> bool {
        self.disk().left > 0
    }

    fn open(&self, boot: usize) -> Result<Store, cache::OpenError> {
        let root = self.disk().root.clone();
        let content = content::Store::open_with(&root.join("content"), Arc::new(self.clone())).unwrap();
        let snapshotter = Snapshots(Native::open(&root.join("snapshots")).unwrap(), self.clone());
        let backend = self.clone();
        let options = StoreOptions {
            backend: Backend::Custom(Box::new(move || Box::new(backend.clone()))),
            // Flushes happen where the test asks for them.
            flush_interval: Duration::from_secs(3600),
            boot_id: Some(format!("boot {boot}")),
            ..StoreOptions::default()
        };
        Store::open(&root, content, Arc::new(snapshotter), options)
    }

    /// Makes a state directory of what is on the disk without power, and starts on it with power for ever.
    fn power_off(&self, to: &Path) -> Self {
        let disk = self.disk();
        copy(&disk.snapshots.path().join("s"), &to.join("snapshots"));
        for (dir, names) in &disk.names {
            let dir = to.join(dir.strip_prefix(&disk.root).unwrap());
            fs::create_dir_all(&dir).unwrap();
            for (name, inode) in names {
                // A name without flushed bytes is an empty file.
                let bytes = disk.files.get(inode).cloned().unwrap_or_default();
                fs::write(dir.join(name), bytes).unwrap();
            }
        }
        Self::start(to, disk.durable_database.clone(), usize::MAX)
    }
}

impl content::Flush for Machine {
    fn file(&self, file: &File, path: &Path) -> io::Result<()> {
        let mut disk = self.flush()?;
        let inode = file.metadata()?.ino();
        disk.files.insert(inode, fs::read(path)?);
        Ok(())
    }

    fn directory(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.flush()?;
        let mut names = BTreeMap::new();
        for entry in fs::read_dir(path)?.flatten() {
            // One that has gone by now has no inode to name.
            if let Ok(metadata) = entry.metadata() {
                names.insert(entry.file_name().into_string().unwrap(), metadata.ino());
            }
        }
        disk.names.insert(path.to_owned(), names);
        Ok(())
    }
}

impl redb::StorageBackend for Machine {
    fn len(&self) -> io::Result<u64> {
        Ok(u64::try_from(self.disk().database.len()).unwrap())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).unwrap();
        let disk = self.disk();
        let bytes = disk.database.get(from..from + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk().database.resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.flush()?;
        disk.durable_database = disk.database.clone();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let from = usize::try_from(offset).unwrap();
        self.disk().database[from..from + data.len()].copy_from_slice(data);
        Ok(())
    }
}

/// Snapshots on the machine.
#[derive(Debug)]
struct Snapshots(Native, Machine);

impl Snapshotter for Snapshots {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn prepare(&self, key: &SnapshotKey, parent: Option<&SnapshotKey>) -> Result<(), SnapshotError> {
        self.0.prepare(key, parent)
    }
    fn view(&self, key: &SnapshotKey, parent: Option<&SnapshotKey>) -> Result<(), SnapshotError> {
        self.0.view(key, parent)
    }
    fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>, SnapshotError> {
        self.0.mounts(key)
    }
    fn read_mounts(&self, name: Option<&SnapshotKey>) -> Result<Vec<Mount>, SnapshotError> {
        self.0.read_mounts(name)
    }
    fn commit(&self, name: &SnapshotKey, key: &SnapshotKey) -> Result<(), SnapshotError> {
        self.0.commit(name, key)
    }
    fn remove(&self, key: &SnapshotKey) -> Result<(), SnapshotError> {
        self.0.remove(key)
    }
    fn stat(&self, key: &SnapshotKey) -> Result<SnapshotStat, SnapshotError> {
        self.0.stat(key)
    }
    fn check(&self, key: &SnapshotKey) -> Result<(), SnapshotError> {
        self.0.check(key)
    }
    fn expire_checks(&self) {
        self.0.expire_checks();
    }
    fn usage(&self, key: &SnapshotKey) -> Result<Usage, SnapshotError> {
        self.0.usage(key)
    }
    fn list(&self) -> Vec<SnapshotStat> {
        self.0.list()
    }
    fn merge(&self, name: &SnapshotKey, diffs: &[Diff]) -> Result<(), SnapshotError> {
        self.0.merge(name, diffs)
    }
    fn sync(&self) -> Result<(), SnapshotError> {
        self.0.sync()?;
        let failed = |source| SnapshotError::Io {
            action: "flush",
            path: PathBuf::new(),
            source,
        };
        let mut disk = self.1.flush().map_err(failed)?;
        let shadow = tempfile::tempdir().unwrap();
        copy(&disk.root.join("snapshots"), &shadow.path().join("s"));
        disk.snapshots = shadow;
        Ok(())
    }
    fn sweep(&self, keep: &dyn Fn(&SnapshotKey) -> bool) -> Result<Swept, SnapshotError> {
        self.0.sweep(keep)
    }
    fn storage(&self, key: &SnapshotKey) -> Result<Storage, SnapshotError> {
        self.0.storage(key)
    }
}

/// What the store said is durable.
#[derive(Debug, Default)]
struct Acknowledged {
    listed: BTreeSet<String>,
    records: BTreeSet<String>,
    blobs: BTreeSet<Digest>,
}

impl Acknowledged {
    fn all_of(&mut self, store: &Store) -> Result<(), StoreError> {
        let listed: BTreeSet<_> = listed(store).into_iter().collect();
        store.flush()?;
        self.listed = listed;
        Ok(())
    }

    fn prove(&self, store: &Store, point: usize) {
        let found: BTreeSet<_> = listed(store).into_iter().collect();
        let lost: Vec<_> = self.listed.difference(&found).collect();
        assert!(lost.is_empty(), "power off at flush {point}: lost {lost:?}");
        for record in &self.records {
            let results = store.records().results(record).unwrap();
            assert_eq!(results.len(), 1, "power off at flush {point}: {record}");
        }
        for blob in &self.blobs {
            let bytes = store.content().reader(blob).unwrap().read_all(1 << 20).unwrap();
            assert_eq!(Digest::sha256(&bytes), *blob, "power off at flush {point}");
        }
    }
}

/// An image whose layer was put by either way, and steps on it with a record each.
fn steps(store: &Store, known: &mut Acknowledged) -> Result<(), StoreError> {
    for durability in [Durability::Deferred, Durability::Immediate] {
        let name = format!("image {durability:?}");
        let tar = tar_layer(&name, "i");
        let layer = layer_blob(&tar, &[]);
        let digest = layer.descriptor.digest;
        let pin = store.pin(&[digest]);
        if store.content().put(&tar, durability).is_err() {
            return Err(StoreError::Closed);
        }
        let image = store.from_blob_chain(&[layer], &retained(&name))?.unwrap();
        drop(pin);
        known.all_of(store)?;
        known.blobs.insert(digest);
        image.unpack()?;
        let mut last = image;
        for number in 0..2 {
            let name = format!("step {number} on {durability:?}");
            let reference = store.create_mutable(Some(&last), described(&name))?;
            write(&reference, &format!("file {number}"), &name);
            let reference = reference.commit()?;
            let record = Digest::sha256(&name).to_string();
            store
                .records()
                .apply(recorded(&record, &name, reference.id().clone()))?;
            known.all_of(store)?;
            known.records.insert(record);
            last = reference;
        }
    }
    Ok(())
}

fn recorded(record: &str, name: &str, reference: cache::RefId) -> Batch {
    let mut batch = Batch::new();
    let link = Link {
        input: 0,
        output: 0,
        digest: Digest::sha256(name),
        selector: None,
    };
    batch.link(Digest::sha256("parent").to_string(), link, record.to_owned());
    let result = CacheResult {
        id: reference.to_string(),
        refs: vec![reference],
        created_at: SystemTime::now(),
    };
    batch.result(record.to_owned(), result);
    batch
}

/// A client's directory that changes, and a prune of some of what there is.
fn source_and_prune(store: &Store, known: &mut Acknowledged) -> Result<(), StoreError> {
    let options = RefOptions {
        retain: true,
        ..described("source")
    };
    let source = store.create_mutable(None, options)?;
    write(&source, "f", "1");
    let id = source.id().clone();
    drop(source.commit()?);
    known.all_of(store)?;
    let source = store.get_mutable(&id)?;
    write(&source, "f", "2");
    drop(source.commit()?);
    known.all_of(store)?;
    let going = |description: &str| description.contains("on Deferred");
    // From here on they may be there or not.
    known.listed.retain(|description| !going(description));
    known.records.clear();
    let options = PruneOptions {
        filter: vec!["description~=Deferred".to_owned()],
        ..PruneOptions::default()
    };
    known.blobs.clear();
    known
        .listed
        .retain(|description| !description.contains("Deferred"));
    store.prune(&[options], &mut |_| std::ops::ControlFlow::Continue(()))?;
    known.all_of(store)
}

fn work(store: &Store, known: &mut Acknowledged) -> Result<(), StoreError> {
    steps(store, known)?;
    source_and_prune(store, known)
}

#[test]
fn power_may_go_at_any_flush() {
    let mut point = 0;
    loop {
        point += 1;
        let dir = Dir::new();
        let machine = Machine::start(dir.path(), Vec::new(), usize::MAX);
        drop(machine.open(0).unwrap());
        machine.disk().left = point;
        let mut known = Acknowledged::default();
        let finished = match machine.open(0) {
            // What fails for want of power has not been acknowledged.
            Ok(store) => work(&store, &mut known).is_ok() && machine.has_power(),
            Err(_) => false,
        };
        let after = Dir::new();
        let machine = machine.power_off(after.path());
        let store = machine.open(1).unwrap();
        known.prove(&store, point);
        check(&store);
        work(&store, &mut Acknowledged::default()).unwrap();
        check(&store);
        if finished {
            assert!(point > 25, "only {point} flushes");
            return;
        }
    }
}

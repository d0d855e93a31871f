//! What a crash leaves: nothing referred to is missing, nothing is left over.

use std::fs;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use cache::{Backend, Batch, CacheResult, Finding, Link, PruneOptions, RefOptions, Store, StoreOptions};
use oci::Digest;

use crate::fixture::*;

/// Storage in memory with two views: what was written, and what was there at the last flush. After `flushes` flushes
/// nothing becomes durable any more.
#[derive(Clone, Debug)]
struct Crashing(Arc<Mutex<Disk>>);

#[derive(Debug)]
struct Disk {
    now: Vec<u8>,
    durable: Vec<u8>,
    flushes: usize,
}

impl Crashing {
    fn new(durable: Vec<u8>, flushes: usize) -> Self {
        Self(Arc::new(Mutex::new(Disk {
            now: durable.clone(),
            durable,
            flushes,
        })))
    }

    fn durable(&self) -> Vec<u8> {
        self.0.lock().unwrap().durable.clone()
    }

    fn as_backend(&self) -> Backend {
        let backend = self.clone();
        Backend::Custom(Box::new(move || Box::new(backend.clone())))
    }

    /// Lets flushes succeed, or fail, from now on.
    fn allow(&self, flushes: usize) {
        self.0.lock().unwrap().flushes = flushes;
    }

    /// Reports whether the crash point was reached.
    fn crashed(&self) -> bool {
        self.0.lock().unwrap().flushes == 0
    }
}

impl redb::StorageBackend for Crashing {
    fn len(&self) -> io::Result<u64> {
        Ok(u64::try_from(self.0.lock().unwrap().now.len()).unwrap())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = self.0.lock().unwrap();
        let from = usize::try_from(offset).unwrap();
        let bytes = disk
            .now
            .get(from..from + out.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0
            .lock()
            .unwrap()
            .now
            .resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        if disk.flushes == 0 {
            return Err(io::Error::other("crashed"));
        }
        disk.flushes -= 1;
        disk.durable = disk.now.clone();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        let from = usize::try_from(offset).unwrap();
        disk.now[from..from + data.len()].copy_from_slice(data);
        Ok(())
    }
}

fn options(backend: &Crashing) -> StoreOptions {
    StoreOptions {
        backend: backend.as_backend(),
        // Flushes happen where the test asks for them.
        flush_interval: Duration::from_secs(3600),
        ..StoreOptions::default()
    }
}

/// A build with everything: steps with records, an image, a source taken back, pruning; a flush after each part. Errors
/// are those of the crash.
fn build(store: &Store) -> Result<(), cache::StoreError> {
    let tar = tar_layer("image", "i");
    let layer = layer_blob(&tar, &[]);
    let pin = store.pin(&[layer.descriptor.digest]);
    put(store, &tar);
    let image = store.from_blob_chain(&[layer], &retained("image"))?.unwrap();
    drop(pin);
    store.flush()?;
    image.unpack()?;
    let mut last = image;
    for number in 0..3 {
        let name = format!("step {number}");
        let reference = store.create_mutable(Some(&last), described(&name))?;
        write(&reference, &name, &name);
        let reference = reference.commit()?;
        let result = CacheResult {
            id: reference.id().to_string(),
            refs: vec![reference.id().clone()],
            created_at: SystemTime::now(),
        };
        let mut batch = Batch::new();
        let link = Link {
            input: 0,
            output: 0,
            digest: Digest::sha256(&name),
            selector: None,
        };
        batch.link(
            Digest::sha256("parent").to_string(),
            link,
            Digest::sha256(&name).to_string(),
        );
        batch.result(Digest::sha256(&name).to_string(), result);
        store.records().apply(batch)?;
        store.flush()?;
        last = reference;
    }
    let source = store.create_mutable(
        None,
        RefOptions {
            retain: true,
            ..described("source")
        },
    )?;
    write(&source, "f", "1");
    let id = source.id().clone();
    let committed = source.commit()?;
    committed.set_checksums(b"one")?;
    drop(committed);
    store.flush()?;
    let source = store.get_mutable(&id)?;
    write(&source, "f", "2");
    drop(source.commit()?);
    store.flush()?;
    drop(last);
    let filter = vec!["description~=step".to_owned()];
    store.prune(
        &[PruneOptions {
            filter,
            ..PruneOptions::default()
        }],
        &mut |_| std::ops::ControlFlow::Continue(()),
    )?;
    store.flush()
}

/// The crash at the nth flush of the database, for every n: open again, check, build again.
#[test]
fn a_crash_at_any_flush_leaves_a_sound_state() {
    let mut point = 0;
    loop {
        point += 1;
        let dir = Dir::new();
        // Opening flushes too; the first state is made before.
        let setup = Crashing::new(Vec::new(), usize::MAX);
        drop(dir.open_with(options(&setup)));
        let backend = Crashing::new(setup.durable(), point);
        let crashed = match try_open(dir.path(), options(&backend)) {
            Ok(store) => {
                let _ = build(&store);
                drop(store);
                backend.crashed()
            }
            Err(_) => true,
        };
        let after = Crashing::new(backend.durable(), usize::MAX);
        let store = dir.open_with(options(&after));
        check(&store);
        drop(store);
        let store = dir.open_with(options(&Crashing::new(after.durable(), usize::MAX)));
        build(&store).unwrap();
        check(&store);
        if !crashed {
            return;
        }
    }
}

/// What fails is told; when writing works again, everything goes on, and nothing that went meanwhile comes back.
#[test]
fn a_full_disk_is_waited_out() {
    let dir = Dir::new();
    let backend = Crashing::new(Vec::new(), usize::MAX);
    let store = dir.open_with(options(&backend));
    let kept = step(&store, None, "kept");
    kept.retain();
    let going = step(&store, None, "going");
    going.retain();
    going.finalize().unwrap();
    let going_id = going.id().clone();
    drop(going);
    store.flush().unwrap();

    backend.allow(0);
    let unfinished = store.create_mutable(None, described("unfinished")).unwrap();
    let key = unfinished.snapshot();
    let error = store.flush().unwrap_err();
    assert!(error.to_string().contains("crashed"), "{error}");
    // Room is made at once where a crash would make it too.
    drop(unfinished);
    wait_until(|| store.snapshotter().stat(&key).is_err());
    let filter = vec![format!("id=={going_id}")];
    let prune = [PruneOptions {
        filter,
        ..PruneOptions::default()
    }];
    let ignore = &mut |_| std::ops::ControlFlow::Continue(());
    assert!(store.prune(&prune, ignore).is_err());

    backend.allow(usize::MAX);
    wait_until(|| store.flush().is_ok());
    let above = step(&store, Some(&kept), "above");
    above.retain();
    store.flush().unwrap();
    check(&store);
    assert_eq!(listed(&store), ["above", "kept"]);
    drop((kept, above, store));
    let store = dir.open_with(options(&Crashing::new(backend.durable(), usize::MAX)));
    assert_eq!(listed(&store), ["above", "kept"]);
    assert_eq!(store.recovered(), cache::Recovered::default());
    check(&store);
}

fn wait_until(mut holds: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "it did not come true");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// `kill -9`: the directory is copied as it lies there and opened elsewhere.
#[test]
fn killed_at_any_step_the_directory_opens() {
    let dir = Dir::new();
    let store = dir.open_with(StoreOptions {
        flush_interval: Duration::from_millis(1),
        ..StoreOptions::default()
    });
    let killed = |name: &str| {
        let copy = Dir::new();
        copy_dir(dir.path(), &copy.path().join("s"));
        let store = open(&copy.path().join("s"), StoreOptions::default());
        check(&store);
        assert!(store.snapshotter().list().len() <= 6, "{name}");
    };
    let mut last = None;
    for number in 0..4 {
        let name = format!("s{number}");
        let reference = store.create_mutable(last.as_ref(), described(&name)).unwrap();
        killed("prepared");
        write(&reference, &name, &name);
        let reference = reference.commit().unwrap();
        reference.retain();
        killed("committed");
        reference.finalize().unwrap();
        killed("finalized");
        last = Some(reference);
    }
    drop(last);
    store
        .prune(&[PruneOptions::default()], &mut |_| {
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    killed("pruned");
}

#[test]
fn a_source_being_written_when_the_process_dies_is_not_believed() {
    let dir = Dir::new();
    let store = dir.open();
    let source = store.create_mutable(None, retained("source")).unwrap();
    source.set_metadata("manifest", Some(b"old")).unwrap();
    write(&source, "f", "old");
    let id = source.id().clone();
    let committed = source.commit().unwrap();
    let committed_id = committed.id().clone();
    committed.set_checksums(b"old").unwrap();
    committed.retain();
    let mut batch = Batch::new();
    let result = CacheResult {
        id: "r".into(),
        refs: vec![committed_id.clone()],
        created_at: SystemTime::now(),
    };
    batch.result("record", result);
    store.records().apply(batch).unwrap();
    drop(committed);
    store.flush().unwrap();
    // What is durable from here on is the state before.
    let copy = Dir::new();
    let root = copy.path().join("s");
    let database = fs::read(dir.path().join("metadata.redb")).unwrap();
    let source = store.get_mutable(&id).unwrap();
    write(&source, "f", "new");
    copy_dir(dir.path(), &root);
    fs::write(root.join("metadata.redb"), database).unwrap();

    let after = open(&root, StoreOptions::default());
    assert!(after.get(&committed_id).unwrap_err().is_not_found());
    assert_eq!(after.records().results("record").unwrap(), []);
    let again = after.get_mutable(&id).unwrap();
    assert_eq!(again.take_checksums(), None);
    assert_eq!(again.metadata("manifest").unwrap(), None);
}

#[test]
fn leases_do_not_survive_and_leaks_are_swept() {
    let dir = Dir::new();
    let store = dir.open();
    let kept = step(&store, None, "kept");
    kept.retain();
    let leaked = put(&store, b"leaked");
    let named = put(&store, b"named");
    store.retain("n", &[named]).unwrap();
    let pin = store.pin(&[leaked]);
    let unfinished = store.create_mutable(None, described("unfinished")).unwrap();
    store.flush().unwrap();
    let copy = Dir::new();
    let root = copy.path().join("s");
    copy_dir(dir.path(), &root);
    drop((pin, unfinished));
    let after = open(&root, StoreOptions::default());
    assert_eq!(listed(&after), ["kept"]);
    assert!(!after.content().exists(&leaked).unwrap());
    assert!(after.content().exists(&named).unwrap());
    assert_eq!(after.retained("n"), [named]);
    assert_eq!(after.snapshotter().list().len(), 1);
}

#[test]
fn after_the_machine_went_down_only_what_was_flushed_counts() {
    let dir = Dir::new();
    let boot = |id: &str| StoreOptions {
        boot_id: Some(id.into()),
        flush_interval: Duration::from_secs(3600),
        ..StoreOptions::default()
    };
    let store = dir.open_with(boot("one"));
    let flushed = step(&store, None, "flushed");
    flushed.retain();
    flushed.finalize().unwrap();
    let source = store.create_mutable(None, retained("source")).unwrap();
    source.set_metadata("manifest", Some(b"m")).unwrap();
    let source_id = source.id().clone();
    drop(source.commit().unwrap());
    store.flush().unwrap();
    let copy = |boot_id: &str| {
        let copy = Dir::new();
        let root = copy.path().join("s");
        copy_dir(dir.path(), &root);
        (open(&root, boot(boot_id)), copy)
    };
    let (same, _dir) = copy("one");
    assert_eq!(listed(&same), ["flushed", "source"]);
    let (other, _dir) = copy("two");
    assert_eq!(listed(&other), ["flushed", "source"]);
    // What is said of files that may have been changed without a trace is not believed.
    assert_eq!(
        other
            .get_mutable(&source_id)
            .unwrap()
            .metadata("manifest")
            .unwrap(),
        None
    );
    assert_eq!(
        same.get_mutable(&source_id)
            .unwrap()
            .metadata("manifest")
            .unwrap()
            .as_deref(),
        Some(&b"m"[..])
    );
    drop((flushed, store));
    // Closed in good order: nothing to doubt.
    let closed = dir.open_with(boot("three"));
    assert_eq!(
        closed
            .get_mutable(&source_id)
            .unwrap()
            .metadata("manifest")
            .unwrap()
            .as_deref(),
        Some(&b"m"[..])
    );
}

#[test]
fn verification_finds_what_is_wrong() {
    let dir = Dir::new();
    let store = dir.open();
    let a = step(&store, None, "a");
    a.finalize().unwrap();
    let tar = tar_layer("x", "1");
    let image = store
        .from_blob_chain(&[layer_blob(&tar, &[])], &described("image"))
        .unwrap()
        .unwrap();
    let digest = put(&store, &tar);
    let leaked = put(&store, b"leaked");
    let key = a.snapshot().unwrap().unwrap();
    store.snapshotter().remove(&key).unwrap();
    let hex = digest.hex();
    fs::write(dir.path().join("content/blobs/sha256").join(hex), "other").unwrap();
    let stray = snapshot::SnapshotKey::new("stray").unwrap();
    store.snapshotter().prepare(&stray, None).unwrap();
    let mut found = Vec::new();
    let mut note = |finding| {
        found.push(finding);
        std::ops::ControlFlow::Continue(())
    };
    store.verify(true, &mut note).unwrap();
    let expected = [
        Finding::MissingSnapshot {
            id: a.id().clone(),
            key,
        },
        Finding::LeakedSnapshot { key: stray },
        Finding::LeakedBlob { digest: leaked },
        Finding::CorruptBlob {
            digest,
            actual: Digest::sha256("other"),
        },
    ];
    assert!(
        found.len() == 4 && expected.iter().all(|finding| found.contains(finding)),
        "{found:?}"
    );
    drop(image);
}

//! A state directory to test in, and layers to put there.

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;

use cache::{ImmutableRef, LayerBlob, MutableRef, Provider, RefOptions, Store, StoreOptions, UsageOptions};
use oci::{Descriptor, Digest};
use snapshot::{Native, Overlay, OverlayOptions};

/// A directory for a store.
pub struct Dir(pub tempfile::TempDir);

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn open(&self) -> Store {
        self.open_with(StoreOptions::default())
    }

    pub fn open_with(&self, options: StoreOptions) -> Store {
        open(self.path(), options)
    }
}

pub fn open(path: &Path, options: StoreOptions) -> Store {
    try_open(path, options).unwrap()
}

pub fn try_open(path: &Path, options: StoreOptions) -> Result<Store, cache::OpenError> {
    let content = content::Store::open(&path.join("content")).unwrap();
    let snapshotter = Native::open(&path.join("snapshots")).unwrap();
    Store::open(path, content, Arc::new(snapshotter), options)
}

/// Opens a store on overlayfs; `None`, saying so, where that is not possible.
pub fn open_overlay(path: &Path) -> Option<Store> {
    let content = content::Store::open(&path.join("content")).unwrap();
    match Overlay::open(&path.join("snapshots"), OverlayOptions::default()) {
        Ok(snapshotter) => {
            Some(Store::open(path, content, Arc::new(snapshotter), StoreOptions::default()).unwrap())
        }
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Copies a state directory as it is: what `kill -9` leaves.
pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            copy_dir(&entry.path(), &target);
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path()).unwrap(), target).unwrap();
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

pub fn described(description: &str) -> RefOptions {
    RefOptions {
        description: description.into(),
        ..RefOptions::default()
    }
}

pub fn retained(description: &str) -> RefOptions {
    RefOptions {
        retain: true,
        ..described(description)
    }
}

/// Opens the tree of a mount and looks at it through its descriptor.
fn with_tree<T>(mounts: &[snapshot::Mount], look: impl FnOnce(&Path) -> T) -> T {
    let [mount] = mounts else {
        panic!("one mount expected: {mounts:?}")
    };
    let tree = mount.open().unwrap();
    look(&Path::new("/proc/self/fd").join(tree.as_fd().as_raw_fd().to_string()))
}

pub fn write(reference: &MutableRef, name: &str, text: &str) {
    with_tree(&reference.mounts(false).unwrap(), |tree| {
        fs::write(tree.join(name), text).unwrap()
    });
}

pub fn read(reference: &ImmutableRef, name: &str) -> Option<String> {
    with_tree(&reference.mounts().unwrap(), |tree| {
        fs::read_to_string(tree.join(name)).ok()
    })
}

/// Makes a ref with one file more than its parent.
pub fn step(store: &Store, parent: Option<&ImmutableRef>, name: &str) -> ImmutableRef {
    let reference = store.create_mutable(parent, described(name)).unwrap();
    write(&reference, name, name);
    reference.commit().unwrap()
}

/// Makes a ref with one file less than its parent.
pub fn without(store: &Store, parent: &ImmutableRef, name: &str) -> ImmutableRef {
    let reference = store
        .create_mutable(Some(parent), described(&format!("without {name}")))
        .unwrap();
    with_tree(&reference.mounts(false).unwrap(), |tree| {
        fs::remove_file(tree.join(name)).unwrap()
    });
    reference.commit().unwrap()
}

/// A layer with one file, as an uncompressed tar.
pub fn tar_layer(name: &str, text: &str) -> Vec<u8> {
    let mut header = [0u8; 512];
    let mut field = |at: usize, value: &[u8]| header[at..at + value.len()].copy_from_slice(value);
    field(0, name.as_bytes());
    field(100, b"0000644\0");
    field(108, b"0000000\0");
    field(116, b"0000000\0");
    field(124, format!("{:011o}\0", text.len()).as_bytes());
    field(136, b"00000000000\0");
    field(148, b"        ");
    field(156, b"0");
    field(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut out = header.to_vec();
    out.write_all(text.as_bytes()).unwrap();
    out.resize(512 + text.len().next_multiple_of(512) + 1024, 0);
    out
}

pub fn provider(locator: &str) -> Provider {
    Provider {
        scheme: "registry".into(),
        locator: locator.into(),
    }
}

/// A layer blob of `tar`; its bytes are nowhere yet.
pub fn layer_blob(tar: &[u8], providers: &[&str]) -> LayerBlob {
    LayerBlob {
        descriptor: Descriptor::of_bytes("application/vnd.oci.image.layer.v1.tar", tar),
        diff_id: Digest::sha256(tar),
        providers: providers.iter().map(|locator| provider(locator)).collect(),
        description: String::new(),
        created_at: None,
    }
}

pub fn put(store: &Store, bytes: &[u8]) -> Digest {
    store
        .content()
        .put(bytes, content::Durability::Immediate)
        .unwrap()
}

/// Descriptions of everything listed, sorted.
pub fn listed(store: &Store) -> Vec<String> {
    let records = store.disk_usage(&UsageOptions::default()).unwrap();
    let mut found: Vec<String> = records.into_iter().map(|record| record.description).collect();
    found.sort();
    found
}

/// Proves that nothing the store names is missing and nothing lies on disk that it does not name.
pub fn check(store: &Store) {
    // Waits until what was removed is deleted.
    store
        .prune(&[], &mut |_| std::ops::ControlFlow::Continue(()))
        .unwrap();
    let mut findings = Vec::new();
    store
        .verify(true, &mut |finding| {
            findings.push(finding);
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(findings, []);
    for record in store.disk_usage(&UsageOptions::default()).unwrap() {
        if record.mutable {
            let taken = store.get_mutable(&record.id);
            assert!(taken.is_ok(), "{}: {taken:?}", record.id);
            continue;
        }
        let reference = store.get(&record.id).unwrap();
        if reference.missing_blobs().unwrap().is_empty() {
            reference.unpack().unwrap();
            assert!(!reference.mounts().unwrap().is_empty());
        } else {
            assert!(
                reference
                    .missing_blobs()
                    .unwrap()
                    .iter()
                    .all(|blob| !blob.providers.is_empty())
            );
        }
    }
    let mut after = None;
    loop {
        let ids = store.records().list(after.as_deref(), 10).unwrap();
        let Some(last) = ids.last() else { break };
        for id in &ids {
            for result in store.records().results(id).unwrap() {
                for reference in &result.refs {
                    store.get(reference).unwrap();
                }
            }
        }
        after = Some(last.clone());
    }
}

//! Backends and trees for tests.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use snapshot::{Mount, MountGuard, Native, Overlay, OverlayOptions, SnapshotError, SnapshotKey, Snapshotter};

pub type Open = fn(&Path) -> Result<Box<dyn Snapshotter>, SnapshotError>;

pub fn overlay(root: &Path) -> Result<Box<dyn Snapshotter>, SnapshotError> {
    Ok(Box::new(Overlay::open(root, OverlayOptions::default())?))
}

pub fn native(root: &Path) -> Result<Box<dyn Snapshotter>, SnapshotError> {
    Ok(Box::new(Native::open(root)?))
}

/// What a test of the contract gets.
pub struct Bench {
    pub open: Open,
    pub root: PathBuf,
    pub snapshotter: Box<dyn Snapshotter>,
    mounts: PathBuf,
}

/// Runs a test, or says why it cannot run.
pub fn with_backend(open: Open, test: fn(&mut Bench)) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let mounts = dir.path().join("mnt");
    fs::create_dir(&mounts).unwrap();
    match open(&root) {
        Err(error @ SnapshotError::Unsupported { .. }) => eprintln!("skipped: {error}"),
        opened => test(&mut Bench {
            open,
            root,
            snapshotter: opened.unwrap(),
            mounts,
        }),
    }
}

pub fn key(text: &str) -> SnapshotKey {
    SnapshotKey::new(text).unwrap()
}

impl Bench {
    pub fn reopen(&mut self) {
        self.snapshotter = (self.open)(&self.root).unwrap();
    }

    /// Mounts and calls `act` with the mount point.
    pub fn mounted<T>(&self, mounts: &[Mount], act: impl FnOnce(&Path) -> T) -> T {
        let point = tempfile::tempdir_in(&self.mounts).unwrap();
        let guards: Vec<MountGuard> = mounts
            .iter()
            .map(|mount| mount.mount_at(point.path()).unwrap())
            .collect();
        let done = act(point.path());
        for guard in guards.into_iter().rev() {
            guard.unmount().unwrap();
        }
        done
    }

    /// Prepares on `parent`, lets `act` change the tree, commits as `name`.
    pub fn commit(&self, name: &str, parent: Option<&str>, act: impl FnOnce(&Path)) {
        let active = key(&format!("{name}-active"));
        self.snapshotter
            .prepare(&active, parent.map(key).as_ref())
            .unwrap();
        self.mounted(&self.snapshotter.mounts(&active).unwrap(), act);
        self.snapshotter.commit(&key(name), &active).unwrap();
    }

    /// Reads the tree of a committed snapshot.
    pub fn tree(&self, name: &str) -> BTreeMap<String, String> {
        self.mounted(&self.snapshotter.read_mounts(Some(&key(name))).unwrap(), describe)
    }

    pub fn keys(&self) -> Vec<String> {
        self.snapshotter
            .list()
            .iter()
            .map(|stat| stat.key.to_string())
            .collect()
    }
}

pub fn write(path: impl AsRef<Path>, content: &str) {
    let path = path.as_ref();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// Describes a tree: type, mode, owner, content.
pub fn describe(root: &Path) -> BTreeMap<String, String> {
    fn visit(dir: &Path, prefix: &str, out: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            let meta = fs::symlink_metadata(entry.path()).unwrap();
            let content = if meta.is_file() {
                fs::read_to_string(entry.path()).unwrap()
            } else if meta.is_symlink() {
                format!("{:?}", fs::read_link(entry.path()).unwrap())
            } else {
                String::new()
            };
            out.insert(
                name.clone(),
                format!("{:o} {}:{} {content}", meta.mode(), meta.uid(), meta.gid()),
            );
            if meta.is_dir() {
                visit(&entry.path(), &format!("{name}/"), out);
            }
        }
    }
    let mut out = BTreeMap::new();
    visit(root, "", &mut out);
    out
}

/// Names only.
pub fn names(tree: &BTreeMap<String, String>) -> Vec<&str> {
    tree.keys().map(String::as_str).collect()
}

//! The directory layout shared by the backends, and the rules of the contract.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use layer::tree::at;
use rustix::fs::{CWD, RenameFlags};

use crate::error::{IoContext, SnapshotError};
use crate::key::SnapshotKey;
use crate::snapshotter::{Kind, SnapshotStat, Swept, Usage};

/// Directories that hold snapshots, by kind.
const KINDS: [(Kind, &str); 3] = [
    (Kind::Active, "active"),
    (Kind::View, "view"),
    (Kind::Committed, "committed"),
];

fn dir_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Active => "active",
        Kind::View => "view",
        Kind::Committed => "committed",
    }
}

/// One backend's directory and what is in it.
#[derive(Debug)]
pub(crate) struct Layout {
    root: PathBuf,
    handle: File,
    state: Mutex<State>,
    /// Numbers names in `new/` and `trash/`.
    sequence: AtomicU64,
    /// Set by every change, cleared by a flush.
    dirty: AtomicBool,
    /// Number of the present round of checks.
    round: AtomicU64,
    /// Directories in `trash/` that wait for the next flush to be deleted, as deleting takes longer than all of a commit.
    discarded: Mutex<Vec<PathBuf>>,
}

#[derive(Debug, Default)]
struct State {
    known: BTreeMap<SnapshotKey, Known>,
    /// Names being created, outside the lock.
    reserved: BTreeSet<SnapshotKey>,
}

#[derive(Debug)]
struct Known {
    kind: Kind,
    parent: Option<SnapshotKey>,
    /// Snapshots, also ones being created, that stand on this one.
    children: u32,
    /// The last round of checks in which this and all below it were found on disk; 0: none.
    checked: u64,
}

impl State {
    fn get(&self, key: &SnapshotKey) -> Result<&Known, SnapshotError> {
        self.known
            .get(key)
            .ok_or_else(|| SnapshotError::NotFound { key: key.clone() })
    }

    fn require(&self, key: &SnapshotKey, wanted: Kind) -> Result<&Known, SnapshotError> {
        let known = self.get(key)?;
        if known.kind == wanted {
            return Ok(known);
        }
        Err(SnapshotError::WrongKind {
            key: key.clone(),
            kind: known.kind,
            wanted,
        })
    }

    fn free(&self, key: &SnapshotKey) -> Result<(), SnapshotError> {
        if self.known.contains_key(key) || self.reserved.contains(key) {
            return Err(SnapshotError::Exists { key: key.clone() });
        }
        Ok(())
    }

    fn release(&mut self, parent: Option<&SnapshotKey>) {
        if let Some(known) = parent.and_then(|parent| self.known.get_mut(parent)) {
            known.children -= 1;
        }
    }
}

impl Layout {
    /// Opens or creates the layout, drops what a crash left half made, and reads what there is.
    pub(crate) fn open(root: &Path) -> Result<Self, SnapshotError> {
        private_dir(root).at("create", root)?;
        for sub in ["active", "view", "committed", "new", "trash", "empty"] {
            fs::create_dir_all(root.join(sub)).at("create", root.join(sub))?;
        }
        let root = root.canonicalize().at("resolve", root)?;
        let handle = File::open(&root).at("open", &root)?;
        let layout = Self {
            handle,
            root,
            state: Mutex::default(),
            sequence: AtomicU64::new(0),
            round: AtomicU64::new(1),
            // Whoever ran before may have gone without flushing.
            dirty: AtomicBool::new(true),
            discarded: Mutex::default(),
        };
        for sub in ["new", "trash"] {
            layout.empty(&layout.root.join(sub))?;
        }
        layout.load()?;
        Ok(layout)
    }

    fn empty(&self, dir: &Path) -> Result<(), SnapshotError> {
        for entry in fs::read_dir(dir).at("list", dir)? {
            let entry = entry.at("list", dir)?;
            at::remove_all(CWD, &entry.path()).at("remove", entry.path())?;
        }
        Ok(())
    }

    fn load(&self) -> Result<(), SnapshotError> {
        let mut state = self.state();
        for (kind, sub) in KINDS {
            let dir = self.root.join(sub);
            for entry in fs::read_dir(&dir).at("list", &dir)? {
                let path = entry.at("list", &dir)?.path();
                let name = path.file_name().and_then(|name| name.to_str());
                let Some(key) = name.and_then(|name| SnapshotKey::new(name).ok()) else {
                    continue;
                };
                let parent = match fs::read_link(path.join("parent")) {
                    Ok(text) => text.to_str().and_then(|text| SnapshotKey::new(text).ok()),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                    Err(error) => return Err(error).at("read", path.join("parent")),
                };
                state.known.insert(
                    key,
                    Known {
                        kind,
                        parent,
                        children: 0,
                        checked: 0,
                    },
                );
            }
        }
        // Without its parent a snapshot is nothing; whatever stands on it is nothing either.
        loop {
            let is_broken = |known: &Known| match &known.parent {
                None => false,
                Some(parent) => state
                    .known
                    .get(parent)
                    .is_none_or(|parent| parent.kind != Kind::Committed),
            };
            let broken: Vec<_> = state
                .known
                .iter()
                .filter(|(_, known)| is_broken(known))
                .map(|(key, _)| key.clone())
                .collect();
            if broken.is_empty() {
                break;
            }
            for key in broken {
                if let Some(known) = state.known.remove(&key) {
                    self.delete(&self.dir(known.kind, &key))?;
                }
            }
        }
        let parents: Vec<_> = state
            .known
            .values()
            .filter_map(|known| known.parent.clone())
            .collect();
        for parent in parents {
            if let Some(known) = state.known.get_mut(&parent) {
                known.children += 1;
            }
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Changes to the table are completed before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dir(&self, kind: Kind, key: &SnapshotKey) -> PathBuf {
        self.root.join(dir_of(kind)).join(key.as_str())
    }

    fn fresh(&self, sub: &str) -> PathBuf {
        let number = self.sequence.fetch_add(1, Ordering::Relaxed);
        self.root.join(sub).join(number.to_string())
    }

    /// Returns the backend's directory.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns a directory that is always empty.
    pub(crate) fn empty_dir(&self) -> PathBuf {
        self.root.join("empty")
    }

    /// Returns the directory of a snapshot with its state.
    pub(crate) fn find(&self, key: &SnapshotKey) -> Result<(PathBuf, SnapshotStat), SnapshotError> {
        let state = self.state();
        let known = state.get(key)?;
        let stat = SnapshotStat {
            key: key.clone(),
            kind: known.kind,
            parent: known.parent.clone(),
        };
        Ok((self.dir(known.kind, key), stat))
    }

    /// Returns the `fs` directories of `key` and all below it, nearest first. `key` must be committed.
    pub(crate) fn chain(&self, key: &SnapshotKey) -> Result<Vec<PathBuf>, SnapshotError> {
        let state = self.state();
        let mut dirs = Vec::new();
        let mut next = Some(key);
        while let Some(key) = next {
            let known = state.require(key, Kind::Committed)?;
            dirs.push(self.dir(Kind::Committed, key).join("fs"));
            next = known.parent.as_ref();
        }
        Ok(dirs)
    }

    /// Looks whether the directories of `key` and all below it are on disk, down to the first that was found in this round.
    pub(crate) fn check(&self, key: &SnapshotKey) -> Result<(), SnapshotError> {
        let round = self.round.load(Ordering::Acquire);
        let dirs = self.unchecked(key, round)?;
        for (key, path) in &dirs {
            match fs::symlink_metadata(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(SnapshotError::NotFound { key: key.clone() });
                }
                done => done.map(drop).at("stat", path)?,
            }
        }
        let mut state = self.state();
        for (key, _) in &dirs {
            if let Some(known) = state.known.get_mut(key) {
                known.checked = round;
            }
        }
        Ok(())
    }

    fn unchecked(&self, key: &SnapshotKey, round: u64) -> Result<Vec<(SnapshotKey, PathBuf)>, SnapshotError> {
        let state = self.state();
        let mut dirs = Vec::new();
        let mut next = Some(key);
        while let Some(key) = next {
            let known = state.get(key)?;
            if known.checked == round {
                break;
            }
            let own = self.dir(known.kind, key);
            // A view has no files of its own.
            let path = if known.kind == Kind::View {
                own
            } else {
                own.join("fs")
            };
            dirs.push((key.clone(), path));
            next = known.parent.as_ref();
        }
        Ok(dirs)
    }

    /// Begins a new round of checks.
    pub(crate) fn expire_checks(&self) {
        self.round.fetch_add(1, Ordering::AcqRel);
    }

    /// Makes the snapshot `key`; `fill` puts into a new directory what the backend needs there. Nothing of it is seen
    /// until it is complete.
    pub(crate) fn create(
        &self,
        kind: Kind,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        fill: impl FnOnce(&Path) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        {
            let mut state = self.state();
            state.free(key)?;
            if let Some(parent) = parent {
                state.require(parent, Kind::Committed)?;
                if let Some(known) = state.known.get_mut(parent) {
                    known.children += 1;
                }
            }
            state.reserved.insert(key.clone());
        }
        let made = self.make(kind, key, parent, fill);
        let mut state = self.state();
        state.reserved.remove(key);
        match made {
            Ok(()) => {
                state.known.insert(
                    key.clone(),
                    Known {
                        kind,
                        parent: parent.cloned(),
                        children: 0,
                        checked: 0,
                    },
                );
                self.dirty.store(true, Ordering::Release);
                Ok(())
            }
            Err(error) => {
                state.release(parent);
                Err(error)
            }
        }
    }

    fn make(
        &self,
        kind: Kind,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        fill: impl FnOnce(&Path) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let new = self.fresh("new");
        fs::create_dir(&new).at("create", &new)?;
        let fill_and_place = || {
            if let Some(parent) = parent {
                let link = new.join("parent");
                std::os::unix::fs::symlink(parent.as_str(), &link).at("create", &link)?;
            }
            fill(&new)?;
            let to = self.dir(kind, key);
            rustix::fs::renameat_with(CWD, &new, CWD, &to, RenameFlags::NOREPLACE).at("rename to", &to)
        };
        let made = fill_and_place();
        if made.is_err() {
            // The failure that led here says more than one of clearing up, which the next start does anyway.
            let _ = at::remove_all(CWD, &new);
        }
        made
    }

    /// Turns the active snapshot `key` into the committed `name`; `settle` has the last look at its directory.
    pub(crate) fn commit(
        &self,
        name: &SnapshotKey,
        key: &SnapshotKey,
        settle: impl FnOnce(&Path) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let mut state = self.state();
        state.require(key, Kind::Active)?;
        if name != key {
            state.free(name)?;
        }
        let from = self.dir(Kind::Active, key);
        settle(&from)?;
        let to = self.dir(Kind::Committed, name);
        rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE).at("rename to", &to)?;
        if let Some(known) = state.known.remove(key) {
            state.known.insert(
                name.clone(),
                Known {
                    kind: Kind::Committed,
                    ..known
                },
            );
        }
        self.dirty.store(true, Ordering::Release);
        Ok(())
    }

    pub(crate) fn remove(&self, key: &SnapshotKey) -> Result<(), SnapshotError> {
        let trash = {
            let mut state = self.state();
            let known = state.get(key)?;
            if known.children > 0 {
                return Err(SnapshotError::HasChildren {
                    key: key.clone(),
                    children: known.children,
                });
            }
            let from = self.dir(known.kind, key);
            let trash = self.fresh("trash");
            match fs::rename(&from, &trash) {
                // Someone was quicker, by hand.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done.at("rename to", &trash)?,
            }
            let parent = state.known.remove(key).and_then(|known| known.parent);
            state.release(parent.as_ref());
            trash
        };
        at::remove_all(CWD, &trash).at("remove", &trash)
    }

    /// Removes a directory so that it is either there or not.
    fn delete(&self, dir: &Path) -> Result<(), SnapshotError> {
        let trash = self.fresh("trash");
        fs::rename(dir, &trash).at("rename to", &trash)?;
        at::remove_all(CWD, &trash).at("remove", &trash)
    }

    pub(crate) fn list(&self) -> Vec<SnapshotStat> {
        let stat = |(key, known): (&SnapshotKey, &Known)| SnapshotStat {
            key: key.clone(),
            kind: known.kind,
            parent: known.parent.clone(),
        };
        self.state().known.iter().map(stat).collect()
    }

    /// Takes a directory out of the way now and deletes it later.
    pub(crate) fn discard(&self, dir: &Path) -> Result<(), SnapshotError> {
        let trash = self.fresh("trash");
        match fs::rename(dir, &trash) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            done => done.at("rename to", &trash)?,
        }
        self.discarded
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(trash);
        Ok(())
    }

    fn delete_discarded(&self) -> Result<(), SnapshotError> {
        let discarded = std::mem::take(&mut *self.discarded.lock().unwrap_or_else(PoisonError::into_inner));
        discarded
            .iter()
            .try_for_each(|dir| at::remove_all(CWD, dir).at("remove", dir))
    }

    /// Flushes the file system, if anything changed since the last time, and deletes what was discarded.
    pub(crate) fn sync(&self) -> Result<(), SnapshotError> {
        self.delete_discarded()?;
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        rustix::fs::syncfs(&self.handle)
            .at("flush", &self.root)
            .inspect_err(|_| {
                self.dirty.store(true, Ordering::Release);
            })
    }

    /// Tells that files of a snapshot were changed by other means than its mounts.
    pub(crate) fn touch(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    pub(crate) fn sweep(&self, keep: &dyn Fn(&SnapshotKey) -> bool) -> Result<Swept, SnapshotError> {
        let mut swept = Swept::default();
        loop {
            let all = self.list();
            let parents: BTreeSet<_> = all.iter().filter_map(|stat| stat.parent.clone()).collect();
            let (held, free): (Vec<_>, Vec<_>) = all
                .into_iter()
                .map(|stat| stat.key)
                .filter(|key| !keep(key))
                .partition(|key| parents.contains(key));
            if free.is_empty() {
                swept.held = held;
                return Ok(swept);
            }
            for key in free {
                match self.remove(&key) {
                    Ok(()) => swept.removed.push(key),
                    // Taken or gone meanwhile.
                    Err(SnapshotError::HasChildren { .. } | SnapshotError::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
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

/// Remembers what a snapshot takes, for those whose files other snapshots share.
pub(crate) fn write_usage(dir: &Path, usage: Usage) -> Result<(), SnapshotError> {
    let link = dir.join("usage");
    std::os::unix::fs::symlink(format!("{} {}", usage.size_bytes, usage.inodes), &link).at("create", &link)
}

/// Reads what [`write_usage`] remembered.
fn read_usage(dir: &Path) -> Option<Usage> {
    let text = fs::read_link(dir.join("usage")).ok()?;
    let (size, inodes) = text.to_str()?.split_once(' ')?;
    Some(Usage {
        size_bytes: size.parse().ok()?,
        inodes: inodes.parse().ok()?,
    })
}

/// Measures a snapshot's own files.
pub(crate) fn usage(dir: &Path) -> Result<Usage, SnapshotError> {
    if let Some(usage) = read_usage(dir) {
        return Ok(usage);
    }
    let root = dir.join("fs");
    if fs::symlink_metadata(&root).is_err() {
        return Ok(Usage::default());
    }
    layer::tree::usage(&root, &BTreeSet::new())
        .map(|(size_bytes, inodes)| Usage { size_bytes, inodes })
        .at("measure", &root)
}

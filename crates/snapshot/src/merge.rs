//! Merging differences: the result looks as if each were exported as a layer and the layers unpacked, but files are hard
//! links to the snapshots they come from.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use layer::tree::{FileType, Stat, Timestamp, at};
use layer::{Change, DiffError};
use rustix::fs::{AtFlags, OFlags};
use rustix::io::Errno;

use crate::error::{IoContext, SnapshotError};
use crate::key::SnapshotKey;
use crate::layers::{LayerError, open_dir, open_tree};
use crate::layout::{Layout, write_usage};
use crate::snapshotter::{Diff, Kind, Snapshotter, Storage, Usage};

/// Makes `name` of `diffs`. With `skip_base` a leading chain of whole snapshots becomes the parent instead of being
/// applied.
pub(crate) fn merge(
    snapshotter: &dyn Snapshotter,
    layout: &Layout,
    name: &SnapshotKey,
    diffs: &[Diff],
    skip_base: bool,
) -> Result<(), SnapshotError> {
    for key in diffs.iter().flat_map(|diff| [&diff.lower, &diff.upper]).flatten() {
        let stat = snapshotter.stat(key)?;
        if stat.kind != Kind::Committed {
            return Err(SnapshotError::WrongKind {
                key: key.clone(),
                kind: stat.kind,
                wanted: Kind::Committed,
            });
        }
    }
    let (base, diffs) = if skip_base {
        base_of(snapshotter, diffs)?
    } else {
        (None, diffs)
    };
    let key = prepare(snapshotter, base.as_ref())?;
    let apply = || -> Result<(), SnapshotError> {
        let storage = snapshotter.storage(&key)?;
        let usage = apply_all(snapshotter, name, &storage, diffs)?;
        write_usage(&layout.find(&key)?.0, usage)?;
        snapshotter.commit(name, &key)
    };
    let done = apply();
    if done.is_err() {
        // The first failure counts; what is left over is swept like any snapshot nobody knows.
        let _ = snapshotter.remove(&key);
    }
    done
}

/// Makes an active snapshot under a key of its own.
fn prepare(snapshotter: &dyn Snapshotter, base: Option<&SnapshotKey>) -> Result<SnapshotKey, SnapshotError> {
    let mut number = 0_u64;
    loop {
        let text = format!("merging-{number}");
        if let Ok(key) = SnapshotKey::new(&text) {
            match snapshotter.prepare(&key, base) {
                Err(SnapshotError::Exists { .. }) => {}
                done => return done.map(|()| key),
            }
        }
        number += 1;
    }
}

/// Follows the diffs from the first as long as each is the next whole snapshot of one chain.
fn base_of<'d>(
    snapshotter: &dyn Snapshotter,
    diffs: &'d [Diff],
) -> Result<(Option<SnapshotKey>, &'d [Diff]), SnapshotError> {
    let mut base: Option<SnapshotKey> = None;
    let mut count = 0;
    for diff in diffs {
        let Some(upper) = &diff.upper else { break };
        if snapshotter.stat(upper)?.parent != diff.lower || diff.lower != base {
            break;
        }
        base = Some(upper.clone());
        count += 1;
    }
    Ok((base, &diffs[count..]))
}

fn apply_all(
    snapshotter: &dyn Snapshotter,
    name: &SnapshotKey,
    storage: &Storage,
    diffs: &[Diff],
) -> Result<Usage, SnapshotError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| SnapshotError::Tree {
        key: name.clone(),
        source,
    };
    let (root_path, lower, userxattr) = match storage {
        Storage::Whole(root) => (root, None, false),
        Storage::Changes {
            upper,
            lower,
            userxattr,
        } => (
            upper,
            Some(
                lower
                    .iter()
                    .map(|dir| open_dir(dir))
                    .collect::<Result<Vec<_>, _>>()?,
            ),
            *userxattr,
        ),
    };
    let mut target = Target {
        root: open_dir(root_path)?,
        lower,
        opaque_key: if userxattr {
            b"user.overlay.opaque"
        } else {
            b"trusted.overlay.opaque"
        },
        times: BTreeMap::new(),
        shared: BTreeSet::new(),
    };
    for diff in diffs {
        let source = Source::open(snapshotter, diff).map_err(|error| failed(error.into()))?;
        let mut step = Step {
            target: &mut target,
            source: &source,
            visited: BTreeSet::new(),
            links: BTreeMap::new(),
        };
        source
            .changes(&mut |change| step.change(change))
            .map_err(|error| failed(error.into()))?;
    }
    target.settle().map_err(|error| failed(error.into()))?;
    let (size_bytes, inodes) = layer::tree::usage(root_path, &target.shared).at("measure", root_path)?;
    Ok(Usage { size_bytes, inodes })
}

/// Where a difference's files come from.
struct Source {
    lower: Option<OwnedFd>,
    /// The upper tree, as it looks.
    upper: OwnedFd,
    /// The directories it is made of, nearest first: their files can be linked.
    dirs: Vec<OwnedFd>,
    /// The first of `dirs` is all that changed.
    is_upperdir: bool,
}

impl Source {
    fn open(snapshotter: &dyn Snapshotter, diff: &Diff) -> Result<Self, LayerError> {
        let open = |key: &Option<SnapshotKey>| -> Result<OwnedFd, LayerError> {
            let tree = open_tree(snapshotter, key.as_ref())?;
            let dir = at::open_dir_beneath(&tree, Path::new("")).at("open", "")?;
            Ok(dir)
        };
        let lower = diff.lower.as_ref().map(|_| open(&diff.lower)).transpose()?;
        let upper = open(&diff.upper)?;
        let (mut dirs, mut is_upperdir) = (Vec::new(), false);
        if let Some(key) = &diff.upper {
            match snapshotter.storage(key)? {
                Storage::Whole(whole) => dirs.push(open_dir(&whole)?),
                Storage::Changes { upper, lower, .. } => {
                    is_upperdir = snapshotter.stat(key)?.parent == diff.lower;
                    dirs.push(open_dir(&upper)?);
                    for dir in &lower {
                        dirs.push(open_dir(dir)?);
                    }
                }
            }
        }
        Ok(Self {
            lower,
            upper,
            dirs,
            is_upperdir,
        })
    }

    fn changes(&self, visit: &mut layer::Visit<'_>) -> Result<(), DiffError> {
        match self.dirs.first() {
            Some(upper) if self.is_upperdir => layer::changes_upperdir(self.lower.as_ref(), upper, visit),
            _ => layer::changes(self.lower.as_ref(), &self.upper, visit),
        }
    }

    /// Opens the directory of `path` in the tree the file really lies in, so that it can be linked.
    fn dir_of(&self, path: &Path) -> io::Result<OwnedFd> {
        let (parent, name) = split(path);
        for dir in &self.dirs {
            let opened = match at::open_beneath(dir, parent, OFlags::PATH | OFlags::DIRECTORY) {
                Err(error) if is_absent(&error) => continue,
                done => done?,
            };
            if at::try_stat_at(&opened, name)?.is_some_and(|stat| !stat.is_whiteout()) {
                return Ok(opened);
            }
        }
        at::open_beneath(&self.upper, parent, OFlags::PATH | OFlags::DIRECTORY)
    }
}

fn split(path: &Path) -> (&Path, &Path) {
    (
        path.parent().unwrap_or(Path::new("")),
        Path::new(path.file_name().unwrap_or_default()),
    )
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    ) || error.raw_os_error() == Some(Errno::LOOP.raw_os_error())
}

/// The tree being made.
struct Target {
    root: OwnedFd,
    /// The directories below, nearest first; `None` when the tree is whole.
    lower: Option<Vec<OwnedFd>>,
    opaque_key: &'static [u8],
    /// Modification times of directories, set at the end.
    times: BTreeMap<PathBuf, Timestamp>,
    /// Files that belong to other snapshots.
    shared: BTreeSet<(u64, u64)>,
}

impl Target {
    fn is_below(&self, path: &Path) -> io::Result<bool> {
        for dir in self.lower.iter().flatten() {
            match at::open_beneath(dir, path, OFlags::PATH | OFlags::NOFOLLOW) {
                Ok(_) => return Ok(true),
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn settle(&self) -> io::Result<()> {
        for (path, mtime) in &self.times {
            let (parent, name) = split(path);
            let dir = match at::open_beneath(&self.root, parent, OFlags::PATH | OFlags::DIRECTORY) {
                // Removed or replaced by a later change.
                Err(error) if is_absent(&error) => continue,
                done => done?,
            };
            if at::try_stat_at(&dir, name)?.is_some_and(|stat| stat.is_dir()) {
                at::set_times(&dir, name, None, Some(*mtime))?;
            }
        }
        Ok(())
    }
}

/// One difference on its way into the target.
struct Step<'a> {
    target: &'a mut Target,
    source: &'a Source,
    /// Directories that are in the target for sure.
    visited: BTreeSet<PathBuf>,
    /// First names of files with several.
    links: BTreeMap<(u64, u64), PathBuf>,
}

impl Step<'_> {
    fn change(&mut self, change: Change<'_>) -> Result<(), DiffError> {
        if change.kind == layer::ChangeKind::Unmodified {
            return Ok(());
        }
        let path = change.path;
        let done = self.parents(path).and_then(|()| self.apply(path, change.stat));
        done.map_err(|source| DiffError::Visit {
            path: path.to_string_lossy().into_owned(),
            source,
        })
    }

    /// Brings the directories above `path`, changed or not, as an exported layer would.
    fn parents(&mut self, path: &Path) -> io::Result<()> {
        let (parent, _) = split(path);
        if parent.as_os_str().is_empty() || !self.visited.insert(parent.to_owned()) {
            return Ok(());
        }
        self.parents(parent)?;
        let stat = at::open_beneath(&self.source.upper, parent, OFlags::PATH | OFlags::NOFOLLOW)
            .and_then(at::stat_fd)?;
        self.apply(parent, Some(&stat))
    }

    fn apply(&mut self, path: &Path, stat: Option<&Stat>) -> io::Result<()> {
        let (parent, name) = split(path);
        let dir = at::open_beneath(&self.target.root, parent, OFlags::PATH | OFlags::DIRECTORY)?;
        let existing = at::try_stat_at(&dir, name)?;
        let Some(stat) = stat else {
            at::remove_all(&dir, name)?;
            if self.target.is_below(path)? {
                at::make_special(&dir, name, FileType::CharDevice, 0, (0, 0))?;
            }
            return Ok(());
        };
        let mut opaque = false;
        let mut is_there = false;
        if let Some(existing) = existing {
            if existing.is_dir() && stat.is_dir() {
                is_there = true;
            } else {
                at::remove_all(&dir, name)?;
                // A directory in the place of something else must not show what lies below.
                opaque = self.target.lower.is_some() && stat.is_dir();
            }
        }
        if stat.is_dir() {
            return self.directory(path, &dir, is_there, opaque);
        }
        self.file(path, stat, &dir)
    }

    fn directory(&mut self, path: &Path, dir: &OwnedFd, is_there: bool, opaque: bool) -> io::Result<()> {
        let (parent, name) = split(path);
        let from = at::open_beneath(&self.source.upper, parent, OFlags::PATH | OFlags::DIRECTORY)?;
        let stat = at::stat_at(&from, name)?;
        if !is_there {
            at::make_dir(dir, name, 0o700)?;
        }
        layer::copy::copy_metadata(&from, name, &stat, dir, name)?;
        if opaque {
            at::set_xattr(dir, name, self.target.opaque_key, b"y")?;
        }
        self.visited.insert(path.to_owned());
        self.target.times.insert(path.to_owned(), stat.mtime);
        Ok(())
    }

    fn file(&mut self, path: &Path, stat: &Stat, dir: &OwnedFd) -> io::Result<()> {
        let (_, name) = split(path);
        if stat.is_linked()
            && let Some(first) = self.links.get(&stat.identity())
        {
            let (above, first) = split(first);
            let from = at::open_beneath(&self.target.root, above, OFlags::PATH | OFlags::DIRECTORY)?;
            if link(&from, first, dir, name)? {
                return Ok(());
            }
        }
        let from = self.source.dir_of(path)?;
        let own = at::stat_at(&from, name)?;
        if stat.is_linked() {
            self.links.insert(stat.identity(), path.to_owned());
        }
        // A pipe or socket that two snapshots share would let their containers talk.
        let can_link = !matches!(own.file_type(), FileType::Fifo | FileType::Socket);
        if can_link && link(&from, name, dir, name)? {
            self.target.shared.insert(own.identity());
            return Ok(());
        }
        layer::copy::copy_file(&from, name, &own, dir, name)
    }
}

/// Makes a hard link; `false` where that cannot be.
fn link(from: impl AsFd, name: &Path, to: impl AsFd, target: &Path) -> io::Result<bool> {
    match rustix::fs::linkat(from, name, to, target, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::XDEV | Errno::MLINK | Errno::PERM) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

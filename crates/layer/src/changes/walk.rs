//! Two trees side by side.

use std::cmp::Ordering;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::same::is_same;
use super::{Change, ChangeKind, Visit};
use crate::diff::{DiffContext, DiffError};
use crate::tree::{Stat, at};

/// Walks two trees and reports what turns `lower` (or nothing) into `upper`, in the order of containerd's differ: names
/// compared byte by byte, a directory before what is in it.
///
/// Files with equal metadata count as equal unless their times may have been truncated to seconds, in which case their
/// bytes are compared. A deleted directory is one change, without what was in it.
pub fn changes<Lower: AsFd>(
    lower: Option<Lower>,
    upper: impl AsFd,
    visit: &mut Visit<'_>,
) -> Result<(), DiffError> {
    let root = Path::new("");
    let mut walk = Walk { visit, prefix: root };
    let lower = match &lower {
        Some(lower) => Some(open(lower.as_fd(), root)?),
        None => None,
    };
    let upper = open(upper.as_fd(), root)?;
    walk.dir(
        lower.as_ref().map(AsFd::as_fd),
        upper.as_fd(),
        &mut PathBuf::new(),
    )
}

/// As [`changes`], for a directory within both trees; reported paths begin with `prefix`.
pub(super) fn changes_below(
    lower: BorrowedFd<'_>,
    upper: BorrowedFd<'_>,
    prefix: &Path,
    visit: &mut Visit<'_>,
) -> Result<(), DiffError> {
    Walk { visit, prefix }.dir(Some(lower), upper, &mut PathBuf::new())
}

fn open(dir: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, DiffError> {
    at::open_dir_beneath(dir, path).on("open", path)
}

struct Walk<'a, 'v> {
    visit: &'a mut Visit<'v>,
    prefix: &'a Path,
}

/// One directory's names, next one last.
struct Names(Vec<OsString>);

impl Names {
    fn read(dir: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let mut names = dir.map_or_else(|| Ok(Vec::new()), at::list)?;
        names.reverse();
        Ok(Self(names))
    }
}

impl Walk<'_, '_> {
    fn report(&mut self, kind: ChangeKind, path: &Path, stat: Option<&Stat>) -> Result<(), DiffError> {
        let full = self.prefix.join(path);
        (self.visit)(Change {
            kind,
            path: &full,
            stat,
        })
    }

    /// Compares one directory. `path` is where it is, and is left as it was found.
    fn dir(
        &mut self,
        lower: Option<BorrowedFd<'_>>,
        upper: BorrowedFd<'_>,
        path: &mut PathBuf,
    ) -> Result<(), DiffError> {
        at::check_depth(path).on("open", path)?;
        let mut below = Names::read(lower).on("list", path)?;
        let mut above = Names::read(Some(upper)).on("list", path)?;
        loop {
            let order = match (below.0.last(), above.0.last()) {
                (None, None) => return Ok(()),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(a), Some(b)) => a.as_encoded_bytes().cmp(b.as_encoded_bytes()),
            };
            let gone = if order == Ordering::Greater {
                None
            } else {
                below.0.pop()
            };
            let here = if order == Ordering::Less {
                None
            } else {
                above.0.pop()
            };
            let Some(name) = here.as_ref().or(gone.as_ref()) else {
                return Ok(());
            };
            path.push(name);
            match (here.is_some(), gone.is_some(), lower) {
                (false, _, _) => self.report(ChangeKind::Deleted, path, None)?,
                (true, true, Some(lower)) => self.both(lower, upper, path)?,
                (true, _, _) => self.added(upper, path)?,
            }
            path.pop();
        }
    }

    fn added(&mut self, upper: BorrowedFd<'_>, path: &mut PathBuf) -> Result<(), DiffError> {
        let name = PathBuf::from(path.file_name().unwrap_or_default());
        let stat = at::stat_at(upper, &name).on("lstat", path)?;
        self.report(ChangeKind::Added, path, Some(&stat))?;
        if stat.is_dir() {
            let dir = open(upper, &name)?;
            self.dir(None, dir.as_fd(), path)?;
        }
        Ok(())
    }

    fn both(
        &mut self,
        lower: BorrowedFd<'_>,
        upper: BorrowedFd<'_>,
        path: &mut PathBuf,
    ) -> Result<(), DiffError> {
        let name = PathBuf::from(path.file_name().unwrap_or_default());
        let old = at::stat_at(lower, &name).on("lstat", path)?;
        let new = at::stat_at(upper, &name).on("lstat", path)?;
        let same = is_same((lower, &old), (upper, &new), &name).on("compare", path)?;
        if !same {
            self.report(ChangeKind::Modified, path, Some(&new))?;
        } else if new.is_linked() {
            self.report(ChangeKind::Unmodified, path, Some(&new))?;
        }
        if !new.is_dir() {
            return Ok(());
        }
        let above = open(upper, &name)?;
        let below = if old.is_dir() {
            Some(open(lower, &name)?)
        } else {
            None
        };
        self.dir(below.as_ref().map(AsFd::as_fd), above.as_fd(), path)
    }
}

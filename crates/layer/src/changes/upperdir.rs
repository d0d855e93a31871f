//! Changes as overlayfs recorded them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::same::is_same;
use super::walk::changes_below;
use super::{Change, ChangeKind, Visit};
use crate::diff::{DiffContext, DiffError};
use crate::tree::{Stat, at};

/// Reports the changes recorded in an overlay's upper directory, reading nothing else of the trees than what it names.
///
/// `upper` is the upper directory itself, `lower` the merged tree below it. Reports no `Unmodified`. An opaque directory
/// is compared with what it hides, so deletions in it are reported one by one.
pub fn changes_upperdir<Lower: AsFd>(
    lower: Option<Lower>,
    upper: impl AsFd,
    visit: &mut Visit<'_>,
) -> Result<(), DiffError> {
    let upper = at::open_dir_beneath(&upper, Path::new("")).on("open", Path::new(""))?;
    let lower = lower.as_ref().map(AsFd::as_fd);
    Upperdir { visit }.dir(lower, &upper, &mut PathBuf::new())
}

struct Upperdir<'a, 'v> {
    visit: &'a mut Visit<'v>,
}

/// Finds `name` below; `None` where there is nothing or no directory to look in.
fn below(lower: Option<BorrowedFd<'_>>, name: &Path) -> io::Result<Option<Stat>> {
    lower.map_or(Ok(None), |lower| at::try_stat_at(lower, name))
}

fn has_mark(dir: &OwnedFd, name: &Path, keys: [&[u8]; 2]) -> io::Result<Option<Vec<u8>>> {
    for key in keys {
        if let Some(value) = at::xattr(dir, name, key)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

impl Upperdir<'_, '_> {
    /// Visits one directory; `lower` is the same directory below, if it is one there.
    fn dir(
        &mut self,
        lower: Option<BorrowedFd<'_>>,
        upper: &OwnedFd,
        path: &mut PathBuf,
    ) -> Result<(), DiffError> {
        at::check_depth(path).on("open", path)?;
        for name in at::list(upper).on("list", path)? {
            path.push(&name);
            self.name(lower, upper, Path::new(&name), path)?;
            path.pop();
        }
        Ok(())
    }

    fn name(
        &mut self,
        lower: Option<BorrowedFd<'_>>,
        upper: &OwnedFd,
        name: &Path,
        path: &mut PathBuf,
    ) -> Result<(), DiffError> {
        let stat = at::stat_at(upper, name).on("lstat", path)?;
        let old = below(lower, name).on("lstat", path)?;
        if stat.is_whiteout() {
            // One of a name that is not below hides nothing.
            return match old {
                Some(_) => (self.visit)(Change {
                    kind: ChangeKind::Deleted,
                    path,
                    stat: None,
                }),
                None => Ok(()),
            };
        }
        let (kind, changed) = match (&old, lower) {
            (Some(old), Some(lower)) => {
                let same = is_same((lower, old), (upper.as_fd(), &stat), name).on("compare", path)?;
                (ChangeKind::Modified, !same)
            }
            _ => (ChangeKind::Added, true),
        };
        if changed {
            (self.visit)(Change {
                kind,
                path,
                stat: Some(&stat),
            })?;
        }
        if stat.is_dir() {
            self.descend(lower, old, (upper, name), path)
        } else {
            Ok(())
        }
    }

    fn descend(
        &mut self,
        lower: Option<BorrowedFd<'_>>,
        old: Option<Stat>,
        (upper, name): (&OwnedFd, &Path),
        path: &mut PathBuf,
    ) -> Result<(), DiffError> {
        let redirect = has_mark(
            upper,
            name,
            [b"trusted.overlay.redirect", b"user.overlay.redirect"],
        );
        if redirect.on("getxattr", path)?.is_some() {
            return Err(DiffError::Redirect {
                path: path.to_string_lossy().into_owned(),
            });
        }
        let opaque = has_mark(upper, name, [b"trusted.overlay.opaque", b"user.overlay.opaque"]);
        let opaque = opaque.on("getxattr", path)?.as_deref() == Some(b"y");
        let above = at::open_dir_beneath(upper, name).on("open", path)?;
        let beneath = match (lower, old) {
            (Some(lower), Some(old)) if old.is_dir() => open_lower(lower, name).on("open", path)?,
            _ => None,
        };
        match &beneath {
            // Nothing is merged in here: what is there is all there is.
            Some(beneath) if opaque => {
                let prefix = path.clone();
                let visit = &mut *self.visit;
                changes_below(
                    beneath.as_fd(),
                    above.as_fd(),
                    &prefix,
                    &mut |change| match change.stat {
                        // A mark within an opaque directory hides nothing and is not there.
                        Some(stat) if stat.is_whiteout() => hidden(beneath, &prefix, change, visit),
                        _ => visit(change),
                    },
                )
            }
            _ => self.dir(beneath.as_ref().map(AsFd::as_fd), &above, path),
        }
    }
}

/// Reports a mark in an opaque directory for what it looks like: a name that is gone, or nothing at all.
fn hidden(
    beneath: &OwnedFd,
    prefix: &Path,
    change: Change<'_>,
    visit: &mut Visit<'_>,
) -> Result<(), DiffError> {
    let relative = change.path.strip_prefix(prefix).unwrap_or(change.path);
    match at::open_beneath(beneath, relative, OFlags::PATH | OFlags::NOFOLLOW) {
        Ok(_) => visit(Change {
            kind: ChangeKind::Deleted,
            path: change.path,
            stat: None,
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(()),
        Err(error) => Err(error).on("open", change.path),
    }
}

fn open_lower(lower: BorrowedFd<'_>, name: &Path) -> io::Result<Option<OwnedFd>> {
    match at::open_dir_beneath(lower, name) {
        Err(error) if error.raw_os_error() == Some(Errno::NOTDIR.raw_os_error()) => Ok(None),
        done => done.map(Some),
    }
}

//! Describing mounts and making them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::error::MountError;

/// A mount as plain data, in containerd's terms.
///
/// Types: `bind` and `overlay`. For `overlay`, options are `lowerdir+=<dir>` once for each lower directory, nearest first
/// (a directory's name may hold any character), then `upperdir=`, `workdir=` if writable, and what else overlayfs takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The file system's type.
    pub fstype: String,
    /// What is mounted; `overlay` for overlays.
    pub source: PathBuf,
    /// Where below the mount point this goes; empty for the mount point itself.
    pub target: PathBuf,
    /// Options; `ro`, `rbind` and the like are understood.
    pub options: Vec<String>,
}

/// A mount that ends when this is dropped (lazily, so also with open files).
#[derive(Debug)]
pub struct MountGuard {
    path: PathBuf,
    armed: bool,
}

/// A tree that is mounted nowhere: reachable through its descriptor alone, gone when dropped. Nothing to clean up
/// after a crash, nothing for others to see.
#[derive(Debug)]
pub struct MountedTree {
    fd: OwnedFd,
    read_only: bool,
}

impl Mount {
    /// Describes a bind mount of `source` with everything mounted below it.
    pub fn bind(source: impl Into<PathBuf>, read_only: bool) -> Self {
        todo!()
    }

    /// Describes an overlay; `lower` nearest first; `upper` is the upper and the work directory.
    pub fn overlay<'a>(
        lower: impl IntoIterator<Item = &'a Path>,
        upper: Option<(&Path, &Path)>,
        options: &[String],
    ) -> Self {
        todo!()
    }

    /// Reports whether nothing can be written through this mount.
    pub fn is_read_only(&self) -> bool {
        todo!()
    }

    /// Returns an overlay's lower directories, nearest first.
    pub fn lower_dirs(&self) -> Vec<&Path> {
        todo!()
    }

    /// Returns an overlay's upper directory.
    pub fn upper_dir(&self) -> Option<&Path> {
        todo!()
    }

    /// Mounts at `path` (joined with `target`), which must exist, in this thread's mount namespace. The mount is private
    /// and lasts as long as the guard.
    pub fn mount_at(&self, path: &Path) -> Result<MountGuard, MountError> {
        todo!()
    }

    /// Mounts without a mount point and returns the tree. For a writable bind this is just the opened directory.
    pub fn open(&self) -> Result<MountedTree, MountError> {
        todo!()
    }
}

impl MountGuard {
    /// Returns the mount point.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends the mount now and reports what went wrong.
    pub fn unmount(mut self) -> Result<(), MountError> {
        self.armed = false;
        unmount(&self.path)
    }

    /// Leaves the mount in place for someone else to end.
    pub fn leave(mut self) -> PathBuf {
        self.armed = false;
        std::mem::take(&mut self.path)
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        if self.armed {
            // Nobody is left to tell; a mount that stays is swept at the next start.
            let _ = unmount(&self.path);
        }
    }
}

impl MountedTree {
    /// Reports whether nothing may be written to the tree.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }
}

impl AsFd for MountedTree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Unmounts whatever is on top at `path`, lazily (`MNT_DETACH`). A path that is no mount point is a success.
pub fn unmount(path: &Path) -> Result<(), MountError> {
    todo!()
}

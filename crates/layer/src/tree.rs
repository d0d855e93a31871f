//! Rooted access to a tree: every path stays below one directory descriptor.

pub mod at;
mod edit;
mod look;
mod resolve;
mod stat;
mod usage;
mod wildcard;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

pub use edit::Attributes;
pub use look::GoStat;
pub(crate) use resolve::{lexical, resolve as resolve_at};
pub use stat::{FileType, Stat, Timestamp};
pub use usage::usage;

/// A failed access to a path in a tree. Names the path as the caller gave it, never the host's.
#[derive(Debug, thiserror::Error)]
#[error("{action} {}", path.display())]
pub struct TreeError {
    /// What was tried, as Go names it: "open", "mkdir", "lstat".
    pub action: &'static str,
    /// The path within the tree.
    pub path: PathBuf,
    /// The system's answer.
    #[source]
    pub source: io::Error,
}

impl TreeError {
    /// Reports whether the path does not exist.
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

pub(crate) trait TreeContext<T> {
    fn on(self, action: &'static str, path: &Path) -> Result<T, TreeError>;
}

impl<T, E: Into<io::Error>> TreeContext<T> for Result<T, E> {
    fn on(self, action: &'static str, path: &Path) -> Result<T, TreeError> {
        self.map_err(|source| TreeError {
            action,
            path: path.to_owned(),
            source: source.into(),
        })
    }
}

/// A directory that is the root of everything resolved through it, as after `chroot`: absolute paths and links begin
/// here, and `..` stays here.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

impl Root {
    /// Takes the directory `fd` as a root; duplicates the descriptor.
    pub fn new(fd: impl AsFd) -> io::Result<Self> {
        Ok(Self {
            fd: fd.as_fd().try_clone_to_owned()?,
        })
    }

    /// Opens a directory of the host as a root. `path` must come from this program, not from a client.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = rustix::fs::open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self { fd })
    }

    /// Resolves symbolic links in `path` within the root, also in its last part, and returns a relative path without
    /// links; empty for the root. Parts that do not exist are kept as they are, as Go's `fs.RootPath` does.
    pub fn resolve(&self, path: &Path) -> Result<PathBuf, TreeError> {
        resolve::resolve(self.as_fd(), path).on("lstat", path)
    }

    /// Resolves as [`resolve`](Self::resolve) does, but leaves a symbolic link in the last part alone.
    pub fn resolve_parent(&self, path: &Path) -> Result<PathBuf, TreeError> {
        resolve::resolve_parent(self.as_fd(), path).on("lstat", path)
    }

    /// Finds what matches `pattern` (Go's `filepath.Match`, over the whole path), as sorted paths relative to the root.
    /// A pattern without wildcards is returned as it is, whether it exists or not. With `follow` symbolic links in the
    /// part before the first wildcard are followed to the last.
    pub fn wildcard(&self, pattern: &Path, follow: bool) -> Result<Vec<PathBuf>, TreeError> {
        wildcard::expand(self, pattern, follow)
    }

    /// Reads a file's metadata, following symbolic links.
    pub fn stat(&self, path: &Path) -> Result<Stat, TreeError> {
        at::open_in_root(&self.fd, path, OFlags::PATH)
            .and_then(at::stat_fd)
            .on("stat", path)
    }

    /// Reads a file's metadata, not following a last symbolic link.
    pub fn lstat(&self, path: &Path) -> Result<Stat, TreeError> {
        at::open_in_root(&self.fd, path, OFlags::PATH | OFlags::NOFOLLOW)
            .and_then(at::stat_fd)
            .on("lstat", path)
    }

    /// Opens a regular file for reading, following symbolic links. Anything else is refused without opening it: a pipe
    /// cannot block, a device is not touched.
    pub fn open_file(&self, path: &Path) -> Result<File, TreeError> {
        at::open_in_root(&self.fd, path, OFlags::PATH)
            .and_then(at::reopen_regular)
            .on("open", path)
    }

    /// Opens a directory, following symbolic links.
    pub fn open_dir(&self, path: &Path) -> Result<OwnedFd, TreeError> {
        at::open_in_root(&self.fd, path, OFlags::RDONLY | OFlags::DIRECTORY).on("open", path)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

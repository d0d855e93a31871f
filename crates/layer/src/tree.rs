//! Rooted access to a tree: every path stays below one directory descriptor.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A point in time: seconds since 1970 and nanoseconds within the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Seconds, negative before 1970.
    pub seconds: i64,
    /// 0 to 999,999,999, counted forward.
    pub nanoseconds: u32,
}

impl Timestamp {
    /// Converts from nanoseconds since 1970, as LLB has it.
    pub fn from_unix_nanos(nanos: i64) -> Self {
        todo!()
    }

    /// Converts to nanoseconds since 1970; saturates at the ends of `i64`.
    pub fn unix_nanos(self) -> i64 {
        todo!()
    }
}

/// A file's metadata as the kernel tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Device the file is on.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Type and permission bits as in `st_mode`.
    pub mode: u32,
    /// Number of names.
    pub nlink: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device.
    pub rdev: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Allocated bytes.
    pub allocated_bytes: u64,
    /// Access time.
    pub atime: Timestamp,
    /// Modification time.
    pub mtime: Timestamp,
}

/// A file's metadata in the form of BuildKit's `fsutil.types.Stat`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GoStat {
    /// The path or name asked for.
    pub path: String,
    /// Go's `os.FileMode`: type bits at the top, permission bits at the bottom.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes; 0 for directories.
    pub size: i64,
    /// Modification time in nanoseconds since 1970.
    pub mod_time: i64,
    /// A symbolic link's text.
    pub linkname: String,
    /// Device number of a device.
    pub devmajor: i64,
    /// Device number of a device.
    pub devminor: i64,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

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

/// A directory that is the root of everything resolved through it, as after `chroot`.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

/// Owner, times and mode given to what a primitive creates.
#[derive(Debug, Clone, Copy, Default)]
pub struct Attributes {
    /// Owner and group; `None` leaves the creator's.
    pub owner: Option<(u32, u32)>,
    /// Both times; `None` leaves now.
    pub time: Option<Timestamp>,
}

impl Root {
    /// Takes the directory `fd` as a root; duplicates the descriptor.
    pub fn new(fd: impl AsFd) -> io::Result<Self> {
        todo!()
    }

    /// Opens a directory of the host as a root. `path` must come from this program, not from a client.
    pub fn open(path: &Path) -> io::Result<Self> {
        todo!()
    }

    /// Resolves symbolic links in `path` within the root, also in its last part, and returns a relative path without
    /// links. Parts that do not exist are kept as they are, as Go's `fs.RootPath` does.
    pub fn resolve(&self, path: &Path) -> Result<PathBuf, TreeError> {
        todo!()
    }

    /// Reads a file's metadata, following symbolic links.
    pub fn stat(&self, path: &Path) -> Result<Stat, TreeError> {
        todo!()
    }

    /// Reads a file's metadata, not following a last symbolic link.
    pub fn lstat(&self, path: &Path) -> Result<Stat, TreeError> {
        todo!()
    }

    /// Opens a regular file for reading, following symbolic links. Anything else is refused without blocking.
    pub fn open_file(&self, path: &Path) -> Result<std::fs::File, TreeError> {
        todo!()
    }

    /// Opens a directory.
    pub fn open_dir(&self, path: &Path) -> Result<OwnedFd, TreeError> {
        todo!()
    }

    /// Reads a regular file, or `length` bytes of it from `offset`; `limit` bounds the answer in bytes (`EFBIG` beyond).
    /// The gateway's `ReadFile`.
    pub fn read_file(
        &self,
        path: &Path,
        range: Option<(u64, u64)>,
        limit: usize,
    ) -> Result<Vec<u8>, TreeError> {
        todo!()
    }

    /// Lists a directory in the order of names; `include` is a pattern on names. The gateway's `ReadDir`.
    pub fn read_dir(&self, path: &Path, include: Option<&str>) -> Result<Vec<GoStat>, TreeError> {
        todo!()
    }

    /// Describes one file, following symbolic links in its directory and its last part. The gateway's `StatFile`.
    pub fn stat_file(&self, path: &Path) -> Result<GoStat, TreeError> {
        todo!()
    }

    /// Makes a directory; one that exists is left as it is. With `parents` the missing ones too, all with `mode` and
    /// `attributes`.
    pub fn mkdir(&self, path: &Path, mode: u32, parents: bool, attributes: Attributes) -> Result<(), TreeError> {
        todo!()
    }

    /// Writes a file, truncating one that exists (which keeps its mode).
    pub fn mkfile(&self, path: &Path, data: &[u8], mode: u32, attributes: Attributes) -> Result<(), TreeError> {
        todo!()
    }

    /// Makes a symbolic link at `path` with the text `target`.
    pub fn symlink(&self, target: &Path, path: &Path, attributes: Attributes) -> Result<(), TreeError> {
        todo!()
    }

    /// Removes `path` and all below it. With `wildcards` every match of the pattern, which may be none.
    pub fn remove(&self, path: &Path, wildcards: bool, allow_not_found: bool) -> Result<(), TreeError> {
        todo!()
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

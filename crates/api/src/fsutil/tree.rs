//! Reading a local directory: entries with their stats, by paths below its handle.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, Statx, StatxFlags, StatxTimestamp,
};
use rustix::io::Errno;

use super::{Stat, mode};

/// Most bytes of one extended attribute, and of the list of their names: the kernel's own limit.
const XATTR_BYTES: usize = 64 << 10;

/// Why a local tree could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A system call failed.
    #[error("{action} {path}")]
    Io {
        /// What was done.
        action: &'static str,
        /// Where, relative to the tree.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A pattern is malformed.
    #[error("invalid {which}patterns: {patterns:?}")]
    Pattern {
        /// `include` or `exclude`.
        which: &'static str,
        /// The patterns.
        patterns: Vec<String>,
        /// Why.
        #[source]
        source: oci::pattern::PatternError,
    },
    /// The visitor asked to stop.
    #[error("stopped")]
    Stopped,
}

impl TreeError {
    pub(super) fn io(action: &'static str, path: &[u8], source: impl Into<io::Error>) -> Self {
        Self::Io {
            action,
            path: String::from_utf8_lossy(path).into_owned(),
            source: source.into(),
        }
    }

    /// Tells whether the entry vanished, or a parent of it.
    pub(super) fn is_gone(&self) -> bool {
        let gone = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory];
        matches!(self, Self::Io { source, .. } if gone.contains(&source.kind()))
    }

    pub(super) fn is_denied(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }
}

/// Names in one directory with their kinds, sorted by name.
pub(super) type Listing = Vec<(Vec<u8>, FileType)>;

/// A local directory. What lies below it is reached without following symlinks.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
    path: PathBuf,
}

impl Tree {
    /// Opens a directory; the path itself may go through symlinks.
    pub fn open(path: &Path) -> Result<Self, TreeError> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let fail = |err: Errno| TreeError::io("open", path.as_os_str().as_encoded_bytes(), err);
        let root = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(fail)?;
        Ok(Self {
            root,
            path: path.to_owned(),
        })
    }

    /// Returns the path the tree was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn open_at(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, TreeError> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let path_or_dot: &[u8] = if path.is_empty() { b"." } else { path };
        let open = || {
            rustix::fs::openat2(
                &self.root,
                path_or_dot,
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                resolve,
            )
        };
        retry_again(open).map_err(|err| TreeError::io("open", path, err))
    }

    /// Opens a regular file for reading.
    pub fn open_file(&self, path: &[u8]) -> Result<File, TreeError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        Ok(File::from(self.open_at(path, flags)?))
    }

    /// Lists a directory.
    pub(super) fn list(&self, path: &[u8]) -> Result<Listing, TreeError> {
        let dir = self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let fail = |err: Errno| TreeError::io("read directory", path, err);
        let mut out = Listing::new();
        let mut buffer = Vec::with_capacity(32 << 10);
        let mut entries = RawDir::new(&dir, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                out.push((name.to_vec(), entry.file_type()));
            }
        }
        for (name, kind) in &mut out {
            if *kind == FileType::Unknown {
                let stat =
                    rustix::fs::statat(&dir, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
                *kind = FileType::from_raw_mode(stat.st_mode);
            }
        }
        out.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(out)
    }

    /// Reads the stat of one entry. `seen` maps inodes to their first paths, for hard links.
    pub(super) fn stat(&self, path: &[u8], seen: &mut Seen) -> Result<Stat, TreeError> {
        let entry = self.open_at(path, OFlags::PATH | OFlags::NOFOLLOW)?;
        let fail = |action| move |err: Errno| TreeError::io(action, path, err);
        let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
        let statx = rustix::fs::statx(&entry, c"", flags, StatxFlags::BASIC_STATS).map_err(fail("stat"))?;
        let kind = FileType::from_raw_mode(statx.stx_mode.into());
        let mut stat = Stat {
            path: Bytes::copy_from_slice(path),
            mode: mode::from_unix(statx.stx_mode.into()) & !mode::SOCKET,
            uid: statx.stx_uid,
            gid: statx.stx_gid,
            mod_time: nanoseconds(statx.stx_mtime),
            change_time: nanoseconds(statx.stx_ctime),
            ..Stat::default()
        };
        if kind == FileType::BlockDevice || kind == FileType::CharacterDevice {
            stat.devmajor = statx.stx_rdev_major.into();
            stat.devminor = statx.stx_rdev_minor.into();
        }
        if kind == FileType::Symlink {
            let target = rustix::fs::readlinkat(&entry, c"", Vec::new()).map_err(fail("read link"))?;
            stat.linkname = target.into_bytes().into();
        }
        if kind != FileType::Directory {
            stat.size = i64::try_from(statx.stx_size).unwrap_or(i64::MAX);
            seen.link(&mut stat, &statx);
        }
        stat.xattrs = xattrs(&entry, kind).map_err(fail("read attributes of"))?;
        Ok(stat)
    }
}

/// Kernels answer EAGAIN when a rename races with a walk that must not leave the tree.
fn retry_again<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    for _ in 0..64 {
        match call() {
            Err(Errno::AGAIN | Errno::INTR) => {}
            done => return done,
        }
    }
    call()
}

fn nanoseconds(time: StatxTimestamp) -> i64 {
    time.tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec.into())
}

/// First paths of files with several names.
#[derive(Debug, Default)]
pub(super) struct Seen(BTreeMap<(u32, u32, u64), Bytes>);

impl Seen {
    /// Turns a stat into that of a hard link when the file came before under another path.
    fn link(&mut self, stat: &mut Stat, statx: &Statx) {
        if statx.stx_nlink < 2 || stat.is_symlink() {
            return;
        }
        let key = (statx.stx_dev_major, statx.stx_dev_minor, statx.stx_ino);
        if let Some(first) = self.0.get(&key) {
            stat.linkname = first.clone();
        } else {
            self.0.insert(key, stat.path.clone());
        }
    }
}

/// Reads extended attributes, but for labels that only mean something on this host.
fn xattrs(entry: impl AsFd, kind: FileType) -> rustix::io::Result<BTreeMap<String, Bytes>> {
    let path = format!("/proc/self/fd/{}", entry.as_fd().as_raw_fd());
    let mut out = BTreeMap::new();
    if kind == FileType::Symlink {
        return Ok(out);
    }
    let mut names = vec![0; 256];
    let length = loop {
        match rustix::fs::listxattr(&path, &mut names) {
            Err(Errno::RANGE) if names.len() < XATTR_BYTES => names.resize(names.len() * 4, 0),
            Err(Errno::NOTSUP | Errno::NOENT | Errno::PERM | Errno::ACCESS) => return Ok(out),
            done => break done?,
        }
    };
    for name in names[..length].split(|c| *c == 0).filter(|name| !name.is_empty()) {
        let Ok(name) = std::str::from_utf8(name) else {
            continue;
        };
        if name.starts_with("com.apple.") || name == "security.selinux" {
            continue;
        }
        let mut value = vec![0; XATTR_BYTES];
        if let Ok(length) = rustix::fs::getxattr(&path, name, &mut value) {
            value.truncate(length);
            out.insert(name.to_owned(), value.into());
        }
    }
    Ok(out)
}

//! Writing what changed as an OCI layer.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::Stop;
use crate::changes::{Change, ChangeKind, changes, changes_upperdir};
use crate::tar::{EntryKind, Header, Writer};
use crate::tree::{FileType, Stat, Timestamp, at};

/// How a layer is written.
#[derive(Debug, Clone, Default)]
pub struct DiffOptions {
    /// No entry is younger than this (`SOURCE_DATE_EPOCH`).
    pub latest: Option<Timestamp>,
    /// Keeps nanoseconds of modification times. Off, they are cut to seconds, as containerd does.
    pub keep_nanoseconds: bool,
    /// Leaves out `user.*` attributes, as containerd does, and writes `security.capability` alone.
    pub capability_only: bool,
    /// When to give up.
    pub stop: Stop,
}

/// A difference that could not be worked out or written.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// A file could not be read.
    #[error("{action} {path:?}")]
    Io {
        /// The path within the tree.
        path: String,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It was told to give up.
    #[error("the layer was stopped")]
    Stopped,
    /// The layer could not be written.
    #[error("write layer")]
    Write(#[source] io::Error),
    /// A file shrank or grew while it was read.
    #[error("{path:?} changed while it was read")]
    Changed {
        /// The path within the tree.
        path: String,
    },
    /// The upper directory uses overlayfs features that hide where data comes from.
    #[error("{path:?}: overlay redirects are not supported")]
    Redirect {
        /// The path within the tree.
        path: String,
    },
    /// A change could not be put where it belongs.
    #[error("apply change of {path:?}")]
    Visit {
        /// The path within the tree.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

pub(crate) trait DiffContext<T> {
    fn on(self, action: &'static str, path: &Path) -> Result<T, DiffError>;
}

impl<T, E: Into<io::Error>> DiffContext<T> for Result<T, E> {
    fn on(self, action: &'static str, path: &Path) -> Result<T, DiffError> {
        self.map_err(|source| DiffError::Io {
            path: shown(path),
            action,
            source: source.into(),
        })
    }
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Writes the uncompressed layer that turns `lower` (or nothing) into `upper`, from two whole trees.
///
/// Entries, their order and their bytes are those containerd writes: parents before children, whiteouts dated 1970, hard
/// links to the first name. Sockets are left out.
pub fn diff<Lower: AsFd>(
    lower: Option<Lower>,
    upper: impl AsFd,
    out: impl Write,
    options: &DiffOptions,
) -> Result<(), DiffError> {
    let mut layer = LayerWriter::new(upper.as_fd(), out, options);
    changes(lower, upper.as_fd(), &mut |change| layer.change(change))?;
    layer.finish()
}

/// Writes the layer recorded in an overlay's upper directory; `lower` is the merged tree below it.
pub fn diff_upperdir<Lower: AsFd>(
    lower: Option<Lower>,
    upper: impl AsFd,
    out: impl Write,
    options: &DiffOptions,
) -> Result<(), DiffError> {
    let mut layer = LayerWriter::new(upper.as_fd(), out, options);
    changes_upperdir(lower, upper.as_fd(), &mut |change| layer.change(change))?;
    layer.finish()
}

/// Turns changes into archive entries.
struct LayerWriter<'a, W: Write> {
    upper: BorrowedFd<'a>,
    tar: Writer<io::BufWriter<W>>,
    options: &'a DiffOptions,
    /// Directories the archive has an entry of.
    dirs: BTreeSet<PathBuf>,
    /// First written name of files with several.
    written: BTreeMap<(u64, u64), Vec<u8>>,
    /// Unmodified names of files with several, which become links if another of their names is written.
    unmodified: BTreeMap<(u64, u64), Vec<PathBuf>>,
    buffer: Vec<u8>,
}

impl<'a, W: Write> LayerWriter<'a, W> {
    fn new(upper: BorrowedFd<'a>, out: W, options: &'a DiffOptions) -> Self {
        Self {
            upper,
            tar: Writer::new(io::BufWriter::with_capacity(256 * 1024, out)),
            options,
            dirs: BTreeSet::new(),
            written: BTreeMap::new(),
            unmodified: BTreeMap::new(),
            buffer: vec![0; 128 * 1024],
        }
    }

    fn finish(self) -> Result<(), DiffError> {
        self.tar.finish().map(drop).map_err(DiffError::Write)
    }

    fn change(&mut self, change: Change<'_>) -> Result<(), DiffError> {
        if self.options.stop.is_stopped() {
            return Err(DiffError::Stopped);
        }
        match change.stat {
            None => self.whiteout(change.path),
            Some(stat) if stat.file_type() == FileType::Socket => Ok(()),
            Some(stat) => self.file(change.kind, change.path, stat),
        }
    }

    fn whiteout(&mut self, path: &Path) -> Result<(), DiffError> {
        let name = path.file_name().unwrap_or_default().as_bytes();
        let mut full = path
            .parent()
            .unwrap_or(Path::new(""))
            .as_os_str()
            .as_bytes()
            .to_vec();
        if !full.is_empty() {
            full.push(b'/');
        }
        full.extend_from_slice(b".wh.");
        full.extend_from_slice(name);
        self.parents(path)?;
        self.header(&Header::new(EntryKind::Regular, full))
    }

    fn header(&mut self, header: &Header) -> Result<(), DiffError> {
        self.tar.write_header(header).map_err(DiffError::Write)
    }

    /// Writes entries of directories above `path` that have none yet.
    fn parents(&mut self, path: &Path) -> Result<(), DiffError> {
        let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) else {
            return Ok(());
        };
        if self.dirs.contains(parent) {
            return Ok(());
        }
        let fd = at::open_beneath(self.upper, parent, OFlags::PATH | OFlags::NOFOLLOW).on("open", parent)?;
        let stat = at::stat_fd(fd).on("stat", parent)?;
        self.file(ChangeKind::Modified, parent, &stat)
    }

    fn file(&mut self, kind: ChangeKind, path: &Path, stat: &Stat) -> Result<(), DiffError> {
        let mut links = Vec::new();
        let mut source = None;
        if stat.is_linked() {
            source = self.written.get(&stat.identity()).cloned();
            if source.is_none() {
                if kind == ChangeKind::Unmodified {
                    self.unmodified
                        .entry(stat.identity())
                        .or_default()
                        .push(path.to_owned());
                    return Ok(());
                }
                self.written
                    .insert(stat.identity(), path.as_os_str().as_bytes().to_vec());
                links = self.unmodified.remove(&stat.identity()).unwrap_or_default();
            }
        } else if kind == ChangeKind::Unmodified {
            return Ok(());
        }
        let dir = at::open_beneath(
            self.upper,
            path.parent().unwrap_or(Path::new("")),
            OFlags::PATH | OFlags::DIRECTORY,
        );
        let dir = dir.on("open the directory of", path)?;
        let mut header = self.describe(path, stat, &dir)?;
        if let Some(source) = source {
            header.kind = EntryKind::Hardlink;
            header.link = source;
            header.size_bytes = 0;
        }
        self.parents(path)?;
        if stat.is_dir() {
            self.dirs.insert(path.to_owned());
        }
        self.header(&header)?;
        if header.kind == EntryKind::Regular && header.size_bytes > 0 {
            self.data(path, &dir, header.size_bytes)?;
        }
        for link in links {
            let name = link.as_os_str().as_bytes().to_vec();
            let target = path.as_os_str().as_bytes().to_vec();
            self.parents(&link)?;
            self.header(&Header {
                kind: EntryKind::Hardlink,
                name,
                link: target,
                size_bytes: 0,
                ..header.clone()
            })?;
        }
        Ok(())
    }

    fn describe(&self, path: &Path, stat: &Stat, dir: impl AsFd) -> Result<Header, DiffError> {
        let kind = match stat.file_type() {
            FileType::Regular => EntryKind::Regular,
            FileType::Directory => EntryKind::Directory,
            FileType::Symlink => EntryKind::Symlink,
            FileType::CharDevice => EntryKind::CharDevice,
            FileType::BlockDevice => EntryKind::BlockDevice,
            FileType::Fifo => EntryKind::Fifo,
            FileType::Socket | FileType::Unknown => {
                return Err(io::Error::from(io::ErrorKind::Unsupported)).on("archive", path);
            }
        };
        let mut header = Header::new(kind, path.as_os_str().as_bytes());
        let name = Path::new(path.file_name().unwrap_or_default());
        match kind {
            EntryKind::Directory => header.name.push(b'/'),
            EntryKind::Regular => header.size_bytes = stat.size_bytes,
            EntryKind::Symlink => header.link = at::read_link(&dir, name).on("readlink", path)?,
            EntryKind::CharDevice | EntryKind::BlockDevice => header.dev = stat.rdev,
            _ => {}
        }
        header.mode = stat.permissions();
        (header.uid, header.gid) = (stat.uid, stat.gid);
        header.mtime = self
            .options
            .latest
            .map_or(stat.mtime, |latest| stat.mtime.min(latest));
        if !self.options.keep_nanoseconds {
            header.mtime = header.mtime.truncated();
        }
        for key in at::xattr_names(&dir, name).on("listxattr", path)? {
            let wanted = if self.options.capability_only {
                key == b"security.capability"
            } else {
                crate::changes::is_layer_xattr(&key)
            };
            if wanted
                && let Some(value) = at::xattr(&dir, name, &key).on("getxattr", path)?
                && !value.is_empty()
            {
                header.xattrs.insert(key, value);
            }
        }
        Ok(header)
    }

    fn data(&mut self, path: &Path, dir: impl AsFd, size: u64) -> Result<(), DiffError> {
        let name = Path::new(path.file_name().unwrap_or_default());
        let mut file = at::open_regular_beneath(dir, name).on("open", path)?;
        let mut left = size;
        loop {
            if self.options.stop.is_stopped() {
                return Err(DiffError::Stopped);
            }
            let count = file.read(&mut self.buffer).on("read", path)?;
            if count == 0 {
                break;
            }
            left = left
                .checked_sub(count as u64)
                .ok_or_else(|| DiffError::Changed { path: shown(path) })?;
            self.tar
                .write_all(&self.buffer[..count])
                .map_err(DiffError::Write)?;
        }
        if left == 0 {
            Ok(())
        } else {
            Err(DiffError::Changed { path: shown(path) })
        }
    }
}

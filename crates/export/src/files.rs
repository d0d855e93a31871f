//! The files of a result as a stream of entries, for exporters that hand out plain trees.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use build::error::{BuildError, ErrorKind};
use build::op::ResultRef;
use build::session::FileStat;
use bytes::Bytes;
use layer::tree::{GoStat, Root, Timestamp, TreeError};
use rustix::fs::{AtFlags, FileType};

/// Go's `os.ModeDir`.
const MODE_DIR: u32 = 1 << 31;
/// Go's `os.ModeSymlink`.
const MODE_SYMLINK: u32 = 1 << 27;

/// One tree of an export.
#[derive(Clone, Debug)]
pub struct Part {
    /// The tree; scratch is an empty one.
    pub reference: ResultRef,
    /// Name of the directory that the tree is put into; empty: none.
    pub prefix: String,
    /// The time that all entries get.
    pub epoch: Option<Timestamp>,
    /// Files beside those of the tree's root directory, by name.
    pub extra: BTreeMap<String, Bytes>,
}

impl Part {
    /// A tree as it is.
    pub fn whole(reference: ResultRef) -> Self {
        Self {
            reference,
            prefix: String::new(),
            epoch: None,
            extra: BTreeMap::new(),
        }
    }
}

/// A mounted tree. Blocking.
#[derive(Debug)]
pub struct Files {
    root: Option<Root>,
    prefix: String,
    epoch: Option<Timestamp>,
    extra: BTreeMap<String, Bytes>,
}

/// What a visitor of entries fails with.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// The tree cannot be read.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A directory cannot be listed.
    #[error("read {path}")]
    Read {
        /// The directory.
        path: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Whoever took the entries does not want more.
    #[error("{0}")]
    Stopped(String),
}

impl From<WalkError> for BuildError {
    fn from(error: WalkError) -> Self {
        let kind = match error {
            WalkError::Stopped(_) => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        };
        Self::from_source(kind, error)
    }
}

impl Files {
    /// Mounts a part's tree, which must be unpacked.
    ///
    /// # Errors
    /// When the tree cannot be mounted.
    pub fn open(part: &Part) -> Result<Self, BuildError> {
        let internal = |error: io::Error| BuildError::from_source(ErrorKind::Internal, error);
        let root = match part.reference.get() {
            None => None,
            Some(reference) => {
                let mounts = reference
                    .mounts()
                    .map_err(|error| BuildError::from_source(ErrorKind::Internal, error))?;
                let [mount] = mounts.as_slice() else {
                    return Err(BuildError::internal("a snapshot has not exactly one mount"));
                };
                let tree = mount.open().map_err(|error| internal(io::Error::other(error)))?;
                Some(Root::new(&tree).map_err(internal)?)
            }
        };
        Ok(Self {
            root,
            prefix: part.prefix.clone(),
            epoch: part.epoch,
            extra: part.extra.clone(),
        })
    }

    /// Calls `visit` for all entries in the order of the transfer protocol: each directory before what is in it, siblings by
    /// name. Paths are relative, without a leading slash.
    ///
    /// # Errors
    /// What `visit` fails with, or that the tree cannot be read.
    pub fn walk(&self, visit: &mut dyn FnMut(FileStat) -> Result<(), WalkError>) -> Result<(), WalkError> {
        if !self.prefix.is_empty() {
            let mut stat = FileStat {
                path: self.prefix.clone(),
                mode: MODE_DIR | 0o755,
                ..FileStat::default()
            };
            self.set_time(&mut stat);
            visit(stat)?;
        }
        let Some(root) = &self.root else {
            return self
                .extra
                .iter()
                .try_for_each(|(name, bytes)| visit(self.extra_stat(name, bytes)));
        };
        let mut links = BTreeMap::new();
        let mut top = Directory::open(root, "")?;
        top.names.retain(|name| !self.extra.contains_key(name));
        top.names.extend(self.extra.keys().cloned());
        top.names.sort_unstable_by(|a, b| b.cmp(a));
        let mut open = vec![top];
        while let Some(dir) = open.last_mut() {
            let Some(name) = dir.names.pop() else {
                open.pop();
                continue;
            };
            let path = if dir.path.is_empty() {
                name.clone()
            } else {
                format!("{}/{name}", dir.path)
            };
            if let Some(bytes) = self.extra.get(&path) {
                visit(self.extra_stat(&name, bytes))?;
                continue;
            }
            let Some(mut stat) = dir.stat(&name, &path, &mut links)? else {
                continue;
            };
            self.set_time(&mut stat);
            let is_dir = stat.mode & MODE_DIR != 0;
            if !self.prefix.is_empty() {
                if stat.mode & MODE_SYMLINK == 0 && !stat.linkname.is_empty() {
                    stat.linkname = format!("{}/{}", self.prefix, stat.linkname);
                }
                stat.path = format!("{}/{}", self.prefix, stat.path);
            }
            visit(stat)?;
            if is_dir {
                open.push(Directory::open(root, &path)?);
            }
        }
        Ok(())
    }

    /// Describes a file that is not in the tree; without an epoch it is as old as the export.
    fn extra_stat(&self, name: &str, bytes: &Bytes) -> FileStat {
        let path = if self.prefix.is_empty() {
            name.to_owned()
        } else {
            format!("{}/{name}", self.prefix)
        };
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let mut stat = FileStat {
            path,
            mode: 0o600,
            size_bytes: i64::try_from(bytes.len()).unwrap_or(i64::MAX),
            mod_time_ns: i64::try_from(now.as_secs())
                .unwrap_or(0)
                .saturating_mul(1_000_000_000),
            ..FileStat::default()
        };
        self.set_time(&mut stat);
        stat
    }

    fn set_time(&self, stat: &mut FileStat) {
        if let Some(epoch) = self.epoch {
            stat.mod_time_ns = epoch.unix_nanos();
        }
    }

    /// Opens a regular file by a path that [`Files::walk`] gave.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open_file(&self, path: &str) -> Result<Box<dyn Read>, WalkError> {
        let inner = if self.prefix.is_empty() {
            Some(path)
        } else {
            path.strip_prefix(&self.prefix)
                .and_then(|rest| rest.strip_prefix('/'))
        };
        let Some(inner) = inner else {
            return Err(WalkError::Stopped(format!("{path} is not in this tree")));
        };
        if let Some(bytes) = self.extra.get(inner) {
            return Ok(Box::new(io::Cursor::new(bytes.clone())));
        }
        match &self.root {
            Some(root) => Ok(Box::new(root.open_file(Path::new(inner))?)),
            None => Err(WalkError::Stopped(format!("{path} is not in this tree"))),
        }
    }
}

/// A directory on the way of a walk.
struct Directory {
    fd: OwnedFd,
    path: String,
    /// What is left of its entries, last first.
    names: Vec<String>,
}

impl Directory {
    fn open(root: &Root, path: &str) -> Result<Self, WalkError> {
        let shown = if path.is_empty() { "/" } else { path };
        let fd = root.open_dir(Path::new(shown))?;
        let read = |source: io::Error| WalkError::Read {
            path: shown.to_owned(),
            source,
        };
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&fd).map_err(|error| read(error.into()))? {
            let entry = entry.map_err(|error| read(error.into()))?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            // The protocol's paths are UTF-8.
            let text = name.to_str().map_err(|error| {
                let reason = format!("name {name:?}: {error}");
                read(io::Error::new(io::ErrorKind::InvalidData, reason))
            })?;
            names.push(text.to_owned());
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(Self {
            fd,
            path: path.to_owned(),
            names,
        })
    }

    /// Describes an entry; `None` for a socket, which cannot be handed out, and for what is not there. `links` has the
    /// first path of each file with several names.
    fn stat(
        &self,
        name: &str,
        path: &str,
        links: &mut BTreeMap<(u64, u64), String>,
    ) -> Result<Option<FileStat>, WalkError> {
        let read = |source: io::Error| WalkError::Read {
            path: path.to_owned(),
            source,
        };
        let own = match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(own) => own,
            // overlayfs lists the whiteouts of a directory that has one layer, but nothing is there.
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(read(error.into())),
        };
        let kind = FileType::from_raw_mode(own.st_mode);
        if kind == FileType::Socket {
            return Ok(None);
        }
        let mut stat = file_stat(GoStat::read(&self.fd, OsStr::new(name)).map_err(read)?, path);
        if own.st_nlink > 1 && !matches!(kind, FileType::Directory | FileType::Symlink) {
            match links.get(&(own.st_dev, own.st_ino)) {
                Some(first) => stat.linkname.clone_from(first),
                None => drop(links.insert((own.st_dev, own.st_ino), path.to_owned())),
            }
        }
        Ok(Some(stat))
    }
}

fn file_stat(stat: GoStat, path: &str) -> FileStat {
    FileStat {
        path: path.to_owned(),
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        size_bytes: stat.size,
        mod_time_ns: stat.mod_time,
        linkname: stat.linkname,
        dev_major: stat.devmajor,
        dev_minor: stat.devminor,
        xattrs: stat
            .xattrs
            .into_iter()
            .map(|(name, value)| (name, Bytes::from(value)))
            .collect(),
        ..FileStat::default()
    }
}

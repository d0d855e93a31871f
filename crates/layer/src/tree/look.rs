//! Looking into a tree for the gateway API.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use oci::pattern::Matcher;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Root, Stat, TreeContext, TreeError, at};

/// A file's metadata in the form of BuildKit's `fsutil.types.Stat`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GoStat {
    /// The name of the file.
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

/// Bit of Go's `os.FileMode` that archive code does not know, so BuildKit leaves it out.
const GO_SOCKET: u32 = 1 << 24;

impl GoStat {
    /// Describes `name` in the directory `dir`.
    pub fn read(dir: impl AsFd, name: &OsStr) -> io::Result<Self> {
        let dir = dir.as_fd();
        let stat: Stat = at::stat_at(dir, name)?;
        let mut go = Self {
            path: name.to_string_lossy().into_owned(),
            mode: stat.go_mode() & !GO_SOCKET,
            uid: stat.uid,
            gid: stat.gid,
            mod_time: stat.mtime.unix_nanos(),
            ..Self::default()
        };
        if !stat.is_dir() {
            go.size = i64::try_from(stat.size_bytes).unwrap_or(i64::MAX);
            (go.devmajor, go.devminor) = (stat.rdev.0.into(), stat.rdev.1.into());
        }
        if stat.is_symlink() {
            go.linkname = String::from_utf8_lossy(&at::read_link(dir, name)?).into_owned();
        }
        for key in at::xattr_names(dir, Path::new(name))? {
            if let Ok(key) = String::from_utf8(key)
                && !key.starts_with("com.apple.")
                && let Ok(Some(value)) = at::xattr(dir, Path::new(name), key.as_bytes())
            {
                go.xattrs.insert(key, value);
            }
        }
        Ok(go)
    }
}

impl Root {
    /// Reads a regular file, or at most `length` bytes of it from `offset`; an answer over `limit` bytes is `EFBIG`. The
    /// gateway's `ReadFile`.
    pub fn read_file(
        &self,
        path: &Path,
        range: Option<(u64, u64)>,
        limit: usize,
    ) -> Result<Vec<u8>, TreeError> {
        let file = self.open_file(path)?;
        let read = || -> io::Result<Vec<u8>> {
            let size = file.metadata()?.len();
            let (offset, length) = range.unwrap_or((0, size));
            let length = length.min(size.saturating_sub(offset));
            let length = usize::try_from(length)
                .ok()
                .filter(|length| *length <= limit)
                .ok_or(Errno::FBIG)?;
            let mut bytes = vec![0; length];
            let mut filled = 0;
            while filled < length {
                let position = offset.saturating_add(filled as u64);
                match file.read_at(&mut bytes[filled..], position) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            bytes.truncate(filled);
            Ok(bytes)
        };
        read().on("read", path)
    }

    /// Lists a directory in the order of names; `include` is a pattern on names. The gateway's `ReadDir`.
    pub fn read_dir(&self, path: &Path, include: Option<&str>) -> Result<Vec<GoStat>, TreeError> {
        let matcher = match include {
            None => None,
            Some(pattern) => Some(
                Matcher::new([pattern])
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
                    .on("readdir", path)?,
            ),
        };
        let dir = self.open_dir(path)?;
        let mut found = Vec::new();
        for name in at::list(&dir).on("readdirent", path)? {
            let bytes = name.as_encoded_bytes();
            let wanted = match &matcher {
                None => true,
                Some(matcher) => matcher
                    .matches_or_parent(bytes)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
                    .on("readdir", path)?,
            };
            if !wanted {
                continue;
            }
            match GoStat::read(&dir, &name) {
                // Removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                stat => found.push(stat.on("lstat", &path.join(&name))?),
            }
        }
        Ok(found)
    }

    /// Describes one file, following symbolic links in its directory and its last part. The gateway's `StatFile`.
    pub fn stat_file(&self, path: &Path) -> Result<GoStat, TreeError> {
        let resolved = self.resolve(path)?;
        let (dir, name) = match (resolved.parent(), resolved.file_name()) {
            (Some(dir), Some(name)) => (dir, name),
            _ => (Path::new(""), OsStr::new(".")),
        };
        let dir = at::open_beneath(self.as_fd(), dir, OFlags::PATH | OFlags::DIRECTORY).on("lstat", path)?;
        let mut stat = GoStat::read(&dir, name).on("lstat", path)?;
        if name == "." {
            // The root has no name of its own.
            stat.path = path
                .file_name()
                .map_or_else(|| "/".into(), |name| name.to_string_lossy().into_owned());
        }
        Ok(stat)
    }
}

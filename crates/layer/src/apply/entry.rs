//! One archive entry after the other.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::{ApplyError, ApplyOptions, Whiteouts};
use crate::tar::{EntryKind, Header, Reader};
use crate::tree::{FileType, Timestamp, at, resolve_at};

/// Longest name or link that is accepted, in bytes: the kernel's longest path.
const PATH_MAX: usize = 4096;
/// Most refused attributes that are reported.
const IGNORED_MAX: usize = 100;
/// Bytes copied at once; a run of zeros as long and aligned so becomes a hole.
const CHUNK: usize = 64 * 1024;

/// A directory that stays open from one entry to the next, as neighbours share it.
pub(super) struct Parent {
    /// The directory's name in the archive, cleaned.
    named: PathBuf,
    /// Where that leads.
    pub(super) resolved: PathBuf,
    pub(super) fd: OwnedFd,
}

pub(super) struct Unpacker<'a> {
    pub(super) root: BorrowedFd<'a>,
    pub(super) options: &'a ApplyOptions,
    parent: Option<Parent>,
    /// What this layer has brought; kept only where whiteouts remove.
    pub(super) unpacked: BTreeSet<PathBuf>,
    /// Times of directories, set when all is unpacked.
    times: Vec<(PathBuf, Timestamp, Timestamp)>,
    buffer: Vec<u8>,
    size_bytes: u64,
    ignored: Vec<String>,
}

pub(super) trait EntryContext<T> {
    fn during(self, action: &'static str, header: &Header) -> Result<T, ApplyError>;
}

impl<T, E: Into<io::Error>> EntryContext<T> for Result<T, E> {
    fn during(self, action: &'static str, header: &Header) -> Result<T, ApplyError> {
        self.map_err(|source| ApplyError::Io {
            path: shown(&header.name),
            action,
            source: source.into(),
        })
    }
}

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(&name[..name.len().min(PATH_MAX)]).into_owned()
}

pub(super) fn invalid(header: &Header, reason: &'static str) -> ApplyError {
    ApplyError::Invalid {
        path: shown(&header.name),
        reason,
    }
}

/// Cleans a name from the archive without looking at files: relative, no `.`, no `..`.
fn clean(name: &[u8]) -> PathBuf {
    let mut path = PathBuf::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                path.pop();
            }
            _ => path.push(OsStr::from_bytes(part)),
        }
    }
    path
}

/// Bounds a time to what containerd lets through: 1970 to 2262, all else is 1970.
fn bounded(time: Timestamp) -> Timestamp {
    if (0..=9_223_372_036).contains(&time.seconds) {
        time
    } else {
        Timestamp::default()
    }
}

fn access_time(header: &Header) -> Timestamp {
    bounded(header.atime.unwrap_or_default().max(header.mtime))
}

impl<'a> Unpacker<'a> {
    pub(super) fn new(root: BorrowedFd<'a>, options: &'a ApplyOptions) -> Self {
        Self {
            root,
            options,
            parent: None,
            unpacked: BTreeSet::new(),
            times: Vec::new(),
            buffer: vec![0; CHUNK],
            size_bytes: 0,
            ignored: Vec::new(),
        }
    }

    pub(super) fn entry(&mut self, header: &Header, data: &mut Reader<impl Read>) -> Result<(), ApplyError> {
        if self.options.stop.is_stopped() {
            return Err(ApplyError::Stopped);
        }
        if header.name.len() >= PATH_MAX || header.link.len() >= PATH_MAX {
            return Err(invalid(header, "name too long"));
        }
        if header.name.contains(&0) || header.link.contains(&0) {
            return Err(invalid(header, "zero byte in a name"));
        }
        self.size_bytes = self.size_bytes.saturating_add(header.size_bytes);
        if let Some(limit_bytes) = self.options.limit_bytes.filter(|limit| self.size_bytes > *limit) {
            return Err(ApplyError::TooLarge { limit_bytes });
        }
        let path = clean(&header.name);
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(()); // the root itself
        };
        let parent = self.enter(dir, header)?;
        let done = if self.options.whiteouts != Whiteouts::Literal && name.as_bytes().starts_with(b".wh.") {
            self.whiteout(header, &parent, name)
        } else {
            self.place(header, &parent, name, data)
        };
        self.parent = Some(parent);
        done
    }

    /// Opens the directory of an entry, making it if need be.
    fn enter(&mut self, dir: &Path, header: &Header) -> Result<Parent, ApplyError> {
        if let Some(parent) = self.parent.take().filter(|parent| parent.named == dir) {
            return Ok(parent);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        // Most names lead through no link; the others are looked at part by part.
        if let Ok(fd) = at::open_beneath(self.root, dir, flags) {
            return Ok(Parent {
                named: dir.to_owned(),
                resolved: dir.to_owned(),
                fd,
            });
        }
        let resolved = self.resolve(dir).during("lstat", header)?;
        let fd = match at::open_beneath(self.root, &resolved, flags) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make_parents(&resolved).during("mkdir", header)?;
                at::open_beneath(self.root, &resolved, flags).during("open directory of", header)?
            }
            done => done.during("open directory of", header)?,
        };
        Ok(Parent {
            named: dir.to_owned(),
            resolved,
            fd,
        })
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        if path.as_os_str().is_empty() {
            Ok(PathBuf::new())
        } else {
            resolve_at(self.root, path)
        }
    }

    /// Makes missing directories, with the attributes they have below where they exist there.
    fn make_parents(&mut self, path: &Path) -> io::Result<()> {
        let mut current = PathBuf::new();
        for part in path {
            let dir = at::open_beneath(self.root, &current, OFlags::PATH | OFlags::DIRECTORY)?;
            current.push(part);
            match at::make_dir(&dir, Path::new(part), 0o755) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                done => {
                    done?;
                    self.inherit(&dir, part, &current)?;
                }
            }
        }
        Ok(())
    }

    fn inherit(&mut self, dir: &OwnedFd, name: &OsStr, path: &Path) -> io::Result<()> {
        for below in &self.options.parents {
            let source = match at::open_beneath(below, path, OFlags::PATH | OFlags::NOFOLLOW) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                // Something above is no directory there: replaced.
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => break,
                Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => break,
                done => done?,
            };
            let stat = at::stat_fd(&source)?;
            if !stat.is_dir() {
                break;
            }
            if !self.options.keep_owner {
                at::set_owner(dir, name, stat.uid, stat.gid)?;
            }
            at::set_mode(dir, Path::new(name), stat.permissions())?;
            let here = Path::new(".");
            for key in at::xattr_names(&source, here)? {
                if !key.starts_with(b"trusted.")
                    && !key.starts_with(b"user.overlay.")
                    && let Some(value) = at::xattr(&source, here, &key)?
                {
                    match at::set_xattr(dir, Path::new(name), &key, &value) {
                        Err(error) if is_refused(&error) => {}
                        done => done?,
                    }
                }
            }
            self.times.push((path.to_owned(), stat.atime, stat.mtime));
            break;
        }
        Ok(())
    }

    fn place(
        &mut self,
        header: &Header,
        parent: &Parent,
        name: &OsStr,
        data: &mut Reader<impl Read>,
    ) -> Result<(), ApplyError> {
        let (dir, path) = (&parent.fd, Path::new(name));
        // Most files are new: whether something is in the way shows when they are made.
        let made = match header.kind {
            EntryKind::Regular => create_new(header, dir, path)?,
            _ => None,
        };
        let mut opaque = false;
        let mut exists = false;
        if made.is_none()
            && let Some(stat) = at::try_stat_at(dir, name).during("lstat", header)?
        {
            if stat.is_dir() && header.kind == EntryKind::Directory {
                exists = true;
            } else {
                // A directory in the place of a deleted one must not show what lies below.
                opaque = stat.is_whiteout() && header.kind == EntryKind::Directory;
                at::remove_all(dir, path).during("remove", header)?;
            }
        }
        let file = match header.kind {
            EntryKind::Regular => {
                let file = match made {
                    Some(made) => made,
                    None => create(header, dir, path).during("create", header)?,
                };
                Some(self.write_file(header, file, data)?)
            }
            EntryKind::Directory if exists => None,
            EntryKind::Directory => {
                let mode = header.mode & 0o777;
                at::make_dir(dir, path, mode).during("mkdir", header)?;
                if opaque {
                    self.make_opaque(dir, path).during("setxattr", header)?;
                }
                None
            }
            EntryKind::Symlink => {
                rustix::fs::symlinkat(&*header.link, dir, name).during("symlink", header)?;
                None
            }
            EntryKind::Hardlink => {
                self.link(header, dir, name)?;
                None
            }
            EntryKind::CharDevice | EntryKind::BlockDevice if in_user_namespace() => return Ok(()),
            EntryKind::CharDevice | EntryKind::BlockDevice | EntryKind::Fifo => {
                let kind = match header.kind {
                    EntryKind::CharDevice => FileType::CharDevice,
                    EntryKind::BlockDevice => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                at::make_special(dir, path, kind, header.mode, header.dev).during("mknod", header)?;
                None
            }
        };
        match file {
            Some(file) => self.describe_file(header, &file)?,
            None => self.describe(header, dir, path)?,
        }
        let full = parent.resolved.join(name);
        if header.kind == EntryKind::Directory {
            self.times
                .push((full.clone(), access_time(header), bounded(header.mtime)));
        }
        if self.options.whiteouts == Whiteouts::Remove {
            self.unpacked.insert(full);
        }
        Ok(())
    }

    fn write_file(
        &mut self,
        header: &Header,
        mut file: File,
        data: &mut Reader<impl Read>,
    ) -> Result<File, ApplyError> {
        let mut left = header.size_bytes;
        let mut ends_in_hole = false;
        let mut is_sized = false;
        while left > 0 {
            if self.options.stop.is_stopped() {
                return Err(ApplyError::Stopped);
            }
            let hole = data.skip_hole();
            if hole > 0 {
                if !is_sized {
                    // Before anything is written: a size that no file can have is refused here.
                    file.set_len(header.size_bytes).during("truncate", header)?;
                    is_sized = true;
                }
                let offset = i64::try_from(hole).map_err(io::Error::other);
                file.seek(SeekFrom::Current(offset.during("seek", header)?))
                    .during("seek", header)?;
                left = left.saturating_sub(hole);
                continue;
            }
            let room = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            let chunk = &mut self.buffer[..room];
            data.read_exact(chunk).during("read data of", header)?;
            ends_in_hole = room == CHUNK && is_zero(chunk);
            if ends_in_hole {
                file.seek(SeekFrom::Current(CHUNK as i64))
                    .during("seek", header)?;
            } else {
                file.write_all(chunk).during("write", header)?;
            }
            left -= room as u64;
        }
        if ends_in_hole && !is_sized {
            file.set_len(header.size_bytes).during("truncate", header)?;
        }
        Ok(file)
    }

    fn link(&self, header: &Header, dir: &OwnedFd, name: &OsStr) -> Result<(), ApplyError> {
        let target = clean(&header.link);
        let (Some(target_dir), Some(target_name)) = (target.parent(), target.file_name()) else {
            return Err(invalid(header, "hard link to the root"));
        };
        let resolved = self.resolve(target_dir).during("lstat", header)?;
        let from = at::open_beneath(self.root, &resolved, OFlags::PATH | OFlags::DIRECTORY);
        let from = from.during("open the link's directory", header)?;
        rustix::fs::linkat(&from, target_name, dir, name, AtFlags::empty()).during("link", header)
    }

    fn owner(&self, header: &Header) -> Option<(u32, u32)> {
        if self.options.keep_owner {
            None
        } else {
            Some(self.options.owner.unwrap_or((header.uid, header.gid)))
        }
    }

    /// Sets owner, attributes, mode and times of a new file through its own descriptor. Most have the right owner and mode
    /// already, and setting them again is slow.
    fn describe_file(&mut self, header: &Header, file: &File) -> Result<(), ApplyError> {
        let made = at::stat_fd(file).during("fstat", header)?;
        // Attributes may be access lists, which have a part of the mode in them.
        let mut keeps_mode = made.permissions() == header.mode & 0o7777 && header.xattrs.is_empty();
        if let Some((uid, gid)) = self.owner(header) {
            if uid == u32::MAX || gid == u32::MAX {
                return Err(invalid(header, "owner"));
            }
            if (made.uid, made.gid) != (uid, gid) {
                let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
                rustix::fs::fchown(file, Some(uid), Some(gid)).during("chown", header)?;
                keeps_mode = false;
            }
        }
        self.set_xattrs(header, |key, value| {
            Ok(rustix::fs::fsetxattr(file, key, value, XattrFlags::empty())?)
        })?;
        if !keeps_mode {
            rustix::fs::fchmod(file, Mode::from_raw_mode(header.mode & 0o7777)).during("chmod", header)?;
        }
        let times = Timestamps {
            last_access: access_time(header).timespec(),
            last_modification: bounded(header.mtime).timespec(),
        };
        rustix::fs::futimens(file, &times).during("set times of", header)
    }

    fn describe(&mut self, header: &Header, dir: &OwnedFd, name: &Path) -> Result<(), ApplyError> {
        let found = at::stat_at(dir, name).during("lstat", header)?;
        let mut keeps_mode = found.permissions() == header.mode & 0o7777 && header.xattrs.is_empty();
        if let Some((uid, gid)) = self.owner(header)
            && (found.uid, found.gid) != (uid, gid)
        {
            at::set_owner(dir, name, uid, gid).during("chown", header)?;
            keeps_mode = false;
        }
        self.set_xattrs(header, |key, value| at::set_xattr(dir, name, key, value))?;
        if !found.is_symlink() && !keeps_mode {
            at::set_mode(dir, name, header.mode).during("chmod", header)?;
        }
        let times = (Some(access_time(header)), Some(bounded(header.mtime)));
        at::set_times(dir, name, times.0, times.1).during("set times of", header)
    }

    fn set_xattrs(
        &mut self,
        header: &Header,
        set: impl Fn(&[u8], &[u8]) -> io::Result<()>,
    ) -> Result<(), ApplyError> {
        for (key, value) in &header.xattrs {
            // These steer the kernel's overlays; only this program may set them.
            let privileged = key.starts_with(b"trusted.") || key.starts_with(b"user.overlay.");
            let done = if privileged {
                Err(Errno::NOTSUP.into())
            } else {
                set(key, value)
            };
            match done {
                Err(error) if is_refused(&error) || is_user_xattr_of_special(&error, header, key) => {
                    if self.ignored.len() < IGNORED_MAX {
                        self.ignored.push(format!(
                            "{}: {}",
                            shown(&header.name),
                            String::from_utf8_lossy(key)
                        ));
                    }
                }
                done => done.during("setxattr", header)?,
            }
        }
        Ok(())
    }

    /// Sets the directories' times, which unpacking into them has changed.
    pub(super) fn finish(self) -> Result<(u64, Vec<String>), ApplyError> {
        for (path, atime, mtime) in &self.times {
            let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
                continue;
            };
            let set = || -> io::Result<()> {
                let dir = match at::open_beneath(self.root, dir, OFlags::PATH | OFlags::DIRECTORY) {
                    // Replaced by a later entry.
                    Err(error) if is_replaced(&error) => return Ok(()),
                    done => done?,
                };
                if !at::try_stat_at(&dir, name)?.is_some_and(|stat| stat.is_dir()) {
                    return Ok(());
                }
                at::set_times(&dir, name, Some(*atime), Some(*mtime))
            };
            set().map_err(|source| ApplyError::Io {
                path: shown(path.as_os_str().as_bytes()),
                action: "set times of",
                source,
            })?;
        }
        Ok((self.size_bytes, self.ignored))
    }
}

/// Makes a file with the entry's permissions, as far as they can be given before its owner.
fn create(header: &Header, dir: &OwnedFd, name: &Path) -> io::Result<File> {
    at::create_file_as(dir, name, header.mode & 0o777)
}

/// Does what [`create`] does; `None` if something of that name is there.
fn create_new(header: &Header, dir: &OwnedFd, name: &Path) -> Result<Option<File>, ApplyError> {
    match create(header, dir, name) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
        done => done.map(Some).during("create", header),
    }
}

fn is_replaced(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    ) || error.raw_os_error() == Some(Errno::LOOP.raw_os_error())
}

fn is_refused(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NOTSUP.raw_os_error())
}

/// Only files and directories can have `user.*` attributes.
fn is_user_xattr_of_special(error: &io::Error, header: &Header, key: &[u8]) -> bool {
    error.raw_os_error() == Some(Errno::PERM.raw_os_error())
        && key.starts_with(b"user.")
        && !matches!(header.kind, EntryKind::Regular | EntryKind::Directory)
}

fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; CHUNK] = [0; CHUNK];
    ZEROS.get(..bytes.len()) == Some(bytes)
}

/// Reports whether this process lives in a user namespace, where devices cannot be made.
fn in_user_namespace() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let Ok(map) = std::fs::read_to_string("/proc/self/uid_map") else {
            return false;
        };
        let mut fields = map.split_whitespace();
        !(fields.next() == Some("0") && fields.next() == Some("0") && fields.next() == Some("4294967295"))
    })
}

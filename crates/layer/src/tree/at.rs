//! System calls relative to directory descriptors. Names are single components; nothing here follows a symbolic link
//! unless it says so.

use std::ffi::{CStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, Gid, Mode, OFlags, ResolveFlags, StatxFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::stat::{FileType, Stat, Timestamp};

/// Longest value of an extended attribute the kernel knows.
const XATTR_VALUE_MAX: usize = 64 * 1024;
/// How often a resolution is repeated when renames elsewhere disturb it.
const RESOLVE_RETRIES: usize = 1000;
/// Levels below which removal lifts directories up instead of descending, to bound open descriptors.
const REMOVE_DEPTH: usize = 64;

/// Deepest directory that is walked. Honest trees end far above; a deeper one would exhaust stack and descriptors.
pub const DEPTH_MAX: usize = 512;

/// Refuses (`ENAMETOOLONG`) to go below a path as deep as [`DEPTH_MAX`].
pub fn check_depth(path: &Path) -> io::Result<()> {
    // A path this long has to be looked at; all others cannot be deep.
    if path.as_os_str().len() > DEPTH_MAX && path.iter().count() > DEPTH_MAX {
        return Err(Errno::NAMETOOLONG.into());
    }
    Ok(())
}

fn dot_if_empty(path: &Path) -> &Path {
    if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    }
}

fn open2(dir: impl AsFd, path: &Path, flags: OFlags, resolve: ResolveFlags) -> io::Result<OwnedFd> {
    let path = dot_if_empty(path);
    let create = if flags.contains(OFlags::CREATE) {
        Mode::from_raw_mode(0o600)
    } else {
        Mode::empty()
    };
    for _ in 0..RESOLVE_RETRIES {
        match rustix::fs::openat2(dir.as_fd(), path, flags | OFlags::CLOEXEC, create, resolve) {
            Err(Errno::AGAIN) => {}
            done => return Ok(done?),
        }
    }
    Err(Errno::AGAIN.into())
}

/// Opens `path` as if `root` were the root directory: symbolic links are followed and stay inside.
pub fn open_in_root(root: impl AsFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    open2(
        root,
        path,
        flags,
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Opens `path`, relative and below `dir`, and refuses every symbolic link in it. Empty is `dir` itself.
pub fn open_beneath(dir: impl AsFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    open2(dir, path, flags, resolve)
}

/// Opens the directory `path` below `dir` for listing.
pub fn open_dir_beneath(dir: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    open_beneath(dir, path, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// Opens what a path descriptor points at for reading, if it is a regular file.
pub fn reopen_regular(fd: OwnedFd) -> io::Result<File> {
    match stat_fd(&fd)?.file_type() {
        FileType::Regular => {}
        FileType::Directory => return Err(Errno::ISDIR.into()),
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    Ok(rustix::fs::open(proc_path(&fd), flags, Mode::empty())?.into())
}

/// Opens the regular file `path` below `dir` for reading.
pub fn open_regular_beneath(dir: impl AsFd, path: &Path) -> io::Result<File> {
    reopen_regular(open_beneath(dir, path, OFlags::PATH | OFlags::NOFOLLOW)?)
}

/// Returns the magic link to an open file.
pub fn proc_path(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// Reads metadata of `name` in `dir`.
pub fn stat_at(dir: impl AsFd, name: impl rustix::path::Arg) -> io::Result<Stat> {
    let stat = rustix::fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)?;
    Ok(Stat::from_statx(&stat))
}

/// Reads metadata of `name` in `dir`; `None` when there is none.
pub fn try_stat_at(dir: impl AsFd, name: impl rustix::path::Arg) -> io::Result<Option<Stat>> {
    match stat_at(dir, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        done => done.map(Some),
    }
}

/// Reads metadata of an open file.
pub fn stat_fd(fd: impl AsFd) -> io::Result<Stat> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
    Ok(Stat::from_statx(&stat))
}

/// Lists the names in a directory opened for reading, sorted by bytes.
pub fn list(dir: impl AsFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(OsString::from_vec(name.to_bytes().to_vec()));
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Reads a symbolic link's text.
pub fn read_link(dir: impl AsFd, name: impl rustix::path::Arg) -> io::Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes())
}

fn proc_child(dir: impl AsFd, name: &Path) -> PathBuf {
    proc_path(dir).join(name)
}

fn is_unsupported(error: Errno) -> bool {
    matches!(error, Errno::NOTSUP | Errno::NODATA)
}

/// Lists the names of the extended attributes of `name` in `dir`, sorted; none where the file system has no attributes.
pub fn xattr_names(dir: impl AsFd, name: &Path) -> io::Result<Vec<Vec<u8>>> {
    let path = proc_child(dir, name);
    let mut list = Vec::with_capacity(256);
    loop {
        match rustix::fs::llistxattr(&path, rustix::buffer::spare_capacity(&mut list)) {
            Ok(_) => break,
            Err(Errno::RANGE) if list.capacity() < XATTR_VALUE_MAX * 2 => {
                let larger = list.capacity() * 4;
                list = Vec::with_capacity(larger);
            }
            Err(error) if is_unsupported(error) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
    }
    let mut names: Vec<_> = list
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(<[u8]>::to_vec)
        .collect();
    names.sort_unstable();
    Ok(names)
}

/// Reads an extended attribute of `name` in `dir`; `None` when it has none of that name.
pub fn xattr(dir: impl AsFd, name: &Path, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let path = proc_child(dir, name);
    let mut value = Vec::with_capacity(256);
    loop {
        match rustix::fs::lgetxattr(&path, key, rustix::buffer::spare_capacity(&mut value)) {
            Ok(_) => return Ok(Some(value)),
            Err(Errno::RANGE) if value.capacity() < XATTR_VALUE_MAX => {
                value = Vec::with_capacity(XATTR_VALUE_MAX)
            }
            Err(error) if is_unsupported(error) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sets an extended attribute of `name` in `dir`.
pub fn set_xattr(dir: impl AsFd, name: &Path, key: &[u8], value: &[u8]) -> io::Result<()> {
    Ok(rustix::fs::lsetxattr(
        proc_child(dir, name),
        key,
        value,
        XattrFlags::empty(),
    )?)
}

/// Sets owner and group of `name` in `dir`.
pub fn set_owner(dir: impl AsFd, name: impl rustix::path::Arg, uid: u32, gid: u32) -> io::Result<()> {
    // The highest number means "leave" to the kernel, so it cannot be an owner.
    if uid == u32::MAX || gid == u32::MAX {
        return Err(Errno::INVAL.into());
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    Ok(rustix::fs::chownat(
        dir,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Sets the twelve permission bits of `name` in `dir`, which must not be a symbolic link (`ELOOP`).
pub fn set_mode(dir: impl AsFd, name: &Path, mode: u32) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    if stat_fd(&fd)?.is_symlink() {
        return Err(Errno::LOOP.into());
    }
    Ok(rustix::fs::chmod(
        proc_path(&fd),
        Mode::from_raw_mode(mode & 0o7777),
    )?)
}

/// Sets access and modification time of `name` in `dir`; `None` leaves one as it is.
pub fn set_times(
    dir: impl AsFd,
    name: impl rustix::path::Arg,
    atime: Option<Timestamp>,
    mtime: Option<Timestamp>,
) -> io::Result<()> {
    let omit = Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_OMIT,
    };
    let times = Timestamps {
        last_access: atime.map_or(omit, Timestamp::timespec),
        last_modification: mtime.map_or(omit, Timestamp::timespec),
    };
    Ok(rustix::fs::utimensat(
        dir,
        name,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Makes a directory with exactly `mode`, whatever the umask.
pub fn make_dir(dir: impl AsFd, name: &Path, mode: u32) -> io::Result<()> {
    rustix::fs::mkdirat(&dir, name, Mode::from_raw_mode(mode & 0o777))?;
    if stat_at(&dir, name)?.permissions() != mode & 0o7777 {
        set_mode(&dir, name, mode)?;
    }
    Ok(())
}

/// Makes a device, pipe or empty file with exactly `mode`.
pub fn make_special(
    dir: impl AsFd,
    name: &Path,
    kind: FileType,
    mode: u32,
    rdev: (u32, u32),
) -> io::Result<()> {
    let kind = match kind {
        FileType::CharDevice => rustix::fs::FileType::CharacterDevice,
        FileType::BlockDevice => rustix::fs::FileType::BlockDevice,
        FileType::Fifo => rustix::fs::FileType::Fifo,
        _ => rustix::fs::FileType::RegularFile,
    };
    let dev = rustix::fs::makedev(rdev.0, rdev.1);
    rustix::fs::mknodat(&dir, name, kind, Mode::from_raw_mode(mode & 0o777), dev)?;
    set_mode(&dir, name, mode)
}

/// Creates the regular file `name` in `dir` for writing; it must not exist.
pub fn create_file(dir: impl AsFd, name: &Path) -> io::Result<File> {
    create_file_as(dir, name, 0o600)
}

/// Does what [`create_file`] does, with a mode, of which the umask takes away.
pub fn create_file_as(dir: impl AsFd, name: &Path, mode: u32) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(mode))?.into())
}

/// Removes `name` in `dir` with all below it. A name that does not exist is a success.
///
/// Takes bounded descriptors and stack however deep the tree is: what lies deep is first lifted up.
pub fn remove_all(dir: impl AsFd, name: &Path) -> io::Result<()> {
    let dir = dir.as_fd();
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let top = match open_dir_nofollow(dir, name.as_os_str().as_bytes()) {
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR) => return Err(Errno::PERM.into()),
        done => done?,
    };
    let mut lifted = 0;
    let mut stack: Vec<(OwnedFd, Vec<u8>)> = Vec::new();
    let mut current = top.try_clone()?;
    loop {
        if let Some(child) = remove_files(&current)? {
            if stack.len() >= REMOVE_DEPTH {
                let away = format!(".lifted-{lifted}");
                lifted += 1;
                rustix::fs::renameat(&current, &*child, &top, &*away)?;
                continue;
            }
            let next = open_dir_nofollow(&current, &child)?;
            stack.push((std::mem::replace(&mut current, next), child));
        } else if let Some((parent, child)) = stack.pop() {
            rustix::fs::unlinkat(&parent, &*child, AtFlags::REMOVEDIR)?;
            current = parent;
        } else {
            break;
        }
    }
    match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn open_dir_nofollow(dir: impl AsFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

/// Removes all but directories from `dir`; returns a directory that is left.
fn remove_files(dir: &OwnedFd) -> io::Result<Option<Vec<u8>>> {
    let mut left = None;
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name: &CStr = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        if entry.file_type() == rustix::fs::FileType::Directory {
            match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(_) => left = Some(name.to_bytes().to_vec()),
            }
            continue;
        }
        match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => left = Some(name.to_bytes().to_vec()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(left)
}

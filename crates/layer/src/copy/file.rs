//! Copying one file: bytes, holes, owners, modes, times, attributes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timestamps, Uid};
use rustix::io::Errno;

use crate::tree::{FileType, Stat, Timestamp, at};

/// Most bytes one system call copies.
const CHUNK_MAX: u64 = 1 << 30;

/// Bytes that are read at once where the kernel does not copy by itself.
const COPY_BUFFER: usize = 128 << 10;

/// What a copied file gets; made from the source's [`Stat`] and what the caller wants different.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    pub(super) owner: Option<(u32, u32)>,
    pub(super) mode: u32,
    pub(super) atime: Timestamp,
    pub(super) mtime: Timestamp,
}

impl Look {
    pub(super) fn of(stat: &Stat) -> Self {
        let owner = Some((stat.uid, stat.gid));
        Self {
            owner,
            mode: stat.permissions(),
            atime: stat.atime,
            mtime: stat.mtime,
        }
    }
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) dir: BorrowedFd<'a>,
    pub(super) name: &'a Path,
}

/// Copies all but directories: `name` in `from` to the new name `target` in `to`, with owner, mode, times and attributes.
/// `stat` is the source's.
pub fn copy_file(from: impl AsFd, name: &Path, stat: &Stat, to: impl AsFd, target: &Path) -> io::Result<()> {
    let source = Place {
        dir: from.as_fd(),
        name,
    };
    create(
        source,
        stat,
        Place {
            dir: to.as_fd(),
            name: target,
        },
        Look::of(stat),
    )
}

/// Gives `target` in `to` the owner, mode, times and attributes of `name` in `from`, which `stat` describes. Attributes
/// that cannot be set are left out.
pub fn copy_metadata(
    from: impl AsFd,
    name: &Path,
    stat: &Stat,
    to: impl AsFd,
    target: &Path,
) -> io::Result<()> {
    let source = Place {
        dir: from.as_fd(),
        name,
    };
    let target = Place {
        dir: to.as_fd(),
        name: target,
    };
    describe(target, Look::of(stat), stat.is_symlink())?;
    copy_xattrs(source, target);
    Ok(())
}

/// Creates a file of any kind but a directory and gives it `look` and the source's attributes.
pub(super) fn create(source: Place<'_>, stat: &Stat, target: Place<'_>, look: Look) -> io::Result<()> {
    match stat.file_type() {
        FileType::Regular => {
            let input = open_source(source)?;
            let output = at::create_file_as(target.dir, target.name, look.mode & 0o777)?;
            copy_data(&input, &output, stat)?;
            describe_file(&output, look)?;
            // Most have none, and asking for them by name is slow.
            if matches!(rustix::fs::flistxattr(&input, &mut [0_u8; 64][..]), Ok(0)) {
                return Ok(());
            }
        }
        FileType::Symlink => {
            let text = at::read_link(source.dir, source.name)?;
            rustix::fs::symlinkat(&*text, target.dir, target.name)?;
            describe(target, look, true)?;
        }
        kind @ (FileType::CharDevice | FileType::BlockDevice | FileType::Fifo) => {
            at::make_special(target.dir, target.name, kind, look.mode, stat.rdev)?;
            describe(target, look, false)?;
        }
        // A socket without its listener is only a name.
        FileType::Socket => {
            at::make_special(target.dir, target.name, FileType::Regular, look.mode, (0, 0))?;
            describe(target, look, false)?;
        }
        FileType::Directory | FileType::Unknown => return Err(io::ErrorKind::Unsupported.into()),
    }
    copy_xattrs(source, target);
    Ok(())
}

fn open_source(source: Place<'_>) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd: OwnedFd = rustix::fs::openat(source.dir, source.name, flags, Mode::empty())?;
    if at::stat_fd(&fd)?.file_type() != FileType::Regular {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(fd.into())
}

/// Sets owner, mode and times of a new file through the file itself; most have the right owner and mode already, and
/// setting them again is slow.
fn describe_file(file: &File, look: Look) -> io::Result<()> {
    let made = at::stat_fd(file)?;
    let mut keeps_mode = made.permissions() == look.mode & 0o7777;
    if let Some((uid, gid)) = look.owner {
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::INVAL.into());
        }
        if (made.uid, made.gid) != (uid, gid) {
            rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
            keeps_mode = false;
        }
    }
    if !keeps_mode {
        rustix::fs::fchmod(file, Mode::from_raw_mode(look.mode & 0o7777))?;
    }
    let times = Timestamps {
        last_access: look.atime.timespec(),
        last_modification: look.mtime.timespec(),
    };
    Ok(rustix::fs::futimens(file, &times)?)
}

/// Sets owner, mode and times by name.
pub(super) fn describe(target: Place<'_>, look: Look, is_symlink: bool) -> io::Result<()> {
    if let Some((uid, gid)) = look.owner {
        at::set_owner(target.dir, target.name, uid, gid)?;
    }
    if !is_symlink {
        at::set_mode(target.dir, target.name, look.mode)?;
    }
    at::set_times(target.dir, target.name, Some(look.atime), Some(look.mtime))
}

/// Copies extended attributes; what cannot be read or set is left out, as BuildKit does. Left out always: the marks of
/// overlayfs, and the host's SELinux label.
pub(super) fn copy_xattrs(source: Place<'_>, target: Place<'_>) {
    let Ok(keys) = at::xattr_names(source.dir, source.name) else {
        return;
    };
    for key in keys {
        if key == b"security.selinux"
            || key.starts_with(b"trusted.overlay.")
            || key.starts_with(b"user.overlay.")
        {
            continue;
        }
        if let Ok(Some(value)) = at::xattr(source.dir, source.name, &key) {
            // The file system may not take this one; the others still count.
            let _ = at::set_xattr(target.dir, target.name, &key, &value);
        }
    }
}

/// Makes another name of a file that was copied before.
pub(super) fn link(from: Place<'_>, to: Place<'_>) -> io::Result<()> {
    Ok(rustix::fs::linkat(
        from.dir,
        from.name,
        to.dir,
        to.name,
        AtFlags::empty(),
    )?)
}

/// Copies a file's bytes: by sharing blocks, or run by run without its holes.
fn copy_data(input: &File, output: &File, stat: &Stat) -> io::Result<()> {
    if stat.size_bytes == 0 {
        return Ok(());
    }
    if rustix::fs::ioctl_ficlone(output, input).is_ok() {
        return Ok(());
    }
    if stat.allocated_bytes < stat.size_bytes {
        return copy_sparse(input, output, stat.size_bytes);
    }
    copy_run(input, output, 0, stat.size_bytes)
}

fn copy_sparse(input: &File, output: &File, size: u64) -> io::Result<()> {
    output.set_len(size)?;
    let mut offset = 0;
    while offset < size {
        let start = match rustix::fs::seek(input, rustix::fs::SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return copy_run(input, output, offset, size - offset),
            Err(error) => return Err(error.into()),
        };
        let end = match rustix::fs::seek(input, rustix::fs::SeekFrom::Hole(start)) {
            Ok(end) => end.min(size),
            Err(_) => size,
        };
        copy_run(input, output, start, end.saturating_sub(start))?;
        offset = end.max(start + 1);
    }
    Ok(())
}

/// Copies `length` bytes at `offset`; a file that ends before is copied as far as it goes.
fn copy_run(input: &File, output: &File, offset: u64, length: u64) -> io::Result<()> {
    let (mut from, mut to) = (offset, offset);
    let end = offset + length;
    while from < end {
        let chunk = usize::try_from((end - from).min(CHUNK_MAX)).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(input, Some(&mut from), output, Some(&mut to), chunk) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            // Not between these file systems, or not for these files.
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::PERM | Errno::IO) => {
                return copy_bytes(input, output, from, end - from);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_bytes(mut input: &File, mut output: &File, offset: u64, length: u64) -> io::Result<()> {
    input.seek(SeekFrom::Start(offset))?;
    output.seek(SeekFrom::Start(offset))?;
    let len = usize::try_from(length).unwrap_or(COPY_BUFFER).min(COPY_BUFFER);
    let mut buffer = vec![0; len];
    let mut input = input.take(length);
    loop {
        let count = input.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        output.write_all(&buffer[..count])?;
    }
}

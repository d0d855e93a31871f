//! Writing a client's entries below a directory. No path here follows a symbolic link or leaves the directory.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use build::session::FileStat;
use bytes::Bytes;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::order::{
    MODE_CHAR, MODE_DEVICE, MODE_DIR, MODE_FIFO, MODE_SETGID, MODE_SETUID, MODE_STICKY, MODE_SYMLINK,
    is_hard_link,
};
use super::receive::TransferError;

/// A directory tree being brought up to date.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    /// The directory that was used last: entries come directory by directory.
    last: Option<(String, OwnedFd)>,
}

impl Tree {
    /// Works on the tree below `root`.
    pub fn new(root: impl AsFd) -> io::Result<Self> {
        Ok(Self {
            root: root.as_fd().try_clone_to_owned()?,
            last: None,
        })
    }

    /// Opens an entry's directory and splits off its name.
    fn parent<'a>(&mut self, path: &'a str) -> Result<(BorrowedFd<'_>, &'a str), TransferError> {
        let (dir, name) = path.rsplit_once('/').unwrap_or((".", path));
        if self.last.as_ref().is_none_or(|(last, _)| last != dir) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            let fd = rustix::fs::openat2(&self.root, dir, flags, Mode::empty(), resolve)
                .map_err(at(dir, "open"))?;
            self.last = Some((dir.to_owned(), fd));
        }
        let (_, fd) = self
            .last
            .as_ref()
            .ok_or_else(|| failure(dir, "open", Errno::NOENT))?;
        Ok((fd.as_fd(), name))
    }

    /// Removes an entry and all below it; an entry that is not there is a success.
    pub fn remove(&mut self, path: &str) -> Result<(), TransferError> {
        let (dir, name) = self.parent(path)?;
        match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(failure(path, "remove", error)),
        }
        remove_dir(dir, name).map_err(at(path, "remove"))?;
        self.last = None;
        Ok(())
    }

    /// Makes a directory, or keeps the one that is there.
    pub fn directory(&mut self, stat: &FileStat, exists: bool) -> Result<(), TransferError> {
        if !exists {
            self.remove(&stat.path)?;
            let (dir, name) = self.parent(&stat.path)?;
            rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700)).map_err(at(&stat.path, "mkdir"))?;
        }
        self.attributes(stat)
    }

    /// Makes a symbolic link, hard link, device or pipe in place of what is there. Sockets cannot be made and are left
    /// out; returns whether the entry was made.
    pub fn special(&mut self, stat: &FileStat) -> Result<bool, TransferError> {
        self.remove(&stat.path)?;
        let path = &stat.path;
        if is_hard_link(stat) {
            return self.hard_link(stat).map(|()| true);
        }
        let (dir, name) = self.parent(path)?;
        if stat.mode & MODE_SYMLINK != 0 {
            rustix::fs::symlinkat(stat.linkname.as_str(), dir, name).map_err(at(path, "symlink"))?;
        } else if stat.mode & (MODE_DEVICE | MODE_FIFO) != 0 {
            let kind = match stat.mode {
                mode if mode & MODE_FIFO != 0 => FileType::Fifo,
                mode if mode & MODE_CHAR != 0 => FileType::CharacterDevice,
                _ => FileType::BlockDevice,
            };
            let part = |number: i64| u32::try_from(number).map_err(|_| failure(path, "mknod", Errno::INVAL));
            let device = rustix::fs::makedev(part(stat.dev_major)?, part(stat.dev_minor)?);
            rustix::fs::mknodat(dir, name, kind, Mode::from_raw_mode(0o600), device)
                .map_err(at(path, "mknod"))?;
        } else {
            return Ok(false);
        }
        self.attributes(stat)?;
        Ok(true)
    }

    fn hard_link(&mut self, stat: &FileStat) -> Result<(), TransferError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let from = stat.linkname.as_str();
        let (from_dir, from_name) = from.rsplit_once('/').unwrap_or((".", from));
        let from_dir = rustix::fs::openat2(
            &self.root,
            from_dir,
            flags | OFlags::DIRECTORY,
            Mode::empty(),
            resolve,
        )
        .map_err(at(from, "open"))?;
        let (dir, name) = self.parent(&stat.path)?;
        rustix::fs::linkat(&from_dir, from_name, dir, name, AtFlags::empty()).map_err(at(&stat.path, "link"))
    }

    /// Makes an empty file in place of what is there. Its attributes are set by [`Tree::finish_file`].
    pub fn create_file(&mut self, path: &str) -> Result<File, TransferError> {
        self.remove(path)?;
        let (dir, name) = self.parent(path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600)).map_err(at(path, "create"))?;
        Ok(File::from(fd))
    }

    /// Opens a file made by [`Tree::create_file`] for its content.
    pub fn open_file(&mut self, path: &str) -> Result<File, TransferError> {
        let (dir, name) = self.parent(path)?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(at(path, "open"))?;
        Ok(File::from(fd))
    }

    /// Removes everything.
    pub fn clear(&mut self) -> Result<(), TransferError> {
        self.last = None;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(&self.root, ".", flags, Mode::empty()).map_err(at("/", "open"))?;
        remove_entries(&root).map_err(at("/", "remove"))
    }

    /// Gives a file whose content is complete its attributes.
    pub fn finish_file(&mut self, file: &File, stat: &FileStat) -> Result<(), TransferError> {
        let path = &stat.path;
        if stat.uid != 0 || stat.gid != 0 {
            let (uid, gid) = owner(stat);
            rustix::fs::fchown(file, Some(uid), Some(gid)).map_err(at(path, "chown"))?;
        }
        for (name, value) in settable(stat) {
            rustix::fs::fsetxattr(file, name.as_str(), value, rustix::fs::XattrFlags::empty())
                .or_else(tolerated)
                .map_err(at(path, "setxattr"))?;
        }
        rustix::fs::fchmod(file, permissions(stat)).map_err(at(path, "chmod"))?;
        rustix::fs::futimens(file, &times(stat)).map_err(at(path, "utimes"))
    }

    /// Gives anything but a file its attributes.
    fn attributes(&mut self, stat: &FileStat) -> Result<(), TransferError> {
        let path = &stat.path;
        let (dir, name) = self.parent(path)?;
        let (uid, gid) = owner(stat);
        rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(at(path, "chown"))?;
        if stat.mode & MODE_SYMLINK == 0 {
            rustix::fs::chmodat(dir, name, permissions(stat), AtFlags::empty()).map_err(at(path, "chmod"))?;
        }
        if stat.mode & MODE_DIR != 0 && !stat.xattrs.is_empty() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(at(path, "open"))?;
            for (name, value) in settable(stat) {
                rustix::fs::fsetxattr(&fd, name.as_str(), value, rustix::fs::XattrFlags::empty())
                    .or_else(tolerated)
                    .map_err(at(path, "setxattr"))?;
            }
        }
        rustix::fs::utimensat(dir, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW).map_err(at(path, "utimes"))
    }

    /// Sets a directory's time again after its entries changed.
    pub fn touch(&mut self, stat: &FileStat) -> Result<(), TransferError> {
        let (dir, name) = self.parent(&stat.path)?;
        rustix::fs::utimensat(dir, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(at(&stat.path, "utimes"))
    }
}

/// The extended attributes of an entry but for those that steer the kernel's overlays, which only this program may set.
fn settable(stat: &FileStat) -> impl Iterator<Item = (&String, &Bytes)> {
    let steers = |name: &str| name.starts_with("trusted.") || name.starts_with("user.overlay.");
    stat.xattrs.iter().filter(move |(name, _)| !steers(name))
}

/// Attributes that the file system does not know are not worth a failed build.
fn tolerated(error: Errno) -> Result<(), Errno> {
    match error {
        Errno::OPNOTSUPP | Errno::PERM => Ok(()),
        error => Err(error),
    }
}

fn remove_dir(parent: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    remove_entries(&dir)?;
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Removes all entries of a directory. Client paths are limited in length, so the depth of this recursion is too.
fn remove_entries(dir: &OwnedFd) -> Result<(), Errno> {
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let child = entry.file_name();
        if matches!(child.to_bytes(), b"." | b"..") {
            continue;
        }
        match rustix::fs::unlinkat(dir, child, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::ISDIR | Errno::PERM) => {
                let child = child.to_str().map_err(|_| Errno::ILSEQ)?;
                remove_dir(dir.as_fd(), child)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn owner(stat: &FileStat) -> (rustix::fs::Uid, rustix::fs::Gid) {
    (
        rustix::fs::Uid::from_raw(stat.uid),
        rustix::fs::Gid::from_raw(stat.gid),
    )
}

fn permissions(stat: &FileStat) -> Mode {
    let mut mode = stat.mode & 0o777;
    for (go, unix) in [
        (MODE_SETUID, 0o4000),
        (MODE_SETGID, 0o2000),
        (MODE_STICKY, 0o1000),
    ] {
        if stat.mode & go != 0 {
            mode |= unix;
        }
    }
    Mode::from_raw_mode(mode)
}

fn times(stat: &FileStat) -> Timestamps {
    let time = Timespec {
        tv_sec: stat.mod_time_ns.div_euclid(1_000_000_000),
        tv_nsec: stat.mod_time_ns.rem_euclid(1_000_000_000),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn failure(path: &str, action: &'static str, source: Errno) -> TransferError {
    TransferError::Write {
        path: path.to_owned(),
        action,
        source: source.into(),
    }
}

fn at<'a>(path: &'a str, action: &'static str) -> impl Fn(Errno) -> TransferError + 'a {
    move |source| failure(path, action, source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_that_steer_overlays_are_not_set() {
        let names = [
            "security.capability",
            "trusted.overlay.redirect",
            "user.overlay.opaque",
            "user.x",
        ];
        let stat = FileStat {
            xattrs: names.map(|name| (name.to_owned(), Bytes::new())).into(),
            ..FileStat::default()
        };
        let kept: Vec<&str> = settable(&stat).map(|(name, _)| name.as_str()).collect();
        assert_eq!(kept, ["security.capability", "user.x"]);
    }
}

//! Paths inside a root file system: resolved relative to its descriptor, never out of it, and the mount points that
//! are made there and removed again.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Most symbolic links on one path.
const MAX_LINKS: usize = 255;

/// Opens a path as a process with that root would see it.
pub(crate) fn open_in_root(root: BorrowedFd<'_>, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // Something moved while we looked.
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// A place in a tree that may or may not exist; its directory does.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) parent: OwnedFd,
    /// `None`: the root itself.
    pub(crate) name: Option<OsString>,
    /// What is there, links not followed because there are none left.
    pub(crate) stat: Option<Stat>,
    /// Where that is, from the root, without links.
    path: Vec<OsString>,
}

/// A mount point that was made for a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stub {
    /// From the root, without links; components joined by `/`.
    path: Vec<u8>,
    /// The directory's modification time, in seconds and nanoseconds, before and after.
    before: (i64, i64),
    after: (i64, i64),
}

/// Finds the place of `path`, making the directories above it (mode 0755). Links, also dangling ones, are followed inside
/// the tree. What was made is reported to `made`.
pub(crate) fn make_place(root: BorrowedFd<'_>, path: &str, made: &mut Vec<Stub>) -> io::Result<Place> {
    let mut rest: VecDeque<OsString> = components(OsStr::new(path)).collect();
    let mut stack: Vec<(OsString, OwnedFd)> = Vec::new();
    let mut links = 0;
    let top = rustix::io::fcntl_dupfd_cloexec(root, 3)?;
    let mut last = None;
    while let Some(name) = rest.pop_front() {
        last = None;
        if name == ".." {
            stack.pop();
            continue;
        }
        let parent = stack
            .last()
            .map_or(top.as_fd(), |(_, directory)| directory.as_fd());
        let stat = match rustix::fs::statat(parent, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(error.into()),
        };
        let kind = stat.as_ref().map(|stat| FileType::from_raw_mode(stat.st_mode));
        if kind == Some(FileType::Symlink) {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP.into());
            }
            let target = OsString::from_vec(rustix::fs::readlinkat(parent, &name, Vec::new())?.into_bytes());
            if target.as_bytes().starts_with(b"/") {
                stack.clear();
            }
            for part in components(&target).rev() {
                rest.push_front(part);
            }
            continue;
        }
        if rest.is_empty() && kind != Some(FileType::Directory) {
            last = Some((name, stat));
            break;
        }
        if kind.is_none() {
            let path = stack.iter().map(|(name, _)| name.clone()).chain([name.clone()]);
            make(parent, &name, true, path.collect(), made)?;
        }
        let directory = open_directory(parent, &name)?;
        stack.push((name, directory));
    }
    place(stack, top, last)
}

/// Ends the walk: `last` is what is not a directory.
fn place(
    mut stack: Vec<(OsString, OwnedFd)>,
    top: OwnedFd,
    last: Option<(OsString, Option<Stat>)>,
) -> io::Result<Place> {
    let mut path: Vec<OsString> = stack.iter().map(|(name, _)| name.clone()).collect();
    if let Some((name, stat)) = last {
        path.push(name.clone());
        let parent = stack.pop().map_or(top, |(_, directory)| directory);
        return Ok(Place {
            parent,
            name: Some(name),
            stat,
            path,
        });
    }
    let Some((name, directory)) = stack.pop() else {
        let stat = rustix::fs::fstat(&top)?;
        return Ok(Place {
            parent: top,
            name: None,
            stat: Some(stat),
            path,
        });
    };
    let stat = rustix::fs::fstat(&directory)?;
    let parent = stack.pop().map_or(top, |(_, directory)| directory);
    Ok(Place {
        parent,
        name: Some(name),
        stat: Some(stat),
        path,
    })
}

fn components(path: &OsStr) -> impl DoubleEndedIterator<Item = OsString> {
    path.as_bytes()
        .split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(|part| OsStr::from_bytes(part).to_owned())
        .collect::<Vec<_>>()
        .into_iter()
}

/// Opens a directory that is no link; mounts on it are entered.
fn open_directory(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

fn modified(directory: BorrowedFd<'_>) -> io::Result<(i64, i64)> {
    let stat = rustix::fs::statat(directory, c"", AtFlags::EMPTY_PATH)?;
    Ok(times(&stat))
}

/// The fields' types differ between architectures.
fn times(stat: &Stat) -> (i64, i64) {
    (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0))
}

/// Makes an empty directory or file. One that someone else made since we looked, as steps do that share a cache mount, is as
/// good, and is not ours to remove.
fn make(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    is_directory: bool,
    path: Vec<OsString>,
    made: &mut Vec<Stub>,
) -> io::Result<()> {
    let before = modified(parent)?;
    let mode = Mode::from_raw_mode(0o755);
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let done = match is_directory {
        true => rustix::fs::mkdirat(parent, name, mode),
        false => rustix::fs::openat(parent, name, flags, mode).map(drop),
    };
    match done {
        Ok(()) => made.push(stub(path, before, modified(parent)?)),
        Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

fn stub(path: Vec<OsString>, before: (i64, i64), after: (i64, i64)) -> Stub {
    Stub {
        path: path.join(OsStr::new("/")).into_vec(),
        before,
        after,
    }
}

impl Stub {
    /// Returns where it is, relative to the root.
    pub(crate) fn path(&self) -> &OsStr {
        OsStr::from_bytes(&self.path)
    }
}

impl Place {
    /// Whether `path` led here without any symbolic link.
    pub(crate) fn is_at(&self, path: &str) -> bool {
        components(OsStr::new(path)).eq(self.path.iter().cloned())
    }

    /// Makes an empty directory or file there unless something exists, and opens what is there (`O_PATH`).
    pub(crate) fn ensure(&self, directory: bool, made: &mut Vec<Stub>) -> io::Result<OwnedFd> {
        let Some(name) = &self.name else {
            return Ok(rustix::io::fcntl_dupfd_cloexec(&self.parent, 3)?);
        };
        if self.stat.is_none() {
            make(self.parent.as_fd(), name, directory, self.path.clone(), made)?;
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.parent, name, flags, Mode::empty())?)
    }
}

/// Makes a directory with those above it unless it exists; what is made belongs to the user.
pub(crate) fn make_working_directory(root: BorrowedFd<'_>, path: &str, uid: u32, gid: u32) -> io::Result<()> {
    match open_in_root(root, path, OFlags::PATH) {
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut made = Vec::new();
    make_place(root, path, &mut made)?.ensure(true, &mut made)?;
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    for directory in &made {
        rustix::fs::chownat(root, directory.path(), uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// Removes mount points that are still as they were made: empty. Restores the times of their directories. Nothing else
/// is touched, and nothing can lead out of the tree; what cannot be removed stays.
pub(crate) fn remove_stubs(root: BorrowedFd<'_>, stubs: &[Stub]) {
    for stub in stubs.iter().rev() {
        // A stub that vanished or was replaced is the step's own doing.
        let _ = remove_stub(root, stub);
    }
}

fn remove_stub(root: BorrowedFd<'_>, stub: &Stub) -> io::Result<()> {
    let (directory, name) = match stub.path.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => (&stub.path[..slash], &stub.path[slash + 1..]),
        None => (b".".as_slice(), stub.path.as_slice()),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let parent = rustix::fs::openat2(root, OsStr::from_bytes(directory), flags, Mode::empty(), resolve)?;
    let name = OsStr::from_bytes(name);
    let stat = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let is_directory = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => true,
        FileType::RegularFile if stat.st_size == 0 => false,
        _ => return Ok(()),
    };
    let now = modified(parent.as_fd())?;
    rustix::fs::unlinkat(
        &parent,
        name,
        if is_directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        },
    )?;
    // If nothing but the stub changed the directory, nothing did.
    let (seconds, nanoseconds) = if now == stub.after { stub.before } else { now };
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        },
    };
    Ok(rustix::fs::futimens(&parent, &times)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};
    use std::path::Path;

    use super::*;

    fn open(path: &Path) -> OwnedFd {
        std::fs::File::open(path).unwrap().into()
    }

    fn mtime(path: &Path) -> (i64, i64) {
        let metadata = std::fs::metadata(path).unwrap();
        (metadata.mtime(), metadata.mtime_nsec())
    }

    #[test]
    fn what_another_step_makes_meanwhile_is_taken_and_left() {
        let directory = tempfile::tempdir().unwrap();
        let root = open(directory.path());
        let mut made = Vec::new();
        let dir = make_place(root.as_fd(), "/dir", &mut made).unwrap();
        let file = make_place(root.as_fd(), "/file", &mut made).unwrap();
        std::fs::create_dir(directory.path().join("dir")).unwrap();
        std::fs::write(directory.path().join("file"), "").unwrap();
        dir.ensure(true, &mut made).unwrap();
        file.ensure(false, &mut made).unwrap();
        make(
            root.as_fd(),
            OsStr::new("dir"),
            true,
            vec!["dir".into()],
            &mut made,
        )
        .unwrap();
        assert_eq!(made, []);
    }

    #[test]
    fn stubs_are_made_inside_and_removed_without_trace() {
        let directory = tempfile::tempdir().unwrap();
        let outside = directory.path().join("outside");
        let root_path = directory.path().join("root");
        std::fs::create_dir_all(&outside).unwrap();
        std::fs::create_dir_all(root_path.join("etc")).unwrap();
        symlink("/../../outside", root_path.join("link")).unwrap();
        symlink("../run/resolve/x", root_path.join("etc/resolv.conf")).unwrap();
        let before = (mtime(&root_path), mtime(&root_path.join("etc")));
        let root = open(&root_path);

        let mut made = Vec::new();
        for (path, is_directory) in [
            ("/etc/hosts", false),
            ("/etc/resolv.conf", false),
            ("/link/deep/dir", true),
        ] {
            make_place(root.as_fd(), path, &mut made)
                .unwrap()
                .ensure(is_directory, &mut made)
                .unwrap();
        }
        assert!(root_path.join("etc/hosts").is_file());
        assert!(root_path.join("run/resolve/x").is_file());
        assert!(
            root_path.join("outside/deep/dir").is_dir(),
            "an absolute link stays inside"
        );
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);

        remove_stubs(root.as_fd(), &made);
        assert_eq!(std::fs::read_dir(&root_path).unwrap().count(), 2);
        assert!(!root_path.join("etc/hosts").exists());
        assert_eq!((mtime(&root_path), mtime(&root_path.join("etc"))), before);
    }

    #[test]
    fn what_a_step_used_stays_and_a_swapped_directory_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let root_path = directory.path().join("root");
        let outside = directory.path().join("outside");
        std::fs::create_dir_all(&root_path).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        std::fs::write(outside.join("victim"), b"").unwrap();
        let root = open(&root_path);

        let mut made = Vec::new();
        make_place(root.as_fd(), "/a/victim", &mut made)
            .unwrap()
            .ensure(false, &mut made)
            .unwrap();
        make_place(root.as_fd(), "/used", &mut made)
            .unwrap()
            .ensure(false, &mut made)
            .unwrap();
        std::fs::write(root_path.join("used"), b"x").unwrap();
        std::fs::remove_dir_all(root_path.join("a")).unwrap();
        symlink(&outside, root_path.join("a")).unwrap();

        remove_stubs(root.as_fd(), &made);
        assert!(outside.join("victim").exists());
        assert!(root_path.join("used").exists());
        assert!(root_path.join("a").is_symlink());
    }

    #[test]
    fn loops_and_files_in_the_way_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        symlink("loop", directory.path().join("loop")).unwrap();
        std::fs::write(directory.path().join("file"), b"").unwrap();
        let root = open(directory.path());
        assert!(make_place(root.as_fd(), "/loop/x", &mut Vec::new()).is_err());
        assert!(make_place(root.as_fd(), "/file/x", &mut Vec::new()).is_err());
    }
}

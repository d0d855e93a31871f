//! Resolving paths of which parts may not exist yet.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{OFlags, ResolveFlags};
use rustix::io::Errno;

use super::at;

/// Symbolic links followed in one resolution before it counts as a cycle.
const LINKS_MAX: usize = 255;
/// Longest path the kernel takes, in bytes.
const PATH_MAX: usize = 4096;

/// Splits off what is not a name: `a/./b//c` becomes `a`, `b`, `c`; `..` is kept.
fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
}

fn checked(path: &Path) -> io::Result<&[u8]> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.contains(&0) {
        return Err(Errno::INVAL.into());
    }
    if bytes.len() >= PATH_MAX {
        return Err(Errno::NAMETOOLONG.into());
    }
    Ok(bytes)
}

/// Removes `.`, `..` and the leading slash without looking at any file.
pub(crate) fn lexical(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

pub(crate) fn resolve(root: BorrowedFd<'_>, path: &Path) -> io::Result<PathBuf> {
    let bytes = checked(path)?;
    let clean = lexical(path);
    let strict = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let probe = if clean.as_os_str().is_empty() {
        Path::new(".")
    } else {
        &clean
    };
    let plain = rustix::fs::openat2(
        root,
        probe,
        OFlags::PATH | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
        strict,
    );
    let has_parent_refs = parts(bytes).any(|part| part == b"..");
    if plain.is_ok() && !has_parent_refs {
        return Ok(clean);
    }
    walk(root, bytes)
}

pub(super) fn resolve_parent(root: BorrowedFd<'_>, path: &Path) -> io::Result<PathBuf> {
    checked(path)?;
    let clean = lexical(path);
    match (clean.parent(), clean.file_name()) {
        (Some(parent), Some(name)) => Ok(resolve(root, parent)?.join(name)),
        _ => Ok(PathBuf::new()),
    }
}

fn walk(root: BorrowedFd<'_>, path: &[u8]) -> io::Result<PathBuf> {
    let mut queue: VecDeque<OsString> = parts(path)
        .map(|part| OsString::from_vec(part.to_vec()))
        .collect();
    let mut done = PathBuf::new();
    let mut links = 0;
    while let Some(part) = queue.pop_front() {
        if part == ".." {
            done.pop();
            continue;
        }
        let Some(target) = link_at(root, &done, &part)? else {
            done.push(part);
            if done.as_os_str().len() >= PATH_MAX {
                return Err(Errno::NAMETOOLONG.into());
            }
            continue;
        };
        links += 1;
        if links > LINKS_MAX {
            return Err(Errno::LOOP.into());
        }
        if target.first() == Some(&b'/') {
            done = PathBuf::new();
        }
        for part in parts(&target).rev() {
            queue.push_front(OsString::from_vec(part.to_vec()));
        }
    }
    Ok(done)
}

/// Reads the symbolic link `name` in `dir`; `None` when it is none, or nothing.
fn link_at(root: BorrowedFd<'_>, dir: &Path, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
    let parent = match at::open_beneath(root, dir, OFlags::PATH | OFlags::DIRECTORY) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        done => done?,
    };
    match rustix::fs::readlinkat(&parent, name, Vec::new()) {
        Ok(target) => Ok(Some(target.into_bytes())),
        Err(Errno::INVAL | Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

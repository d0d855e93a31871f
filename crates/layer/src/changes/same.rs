//! Deciding whether a file changed.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::path::Path;

use crate::tree::{FileType, Stat, at};

/// Compares `name` in two directories as containerd does, and its `user.*` attributes besides.
pub(super) fn is_same(
    (lower, old): (BorrowedFd<'_>, &Stat),
    (upper, new): (BorrowedFd<'_>, &Stat),
    name: &Path,
) -> io::Result<bool> {
    if old.identity() == new.identity() {
        return Ok(true);
    }
    let owners = |stat: &Stat| (stat.mode, stat.uid, stat.gid, stat.rdev);
    if owners(old) != owners(new) {
        return Ok(false);
    }
    if !new.is_dir() && (old.size_bytes, old.mtime.seconds) != (new.size_bytes, new.mtime.seconds) {
        return Ok(false);
    }
    if !new.is_symlink() && !is_same_xattrs(lower, upper, name)? {
        return Ok(false);
    }
    if new.is_dir() {
        return Ok(true);
    }
    if old.mtime.nanoseconds != new.mtime.nanoseconds {
        return Ok(false);
    }
    if new.mtime.nanoseconds != 0 {
        return Ok(true);
    }
    // Times of whole seconds may have been cut: only the content tells.
    match new.file_type() {
        FileType::Symlink => Ok(at::read_link(lower, name)? == at::read_link(upper, name)?),
        FileType::Regular if new.size_bytes > 0 => is_same_content(
            at::open_regular_beneath(lower, name)?,
            at::open_regular_beneath(upper, name)?,
        ),
        _ => Ok(true),
    }
}

/// Tells which attributes belong to a layer: capabilities, and what users set.
pub(crate) fn is_layer_xattr(key: &[u8]) -> bool {
    key == b"security.capability" || key.starts_with(b"user.") && !key.starts_with(b"user.overlay.")
}

/// Attributes of a file that belong to a layer, by name.
type LayerXattrs = Vec<(Vec<u8>, Option<Vec<u8>>)>;

fn is_same_xattrs(lower: BorrowedFd<'_>, upper: BorrowedFd<'_>, name: &Path) -> io::Result<bool> {
    let read = |dir: BorrowedFd<'_>| -> io::Result<LayerXattrs> {
        let keys = at::xattr_names(dir, name)?
            .into_iter()
            .filter(|key| is_layer_xattr(key));
        keys.map(|key| at::xattr(dir, name, &key).map(|value| (key, value)))
            .collect()
    };
    Ok(read(lower)? == read(upper)?)
}

fn is_same_content(mut old: File, mut new: File) -> io::Result<bool> {
    const CHUNK: u64 = 64 * 1024;
    let (mut a, mut b) = (Vec::new(), Vec::new());
    loop {
        a.clear();
        b.clear();
        (&mut old).take(CHUNK).read_to_end(&mut a)?;
        (&mut new).take(CHUNK).read_to_end(&mut b)?;
        if a != b {
            return Ok(false);
        }
        if a.is_empty() {
            return Ok(true);
        }
    }
}

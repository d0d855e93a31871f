//! Copying a whole tree.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::CopyError;
use super::file::{self, Look, Place};
use crate::tree::{Root, TreeContext, at};

/// Copies the whole tree `from` into the empty directory `to` with everything it has: owners, times, attributes, hard
/// links, holes, devices. Blocks are shared where the file system can.
pub fn copy_tree(from: &Root, to: &Root) -> Result<(), CopyError> {
    let here = Path::new(".");
    let source = at::open_dir_beneath(from, Path::new("")).on("open", here)?;
    let target = at::open_dir_beneath(to, Path::new("")).on("open", here)?;
    let mut tree = Tree {
        to: target.as_fd(),
        links: BTreeMap::new(),
    };
    tree.dir(source.as_fd(), target.as_fd(), &mut PathBuf::new())?;
    let stat = at::stat_fd(&source).on("lstat", here)?;
    finish_dir(
        Place {
            dir: source.as_fd(),
            name: here,
        },
        &stat,
        Place {
            dir: target.as_fd(),
            name: here,
        },
    )
    .on("chmod", here)?;
    Ok(())
}

struct Tree<'a> {
    to: BorrowedFd<'a>,
    /// Where files with several names were copied to first.
    links: BTreeMap<(u64, u64), PathBuf>,
}

impl Tree<'_> {
    fn dir(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &mut PathBuf) -> Result<(), CopyError> {
        at::check_depth(path).on("open", path)?;
        for name in at::list(from).on("readdirent", path)? {
            path.push(&name);
            self.name(from, to, Path::new(&name), path)?;
            path.pop();
        }
        Ok(())
    }

    fn name(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &Path,
        path: &mut PathBuf,
    ) -> Result<(), CopyError> {
        let stat = at::stat_at(from, name).on("lstat", path)?;
        let (source, target) = (Place { dir: from, name }, Place { dir: to, name });
        if stat.is_dir() {
            at::make_dir(to, name, 0o700).on("mkdir", path)?;
            let below = at::open_dir_beneath(from, name).on("open", path)?;
            let above = at::open_dir_beneath(to, name).on("open", path)?;
            self.dir(below.as_fd(), above.as_fd(), path)?;
            return Ok(finish_dir(source, &stat, target).on("chmod", path)?);
        }
        if stat.is_linked() {
            if let Some(first) = self.links.get(&stat.identity()) {
                match self.link(first, target) {
                    // The file system allows no more links: one more copy.
                    Err(error) if error.raw_os_error() == Some(Errno::MLINK.raw_os_error()) => {}
                    done => return Ok(done.on("link", path)?),
                }
            } else {
                self.links.insert(stat.identity(), path.clone());
            }
        }
        Ok(file::create(source, &stat, target, Look::of(&stat)).on("copy", path)?)
    }

    fn link(&self, first: &Path, target: Place<'_>) -> io::Result<()> {
        let dir = first.parent().unwrap_or(Path::new(""));
        let dir = at::open_beneath(self.to, dir, OFlags::PATH | OFlags::DIRECTORY)?;
        let name = Path::new(first.file_name().unwrap_or_default());
        file::link(
            Place {
                dir: dir.as_fd(),
                name,
            },
            target,
        )
    }
}

fn finish_dir(source: Place<'_>, stat: &crate::tree::Stat, target: Place<'_>) -> io::Result<()> {
    file::copy_xattrs(source, target);
    file::describe(target, Look::of(stat), false)
}

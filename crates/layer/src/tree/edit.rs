//! Changing a tree: LLB's mkdir, mkfile, symlink and rm.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{FileType, Root, Timestamp, TreeContext, TreeError, at};

/// Owner and times given to what a primitive creates.
#[derive(Debug, Clone, Copy, Default)]
pub struct Attributes {
    /// Owner and group; `None` leaves the creator's.
    pub owner: Option<(u32, u32)>,
    /// Both times; `None` leaves now.
    pub time: Option<Timestamp>,
}

impl Attributes {
    fn set(&self, dir: impl AsFd, name: &OsStr) -> io::Result<()> {
        if let Some((uid, gid)) = self.owner {
            at::set_owner(&dir, name, uid, gid)?;
        }
        match self.time {
            Some(time) => at::set_times(&dir, name, Some(time), Some(time)),
            None => Ok(()),
        }
    }
}

impl Root {
    /// Opens the directory of a resolved path and returns it with the last name. Fails with `EEXIST` for the root.
    pub(crate) fn parent_of<'p>(&self, resolved: &'p Path) -> io::Result<(OwnedFd, &'p OsStr)> {
        match (resolved.parent(), resolved.file_name()) {
            (Some(parent), Some(name)) => Ok((
                at::open_beneath(self.as_fd(), parent, OFlags::PATH | OFlags::DIRECTORY)?,
                name,
            )),
            _ => Err(Errno::EXIST.into()),
        }
    }

    /// Makes a directory. With `parents` the missing ones too, all with the permissions of `mode` (nine bits) and with
    /// `attributes`; then what exists must be a directory. Without, a path that exists is left as it is.
    pub fn mkdir(
        &self,
        path: &Path,
        mode: u32,
        parents: bool,
        attributes: Attributes,
    ) -> Result<(), TreeError> {
        let resolved = self.resolve(path)?;
        if parents {
            let created = self.make_dirs(&resolved, mode, attributes).on("mkdir", path)?;
            return self.settle_dirs(&created, attributes).on("chtimes", path);
        }
        let (dir, name) = match self.parent_of(&resolved) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            done => done.on("mkdir", path)?,
        };
        match at::make_dir(&dir, Path::new(name), mode & 0o777) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            done => done.and_then(|()| attributes.set(&dir, name)).on("mkdir", path),
        }
    }

    /// Makes the missing directories of a resolved path and returns them, outermost first.
    pub(crate) fn make_dirs(
        &self,
        resolved: &Path,
        mode: u32,
        attributes: Attributes,
    ) -> io::Result<Vec<PathBuf>> {
        let mut missing = Vec::new();
        let mut current = resolved;
        loop {
            match at::open_beneath(self.as_fd(), current, OFlags::PATH | OFlags::NOFOLLOW)
                .and_then(at::stat_fd)
            {
                Ok(stat) if stat.is_dir() => break,
                Ok(_) => return Err(Errno::NOTDIR.into()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(current),
                Err(error) => return Err(error),
            }
            current = current.parent().ok_or(Errno::NOENT)?;
        }
        let mut created = Vec::new();
        for path in missing.into_iter().rev() {
            let (dir, name) = self.parent_of(path)?;
            match at::make_dir(&dir, Path::new(name), mode & 0o777) {
                // Made by someone else meanwhile.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                done => done?,
            }
            attributes.set(&dir, name)?;
            created.push(path.to_owned());
        }
        Ok(created)
    }

    /// Gives created directories their times again, which filling them has changed.
    pub(crate) fn settle_dirs(&self, created: &[PathBuf], attributes: Attributes) -> io::Result<()> {
        let Some(time) = attributes.time else {
            return Ok(());
        };
        for path in created.iter().rev() {
            let (dir, name) = self.parent_of(path)?;
            at::set_times(&dir, name, Some(time), Some(time))?;
        }
        Ok(())
    }

    /// Writes a file with the permissions of `mode` (nine bits). One that exists is truncated and keeps its mode. What
    /// exists and is no regular file is refused: a device or a pipe of a foreign tree is never written to.
    pub fn mkfile(
        &self,
        path: &Path,
        data: &[u8],
        mode: u32,
        attributes: Attributes,
    ) -> Result<(), TreeError> {
        let resolved = self.resolve(path)?;
        let write = || -> io::Result<()> {
            let (dir, name) = match self.parent_of(&resolved) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(Errno::ISDIR.into()),
                done => done?,
            };
            let file = match at::create_file(&dir, Path::new(name)) {
                Ok(file) => {
                    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(mode & 0o777))?;
                    file
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => reopen_for_writing(&dir, name)?,
                Err(error) => return Err(error),
            };
            file.write_all_at(data, 0)?;
            drop(file);
            attributes.set(&dir, name)
        };
        write().on("open", path)
    }

    /// Makes a symbolic link at `path` with the text `target`, which is not looked at.
    pub fn symlink(&self, target: &Path, path: &Path, attributes: Attributes) -> Result<(), TreeError> {
        let resolved = self.resolve(path)?;
        let link = || -> io::Result<()> {
            let (dir, name) = self.parent_of(&resolved)?;
            rustix::fs::symlinkat(target, &dir, name)?;
            attributes.set(&dir, name)
        };
        link().on("symlink", path)
    }

    /// Removes `path` and all below it; a symbolic link itself, not what it points at. With `wildcards` every match of the
    /// pattern, which may be none.
    pub fn remove(&self, path: &Path, wildcards: bool, allow_not_found: bool) -> Result<(), TreeError> {
        let targets = if wildcards {
            self.wildcard(path, false)?
        } else {
            vec![path.to_owned()]
        };
        for target in targets {
            let resolved = self.resolve_parent(&target)?;
            let remove = || -> io::Result<()> {
                let (dir, name) = match self.parent_of(&resolved) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidInput,
                            "cannot remove the root",
                        ));
                    }
                    Err(error) if allow_not_found && error.kind() == io::ErrorKind::NotFound => return Ok(()),
                    done => done?,
                };
                if !allow_not_found {
                    at::stat_at(&dir, name)?;
                }
                at::remove_all(&dir, Path::new(name))
            };
            remove().on("rm", &target)?;
        }
        Ok(())
    }
}

fn reopen_for_writing(dir: &OwnedFd, name: &OsStr) -> io::Result<std::fs::File> {
    let fd = at::open_beneath(dir, Path::new(name), OFlags::PATH | OFlags::NOFOLLOW)?;
    match at::stat_fd(&fd)?.file_type() {
        FileType::Regular => {}
        FileType::Directory => return Err(Errno::ISDIR.into()),
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
    }
    std::fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(at::proc_path(&fd))
}

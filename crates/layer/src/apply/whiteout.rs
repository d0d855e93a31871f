//! Deletions: `.wh.name` and `.wh..wh..opq`.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::entry::{EntryContext, Parent, Unpacker, invalid};
use super::{ApplyError, Whiteouts};
use crate::tar::Header;
use crate::tree::{FileType, at};

const PREFIX: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

impl Unpacker<'_> {
    /// Carries out the whiteout `name` in `parent`.
    pub(super) fn whiteout(
        &mut self,
        header: &Header,
        parent: &Parent,
        name: &OsStr,
    ) -> Result<(), ApplyError> {
        let name = name.as_bytes();
        let overlay = self.options.whiteouts != Whiteouts::Remove;
        if name == OPAQUE {
            return match (overlay, parent.resolved.as_os_str().is_empty()) {
                (false, _) => self
                    .empty_dir(&parent.fd, &parent.resolved)
                    .during("empty", header),
                // An overlay's own root is never opaque: each name below gets its mark.
                (true, true) => self.hide_all(&parent.fd).during("hide what is below", header),
                (true, false) => self
                    .make_opaque(&parent.fd, Path::new("."))
                    .during("setxattr", header),
            };
        }
        let target = name.strip_prefix(PREFIX).unwrap_or_default();
        if matches!(target, b"" | b"." | b"..") {
            return Err(invalid(header, "invalid whiteout name"));
        }
        if target.starts_with(PREFIX) {
            return Ok(()); // AUFS's own bookkeeping
        }
        let target = Path::new(OsStr::from_bytes(target));
        if overlay {
            self.hide(&parent.fd, target).during("mknod", header)
        } else if self.is_unpacked(&parent.resolved.join(target)) {
            // Whiteouts speak of the layers below; this layer brought the name back.
            Ok(())
        } else {
            at::remove_all(&parent.fd, target).during("remove", header)
        }
    }

    /// Reports whether this layer brought `path` or something in it.
    fn is_unpacked(&self, path: &Path) -> bool {
        self.unpacked
            .range(path.to_owned()..)
            .next()
            .is_some_and(|next| next.starts_with(path))
    }

    /// Removes from a directory all that this layer did not bring.
    fn empty_dir(&self, dir: &OwnedFd, path: &Path) -> io::Result<()> {
        for name in at::list(dir)? {
            let child = path.join(&name);
            if !self.is_unpacked(&child) {
                at::remove_all(dir, Path::new(&name))?;
            } else if at::stat_at(dir, &*name)?.is_dir() {
                // A directory that is in both: what else is in it came from below.
                let fd = at::open_dir_beneath(dir, Path::new(&name))?;
                self.empty_dir(&fd, &child)?;
            }
        }
        Ok(())
    }

    /// Marks a directory of an upper directory so that nothing below it shows.
    pub(super) fn make_opaque(&self, dir: impl AsFd, name: &Path) -> io::Result<()> {
        let key: &[u8] = match self.options.whiteouts {
            Whiteouts::OverlayUser => b"user.overlay.opaque",
            _ => b"trusted.overlay.opaque",
        };
        at::set_xattr(dir, name, key, b"y")
    }

    /// Marks one name of an upper directory as deleted.
    fn hide(&self, dir: &OwnedFd, name: &Path) -> io::Result<()> {
        match at::try_stat_at(dir, name)? {
            None => at::make_special(dir, name, FileType::CharDevice, 0, (0, 0)),
            // This layer brought the name, which hides what is below; a directory has to be told.
            Some(stat) if stat.is_dir() => self.make_opaque(dir, name),
            Some(_) => Ok(()),
        }
    }

    fn hide_all(&self, root: &OwnedFd) -> io::Result<()> {
        for below in &self.options.parents {
            let below: BorrowedFd<'_> = below.as_fd();
            let dir = at::open_beneath(below, &PathBuf::new(), OFlags::RDONLY | OFlags::DIRECTORY)?;
            for name in at::list(&dir)? {
                if !at::stat_at(&dir, &*name)?.is_whiteout() {
                    self.hide(root, Path::new(&name))?;
                }
            }
        }
        Ok(())
    }
}

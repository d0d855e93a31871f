//! Room kept for the time when the disk is full: without it not even a deletion could be written down.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

/// Bytes kept: more than the pages of a large commit.
const RESERVE_BYTES: u64 = 4 << 20;

/// A file that takes room to give it away.
#[derive(Clone, Debug)]
pub(crate) struct Reserve {
    path: PathBuf,
}

impl Reserve {
    pub fn new(root: &Path) -> Self {
        Self {
            path: root.join("reserve"),
        }
    }

    /// Takes the room if it is not taken and there is plenty. What goes wrong is no failure: there is just less to give.
    pub fn take(&self) {
        if self.path.exists() || !self.has_plenty() {
            return;
        }
        let mut options = OpenOptions::new();
        options.write(true).create(true).mode(0o600);
        let taken = options.open(&self.path).and_then(|file| {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES).map_err(io::Error::from)
        });
        if let Err(error) = taken {
            tracing::debug!(%error, path = %self.path.display(), "no room can be reserved");
            self.give();
        }
    }

    fn has_plenty(&self) -> bool {
        let dir = self.path.parent().unwrap_or(&self.path);
        rustix::fs::statvfs(dir)
            .is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) > 8 * RESERVE_BYTES)
    }

    /// Gives the room away.
    pub fn give(&self) {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, path = %self.path.display(), "reserved room cannot be given away");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_taken_once_and_given_away() {
        let dir = tempfile::tempdir().expect("a directory");
        let reserve = Reserve::new(dir.path());
        reserve.give();
        reserve.take();
        reserve.take();
        let size = fs::metadata(dir.path().join("reserve")).map(|metadata| metadata.len());
        assert_eq!(size.ok(), Some(RESERVE_BYTES));
        reserve.give();
        assert!(!dir.path().join("reserve").exists());
    }
}

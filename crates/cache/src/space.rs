//! The database's file, with room kept for it: on a full disk nothing can be deleted unless that can be written first.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// Room that the file system promises to the file beyond its end. A transaction that deletes needs some kilobytes; this
/// lasts for thousands on a disk that stays full, and for writing down anew what a refused transaction left in memory.
const KEPT_BYTES: u64 = 8 << 20;

/// A file whose blocks are taken from the disk before they are needed, where the file system can do that.
#[derive(Debug)]
pub(crate) struct RoomyFile {
    file: File,
    /// The room could not be taken when it was last tried.
    lacks: AtomicBool,
}

impl RoomyFile {
    /// Opens or creates the file and takes its room.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let len = file.metadata()?.len();
        let this = Self {
            file,
            lacks: AtomicBool::new(false),
        };
        this.keep_room(len);
        Ok(this)
    }

    /// Takes the blocks up to `len` and the room behind it. On a full disk the room that was taken before lasts a while.
    fn keep_room(&self, len: u64) {
        let taken = rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, len + KEPT_BYTES);
        let lacks = match taken {
            Ok(()) => false,
            // Some file systems promise nothing; asking again is in vain.
            Err(Errno::OPNOTSUPP) => false,
            Err(_) => true,
        };
        self.lacks.store(lacks, Ordering::Relaxed);
    }
}

impl redb::StorageBackend for RoomyFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        // Growing does not give back what lies behind the end, shrinking does.
        self.keep_room(len);
        let shrinks = len < self.file.metadata()?.len();
        self.file.set_len(len)?;
        if shrinks {
            self.keep_room(len);
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.lacks.load(Ordering::Relaxed) {
            self.keep_room(redb::StorageBackend::len(self)?);
        }
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use redb::StorageBackend as _;

    use super::*;

    #[test]
    fn there_is_always_room_behind_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = RoomyFile::open(&path).unwrap();
        if rustix::fs::fallocate(&file.file, FallocateFlags::KEEP_SIZE, 0, 1).is_err() {
            return;
        }
        let room = || {
            let metadata = path.metadata().unwrap();
            (metadata.blocks() * 512).saturating_sub(metadata.len())
        };
        assert!(room() >= KEPT_BYTES);
        for len in [1 << 20, 16 << 20, 4096] {
            file.set_len(len).unwrap();
            assert_eq!(file.len().unwrap(), len);
            assert!(room() >= KEPT_BYTES, "{len}: {}", room());
        }
        file.write(5, b"abc").unwrap();
        let mut out = [0; 4];
        file.read(4, &mut out).unwrap();
        assert_eq!(&out, b"\0abc");
        drop(file);
        assert_eq!(RoomyFile::open(&path).unwrap().len().unwrap(), 4096);
    }
}

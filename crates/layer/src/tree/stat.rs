//! Metadata and time.

use rustix::fs::Statx;

/// A point in time: seconds since 1970 and nanoseconds within the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Seconds, negative before 1970.
    pub seconds: i64,
    /// 0 to 999,999,999, counted forward.
    pub nanoseconds: u32,
}

const NANOS: i64 = 1_000_000_000;

impl Timestamp {
    /// Makes the start of a second.
    pub fn from_seconds(seconds: i64) -> Self {
        Self {
            seconds,
            nanoseconds: 0,
        }
    }

    /// Converts from nanoseconds since 1970, as LLB has it.
    pub fn from_unix_nanos(nanos: i64) -> Self {
        let rest = u32::try_from(nanos.rem_euclid(NANOS)).unwrap_or_default();
        Self {
            seconds: nanos.div_euclid(NANOS),
            nanoseconds: rest,
        }
    }

    /// Converts to nanoseconds since 1970; saturates at the ends of `i64`.
    pub fn unix_nanos(self) -> i64 {
        self.seconds
            .saturating_mul(NANOS)
            .saturating_add(i64::from(self.nanoseconds))
    }

    /// Drops the nanoseconds.
    #[must_use]
    pub fn truncated(self) -> Self {
        Self::from_seconds(self.seconds)
    }

    pub(crate) fn timespec(self) -> rustix::fs::Timespec {
        rustix::fs::Timespec {
            tv_sec: self.seconds,
            tv_nsec: self.nanoseconds.into(),
        }
    }
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// Something this program does not know.
    Unknown,
}

/// A file's metadata as the kernel tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Device the file is on.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Type and permission bits as in `st_mode`.
    pub mode: u32,
    /// Number of names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
    /// Length in bytes.
    pub size_bytes: u64,
    /// Allocated bytes.
    pub allocated_bytes: u64,
    /// Access time.
    pub atime: Timestamp,
    /// Modification time.
    pub mtime: Timestamp,
    /// Time of the last change of metadata.
    pub ctime: Timestamp,
}

impl Stat {
    pub(crate) fn from_statx(stat: &Statx) -> Self {
        let time = |at: rustix::fs::StatxTimestamp| Timestamp {
            seconds: at.tv_sec,
            nanoseconds: at.tv_nsec,
        };
        Self {
            dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            mode: stat.stx_mode.into(),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            rdev: (stat.stx_rdev_major, stat.stx_rdev_minor),
            size_bytes: stat.stx_size,
            allocated_bytes: stat.stx_blocks.saturating_mul(512),
            atime: time(stat.stx_atime),
            mtime: time(stat.stx_mtime),
            ctime: time(stat.stx_ctime),
        }
    }

    /// Returns the type.
    pub fn file_type(&self) -> FileType {
        match self.mode & 0o170_000 {
            0o100_000 => FileType::Regular,
            0o040_000 => FileType::Directory,
            0o120_000 => FileType::Symlink,
            0o020_000 => FileType::CharDevice,
            0o060_000 => FileType::BlockDevice,
            0o010_000 => FileType::Fifo,
            0o140_000 => FileType::Socket,
            _ => FileType::Unknown,
        }
    }

    /// Reports whether this is a directory.
    pub fn is_dir(&self) -> bool {
        self.file_type() == FileType::Directory
    }

    /// Reports whether this is a symbolic link.
    pub fn is_symlink(&self) -> bool {
        self.file_type() == FileType::Symlink
    }

    /// Reports whether this is overlayfs' mark of a deleted name: the character device 0:0.
    pub fn is_whiteout(&self) -> bool {
        self.file_type() == FileType::CharDevice && self.rdev == (0, 0)
    }

    /// Returns permission, set-id and sticky bits.
    pub fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }

    /// Returns what identifies the file among its names.
    pub fn identity(&self) -> (u64, u64) {
        (self.dev, self.ino)
    }

    /// Reports whether the file has other names than the one looked at.
    pub fn is_linked(&self) -> bool {
        self.nlink > 1 && !self.is_dir()
    }

    /// Converts the mode to Go's `os.FileMode`.
    pub fn go_mode(&self) -> u32 {
        let kind = match self.file_type() {
            FileType::Directory => 1 << 31,
            FileType::Symlink => 1 << 27,
            FileType::BlockDevice => 1 << 26,
            FileType::CharDevice => 1 << 26 | 1 << 21,
            FileType::Fifo => 1 << 25,
            FileType::Socket => 1 << 24,
            FileType::Regular => 0,
            FileType::Unknown => 1 << 19,
        };
        let mut special = 0;
        for (bit, go) in [(0o4000, 1 << 23), (0o2000, 1 << 22), (0o1000, 1 << 20)] {
            if self.mode & bit != 0 {
                special |= go;
            }
        }
        kind | special | (self.mode & 0o777)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_count_forward() {
        let time = Timestamp::from_unix_nanos(-1);
        assert_eq!(
            time,
            Timestamp {
                seconds: -1,
                nanoseconds: 999_999_999
            }
        );
        assert_eq!(time.unix_nanos(), -1);
        assert_eq!(
            Timestamp {
                seconds: i64::MAX,
                nanoseconds: 0
            }
            .unix_nanos(),
            i64::MAX
        );
    }
}

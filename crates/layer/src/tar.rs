//! The tar format: a reader for hostile archives and a writer that matches Go's byte for byte.

mod read;
mod write;

use std::collections::BTreeMap;

pub use read::{ReadError, Reader};
pub use write::Writer;

use crate::tree::Timestamp;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    Regular,
    /// Another name of an earlier entry.
    Hardlink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A global extended header, which describes no file.
    Global,
}

/// One entry's metadata. Names are bytes: nothing promises UTF-8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: EntryKind,
    /// Its name as in the archive, with a trailing slash for directories.
    pub name: Vec<u8>,
    /// The target of a link.
    pub link: Vec<u8>,
    /// Length of the file, holes included.
    pub size_bytes: u64,
    /// Permission bits with set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Owner's name, not used for anything here.
    pub uname: Vec<u8>,
    /// Group's name.
    pub gname: Vec<u8>,
    /// Modification time.
    pub mtime: Timestamp,
    /// Access time, if the archive has it.
    pub atime: Option<Timestamp>,
    /// Change time, if the archive has it.
    pub ctime: Option<Timestamp>,
    /// Device number, for devices.
    pub dev_major: u32,
    /// Device number, for devices.
    pub dev_minor: u32,
    /// Extended attributes by name (without tar's prefix).
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

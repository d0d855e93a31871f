//! The tar format: a reader for hostile archives and a writer that matches Go's byte for byte.

mod number;
mod pax;
mod read;
mod sparse;
mod write;

use std::collections::BTreeMap;

pub use read::{ReadError, Reader};
pub(crate) use read::{extension_bytes, padding};
pub use write::Writer;

use crate::tree::Timestamp;

/// Length of a header and unit of padding, in bytes.
pub(crate) const BLOCK: usize = 512;

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
}

/// One entry's metadata. Names are bytes: nothing promises UTF-8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: EntryKind,
    /// Its name as in the archive; directories may have a trailing slash.
    pub name: Vec<u8>,
    /// The target of a link.
    pub link: Vec<u8>,
    /// Length of a regular file, holes included; 0 for all else.
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
    /// Major and minor number of a device.
    pub dev: (u32, u32),
    /// Extended attributes by name (without tar's prefix).
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Other extended records, kept for rewriting.
    pub records: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Header {
    /// Makes a header with nothing but kind and name.
    pub fn new(kind: EntryKind, name: impl Into<Vec<u8>>) -> Self {
        Self {
            kind,
            name: name.into(),
            link: Vec::new(),
            size_bytes: 0,
            mode: 0,
            uid: 0,
            gid: 0,
            uname: Vec::new(),
            gname: Vec::new(),
            mtime: Timestamp::default(),
            atime: None,
            ctime: None,
            dev: (0, 0),
            xattrs: BTreeMap::new(),
            records: BTreeMap::new(),
        }
    }
}

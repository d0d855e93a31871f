//! The digest of one file: a tarsum header (version 1 of Docker's, without the name), then the content.

use std::io;

use oci::{Digest, Digester};

use super::ChecksumError;
use crate::tree::GoStat;

pub(super) const GO_DIR: u32 = 1 << 31;
pub(super) const GO_SYMLINK: u32 = 1 << 27;
const GO_DEVICE: u32 = 1 << 26;
const GO_NAMED_PIPE: u32 = 1 << 25;
const GO_SOCKET: u32 = 1 << 24;
const GO_SETUID: u32 = 1 << 23;
const GO_SETGID: u32 = 1 << 22;
const GO_CHAR_DEVICE: u32 = 1 << 21;
const GO_STICKY: u32 = 1 << 20;
const GO_IRREGULAR: u32 = 1 << 19;

/// Digests one file as BuildKit does: begins with the metadata, then takes the content of regular files.
#[derive(Clone, Debug)]
pub struct FileHasher(Digester);

impl FileHasher {
    /// Starts with the metadata of a received file. Path and time are not looked at; of hard links, neither is the link.
    pub fn new(stat: &GoStat) -> Result<Self, ChecksumError> {
        let xattrs = stat
            .xattrs
            .iter()
            .map(|(name, value)| (name.as_bytes(), &value[..]));
        let header = Header {
            mode: stat.mode,
            uid: stat.uid,
            gid: stat.gid,
            size: stat.size,
            link: stat.linkname.as_bytes(),
            device: (stat.devmajor, stat.devminor),
        };
        header
            .digest(xattrs)
            .map(Self)
            .ok_or_else(|| ChecksumError::UnknownMode {
                path: stat.path.clone(),
                mode: stat.mode,
            })
    }

    pub(super) fn from_digester(digester: Digester) -> Self {
        Self(digester)
    }

    /// Adds content.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Returns the digest.
    pub fn finish(self) -> Digest {
        self.0.finish()
    }
}

impl io::Write for FileHasher {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.update(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What of a file's metadata, apart from extended attributes, is content.
pub(super) struct Header<'a> {
    /// Go's `os.FileMode`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: i64,
    pub link: &'a [u8],
    pub device: (i64, i64),
}

impl Header<'_> {
    /// Digests the header; none for a type that is unknown to tar.
    pub fn digest<'x>(&self, xattrs: impl Iterator<Item = (&'x [u8], &'x [u8])>) -> Option<Digester> {
        // Sockets, which tar does not know, count as empty files.
        let mode = self.mode & !(GO_SOCKET | GO_IRREGULAR);
        let types = mode & (GO_DIR | GO_SYMLINK | GO_DEVICE | GO_NAMED_PIPE | GO_CHAR_DEVICE);
        let (flag, size, link): (u8, i64, &[u8]) = if types == 0 {
            (b'0', self.size, b"")
        } else if types & GO_DIR != 0 {
            (b'5', 0, b"")
        } else if types & GO_SYMLINK != 0 {
            (b'2', 0, self.link)
        } else if types & GO_DEVICE != 0 {
            (if types & GO_CHAR_DEVICE != 0 { b'3' } else { b'4' }, 0, b"")
        } else if types & GO_NAMED_PIPE != 0 {
            (b'6', 0, b"")
        } else {
            return None;
        };
        let mut permissions = mode & 0o777;
        for (bit, tar) in [(GO_SETUID, 0o4000), (GO_SETGID, 0o2000), (GO_STICKY, 0o1000)] {
            if mode & bit != 0 {
                permissions |= tar;
            }
        }
        let mut digester = Digester::sha256();
        digester.update(format!(
            "namemode{permissions}uid{}gid{}size{size}typeflag",
            self.uid, self.gid
        ));
        digester.update([flag]);
        digester.update("linkname");
        digester.update(link);
        digester.update(format!(
            "unamegnamedevmajor{}devminor{}",
            self.device.0, self.device.1
        ));
        let mut xattrs: Vec<_> = xattrs.filter(|(name, _)| is_content(name)).collect();
        xattrs.sort_unstable();
        for (name, value) in xattrs {
            digester.update(name);
            digester.update(value);
        }
        Some(digester)
    }
}

/// Reports whether an extended attribute is content rather than a mark of the host.
pub(super) fn is_content(name: &[u8]) -> bool {
    name == b"security.capability" || !(name.starts_with(b"security.") || name.starts_with(b"system."))
}

/// Converts `st_mode` to Go's `os.FileMode`.
pub(super) fn go_mode(mode: u32) -> u32 {
    use rustix::fs::FileType;
    let mut go = mode & 0o777;
    go |= match FileType::from_raw_mode(mode) {
        FileType::Directory => GO_DIR,
        // Whatever the file system says, links are digested as open to all.
        FileType::Symlink => GO_SYMLINK | 0o777,
        FileType::BlockDevice => GO_DEVICE,
        FileType::CharacterDevice => GO_DEVICE | GO_CHAR_DEVICE,
        FileType::Fifo => GO_NAMED_PIPE,
        FileType::Socket => GO_SOCKET,
        _ => 0,
    };
    for (bit, flag) in [(0o4000, GO_SETUID), (0o2000, GO_SETGID), (0o1000, GO_STICKY)] {
        if mode & bit != 0 {
            go |= flag;
        }
    }
    go
}

//! The listing of a transfer of metadata alone: all entries as the client sent them, in a file `.fsutil-metadata`.
//!
//! Each entry is four bytes of length, little-endian, and the protocol's `Stat` message (facts: fsutil's `stat.proto`).

use build::session::FileStat;

use super::order::MODE_DIR;

/// Where the listing is put.
const PATH: &str = ".fsutil-metadata";

/// A listing in progress.
#[derive(Debug, Default)]
pub(super) struct Listing {
    bytes: Vec<u8>,
    /// Directories on the way to the last entry that nothing wanted was found in yet.
    parents: Vec<(u32, FileStat)>,
}

impl Listing {
    /// Adds an entry and returns what has to be made now: nothing for an entry that is not wanted, else the entry and
    /// those of its directories that were held back.
    pub fn accept(&mut self, id: u32, stat: FileStat, wanted: bool) -> Vec<(u32, FileStat)> {
        if stat.path == PATH {
            return Vec::new();
        }
        let message = encode(&stat);
        self.bytes
            .extend_from_slice(&u32::try_from(message.len()).unwrap_or(0).to_le_bytes());
        self.bytes.extend_from_slice(&message);
        let parent = stat.path.rsplit_once('/').map_or("", |(parent, _)| parent);
        while self
            .parents
            .last()
            .is_some_and(|(_, dir)| !holds(&dir.path, parent))
        {
            self.parents.pop();
        }
        if !wanted {
            if stat.mode & MODE_DIR != 0 {
                self.parents.push((id, stat));
            }
            return Vec::new();
        }
        let mut made = std::mem::take(&mut self.parents);
        made.push((id, stat));
        made
    }

    /// The listing's content.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The listing's own attributes.
    pub fn stat(&self) -> FileStat {
        FileStat {
            path: PATH.to_owned(),
            mode: 0o644,
            size_bytes: i64::try_from(self.bytes.len()).unwrap_or(i64::MAX),
            ..FileStat::default()
        }
    }
}

/// Whether `dir` is `path` or a directory above it.
fn holds(dir: &str, path: &str) -> bool {
    path.strip_prefix(dir)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn encode(stat: &FileStat) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + stat.path.len());
    text(&mut out, 1, stat.path.as_bytes());
    number(&mut out, 2, u64::from(stat.mode));
    number(&mut out, 3, u64::from(stat.uid));
    number(&mut out, 4, u64::from(stat.gid));
    number(&mut out, 5, stat.size_bytes.cast_unsigned());
    number(&mut out, 6, stat.mod_time_ns.cast_unsigned());
    text(&mut out, 7, stat.linkname.as_bytes());
    number(&mut out, 8, stat.dev_major.cast_unsigned());
    number(&mut out, 9, stat.dev_minor.cast_unsigned());
    for (name, value) in &stat.xattrs {
        let mut pair = Vec::new();
        text(&mut pair, 1, name.as_bytes());
        text(&mut pair, 2, value);
        text(&mut out, 10, &pair);
    }
    out
}

fn number(out: &mut Vec<u8>, field: u64, value: u64) {
    if value != 0 {
        varint(out, field << 3);
        varint(out, value);
    }
}

fn text(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    if !value.is_empty() {
        varint(out, field << 3 | 2);
        varint(out, u64::try_from(value.len()).unwrap_or(0));
        out.extend_from_slice(value);
    }
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).unwrap_or(0) | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap_or(0));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, mode: u32) -> FileStat {
        FileStat {
            path: path.to_owned(),
            mode,
            ..FileStat::default()
        }
    }

    #[test]
    fn holds_directories_back_until_something_in_them_is_wanted() {
        let mut listing = Listing::default();
        assert!(listing.accept(0, entry("a", MODE_DIR), false).is_empty());
        assert!(listing.accept(1, entry("a/b", MODE_DIR), false).is_empty());
        assert!(listing.accept(2, entry("c", MODE_DIR), false).is_empty());
        let made = listing.accept(3, entry("c/d", 0o644), true);
        assert_eq!(made.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [2, 3]);
        let made = listing.accept(4, entry("c/e", 0o644), true);
        assert_eq!(made.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn frames_entries() {
        let mut listing = Listing::default();
        listing.accept(0, entry("ab", 0o644), false);
        assert_eq!(listing.bytes(), b"\x07\0\0\0\x0a\x02ab\x10\xa4\x03");
    }
}

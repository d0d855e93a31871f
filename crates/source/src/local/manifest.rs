//! What the client had at the last transfer: the attributes of every entry, kept with the tree.

use std::collections::BTreeMap;

use build::session::FileStat;
use bytes::Bytes;

/// Marks the encoding; another one is as good as none.
const MAGIC: &[u8; 8] = b"cpr-lm2\n";

/// How shortly before a transfer a file may have been modified for a later edit to go unnoticed: the coarsest times of
/// file systems in use (FAT), which also covers the usual slack between two machines' clocks.
const GRANULARITY_NS: i64 = 2_000_000_000;

/// One entry and whether its attributes can be trusted to tell the next edit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The attributes.
    pub stat: FileStat,
    /// The file was modified so shortly before it was read that its times do not tell the next edit.
    pub is_racy: bool,
}

impl Entry {
    /// Makes the entry of a file read in a transfer that began at `began_ns`.
    pub fn new(stat: FileStat, began_ns: i64) -> Self {
        let is_racy =
            super::order::has_content(&stat) && stat.mod_time_ns > began_ns.saturating_sub(GRANULARITY_NS);
        Self { stat, is_racy }
    }

    /// Whether the client's entry is surely the one that is kept.
    pub fn is_current(&self, stat: &FileStat) -> bool {
        !self.is_racy && self.has_attributes_of(stat)
    }

    /// Whether the attributes are the same, which need not mean that the content is.
    pub fn has_attributes_of(&self, stat: &FileStat) -> bool {
        if stat.mode & super::order::MODE_DIR == 0 {
            return *stat == self.stat;
        }
        // A directory's times change with its entries, which are compared themselves.
        let (mod_time_ns, size_bytes) = (self.stat.mod_time_ns, self.stat.size_bytes);
        FileStat {
            mod_time_ns,
            size_bytes,
            change_time_ns: self.stat.change_time_ns,
            ..stat.clone()
        } == self.stat
    }
}

/// Writes entries, which must be in order.
pub(super) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(MAGIC.len() + entries.len() * 96);
    out.extend_from_slice(MAGIC);
    for Entry { stat, is_racy } in entries {
        put_bytes(&mut out, stat.path.as_bytes());
        put_bytes(&mut out, stat.linkname.as_bytes());
        for number in [stat.mode, stat.uid, stat.gid, u32::from(*is_racy)] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for number in [stat.size_bytes, stat.mod_time_ns, stat.dev_major, stat.dev_minor] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&stat.change_time_ns.to_le_bytes());
        put_length(&mut out, stat.xattrs.len());
        for (name, value) in &stat.xattrs {
            put_bytes(&mut out, name.as_bytes());
            put_bytes(&mut out, value);
        }
    }
    out
}

fn put_length(out: &mut Vec<u8>, length: usize) {
    // Everything that is kept was limited to far less when it was received.
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_length(out, bytes.len());
    out.extend_from_slice(bytes);
}

/// Reads entries; `None` for anything that [`encode`] did not write whole.
pub(super) fn decode(bytes: &[u8]) -> Option<Vec<Entry>> {
    let mut rest = bytes.strip_prefix(MAGIC)?;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        entries.push(entry(&mut rest)?);
    }
    Some(entries)
}

fn entry(rest: &mut &[u8]) -> Option<Entry> {
    let path = text(rest)?;
    let linkname = text(rest)?;
    let (mode, uid, gid, racy) = (number(rest)?, number(rest)?, number(rest)?, number(rest)?);
    let (size_bytes, mod_time_ns) = (long(rest)?, long(rest)?);
    let (dev_major, dev_minor, change_time_ns) = (long(rest)?, long(rest)?, long(rest)?);
    let mut xattrs = BTreeMap::new();
    for _ in 0..number(rest)? {
        let name = text(rest)?;
        xattrs.insert(name, Bytes::copy_from_slice(slice(rest)?));
    }
    let stat = FileStat {
        path,
        mode,
        uid,
        gid,
        size_bytes,
        mod_time_ns,
        linkname,
        dev_major,
        dev_minor,
        xattrs,
        change_time_ns,
    };
    Some(Entry {
        stat,
        is_racy: racy != 0,
    })
}

fn number(rest: &mut &[u8]) -> Option<u32> {
    let (bytes, tail) = rest.split_first_chunk::<4>()?;
    *rest = tail;
    Some(u32::from_le_bytes(*bytes))
}

fn long(rest: &mut &[u8]) -> Option<i64> {
    let (bytes, tail) = rest.split_first_chunk::<8>()?;
    *rest = tail;
    Some(i64::from_le_bytes(*bytes))
}

fn slice<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(number(rest)?).ok()?;
    let (bytes, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(bytes)
}

fn text(rest: &mut &[u8]) -> Option<String> {
    String::from_utf8(slice(rest)?.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(mod_time_ns: i64) -> FileStat {
        let xattrs = BTreeMap::from([("user.a".to_owned(), Bytes::from_static(b"\0b"))]);
        FileStat {
            path: "d/f".to_owned(),
            mode: 0o644,
            size_bytes: 5,
            mod_time_ns,
            xattrs,
            ..FileStat::default()
        }
    }

    #[test]
    fn reads_what_it_wrote_and_nothing_else() {
        let entries = vec![Entry::new(stat(1), i64::MAX), Entry::new(stat(7), 7)];
        let bytes = encode(&entries);
        assert_eq!(decode(&bytes), Some(entries));
        assert_eq!(decode(&bytes[..bytes.len() - 1]), None);
        assert_eq!(decode(b"something else"), None);
    }

    #[test]
    fn distrusts_files_modified_just_before_the_transfer() {
        let began = 100 * GRANULARITY_NS;
        assert!(Entry::new(stat(began - GRANULARITY_NS), began).is_current(&stat(began - GRANULARITY_NS)));
        assert!(!Entry::new(stat(began - 1), began).is_current(&stat(began - 1)));
        assert!(!Entry::new(stat(began + 1), began).is_current(&stat(began + 1)));
    }

    #[test]
    fn notices_every_attribute() {
        let kept = Entry::new(stat(1), i64::MAX);
        assert!(kept.is_current(&stat(1)));
        assert!(!kept.is_current(&stat(2)));
        assert!(!kept.is_current(&FileStat {
            mode: 0o600,
            ..stat(1)
        }));
        // The one trace of an edit that put everything else back.
        assert!(!kept.is_current(&FileStat {
            change_time_ns: 1,
            ..stat(1)
        }));
        assert!(!kept.is_current(&FileStat {
            xattrs: BTreeMap::new(),
            ..stat(1)
        }));
    }
}

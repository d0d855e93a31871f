//! Finding records: keys, symbolic links, what is known to be absent.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::{ChecksumError, ChecksumTree, Kind, Record, key_path, lossy, path_key};

/// Links followed before giving up; BuildKit's limit.
pub(super) const MAX_LINKS: usize = 255;

/// Iterates over the records from `key` on, itself included.
pub(super) fn range_from<'a>(
    records: &'a BTreeMap<Vec<u8>, Record>,
    key: &[u8],
) -> impl Iterator<Item = (&'a Vec<u8>, &'a Record)> {
    records.range::<[u8], _>((Bound::Included(key), Bound::Unbounded))
}

/// Makes a path absolute and clean by text alone; the root is the empty path.
pub(super) fn absolute(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.iter().flat_map(|part| [b"/", *part].concat()).collect()
}

/// What looking for a path led to.
pub(super) struct Found {
    /// The key with all links resolved, also when nothing is there.
    pub key: Vec<u8>,
    /// Whether there is a record.
    pub exists: bool,
    /// Whether absence is certain; only meaningful when there is no record.
    pub known: bool,
}

impl ChecksumTree {
    /// Looks for `key`, resolving symbolic links on the way, and the last part too with `follow`.
    pub(super) fn find(&self, key: &[u8], follow: bool) -> Result<Found, ChecksumError> {
        if let Some(record) = self.records.get(key)
            && (!follow || record.kind != Kind::Symlink)
        {
            return Ok(Found {
                key: key.to_vec(),
                exists: true,
                known: true,
            });
        }
        if key.is_empty() {
            return Ok(Found {
                key: Vec::new(),
                exists: false,
                known: false,
            });
        }
        let mut rest = key_path(key);
        let trailing_slash = rest.last() == Some(&b'/');
        if trailing_slash {
            rest.pop();
        }
        let (mut current, mut links) = (Vec::new(), 0);
        let (mut exists, mut known) = (false, false);
        while !rest.is_empty() {
            let at = rest.iter().position(|byte| *byte == b'/');
            let part: Vec<u8> = rest
                .drain(..at.map_or(rest.len(), |at| at + 1))
                .filter(|byte| *byte != b'/')
                .collect();
            let next = absolute(&[&current[..], b"/", &part].concat());
            let next_key = path_key(&next);
            let record = self.records.get(&next_key);
            exists = record.is_some();
            known = self.is_complete_above(&next_key);
            match record.and_then(|record| record.link.as_deref().filter(|_| record.kind == Kind::Symlink)) {
                Some(text) if follow || !rest.is_empty() => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(ChecksumError::TooManyLinks {
                            path: lossy(&key_path(key)),
                        });
                    }
                    if text.first() == Some(&b'/') {
                        current.clear();
                    }
                    rest = [text, b"/", &rest].concat();
                }
                _ => current = next,
            }
        }
        let mut found = path_key(&current);
        if trailing_slash {
            found.push(0);
            exists = self.records.contains_key(&found);
        }
        Ok(Found {
            key: found,
            exists,
            known,
        })
    }

    /// Reports whether everything that exists in the directories that hold `key` has a record.
    fn is_complete_above(&self, key: &[u8]) -> bool {
        let mut key = key;
        loop {
            if self.complete.contains(key) {
                return true;
            }
            match key.iter().rposition(|byte| *byte == 0) {
                Some(at) => key = &key[..at],
                None => return false,
            }
        }
    }
}

//! The stored form of a tree: sorted keys share prefixes, digests are raw.

use super::{ChecksumTree, Kind, PATH_MAX, Record};

const VERSION: u8 = 1;
/// The longest key: a path and the mark of a header.
const KEY_MAX: usize = PATH_MAX + 2;

/// Stored bytes that are not a checksum tree of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a checksum tree of version 1")]
pub struct DecodeError;

impl ChecksumTree {
    /// Encodes the tree for storage and takes it as clean. The bytes depend on the records alone.
    pub fn encode(&mut self) -> Vec<u8> {
        self.dirty = false;
        let mut out = vec![VERSION];
        put_number(&mut out, self.complete.len());
        for key in &self.complete {
            put_bytes(&mut out, key);
        }
        put_number(&mut out, self.records.len());
        let mut last: &[u8] = &[];
        for (key, record) in &self.records {
            let shared = key.iter().zip(last).take_while(|(a, b)| a == b).count();
            put_number(&mut out, shared);
            put_bytes(&mut out, &key[shared..]);
            let kind = match record.kind {
                Kind::File => 0,
                Kind::Dir => 1,
                Kind::DirHeader => 2,
                Kind::Symlink => 3,
            };
            out.push(kind | u8::from(record.hash.is_some()) << 2);
            if let Some(hash) = &record.hash {
                out.extend_from_slice(hash);
            }
            if record.kind == Kind::Symlink {
                put_bytes(&mut out, record.link.as_deref().unwrap_or_default());
            }
            last = key;
        }
        out
    }

    /// Decodes what [`encode`](Self::encode) made. Anything else is an error, never a panic.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Input(bytes);
        if input.take(1)? != [VERSION] {
            return Err(DecodeError);
        }
        let mut tree = Self::default();
        for _ in 0..input.number()? {
            tree.complete.insert(input.bytes(KEY_MAX)?.to_vec());
        }
        let mut key: Vec<u8> = Vec::new();
        for _ in 0..input.number()? {
            let shared = input.number()?;
            if shared > key.len() {
                return Err(DecodeError);
            }
            key.truncate(shared);
            key.extend_from_slice(input.bytes(KEY_MAX)?);
            let flags = input.take(1)?[0];
            let kind = match flags & 3 {
                0 => Kind::File,
                1 => Kind::Dir,
                2 => Kind::DirHeader,
                _ => Kind::Symlink,
            };
            let mut record = Record::new(kind);
            if flags & 4 != 0 {
                record.hash = Some(input.take(32)?.try_into().map_err(|_| DecodeError)?);
            }
            if kind == Kind::Symlink {
                record.link = Some(input.bytes(PATH_MAX)?.into());
            }
            tree.records.insert(key.clone(), record);
        }
        if input.0.is_empty() {
            Ok(tree)
        } else {
            Err(DecodeError)
        }
    }
}

fn put_number(out: &mut Vec<u8>, mut number: usize) {
    loop {
        let low = u8::try_from(number & 0x7f).unwrap_or(0x7f);
        number >>= 7;
        if number == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len());
    out.extend_from_slice(bytes);
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(DecodeError)?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<usize, DecodeError> {
        let (mut number, mut shift) = (0usize, 0);
        loop {
            let byte = self.take(1)?[0];
            number |= usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
            shift += 7;
            if shift > 28 {
                return Err(DecodeError);
            }
        }
    }

    fn bytes(&mut self, limit: usize) -> Result<&'a [u8], DecodeError> {
        let count = self.number()?;
        if count > limit {
            return Err(DecodeError);
        }
        self.take(count)
    }
}

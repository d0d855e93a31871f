//! BuildKit's content digests of trees.
//!
//! A [`ChecksumTree`] holds one record per path: for files, symbolic links and directories' own metadata (their *header*)
//! the digest of a tarsum header and the content; for directories also the digest over everything below. Digests are bit
//! for bit BuildKit's (`cache/contenthash`), because they are parts of cache keys that travel between the two.
//!
//! What is content: type, permission bits, owner, size, bytes, symbolic link text, device numbers (of received files; for
//! files on disk BuildKit takes 0:0, so this does too), and extended attributes except `system.*` and `security.*`; of the
//! latter `security.capability` alone is content. Times are not.
//!
//! Records are made as they are needed: listing a directory costs no look at its files, and a file is read when a selector
//! asks for it. A tree can be encoded, kept, and brought up to date by [`upsert`](ChecksumTree::upsert) and
//! [`remove`](ChecksumTree::remove) instead of reading anything again.
//!
//! Keys: a path's key is the absolute clean path with `/` replaced by NUL, the root's is empty. A directory's header has
//! the key of the directory with a NUL appended. Records are ordered by key; digests depend on that order.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use oci::pattern::PatternError;
use oci::{Algorithm, Digest, Digester};

use crate::Stop;
use crate::tree::GoStat;

mod encoding;
mod hash;
mod listing;
mod lookup;
mod scan;
mod select;
#[cfg(test)]
mod tests;

pub use encoding::DecodeError;
pub use hash::FileHasher;
pub use listing::{Attributes, Listed, ListedFile, ListedKind, hash_as};

/// Longest path taken from outside, in bytes; the kernel's limit.
const PATH_MAX: usize = 4096;

/// Chooses what of a tree is digested; BuildKit's `opsutils.Selector`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// The path, absolute or taken as such; with `wildcard` a pattern in the language of Go's `path.Match`.
    pub path: String,
    /// Takes `path` as a pattern.
    pub wildcard: bool,
    /// Digests the target if `path` is a symbolic link.
    pub follow_links: bool,
    /// Takes only what matches, if there are any.
    pub include: Vec<String>,
    /// Leaves out what matches.
    pub exclude: Vec<String>,
    /// Prefixes each of which something taken has to have.
    pub required: Vec<String>,
}

/// Why a tree has no digest.
#[derive(Debug, thiserror::Error)]
pub enum ChecksumError {
    /// The path, or a required one, does not exist.
    #[error("{path:?}: not found")]
    NotFound {
        /// The path.
        path: String,
    },
    /// More than 255 symbolic links on the way.
    #[error("{path:?}: too many links")]
    TooManyLinks {
        /// The path.
        path: String,
    },
    /// A path from outside is too long.
    #[error("path of {length} bytes is too long")]
    PathTooLong {
        /// Its length.
        length: usize,
    },
    /// One of several patterns does not parse.
    #[error("invalid {what}: [{}]", patterns.join(" "))]
    Patterns {
        /// `includepatterns` or `excludepatterns`.
        what: &'static str,
        /// All of them.
        patterns: Vec<String>,
        /// Why.
        #[source]
        source: PatternError,
    },
    /// A path with wildcards does not parse.
    #[error("invalid pattern {pattern:?}")]
    Wildcard {
        /// The path.
        pattern: String,
        /// Why.
        #[source]
        source: PatternError,
    },
    /// Patterns cannot be matched.
    #[error("failed to match patterns")]
    Match(#[from] PatternError),
    /// The file has a type no tar header can have.
    #[error("{path:?}: unknown file mode {mode:#o}")]
    UnknownMode {
        /// The path, if known.
        path: String,
        /// Go's `os.FileMode`.
        mode: u32,
    },
    /// It was told to give up.
    #[error("the checksum was stopped")]
    Stopped,
    /// The tree cannot be opened.
    #[error("open the tree")]
    Open {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file system refused.
    #[error("checksum {}", path.display())]
    Io {
        /// The path in the tree.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl ChecksumError {
    /// Reports whether the failure says that a path does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}

/// Opens the root directory of the tree when it is first needed: a tree whose records answer is never mounted.
pub type OpenRoot<'a> = dyn FnMut() -> io::Result<OwnedFd> + 'a;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Dir,
    DirHeader,
    Symlink,
}

/// A SHA-256 hash.
type Hash = [u8; 32];

#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    kind: Kind,
    /// Absent until computed. A directory has one only while everything below has.
    hash: Option<Hash>,
    /// A symbolic link's text.
    link: Option<Box<[u8]>>,
}

impl Record {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            hash: None,
            link: None,
        }
    }
}

/// Content digests of one tree, computed as needed and kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChecksumTree {
    records: BTreeMap<Vec<u8>, Record>,
    /// Keys of directories everything below which has a record.
    complete: BTreeSet<Vec<u8>>,
    /// Keys of received hard links by the path of the file they were sent as links to.
    links: BTreeMap<Vec<u8>, Vec<Vec<u8>>>,
    dirty: bool,
}

impl ChecksumTree {
    /// Starts with nothing known.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reports whether records changed since the tree was made, decoded or [`encode`](Self::encode)d.
    pub fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// Digests what `selectors` choose; none choose everything. This is what BuildKit's content-based cache keys contain.
    ///
    /// Paths are cleaned first, so that a trailing slash has no meaning. Errors: `NotFound` for a plain path that does not
    /// exist (a pattern may match nothing); `Stopped` when `stop` says so.
    pub fn checksum_all(
        &mut self,
        open: &mut OpenRoot<'_>,
        selectors: &[Selector],
        stop: &Stop,
    ) -> Result<Digest, ChecksumError> {
        let everything = [Selector::default()];
        let selectors = if selectors.is_empty() {
            &everything
        } else {
            selectors
        };
        let mut texts = Vec::with_capacity(selectors.len());
        for selector in selectors {
            let path = oci::path::join(&["/", &selector.path]);
            texts.push(
                self.checksum_one(
                    &mut scan::Root::new(open, stop),
                    &Selector {
                        path,
                        ..selector.clone()
                    },
                )?
                .to_string(),
            );
        }
        Ok(Digest::sha256(texts.join("\0")))
    }

    /// Digests what `selectors` choose of a tree that does not exist (an empty reference): only `/` can be asked for.
    pub fn checksum_nothing(selectors: &[Selector]) -> Result<Digest, ChecksumError> {
        for selector in selectors {
            let path = oci::path::join(&["/", &selector.path]);
            if path != "/" {
                return Err(ChecksumError::NotFound { path });
            }
        }
        let texts = vec![Digest::sha256(b"").to_string(); selectors.len().max(1)];
        Ok(Digest::sha256(texts.join("\0")))
    }

    /// Digests what `selector` chooses; its path is taken as it is: with include or exclude patterns, a trailing slash leaves
    /// the directory's own metadata out. BuildKit's `contenthash.Checksum`.
    pub fn checksum(
        &mut self,
        open: &mut OpenRoot<'_>,
        selector: &Selector,
    ) -> Result<Digest, ChecksumError> {
        self.checksum_one(&mut scan::Root::new(open, &Stop::default()), selector)
    }

    fn checksum_one(
        &mut self,
        root: &mut scan::Root<'_, '_>,
        selector: &Selector,
    ) -> Result<Digest, ChecksumError> {
        self.links.clear();
        if selector.wildcard || !selector.include.is_empty() || !selector.exclude.is_empty() {
            self.checksum_selected(root, selector)
        } else {
            let hash = self.checksum_path(root, selector.path.as_bytes(), selector.follow_links)?;
            Ok(digest_of(&hash))
        }
    }

    /// Takes over a received file, directory or link: `stat` as sent, `digest` as computed by a [`FileHasher`] over it and
    /// the content. The digests of all directories above are forgotten.
    ///
    /// After the first call the tree is taken to be known as a whole: what was not received does not exist. A hard link
    /// takes the digest of its source, also when that comes later; asking for a digest ends such waiting.
    pub fn upsert(&mut self, path: &[u8], stat: &GoStat, digest: Digest) -> Result<(), ChecksumError> {
        let path = received_path(path)?;
        self.begin_changes();
        let key = path_key(&path);
        let is_dir = stat.mode & hash::GO_DIR != 0;
        let is_symlink = stat.mode & hash::GO_SYMLINK != 0;
        if !is_dir && self.records.get(&key).is_some_and(|old| old.kind == Kind::Dir) {
            self.remove_below(&key);
        }
        let mut record = Record {
            kind: Kind::File,
            hash: Some(hash_of(&digest)),
            link: None,
        };
        let mut record_key = key.clone();
        if is_symlink {
            record.kind = Kind::Symlink;
            record.link = Some(stat.linkname.as_bytes().into());
        }
        if is_dir {
            record.kind = Kind::DirHeader;
            self.records.insert(key.clone(), Record::new(Kind::Dir));
            record_key.push(0);
        }
        if !is_symlink && !stat.linkname.is_empty() {
            // The source may come later, as content arrives out of order: then it updates this one.
            let source = received_path(stat.linkname.as_bytes())?;
            if let Some(linked) = self.records.get(&path_key(&source)) {
                record = linked.clone();
            }
            self.links.entry(source).or_default().push(record_key.clone());
        }
        self.records.insert(record_key, record.clone());
        if !is_dir {
            for link in self.links.remove(&path).unwrap_or_default() {
                self.records.insert(link.clone(), record.clone());
                self.forget_above(&link);
            }
        }
        self.forget_above(&key);
        Ok(())
    }

    /// Takes over the removal of a path and everything below it.
    pub fn remove(&mut self, path: &[u8]) -> Result<(), ChecksumError> {
        let path = received_path(path)?;
        self.begin_changes();
        let key = path_key(&path);
        if self.records.remove(&key).is_some_and(|old| old.kind == Kind::Dir) {
            self.remove_below(&key);
        }
        self.forget_above(&key);
        Ok(())
    }

    /// Makes the root's records, which are never received: its header counts as empty.
    fn begin_changes(&mut self) {
        self.dirty = true;
        if !self.records.contains_key(&b"\0"[..]) {
            let hash = Some(hash_of(&Digest::sha256(b"")));
            self.records.insert(
                vec![0],
                Record {
                    hash,
                    ..Record::new(Kind::DirHeader)
                },
            );
            self.records.insert(Vec::new(), Record::new(Kind::Dir));
        }
        if !self.complete.contains(&b""[..]) {
            self.complete.clear();
            self.complete.insert(Vec::new());
        }
    }

    fn remove_below(&mut self, key: &[u8]) {
        let prefix = [key, &[0]].concat();
        let below: Vec<_> = lookup::range_from(&self.records, &prefix)
            .map(|(key, _)| key.clone())
            .take_while(|key| key.starts_with(&prefix))
            .collect();
        for key in below {
            self.records.remove(&key);
        }
    }

    /// Forgets the digests of the directories above `key`.
    fn forget_above(&mut self, key: &[u8]) {
        let mut key = key;
        while let Some(at) = key.iter().rposition(|byte| *byte == 0) {
            key = &key[..at];
            match self.records.get_mut(key) {
                // A directory without a digest has none above with one.
                Some(record) if record.kind == Kind::Dir && record.hash.is_none() => break,
                Some(record) => *record = Record::new(Kind::Dir),
                None => {}
            }
        }
    }
}

/// Cleans a received path and makes it absolute: `/a/b`, and the empty path for the root.
fn received_path(path: &[u8]) -> Result<Vec<u8>, ChecksumError> {
    if path.len() > PATH_MAX {
        return Err(ChecksumError::PathTooLong { length: path.len() });
    }
    Ok(lookup::absolute(path))
}

fn path_key(path: &[u8]) -> Vec<u8> {
    path.iter()
        .map(|byte| if *byte == b'/' { 0 } else { *byte })
        .collect()
}

fn key_path(key: &[u8]) -> Vec<u8> {
    key.iter()
        .map(|byte| if *byte == 0 { b'/' } else { *byte })
        .collect()
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

fn digest_of(hash: &Hash) -> Digest {
    Digest::from_hash(Algorithm::Sha256, hash).expect("a SHA-256 hash has 32 bytes")
}

/// Shrinks a digest to what records hold; one of another algorithm is hashed again.
fn hash_of(digest: &Digest) -> Hash {
    digest
        .as_bytes()
        .try_into()
        .unwrap_or_else(|_| hash_of(&Digest::sha256(digest.to_string())))
}

fn finish(digester: Digester) -> Hash {
    hash_of(&digester.finish())
}

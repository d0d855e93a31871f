//! Digesting what a selector chooses.

use oci::pattern::{self, Matcher, ParentState};
use oci::{Digest, Digester};

use super::lookup::{self, range_from};
use super::scan::Root;
use super::{
    ChecksumError, ChecksumTree, Hash, Kind, Selector, digest_of, finish, key_path, lossy, path_key,
};

/// A record that was chosen.
pub(super) struct Chosen {
    /// As the selector spells it, links in its path unresolved.
    pub path: Vec<u8>,
    pub key: Vec<u8>,
    pub kind: Kind,
    pub follow: bool,
}

/// A directory's header on the way down.
struct Header {
    chosen: Option<Chosen>,
    path: Vec<u8>,
    included: Option<ParentState>,
    excluded: Option<ParentState>,
}

pub(super) struct Patterns {
    include: Option<Matcher>,
    exclude: Option<Matcher>,
}

impl Patterns {
    pub fn new(selector: &Selector) -> Result<Self, ChecksumError> {
        let compile = |what, patterns: &[String]| {
            let invalid = |source| ChecksumError::Patterns {
                what,
                patterns: patterns.to_vec(),
                source,
            };
            let matcher = (!patterns.is_empty()).then(|| Matcher::new(patterns));
            matcher.transpose().map_err(invalid)
        };
        Ok(Self {
            include: compile("includepatterns", &selector.include)?,
            exclude: compile("excludepatterns", &selector.exclude)?,
        })
    }

    /// Decides on `candidate`, a path relative to what the selector names. Returns what its children need to know.
    fn decide(
        &self,
        candidate: &[u8],
        parent: Option<&Header>,
    ) -> Result<(bool, Option<ParentState>, Option<ParentState>), ChecksumError> {
        let mut included = None;
        if let Some(matcher) = &self.include {
            let above = parent.and_then(|parent| parent.included.as_ref());
            let (hit, state) = matcher.matches_with_parent(candidate, above)?;
            included = Some(state);
            if !hit {
                return Ok((false, included, None));
            }
        }
        let Some(matcher) = &self.exclude else {
            return Ok((true, included, None));
        };
        let above = parent.and_then(|parent| parent.excluded.as_ref());
        let (hit, state) = matcher.matches_with_parent(candidate, above)?;
        Ok((!hit, included, Some(state)))
    }
}

/// Where a walk through the records begins, and how its paths are spelt.
pub(super) struct Start {
    /// The directory part as the selector spells it.
    spelt: Vec<u8>,
    /// The same with links resolved.
    resolved: Vec<u8>,
    /// First key; none when there is nothing.
    key: Option<Vec<u8>>,
}

impl ChecksumTree {
    /// Digests one path with everything below it.
    pub(super) fn checksum_path(
        &mut self,
        root: &mut Root<'_, '_>,
        path: &[u8],
        follow: bool,
    ) -> Result<Hash, ChecksumError> {
        let path = lookup::absolute(path);
        self.scan(root, &path, follow)?;
        let found = self.find(&path_key(&path), follow)?;
        if !found.exists {
            return Err(ChecksumError::NotFound { path: lossy(&path) });
        }
        self.complete_hash(root, &found.key)
    }

    fn complete_hash(&mut self, root: &mut Root<'_, '_>, key: &[u8]) -> Result<Hash, ChecksumError> {
        let record = self.records.get(key);
        if let Some(hash) = record.and_then(|record| record.hash) {
            return Ok(hash);
        }
        let mut files = Vec::new();
        if record.is_some_and(|record| record.kind == Kind::Dir) {
            let prefix = [key, &[0]].concat();
            let below = range_from(&self.records, &prefix).take_while(|(key, _)| key.starts_with(&prefix));
            let lacking = below.filter(|(_, record)| record.kind != Kind::Dir && record.hash.is_none());
            files.extend(lacking.map(|(key, _)| key.clone()));
        } else {
            files.push(key.to_vec());
        }
        self.read_files(root, &files)?;
        self.hash(key)
    }

    /// Returns the hash of a record; a directory's is computed from those below, which are there already.
    fn hash(&mut self, key: &[u8]) -> Result<Hash, ChecksumError> {
        let absent = || ChecksumError::NotFound {
            path: lossy(&key_path(key)),
        };
        let record = self.records.get(key).ok_or_else(absent)?;
        if let Some(hash) = record.hash {
            return Ok(hash);
        }
        if record.kind != Kind::Dir {
            return Err(absent());
        }
        let prefix = [key, &[0]].concat();
        let mut digester = Digester::sha256();
        digester.update([0]);
        digester.update(digest_of(&self.hash(&prefix)?).to_string());
        let mut from = [&prefix[..], &[0]].concat();
        loop {
            let next = range_from(&self.records, &from).next();
            let Some((child, kind)) = next.map(|(child, record)| (child.clone(), record.kind)) else {
                break;
            };
            if !child.starts_with(&prefix) {
                break;
            }
            digester.update(&child[key.len()..]);
            digester.update(digest_of(&self.hash(&child)?).to_string());
            from = child;
            // Jumps over what the child's digest stands for. A name that begins with 0xff is not jumped over: as BuildKit.
            from.extend_from_slice(if kind == Kind::Dir { &[0, 0xff] } else { &[0] });
        }
        let hash = finish(digester);
        if let Some(record) = self.records.get_mut(key) {
            record.hash = Some(hash);
            self.dirty = true;
        }
        Ok(hash)
    }

    /// Digests a list of what is chosen by a pattern or by include and exclude patterns.
    pub(super) fn checksum_selected(
        &mut self,
        root: &mut Root<'_, '_>,
        selector: &Selector,
    ) -> Result<Digest, ChecksumError> {
        let patterns = Patterns::new(selector)?;
        let start = self.start(root, selector)?;
        let chosen = self.choose(selector, &patterns, &start)?;
        for required in &selector.required {
            if !chosen
                .iter()
                .any(|chosen| chosen.path.starts_with(required.as_bytes()))
            {
                return Err(ChecksumError::NotFound {
                    path: required.clone(),
                });
            }
        }
        let is_followed = |chosen: &Chosen| chosen.follow && chosen.kind == Kind::Symlink;
        let files: Vec<_> = chosen
            .iter()
            .filter(|chosen| !is_followed(chosen))
            .map(|chosen| chosen.key.clone())
            .collect();
        self.read_files(root, &files)?;
        let mut hashes = Vec::with_capacity(chosen.len());
        for chosen in &chosen {
            hashes.push(match is_followed(chosen) {
                true => self.checksum_path(root, &chosen.path, true)?,
                false => self.hash(&chosen.key)?,
            });
        }
        match (&chosen[..], &hashes[..]) {
            ([], _) => return Ok(Digest::sha256(b"")),
            ([chosen], [hash]) if base(selector.path.as_bytes()) == base(&chosen.path) => {
                return Ok(digest_of(hash));
            }
            _ => {}
        }
        let mut digester = Digester::sha256();
        for (chosen, hash) in chosen.iter().zip(&hashes) {
            let path = chosen.path.strip_prefix(&start.spelt[..]).unwrap_or(&chosen.path);
            let key = path_key(path);
            digester.update(if key.is_empty() { &[0][..] } else { &key });
            digester.update(digest_of(hash).to_string());
        }
        Ok(digester.finish())
    }

    /// Finds where to begin, reading the part of the tree that can matter.
    pub(super) fn start(
        &mut self,
        root: &mut Root<'_, '_>,
        selector: &Selector,
    ) -> Result<Start, ChecksumError> {
        let path = lookup::absolute(selector.path.as_bytes());
        let (spelt, follow) = if selector.wildcard {
            plain_prefix(&path)
        } else {
            (path, false)
        };
        self.scan(root, &spelt, follow)?;
        if spelt.is_empty() {
            return Ok(Start {
                spelt,
                resolved: Vec::new(),
                key: Some(Vec::new()),
            });
        }
        let found = self.find(&path_key(&spelt), follow)?;
        let resolved = key_path(&found.key);
        Ok(Start {
            spelt,
            resolved,
            key: found.exists.then_some(found.key),
        })
    }

    /// Lists what is chosen, with the headers of the directories it lies in, in the order of keys.
    pub(super) fn choose(
        &self,
        selector: &Selector,
        patterns: &Patterns,
        start: &Start,
    ) -> Result<Vec<Chosen>, ChecksumError> {
        let top = lookup::absolute(selector.path.as_bytes());
        let top_text = lossy(&top);
        let without_top = selector.path.ends_with('/');
        let mut chosen: Vec<Chosen> = Vec::new();
        let mut headers: Vec<Header> = Vec::new();
        let mut matched: Vec<u8> = Vec::new();
        let Some(first) = &start.key else {
            return Ok(chosen);
        };
        for (key, record) in range_from(&self.records, first) {
            let path = key_path(key);
            let mut path = match path.strip_prefix(&start.resolved[..]) {
                Some(rest) => [&start.spelt[..], rest].concat(),
                None => path,
            };
            while headers
                .last()
                .is_some_and(|header| !is_below(&path, &header.path))
            {
                headers.pop();
            }
            let is_header = key.last() == Some(&0);
            if is_header {
                path.pop();
                if path == top && without_top {
                    continue;
                }
            }
            if selector.wildcard {
                if !top.is_empty() && (matched.is_empty() || !is_below(&path, &matched)) {
                    if !is_match(selector, &top_text, &path)? {
                        continue;
                    }
                    matched.clone_from(&path);
                }
            } else if path != top && !is_below(&path, &top) {
                break;
            }
            let candidate = relative(&path, if selector.wildcard { &matched } else { &top });
            let parent = headers.last();
            let follow = parent.is_none() && selector.follow_links;
            let (take, included, excluded) = patterns.decide(candidate, parent)?;
            let this = Chosen {
                path: path.clone(),
                key: key.clone(),
                kind: record.kind,
                follow,
            };
            // A directory's digest would cover what is left out: only headers and files are listed.
            if take && record.kind != Kind::Dir {
                chosen.extend(headers.iter_mut().filter_map(|header| header.chosen.take()));
            }
            let pending = match record.kind {
                Kind::Dir => continue,
                _ if take => {
                    chosen.push(this);
                    None
                }
                _ => Some(this),
            };
            if record.kind == Kind::DirHeader {
                headers.push(Header {
                    chosen: pending,
                    path,
                    included,
                    excluded,
                });
            }
        }
        Ok(chosen)
    }
}

/// Whether the pattern of a selector, which is absolute in `pattern`, matches a path.
fn is_match(selector: &Selector, pattern: &str, path: &[u8]) -> Result<bool, ChecksumError> {
    pattern::glob_match(pattern, path).map_err(|source| ChecksumError::Wildcard {
        pattern: selector.path.clone(),
        source,
    })
}

/// Returns the part of a pattern before the first element with a wildcard, and whether there is such an element.
fn plain_prefix(path: &[u8]) -> (Vec<u8>, bool) {
    let mut plain = Vec::new();
    for part in path.split(|byte| *byte == b'/').skip(1) {
        if has_wildcard(part) {
            return (plain, true);
        }
        plain.push(b'/');
        plain.extend_from_slice(part);
    }
    (plain, false)
}

fn has_wildcard(name: &[u8]) -> bool {
    let mut bytes = name.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'*' | b'?' | b'[' => return true,
            b'\\' => {
                bytes.next();
            }
            _ => {}
        }
    }
    false
}

fn is_below(path: &[u8], dir: &[u8]) -> bool {
    path.strip_prefix(dir)
        .is_some_and(|rest| rest.first() == Some(&b'/'))
}

/// Returns `path` relative to `dir`, where it lies below; empty for `dir` itself.
fn relative<'a>(path: &'a [u8], dir: &[u8]) -> &'a [u8] {
    let rest = path.strip_prefix(dir).unwrap_or(path);
    rest.strip_prefix(b"/").unwrap_or(rest)
}

/// Returns the last element as Go's `path.Base` does.
fn base(path: &[u8]) -> &[u8] {
    if path.is_empty() {
        return b".";
    }
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |at| at + 1);
    if end == 0 {
        return b"/";
    }
    let start = path[..end]
        .iter()
        .rposition(|byte| *byte == b'/')
        .map_or(0, |at| at + 1);
    &path[start..end]
}

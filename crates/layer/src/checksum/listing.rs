//! Listing what selectors choose, with all that counts of each file, so that two runs can be compared file by file.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use oci::Digester;
use rustix::fs::{AtFlags, FileType};

use super::hash::is_content;
use super::lookup::{self, range_from};
use super::scan::{self, Root};
use super::select::Patterns;
use super::{ChecksumError, ChecksumTree, Hash, Kind, OpenRoot, Selector, finish, key_path, lossy, path_key};
use crate::Stop;

/// What a listed file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListedKind {
    /// A regular file.
    File,
    /// A directory; what lies in it is listed by itself.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, a pipe or a socket.
    Other,
}

/// One file of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedFile {
    /// Where it is, with links resolved; absolute, the root is empty. What is not UTF-8 is replaced.
    pub place: String,
    /// What it is.
    pub kind: ListedKind,
    /// Permission bits with set-user-ID, set-group-ID and sticky bit.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owning group.
    pub gid: u32,
    /// Size of a regular file, else 0.
    pub size_bytes: u64,
    /// A symbolic link's text.
    pub link: Option<String>,
    /// Hash over the extended attributes that count, if there are any.
    pub xattrs: Option<[u8; 32]>,
    /// The digest that counts: of the attributes and the content.
    pub hash: [u8; 32],
}

/// What selectors choose, by path as the selectors spell it: absolute, the root is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// The files.
    pub files: BTreeMap<String, ListedFile>,
    /// There are more, which were left out.
    pub is_cut: bool,
}

/// Attributes that a file had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits with set-user-ID, set-group-ID and sticky bit.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owning group.
    pub gid: u32,
}

/// A record on its way into a listing.
struct Candidate {
    path: Vec<u8>,
    key: Vec<u8>,
}

impl ChecksumTree {
    /// Lists what `selectors` choose, at most `limit` files; none choose everything. Only of use after their digest was
    /// computed: digests that are missing are computed, which reads files.
    ///
    /// # Errors
    /// Those of [`checksum_all`](Self::checksum_all).
    pub fn list(
        &mut self,
        open: &mut OpenRoot<'_>,
        selectors: &[Selector],
        limit: usize,
    ) -> Result<Listed, ChecksumError> {
        self.links.clear();
        let mut root = Root::new(open, &Stop::default());
        let everything = [Selector::default()];
        let selectors = if selectors.is_empty() {
            &everything
        } else {
            selectors
        };
        let mut listed = Listed::default();
        for selector in selectors {
            let path = oci::path::join(&["/", &selector.path]);
            let selector = Selector {
                path,
                ..selector.clone()
            };
            let mut found = self.candidates(&mut root, &selector)?;
            let room = limit.saturating_sub(listed.files.len());
            listed.is_cut |= found.len() > room;
            found.truncate(room);
            self.look(&mut root, found, &mut listed.files)?;
        }
        Ok(listed)
    }

    fn candidates(
        &mut self,
        root: &mut Root<'_, '_>,
        selector: &Selector,
    ) -> Result<Vec<Candidate>, ChecksumError> {
        if !selector.wildcard && selector.include.is_empty() && selector.exclude.is_empty() {
            return self.below(root, selector.path.as_bytes(), selector.follow_links);
        }
        let patterns = Patterns::new(selector)?;
        let start = self.start(root, selector)?;
        let mut found = Vec::new();
        for chosen in self.choose(selector, &patterns, &start)? {
            if chosen.follow && chosen.kind == Kind::Symlink {
                found.extend(self.below(root, &chosen.path, true)?);
            } else {
                let (path, key) = (chosen.path, chosen.key);
                found.push(Candidate { path, key });
            }
        }
        Ok(found)
    }

    /// Lists a path with everything below it.
    fn below(
        &mut self,
        root: &mut Root<'_, '_>,
        path: &[u8],
        follow: bool,
    ) -> Result<Vec<Candidate>, ChecksumError> {
        let path = lookup::absolute(path);
        self.scan(root, &path, follow)?;
        let found = self.find(&path_key(&path), follow)?;
        if !found.exists {
            return Err(ChecksumError::NotFound { path: lossy(&path) });
        }
        let prefix = [&found.key[..], &[0]].concat();
        let records = range_from(&self.records, &found.key);
        let records = records.take_while(|(key, _)| **key == found.key || key.starts_with(&prefix));
        let files = records.filter(|(_, record)| record.kind != Kind::Dir);
        let candidates = files.map(|(key, _)| {
            let mut rest = key_path(&key[found.key.len()..]);
            if rest.last() == Some(&b'/') {
                rest.pop();
            }
            Candidate {
                path: [&path[..], &rest].concat(),
                key: key.clone(),
            }
        });
        Ok(candidates.collect())
    }

    fn look(
        &mut self,
        root: &mut Root<'_, '_>,
        found: Vec<Candidate>,
        files: &mut BTreeMap<String, ListedFile>,
    ) -> Result<(), ChecksumError> {
        let keys: Vec<Vec<u8>> = found.iter().map(|candidate| candidate.key.clone()).collect();
        self.read_files(root, &keys)?;
        let mut dir: Option<(Vec<u8>, OwnedFd)> = None;
        for Candidate { path, key } in found {
            let Some(hash) = self.records.get(&key).and_then(|record| record.hash) else {
                continue;
            };
            let mut place = key_path(&key);
            if place.last() == Some(&b'/') {
                place.pop();
            }
            files.insert(lossy(&path), look_at(root, &place, hash, &mut dir)?);
        }
        Ok(())
    }
}

/// Looks at one file; neighbours share the open directory.
fn look_at(
    root: &mut Root<'_, '_>,
    place: &[u8],
    hash: Hash,
    dir: &mut Option<(Vec<u8>, OwnedFd)>,
) -> Result<ListedFile, ChecksumError> {
    let (parent, name) = scan::split(place);
    let fail = |error| scan::io_error(place, error);
    if dir.as_ref().is_none_or(|(open, _)| open != parent) {
        *dir = Some((parent.to_vec(), scan::open_dir(root.fd()?, parent).map_err(fail)?));
    }
    let fd = &dir.as_ref().expect("set above").1;
    let name = if name.is_empty() { b"." } else { name };
    let stat = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => ListedKind::File,
        FileType::Directory => ListedKind::Directory,
        FileType::Symlink => ListedKind::Symlink,
        _ => ListedKind::Other,
    };
    let link = match kind {
        ListedKind::Symlink => Some(lossy(&scan::read_link(fd.as_fd(), name).map_err(fail)?)),
        _ => None,
    };
    let at = [format!("/proc/self/fd/{}/", fd.as_raw_fd()).as_bytes(), name].concat();
    let mut xattrs = scan::xattrs(
        |buffer| rustix::fs::llistxattr(&at[..], buffer),
        |name, buffer| rustix::fs::lgetxattr(&at[..], name, buffer),
    )
    .map_err(fail)?;
    xattrs.retain(|(name, _)| is_content(name));
    xattrs.sort_unstable();
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    Ok(ListedFile {
        place: lossy(place),
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size_bytes: if kind == ListedKind::File { size } else { 0 },
        link,
        xattrs: (!xattrs.is_empty()).then(|| {
            let mut digester = Digester::sha256();
            for (name, value) in &xattrs {
                digester.update(name);
                digester.update([0]);
                digester.update(value);
                digester.update([0]);
            }
            finish(digester)
        }),
        hash,
    })
}

/// Digests a regular file as if it had other attributes: what differs then from an earlier digest is the content. `place` is
/// that of a [`ListedFile`].
///
/// # Errors
/// When it is no regular file or cannot be read.
pub fn hash_as(
    open: &mut OpenRoot<'_>,
    place: &str,
    attributes: Attributes,
) -> Result<[u8; 32], ChecksumError> {
    let mut root = Root::new(open, &Stop::default());
    scan::read_regular_as(&mut root, place.as_bytes(), attributes)
}

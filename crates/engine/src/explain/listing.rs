//! The files that a step read of an input, in a form to keep and to compare.

use std::collections::BTreeMap;

use layer::checksum::{Attributes, Listed, ListedFile, ListedKind};

use crate::explanation::{Change, ChangeKind, How};

/// Files in a listing; what comes later in the order of paths is left out.
pub(crate) const MAX_FILES: usize = 10_000;
/// Bytes of a stored listing.
pub(crate) const MAX_BYTES: usize = 1 << 20;

const VERSION: u8 = 1;

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub kind: ListedKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size_bytes: u64,
    pub link: Option<String>,
    /// First half of the hash over extended attributes.
    pub xattrs: Option<[u8; 16]>,
    /// First half of the digest over attributes and content.
    pub hash: [u8; 16],
}

/// Files by path, which is relative; the root is `.`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Listing {
    pub files: BTreeMap<String, Entry>,
    /// There are more.
    pub is_cut: bool,
}

fn half(hash: &[u8; 32]) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&hash[..16]);
    half
}

fn relative(path: &str) -> String {
    match path.trim_start_matches('/') {
        "" => ".".to_owned(),
        path => path.to_owned(),
    }
}

impl From<&ListedFile> for Entry {
    fn from(file: &ListedFile) -> Self {
        Self {
            kind: file.kind,
            mode: file.mode,
            uid: file.uid,
            gid: file.gid,
            size_bytes: file.size_bytes,
            link: file.link.clone(),
            xattrs: file.xattrs.as_ref().map(half),
            hash: half(&file.hash),
        }
    }
}

impl Entry {
    /// The attributes that go into the digest.
    pub fn attributes(&self) -> Attributes {
        Attributes {
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
        }
    }

    /// Whether this is the beginning of the entry's digest.
    pub fn has_hash(&self, hash: &[u8; 32]) -> bool {
        self.hash == half(hash)
    }
}

impl From<&Listed> for Listing {
    fn from(listed: &Listed) -> Self {
        let files = listed.files.iter();
        Self {
            files: files.map(|(path, file)| (relative(path), file.into())).collect(),
            is_cut: listed.is_cut,
        }
    }
}

impl Listing {
    /// Encodes for storage, in at most [`MAX_BYTES`]; equal listings give equal bytes. Neighbours share what their paths
    /// begin with.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION, u8::from(self.is_cut)];
        let mut last: &str = "";
        for (path, file) in &self.files {
            let before = out.len();
            let shared = path.bytes().zip(last.bytes()).take_while(|(a, b)| a == b).count();
            put_number(&mut out, shared as u64);
            put_bytes(&mut out, &path.as_bytes()[shared..]);
            let kind: u8 = match file.kind {
                ListedKind::File => 0,
                ListedKind::Directory => 1,
                ListedKind::Symlink => 2,
                ListedKind::Other => 3,
            };
            out.push(kind | u8::from(file.xattrs.is_some()) << 2);
            for number in [
                file.mode.into(),
                file.uid.into(),
                file.gid.into(),
                file.size_bytes,
            ] {
                put_number(&mut out, number);
            }
            out.extend_from_slice(&file.hash);
            out.extend_from_slice(file.xattrs.as_ref().map_or(&[][..], |xattrs| xattrs));
            if file.kind == ListedKind::Symlink {
                put_bytes(&mut out, file.link.as_deref().unwrap_or_default().as_bytes());
            }
            if out.len() > MAX_BYTES {
                out.truncate(before);
                out[1] = 1;
                break;
            }
            last = path;
        }
        out
    }

    /// Decodes what [`encode`](Self::encode) made; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let [VERSION, cut, rest @ ..] = bytes else {
            return None;
        };
        let mut input = rest;
        let mut listing = Self {
            is_cut: *cut == 1,
            ..Self::default()
        };
        let mut path: Vec<u8> = Vec::new();
        while !input.is_empty() {
            let shared = usize::try_from(number(&mut input)?).ok()?;
            if shared > path.len() {
                return None;
            }
            path.truncate(shared);
            path.extend_from_slice(text(&mut input)?);
            let flags = take(&mut input, 1)?[0];
            let kind = match flags & 3 {
                0 => ListedKind::File,
                1 => ListedKind::Directory,
                2 => ListedKind::Symlink,
                _ => ListedKind::Other,
            };
            let mut small = || u32::try_from(number(&mut input)?).ok();
            let (mode, uid, gid) = (small()?, small()?, small()?);
            let size_bytes = number(&mut input)?;
            let hash = take(&mut input, 16)?.try_into().ok()?;
            let xattrs = match flags & 4 {
                0 => None,
                _ => Some(take(&mut input, 16)?.try_into().ok()?),
            };
            let link = match kind {
                ListedKind::Symlink => Some(String::from_utf8(text(&mut input)?.to_vec()).ok()?),
                _ => None,
            };
            let entry = Entry {
                kind,
                mode,
                uid,
                gid,
                size_bytes,
                link,
                xattrs,
                hash,
            };
            listing.files.insert(String::from_utf8(path.clone()).ok()?, entry);
        }
        Some(listing)
    }
}

fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(u8::try_from(number & 0x7f).unwrap_or(0) | 0x80);
        number >>= 7;
    }
    out.push(u8::try_from(number).unwrap_or(0));
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn take<'a>(input: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = input.split_at_checked(count)?;
    *input = rest;
    Some(taken)
}

fn number(input: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(input, 1)?[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn text<'a>(input: &mut &'a [u8]) -> Option<&'a [u8]> {
    let count = usize::try_from(number(input)?).ok()?;
    take(input, count)
}

/// Says what differs between two listings, in the order of paths. `has_same_content` is asked for files of the same size
/// whose attributes differ: their digests say nothing about the bytes alone; `None`: it is not known.
pub(crate) fn diff(
    before: &Listing,
    now: &Listing,
    input: &str,
    has_same_content: &mut dyn FnMut(&str, &Entry) -> Option<bool>,
) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut found = |path: &str, how: How, attribute: &str, values: Option<(String, String)>| {
        let (before, after) = values.unzip();
        changes.push(Change {
            kind: ChangeKind::File,
            subject: path.to_owned(),
            attribute: attribute.to_owned(),
            before,
            after,
            how,
            input: input.to_owned(),
        });
    };
    // What lies behind the end of a cut listing is not known to be absent.
    let is_known = |listing: &Listing, path: &str| {
        !listing.is_cut
            || listing
                .files
                .last_key_value()
                .is_some_and(|(last, _)| path <= last.as_str())
    };
    let mut paths: Vec<&String> = before.files.keys().chain(now.files.keys()).collect();
    paths.sort_unstable();
    paths.dedup();
    for path in paths {
        match (before.files.get(path), now.files.get(path)) {
            (Some(old), Some(new)) if old == new => {}
            (Some(old), Some(new)) => differences(path, old, new, has_same_content, &mut found),
            (None, Some(_)) if is_known(before, path) => found(path, How::Added, "", None),
            (Some(_), None) if is_known(now, path) => found(path, How::Removed, "", None),
            _ => {}
        }
    }
    changes
}

type Found<'a> = dyn FnMut(&str, How, &str, Option<(String, String)>) + 'a;

fn differences(
    path: &str,
    old: &Entry,
    new: &Entry,
    has_same_content: &mut dyn FnMut(&str, &Entry) -> Option<bool>,
    found: &mut Found<'_>,
) {
    let mut changed = |attribute: &str, before: String, after: String| {
        found(path, How::Changed, attribute, Some((before, after)));
    };
    if old.kind != new.kind {
        return changed(
            "type",
            kind_name(old.kind).to_owned(),
            kind_name(new.kind).to_owned(),
        );
    }
    let is_link = new.kind == ListedKind::Symlink;
    // A symbolic link's permissions mean nothing.
    let has_mode = old.mode != new.mode && !is_link;
    if has_mode {
        changed("mode", format!("{:04o}", old.mode), format!("{:04o}", new.mode));
    }
    let has_owner = (old.uid, old.gid) != (new.uid, new.gid);
    if has_owner {
        let owner = |entry: &Entry| format!("{}:{}", entry.uid, entry.gid);
        changed("owner", owner(old), owner(new));
    }
    if is_link && old.link != new.link {
        let target = |entry: &Entry| entry.link.clone().unwrap_or_default();
        changed("target", target(old), target(new));
    }
    let has_xattrs = old.xattrs != new.xattrs;
    if has_xattrs {
        found(path, How::Changed, "extended attributes", None);
    }
    if new.kind != ListedKind::File || old.hash == new.hash {
        return;
    }
    if old.size_bytes != new.size_bytes {
        let size = |entry: &Entry| format!("{} bytes", entry.size_bytes);
        found(path, How::Changed, "content", Some((size(old), size(new))));
    } else if !(has_mode || has_owner || has_xattrs)
        || (!has_xattrs && has_same_content(path, old) == Some(false))
    {
        found(path, How::Changed, "content", None);
    }
}

fn kind_name(kind: ListedKind) -> &'static str {
    match kind {
        ListedKind::File => "file",
        ListedKind::Directory => "directory",
        ListedKind::Symlink => "symbolic link",
        ListedKind::Other => "device, pipe or socket",
    }
}

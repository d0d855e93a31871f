//! The table of contents.

use std::collections::BTreeMap;
use std::io;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use oci::Digest;
use serde::Serialize;

use crate::tar::{EntryKind, Header};
use crate::tree::Timestamp;

/// An entry of the archive, or a piece of a file behind its first.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Entry {
    pub(super) name: String,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    size: u64,
    #[serde(rename = "modtime", skip_serializing_if = "String::is_empty")]
    mod_time: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    link_name: String,
    #[serde(skip_serializing_if = "is_zero")]
    mode: u64,
    #[serde(skip_serializing_if = "is_zero")]
    uid: u64,
    #[serde(skip_serializing_if = "is_zero")]
    gid: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    user_name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    group_name: String,
    /// Where in the blob the member with the data begins.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    dev_major: u64,
    #[serde(skip_serializing_if = "is_zero")]
    dev_minor: u64,
    /// Values in base64.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    xattrs: BTreeMap<String, String>,
    /// Digest of a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) digest: Option<Digest>,
    /// Where in the file the piece begins.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) chunk_offset: u64,
    /// Length of the piece; zero: up to the file's end.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) chunk_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) chunk_digest: Option<Digest>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes references"
)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The owners' names told last, by number: those that are the same are not told again.
#[derive(Default)]
pub(super) struct Names {
    users: BTreeMap<u32, Vec<u8>>,
    groups: BTreeMap<u32, Vec<u8>>,
}

fn if_changed(known: &mut BTreeMap<u32, Vec<u8>>, id: u32, name: &[u8]) -> String {
    if name.is_empty() || known.get(&id).is_some_and(|known| known == name) {
        return String::new();
    }
    known.insert(id, name.to_vec());
    text(name)
}

/// JSON has no bytes.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Entry {
    /// Describes an entry, but for what is known only with its data.
    pub(super) fn new(header: &Header, names: &mut Names) -> Self {
        let (kind, is_link, is_device) = match header.kind {
            EntryKind::Regular => ("reg", false, false),
            EntryKind::Hardlink => ("hardlink", true, false),
            EntryKind::Symlink => ("symlink", true, false),
            EntryKind::CharDevice => ("char", false, true),
            EntryKind::BlockDevice => ("block", false, true),
            EntryKind::Directory => ("dir", false, false),
            EntryKind::Fifo => ("fifo", false, false),
        };
        let (dev_major, dev_minor) = if is_device { header.dev } else { (0, 0) };
        Self {
            name: text(&header.name),
            kind,
            size: header.size_bytes,
            mod_time: seconds(header.mtime),
            link_name: if is_link { text(&header.link) } else { String::new() },
            mode: header.mode.into(),
            uid: header.uid.into(),
            gid: header.gid.into(),
            user_name: if_changed(&mut names.users, header.uid, &header.uname),
            group_name: if_changed(&mut names.groups, header.gid, &header.gname),
            dev_major: dev_major.into(),
            dev_minor: dev_minor.into(),
            xattrs: header
                .xattrs
                .iter()
                .map(|(name, value)| (text(name), STANDARD.encode(value)))
                .collect(),
            ..Self::default()
        }
    }

    /// Begins the entry of the piece behind this one.
    pub(super) fn next_piece(&self) -> Self {
        Self {
            name: self.name.clone(),
            kind: "chunk",
            ..Self::default()
        }
    }

    fn has_offset(&self) -> bool {
        self.chunk_digest.is_some()
    }
}

/// A time to the nearest second; nothing for the epoch, which stands for an unknown time.
fn seconds(time: Timestamp) -> String {
    if time.seconds == 0 {
        return String::new();
    }
    let round_up = i64::from(time.nanoseconds >= 500_000_000);
    oci::timestamp::format(time.seconds.saturating_add(round_up), 0)
}

/// Writes the table. `starts` tells where the blocks begin whose numbers the entries have.
pub(super) fn encode(mut entries: Vec<Entry>, starts: &[u64]) -> io::Result<Vec<u8>> {
    #[derive(Serialize)]
    struct Table {
        version: u32,
        entries: Vec<Entry>,
    }
    for entry in entries.iter_mut().filter(|entry| entry.has_offset()) {
        let start = usize::try_from(entry.offset)
            .ok()
            .and_then(|block| starts.get(block));
        entry.offset = *start.ok_or_else(|| io::Error::other("a file's data was not written"))?;
    }
    let table = Table { version: 1, entries };
    oci::json::to_vec_indent(&table, "\t").map_err(io::Error::other)
}

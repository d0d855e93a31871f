//! What records' keys were made from: descriptions by group, the listings of files that they name, and which records there
//! were once.
//!
//! A listing is stored once under its digest, however many descriptions name it, and goes with the last of them. Of a
//! record that is gone its id is kept for some time: whoever asks why a step ran learns that it had run before.

use std::time::SystemTime;

use oci::Digest;
use redb::{ReadableTable, ReadableTableMetadata, WriteTransaction};

use crate::clock;
use crate::db::{BoxError, Table, prefix_range};
use crate::error::StoreError;
use crate::graph::{self, database_error};
use crate::record::{Batch, Records};

/// Record → description, JSON.
pub(crate) const DESCRIPTIONS: Table = Table::new("descriptions");
/// Group, NUL, time in nanoseconds counted backwards, record → nothing.
pub(crate) const GROUPS: Table = Table::new("groups");
/// Digest of a listing → the listing.
pub(crate) const LISTINGS: Table = Table::new("listings");
/// Digest of a listing, record that names it → nothing.
pub(crate) const LISTED: Table = Table::new("listed");
/// Record that is gone → when it went, in nanoseconds.
pub(crate) const GONE: Table = Table::new("gone");
/// When a record went, record → nothing.
pub(crate) const GONE_ORDER: Table = Table::new("gone_order");

/// Records that are remembered after they went.
const MAX_GONE: u64 = 10_000;

/// What a record's key was made from, for people who ask why something ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordDescription {
    /// What comparable records have in common, for example hashes of a step's place and of its name.
    pub groups: Vec<String>,
    /// The inputs, as JSON.
    pub json: Vec<u8>,
    /// Listings of files that the JSON names by their SHA-256 digests.
    pub listings: Vec<Vec<u8>>,
    /// When it was written.
    pub created_at: SystemTime,
}

/// A stored description.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Row {
    #[serde(default)]
    groups: Vec<String>,
    #[serde(default)]
    listings: Vec<Digest>,
    created_at_ns: i64,
    /// The caller's JSON as text; invalid UTF-8 is replaced.
    json: String,
}

/// A description that was found; its listings are read by [`Records::listing`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// The record.
    pub record: String,
    /// The inputs, as JSON.
    pub json: Vec<u8>,
    /// When it was written.
    pub created_at: SystemTime,
}

fn group_key(group: &str, created_at_ns: i64, record: &[u8]) -> Vec<u8> {
    // Newest first.
    let backwards = i64::MAX.wrapping_sub(created_at_ns).cast_unsigned() ^ (1 << 63);
    [group.as_bytes(), &[0], &backwards.to_be_bytes(), record].concat()
}

/// Returns the record of a [`GROUPS`] key.
fn group_key_record<'k>(group: &str, key: &'k [u8]) -> Option<&'k [u8]> {
    key.get(group.len() + 9..)
}

fn listed_key(digest: &Digest, record: &[u8]) -> Vec<u8> {
    [digest.as_bytes(), record].concat()
}

fn gone_key(at_ns: i64, record: &[u8]) -> Vec<u8> {
    // Negative times do not occur.
    [&at_ns.to_be_bytes(), record].concat()
}

fn decode(row: &[u8]) -> Option<Row> {
    serde_json::from_slice(row).ok()
}

impl Records {
    /// Returns what a record's key was made from.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn description(&self, record: &str) -> Result<Option<Described>, StoreError> {
        let read = self.store.shared.db.read()?;
        let table = read.open_table(DESCRIPTIONS).map_err(database_error)?;
        let row = table.get(&graph::encode_id(record)[..]).map_err(database_error)?;
        Ok(row.and_then(|row| described(record.to_owned(), row.value())))
    }

    /// Lists described records of a group, newest first, at most `limit`.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn described(&self, group: &str, limit: usize) -> Result<Vec<Described>, StoreError> {
        let read = self.store.shared.db.read()?;
        let groups = read.open_table(GROUPS).map_err(database_error)?;
        let descriptions = read.open_table(DESCRIPTIONS).map_err(database_error)?;
        let (from, to) = prefix_range([group.as_bytes(), &[0]].concat());
        let mut found = Vec::new();
        for row in groups
            .range(&from[..]..&to[..])
            .map_err(database_error)?
            .take(limit)
        {
            let key = row.map_err(database_error)?.0;
            let Some(record) = group_key_record(group, key.value()) else {
                continue;
            };
            let row = descriptions.get(record).map_err(database_error)?;
            found.extend(row.and_then(|row| described(graph::decode_id(record)?, row.value())));
        }
        Ok(found)
    }

    /// Reads a listing that a description names.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn listing(&self, digest: &Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let read = self.store.shared.db.read()?;
        let table = read.open_table(LISTINGS).map_err(database_error)?;
        let row = table.get(digest.as_bytes()).map_err(database_error)?;
        Ok(row.map(|row| row.value().to_vec()))
    }

    /// Tells when a record went that is not there any more, if that is not too long ago.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn gone_since(&self, record: &str) -> Result<Option<SystemTime>, StoreError> {
        let read = self.store.shared.db.read()?;
        let table = read.open_table(GONE).map_err(database_error)?;
        let row = table.get(&graph::encode_id(record)[..]).map_err(database_error)?;
        let nanoseconds = row.and_then(|row| Some(i64::from_be_bytes(row.value().try_into().ok()?)));
        Ok(nanoseconds.map(clock::from_nanos))
    }

    /// Applies a batch of descriptions later, with what else is to be written. Those of records that do not exist by then are
    /// left out.
    ///
    /// # Errors
    /// Those of [`apply`](Self::apply), except for what goes wrong later.
    pub fn apply_later(&self, batch: Batch) -> Result<(), StoreError> {
        self.submit(batch).map(|_| ())
    }
}

fn described(record: String, row: &[u8]) -> Option<Described> {
    let row = decode(row)?;
    Some(Described {
        record,
        json: row.json.into_bytes(),
        created_at: clock::from_nanos(row.created_at_ns),
    })
}

/// Writes a description in place of the earlier one; nothing if there is no such record.
pub(crate) fn put(
    write: &WriteTransaction,
    record: &str,
    description: RecordDescription,
) -> Result<(), BoxError> {
    let nothing: &[u8] = &[];
    let record = graph::encode_id(record);
    {
        let (links, results) = (write.open_table(graph::LINKS)?, write.open_table(graph::RESULTS)?);
        let backlinks = write.open_table(graph::BACKLINKS)?;
        if !graph::exists(&links, &results, &record)? && !graph::has_prefix(&backlinks, &record)? {
            return Ok(());
        }
    }
    delete(write, &record)?;
    let created_at_ns = clock::to_nanos(description.created_at);
    let json = String::from_utf8_lossy(&description.json).into_owned();
    let mut digests = Vec::with_capacity(description.listings.len());
    {
        let (mut listings, mut listed) = (write.open_table(LISTINGS)?, write.open_table(LISTED)?);
        for listing in &description.listings {
            let digest = Digest::sha256(listing);
            if listings.get(digest.as_bytes())?.is_none() {
                listings.insert(digest.as_bytes(), &listing[..])?;
            }
            listed.insert(&listed_key(&digest, &record)[..], nothing)?;
            digests.push(digest);
        }
        let mut groups = write.open_table(GROUPS)?;
        for group in &description.groups {
            groups.insert(&group_key(group, created_at_ns, &record)[..], nothing)?;
        }
    }
    let row = Row {
        groups: description.groups,
        listings: digests,
        created_at_ns,
        json,
    };
    let row = serde_json::to_vec(&row)?;
    write.open_table(DESCRIPTIONS)?.insert(&record[..], &row[..])?;
    forget_gone(write, &record)
}

/// Deletes a record's description, and listings that no other one names.
fn delete(write: &WriteTransaction, record: &[u8]) -> Result<bool, BoxError> {
    let old = write
        .open_table(DESCRIPTIONS)?
        .remove(record)?
        .map(|row| row.value().to_vec());
    let Some(row) = old.as_deref().and_then(decode) else {
        return Ok(old.is_some());
    };
    let mut groups = write.open_table(GROUPS)?;
    for group in &row.groups {
        groups.remove(&group_key(group, row.created_at_ns, record)[..])?;
    }
    let (mut listings, mut listed) = (write.open_table(LISTINGS)?, write.open_table(LISTED)?);
    for digest in &row.listings {
        listed.remove(&listed_key(digest, record)[..])?;
        if !graph::has_prefix(&listed, digest.as_bytes())? {
            listings.remove(digest.as_bytes())?;
        }
    }
    Ok(true)
}

/// Deletes the description of a record that goes, and remembers that there was one.
pub(crate) fn bury(write: &WriteTransaction, record: &[u8]) -> Result<(), BoxError> {
    if !delete(write, record)? {
        return Ok(());
    }
    let nothing: &[u8] = &[];
    let now = clock::to_nanos(SystemTime::now());
    forget_gone(write, record)?;
    write.open_table(GONE)?.insert(record, &now.to_be_bytes()[..])?;
    write
        .open_table(GONE_ORDER)?
        .insert(&gone_key(now, record)[..], nothing)?;
    let oldest = {
        let order = write.open_table(GONE_ORDER)?;
        if order.len()? <= MAX_GONE {
            return Ok(());
        }
        order.first()?.map(|row| row.0.value().to_vec())
    };
    match oldest.as_deref().and_then(|key| key.get(8..)) {
        Some(record) => forget_gone(write, record),
        None => Ok(()),
    }
}

fn forget_gone(write: &WriteTransaction, record: &[u8]) -> Result<(), BoxError> {
    let old = write
        .open_table(GONE)?
        .remove(record)?
        .and_then(|row| Some(i64::from_be_bytes(row.value().try_into().ok()?)));
    if let Some(at) = old {
        write.open_table(GONE_ORDER)?.remove(&gone_key(at, record)[..])?;
    }
    Ok(())
}

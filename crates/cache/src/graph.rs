//! The tables of solver records.
//!
//! A record's id is encoded as a tag and, for SHA-256 digests, the raw hash: the graph has many links, and each is stored
//! twice. A link's key is parent, input, output, op, selector, child; a backlink's the same with the child first.

use oci::{Algorithm, Digest};
use redb::{ReadableTable, WriteTransaction};

use crate::db::{BoxError, Table, prefix_range};
use crate::describe::{self, RecordDescription};
use crate::error::StoreError;
use crate::record::{CacheResult, Link};
use crate::types::RefId;

/// Parent, link, child → nothing.
pub(crate) const LINKS: Table = Table::new("links");
/// Child, parent, link → nothing.
pub(crate) const BACKLINKS: Table = Table::new("backlinks");
/// Record, result id → result, JSON.
pub(crate) const RESULTS: Table = Table::new("results");
/// Result id, NUL, record → nothing.
pub(crate) const BY_RESULT: Table = Table::new("by_result");
/// Ref id, NUL, result id → nothing.
pub(crate) const BY_REF: Table = Table::new("by_ref");

/// Longest id of a record or result, in bytes.
pub(crate) const ID_MAX: usize = 512;

const TAG_SHA256: u8 = 1;
const TAG_TEXT: u8 = 0;
const NO_SELECTOR: u8 = 2;

/// Encodes a record's id so that no code is a prefix of another.
pub(crate) fn encode_id(id: &str) -> Vec<u8> {
    match id.parse::<Digest>() {
        Ok(digest) if digest.algorithm() == Algorithm::Sha256 && digest.to_string() == id => {
            [&[TAG_SHA256], digest.as_bytes()].concat()
        }
        _ => {
            // Longer ids are refused before.
            let length = u16::try_from(id.len()).unwrap_or(u16::MAX);
            [&[TAG_TEXT], &length.to_be_bytes()[..], id.as_bytes()].concat()
        }
    }
}

/// Takes an encoded id off the front of `bytes`.
fn take_id(bytes: &mut &[u8]) -> Option<String> {
    match take(bytes, 1)?[0] {
        TAG_SHA256 => Some(
            Digest::from_hash(Algorithm::Sha256, take(bytes, 32)?)
                .ok()?
                .to_string(),
        ),
        TAG_TEXT => {
            let length = u16::from_be_bytes(take(bytes, 2)?.try_into().ok()?);
            String::from_utf8(take(bytes, usize::from(length))?.to_vec()).ok()
        }
        _ => None,
    }
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

pub(crate) fn decode_id(mut bytes: &[u8]) -> Option<String> {
    take_id(&mut bytes).filter(|_| bytes.is_empty())
}

/// Returns the encoded id at the front of a key.
pub(crate) fn first_id(key: &[u8]) -> Option<Vec<u8>> {
    let mut rest = key;
    take_id(&mut rest)?;
    Some(key[..key.len() - rest.len()].to_vec())
}

pub(crate) fn encode_link(link: &Link) -> Vec<u8> {
    let mut out = [link.input.to_be_bytes(), link.output.to_be_bytes()].concat();
    out.extend(encode_id(&link.digest.to_string()));
    match &link.selector {
        Some(selector) => out.extend(encode_id(&selector.to_string())),
        None => out.push(NO_SELECTOR),
    }
    out
}

fn take_link(bytes: &mut &[u8]) -> Option<Link> {
    let input = u32::from_be_bytes(take(bytes, 4)?.try_into().ok()?);
    let output = u32::from_be_bytes(take(bytes, 4)?.try_into().ok()?);
    let digest = take_id(bytes)?.parse().ok()?;
    let selector = if bytes.first() == Some(&NO_SELECTOR) {
        take(bytes, 1)?;
        None
    } else {
        Some(take_id(bytes)?.parse().ok()?)
    };
    Some(Link {
        input,
        output,
        digest,
        selector,
    })
}

/// Decodes a key of [`LINKS`]: parent, link, child.
pub(crate) fn decode_link_key(mut bytes: &[u8]) -> Option<(String, Link, String)> {
    let parent = take_id(&mut bytes)?;
    let link = take_link(&mut bytes)?;
    Some((parent, link, take_id(&mut bytes)?))
}

/// Decodes a key of [`BACKLINKS`]: child, parent, link.
pub(crate) fn decode_backlink_key(mut bytes: &[u8]) -> Option<(String, String, Link)> {
    let child = take_id(&mut bytes)?;
    let parent = take_id(&mut bytes)?;
    Some((child, parent, take_link(&mut bytes)?))
}

fn backlink_key(parent: &[u8], link: &[u8], child: &[u8]) -> Vec<u8> {
    [child, parent, link].concat()
}

pub(crate) fn result_key(record: &[u8], result: &[u8]) -> Vec<u8> {
    [record, result].concat()
}

pub(crate) fn by_result_key(result: &[u8], record: &[u8]) -> Vec<u8> {
    [result, &[0], record].concat()
}

/// A stored result.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct ResultRow {
    pub refs: Vec<RefId>,
    pub created_at_ns: i64,
}

/// A batch whose results are known to have their refs.
#[derive(Debug, Default)]
pub(crate) struct RecordChanges {
    pub links: Vec<(String, Link, String)>,
    pub results: Vec<(String, CacheResult)>,
    pub descriptions: Vec<(String, RecordDescription)>,
}

pub(crate) fn apply(write: &WriteTransaction, changes: RecordChanges) -> Result<(), BoxError> {
    let nothing: &[u8] = &[];
    let mut links = write.open_table(LINKS)?;
    let mut backlinks = write.open_table(BACKLINKS)?;
    for (parent, link, child) in changes.links {
        let (parent, link, child) = (encode_id(&parent), encode_link(&link), encode_id(&child));
        links.insert(&[&parent[..], &link, &child].concat()[..], nothing)?;
        backlinks.insert(&backlink_key(&parent, &link, &child)[..], nothing)?;
    }
    let mut results = write.open_table(RESULTS)?;
    let mut by_result = write.open_table(BY_RESULT)?;
    let mut by_ref = write.open_table(BY_REF)?;
    for (record, result) in changes.results {
        let (record, id) = (encode_id(&record), result.id.as_bytes());
        for reference in &result.refs {
            by_ref.insert(&by_result_key(reference.as_str().as_bytes(), id)[..], nothing)?;
        }
        by_result.insert(&by_result_key(id, &record)[..], nothing)?;
        let row = ResultRow {
            created_at_ns: crate::clock::to_nanos(result.created_at),
            refs: result.refs,
        };
        results.insert(&result_key(&record, id)[..], &serde_json::to_vec(&row)?[..])?;
    }
    drop((links, backlinks, results, by_result, by_ref));
    for (record, description) in changes.descriptions {
        describe::put(write, &record, description)?;
    }
    Ok(())
}

/// Lists the keys of `table` that begin with `prefix`.
pub(crate) fn keys(
    table: &impl ReadableTable<&'static [u8], &'static [u8]>,
    prefix: Vec<u8>,
) -> Result<Vec<Vec<u8>>, redb::StorageError> {
    let (from, to) = prefix_range(prefix);
    table
        .range(&from[..]..&to[..])?
        .map(|row| Ok(row?.0.value().to_vec()))
        .collect()
}

pub(crate) fn has_prefix(
    table: &impl ReadableTable<&'static [u8], &'static [u8]>,
    prefix: &[u8],
) -> Result<bool, redb::StorageError> {
    let (from, to) = prefix_range(prefix.to_vec());
    Ok(table.range(&from[..]..&to[..])?.next().transpose()?.is_some())
}

/// Reports whether a record has links or results.
pub(crate) fn exists(
    links: &impl ReadableTable<&'static [u8], &'static [u8]>,
    results: &impl ReadableTable<&'static [u8], &'static [u8]>,
    record: &[u8],
) -> Result<bool, redb::StorageError> {
    Ok(has_prefix(links, record)? || has_prefix(results, record)?)
}

/// Deletes all results a ref is part of.
pub(crate) fn delete_ref(write: &WriteTransaction, id: &RefId) -> Result<(), BoxError> {
    let prefix = by_result_key(id.as_str().as_bytes(), &[]);
    let found = keys(&write.open_table(BY_REF)?, prefix.clone())?;
    for key in found {
        delete_result(write, &key[prefix.len()..])?;
    }
    Ok(())
}

/// Deletes a result wherever it is, and records that lead nowhere without it.
pub(crate) fn delete_result(write: &WriteTransaction, result: &[u8]) -> Result<(), BoxError> {
    let prefix = by_result_key(result, &[]);
    let found = keys(&write.open_table(BY_RESULT)?, prefix.clone())?;
    let mut suspects = Vec::with_capacity(found.len());
    for key in found {
        let record = key[prefix.len()..].to_vec();
        let row = write
            .open_table(RESULTS)?
            .remove(&result_key(&record, result)[..])?
            .map(|row| row.value().to_vec());
        let refs = row
            .and_then(|row| serde_json::from_slice::<ResultRow>(&row).ok())
            .map(|row| row.refs);
        for id in refs.unwrap_or_default() {
            write
                .open_table(BY_REF)?
                .remove(&by_result_key(id.as_str().as_bytes(), result)[..])?;
        }
        write.open_table(BY_RESULT)?.remove(&key[..])?;
        suspects.push(record);
    }
    delete_dead_ends(write, suspects)
}

/// Deletes those of the records that have neither results nor children, and then their parents likewise.
fn delete_dead_ends(write: &WriteTransaction, mut suspects: Vec<Vec<u8>>) -> Result<(), BoxError> {
    let mut links = write.open_table(LINKS)?;
    let mut backlinks = write.open_table(BACKLINKS)?;
    let results = write.open_table(RESULTS)?;
    while let Some(record) = suspects.pop() {
        if exists(&links, &results, &record)? {
            continue;
        }
        for key in keys(&backlinks, record.clone())? {
            backlinks.remove(&key[..])?;
            let Some((child, parent, link)) = decode_backlink_key(&key) else {
                continue;
            };
            let (parent, child) = (encode_id(&parent), encode_id(&child));
            links.remove(&[&parent[..], &encode_link(&link), &child].concat()[..])?;
            suspects.push(parent);
        }
        describe::bury(write, &record)?;
    }
    Ok(())
}

/// Creates all tables, so that readers need not expect their absence.
pub(crate) fn create_tables(write: &WriteTransaction) -> Result<(), BoxError> {
    use crate::db::{META, NAMES, REFS, VALUES};
    use crate::describe::{DESCRIPTIONS, GONE, GONE_ORDER, GROUPS, LISTED, LISTINGS};
    for table in [
        META,
        REFS,
        VALUES,
        NAMES,
        LINKS,
        BACKLINKS,
        RESULTS,
        BY_RESULT,
        BY_REF,
        DESCRIPTIONS,
        GROUPS,
        LISTINGS,
        LISTED,
        GONE,
        GONE_ORDER,
    ] {
        write.open_table(table)?;
    }
    Ok(())
}

pub(crate) fn database_error(error: impl std::fmt::Display) -> StoreError {
    StoreError::Database {
        message: error.to_string(),
    }
}

//! Disk usage: what there is, what it takes, who holds it.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use crate::clock;
use crate::error::StoreError;
use crate::filter::{Filters, Subject};
use crate::state::{Entry, State};
use crate::store::Store;
use crate::types::{RecordType, RefId};

/// One ref in a usage listing; BuildKit's `UsageRecord`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRecord {
    /// The ref.
    pub id: RefId,
    /// Whether it is writable.
    pub mutable: bool,
    /// Whether something holds it.
    pub in_use: bool,
    /// Bytes on disk: snapshot and blobs.
    pub size_bytes: u64,
    /// What it stands on.
    pub parents: Vec<RefId>,
    /// When it was made.
    pub created_at: SystemTime,
    /// When it was last used.
    pub last_used_at: Option<SystemTime>,
    /// How often it was used.
    pub usage_count: u64,
    /// What to show.
    pub description: String,
    /// What it is for.
    pub record_type: RecordType,
    /// Whether its blobs are also held by name, see [`Store::retain`].
    pub shared: bool,
}

/// What to list.
#[derive(Clone, Debug, Default)]
pub struct UsageOptions {
    /// Filters in containerd's language; a ref is listed when any of them matches, or when there are none.
    pub filter: Vec<String>,
    /// Lists only what was not used for this long; zero lists all.
    pub age_limit: Duration,
}

impl Subject for UsageRecord {
    fn field(&self, path: &[String]) -> Option<String> {
        let flag = |is_set: bool| is_set.then(String::new);
        let text = |text: String| (!text.is_empty()).then_some(text);
        match path.first().map(String::as_str)? {
            "id" => text(self.id.to_string()),
            "parents" => text(
                self.parents
                    .iter()
                    .map(RefId::as_str)
                    .collect::<Vec<_>>()
                    .join(";"),
            ),
            "description" => text(self.description.clone()),
            "inuse" => flag(self.in_use),
            "mutable" => flag(self.mutable),
            "immutable" => flag(!self.mutable),
            "type" => text(self.record_type.to_string()),
            "shared" => flag(self.shared),
            "private" => flag(!self.shared),
            _ => None,
        }
    }
}

/// Reports whether `entry` speaks for itself: of twins, the mutable one does unless someone holds the immutable one.
pub(crate) fn is_listed(state: &State, entry: &Entry) -> bool {
    let twin = entry.row.twin.as_ref().and_then(|twin| state.get(twin));
    match twin {
        None => true,
        Some(immutable) if entry.row.mutable => immutable.holds == 0,
        Some(_) => entry.holds > 0,
    }
}

/// Describes one ref; the size is what is remembered.
pub(crate) fn describe(state: &State, id: &RefId, entry: &Entry, in_use: bool) -> UsageRecord {
    let row = &entry.row;
    UsageRecord {
        id: id.clone(),
        mutable: row.mutable,
        in_use,
        size_bytes: row.size_bytes.unwrap_or_default(),
        parents: row.parents.ids().into_iter().cloned().collect(),
        created_at: clock::from_nanos(row.created_at_ns),
        last_used_at: row.last_used_at_ns.map(clock::from_nanos),
        usage_count: row.usage_count,
        description: row.description.as_ref().to_owned(),
        record_type: row.record_type,
        shared: row.layer().blobs.iter().any(|blob| state.is_named(&blob.digest)),
    }
}

/// Lists what is held, directly or by something that stands on it.
fn in_use(state: &State) -> BTreeSet<RefId> {
    let mut pending: Vec<RefId> = state
        .iter()
        .filter(|(_, entry)| entry.holds > 0)
        .map(|(id, _)| id.clone())
        .collect();
    let mut used = BTreeSet::new();
    while let Some(id) = pending.pop() {
        if let Some(entry) = state.get(&id)
            && used.insert(id)
        {
            pending.extend(entry.row.parents.ids().into_iter().cloned());
        }
    }
    used
}

impl Store {
    /// Lists refs and what they take on disk, in the order of ids. Sizes that are not known yet are measured.
    pub fn disk_usage(&self, options: &UsageOptions) -> Result<Vec<UsageRecord>, StoreError> {
        let filters = Filters::parse(&options.filter)?;
        let cut_off = SystemTime::now().checked_sub(options.age_limit);
        let mut unmeasured = BTreeSet::new();
        let mut records = {
            let state = self.shared.state();
            let used = in_use(&state);
            let mut records = Vec::with_capacity(state.len());
            for (id, entry) in state.iter().filter(|(_, entry)| is_listed(&state, entry)) {
                let record = describe(&state, id, entry, used.contains(id));
                let is_young = |used_at| cut_off.is_some_and(|cut_off| used_at > cut_off);
                let too_young = !options.age_limit.is_zero() && record.last_used_at.is_some_and(is_young);
                if too_young || !filters.matches(&record) {
                    continue;
                }
                // The size of what is being written to is anyone's guess.
                let is_written = entry.row.mutable && entry.holds > 0;
                if entry.row.size_bytes.is_none() && !is_written {
                    unmeasured.insert(id.clone());
                }
                records.push(record);
            }
            records
        };
        for record in records
            .iter_mut()
            .filter(|record| unmeasured.contains(&record.id))
        {
            record.size_bytes = measure(self, &record.id)?;
        }
        Ok(records)
    }
}

/// Measures a ref's snapshot and blobs and remembers the sum. What several refs share counts for the first of them. A ref
/// that is gone takes nothing.
pub(crate) fn measure(store: &Store, id: &RefId) -> Result<u64, StoreError> {
    let (row, counts_snapshot, blobs) = {
        let state = store.shared.state();
        let Some(entry) = state.get(id) else { return Ok(0) };
        let row = entry.row.clone();
        if let Some(size_bytes) = row.size_bytes {
            return Ok(size_bytes);
        }
        let first = row.layer().chain_id.as_ref().and_then(|chain_id| {
            let shares = |other: &&RefId| {
                state
                    .get(other)
                    .is_some_and(|entry| entry.row.snapshot == row.snapshot)
            };
            state.by_chain(chain_id).find(shares)
        });
        let counts = first.is_none_or(|first| first == id);
        let blobs: Vec<_> = row.layer().blobs.iter().map(|blob| blob.digest).collect();
        let blobs: Vec<_> = blobs
            .into_iter()
            .filter(|digest| state.counts_blob(id, digest))
            .collect();
        (row, counts, blobs)
    };
    let key = match &row.twin {
        Some(twin) if !row.mutable => Some(twin.snapshot_key().clone()),
        _ => row.snapshot.clone(),
    };
    let mut size_bytes = 0u64;
    if let Some(key) = key.filter(|_| counts_snapshot) {
        size_bytes = match store.snapshotter().usage(&key) {
            Ok(usage) => usage.size_bytes,
            Err(error) if error.is_not_found() => 0,
            Err(error) => return Err(error.into()),
        };
    }
    for digest in &blobs {
        let info = store.content().info(digest)?;
        size_bytes = size_bytes.saturating_add(info.map_or(0, |info| info.size_bytes));
    }
    store.shared.change(|state, transaction| {
        // Unless something changed meanwhile.
        if state
            .get(id)
            .map(|entry| &entry.row)
            .is_some_and(|now| now.snapshot == row.snapshot && now.layer().blobs == row.layer().blobs)
        {
            state.update(id, transaction, |row| row.size_bytes = Some(size_bytes));
        }
    });
    Ok(size_bytes)
}

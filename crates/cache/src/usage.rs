//! Disk usage.

use std::time::{Duration, SystemTime};

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
    /// Whether its blobs are also held by name, see [`Store::retain`](crate::Store::retain).
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

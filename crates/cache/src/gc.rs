//! Garbage collection: policies, what they take, and in what order.

use std::time::Duration;

/// One step of a prune or one policy of garbage collection; BuildKit's `PruneInfo`. Zero means "no such limit".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PruneOptions {
    /// Filters in containerd's language; a ref is a candidate when any of them matches, or when there are none.
    pub filter: Vec<String>,
    /// Takes internal, frontend and shared refs too.
    pub all: bool,
    /// Keeps what was used within this time.
    pub keep_duration: Duration,
    /// Never goes below this much.
    pub reserved_bytes: u64,
    /// Removes until not more than this is used.
    pub max_used_bytes: u64,
    /// Removes until this much is free on the file system.
    pub min_free_bytes: u64,
}

/// A size of disk space: in bytes or relative to the whole disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSpace {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of the disk.
    Percentage(u64),
}

/// The size of a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskStat {
    /// All of it in bytes.
    pub total_bytes: u64,
    /// What is free.
    pub free_bytes: u64,
    /// What is free to unprivileged users.
    pub available_bytes: u64,
}

/// The limits default policies are made from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcLimits {
    /// What is kept in any case.
    pub reserved: Option<DiskSpace>,
    /// The cap.
    pub max_used: Option<DiskSpace>,
    /// What shall stay free on the disk.
    pub min_free: Option<DiskSpace>,
}

/// Makes BuildKit's default policies: old and cheap data after two days, anything after sixty, then what is over the
/// limits, at last internal data too. Without any limit, they are derived from the disk.
pub fn default_policies(limits: GcLimits, disk: DiskStat) -> Vec<PruneOptions> {
    todo!()
}

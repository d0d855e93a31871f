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

impl PruneOptions {
    /// Tells whether nothing is to stay that is not in use.
    pub fn takes_everything(&self) -> bool {
        let everything = Self {
            all: true,
            ..Self::default()
        };
        *self == everything
    }
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

/// What is assumed when the size of the disk is unknown.
const UNKNOWN_DISK_BYTES: u64 = 2_000_000_000;
/// Most that is kept in any case by default.
const RESERVED_MAX_BYTES: u64 = 10_000_000_000;
/// Highest default cap.
const USED_MAX_BYTES: u64 = 100_000_000_000;
const GIGABYTE: u64 = 1_000_000_000;

impl DiskSpace {
    /// Converts to bytes; shares of the disk are rounded up to whole gigabytes as BuildKit does.
    pub fn to_bytes(self, disk: DiskStat) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percentage(0) => 0,
            Self::Percentage(_) if disk.total_bytes == 0 => UNKNOWN_DISK_BYTES,
            Self::Percentage(percent) => {
                let share = disk.total_bytes.saturating_mul(percent) / 100;
                ((share >> 30) + 1).saturating_mul(GIGABYTE)
            }
        }
    }
}

impl GcLimits {
    /// Derives limits from the disk: a tenth reserved, a fifth free, four fifths used, within absolute bounds.
    pub fn for_disk(disk: DiskStat) -> Self {
        let capped = |percent, most| match DiskSpace::Percentage(percent) {
            share if share.to_bytes(disk) > most => DiskSpace::Bytes(most),
            share => share,
        };
        Self {
            reserved: Some(capped(10, RESERVED_MAX_BYTES)),
            max_used: Some(capped(80, USED_MAX_BYTES)),
            min_free: Some(DiskSpace::Percentage(20)),
        }
    }
}

/// Makes BuildKit's default policies: old and cheap data after two days, anything after sixty, then what is over the
/// limits, at last internal data too. Without any limit, they are derived from the disk.
pub fn default_policies(limits: GcLimits, disk: DiskStat) -> Vec<PruneOptions> {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let limits = if limits == GcLimits::default() {
        GcLimits::for_disk(disk)
    } else {
        limits
    };
    let bytes = |space: Option<DiskSpace>| space.map_or(0, |space| space.to_bytes(disk));
    let over_limits = PruneOptions {
        reserved_bytes: bytes(limits.reserved),
        max_used_bytes: bytes(limits.max_used),
        min_free_bytes: bytes(limits.min_free),
        ..PruneOptions::default()
    };
    let cheap = ["source.local", "exec.cachemount", "source.git.checkout"];
    vec![
        PruneOptions {
            filter: cheap.iter().map(|kind| format!("type=={kind}")).collect(),
            keep_duration: 2 * DAY,
            max_used_bytes: 512_000_000,
            ..PruneOptions::default()
        },
        PruneOptions {
            keep_duration: 60 * DAY,
            ..over_limits.clone()
        },
        over_limits.clone(),
        PruneOptions {
            all: true,
            ..over_limits
        },
    ]
}

/// Returns how many bytes may stay, given the present total; `None` if there is no limit and all candidates go.
pub(crate) fn keep_bytes(options: &PruneOptions, total_bytes: u64, disk: DiskStat) -> Option<u64> {
    let PruneOptions {
        reserved_bytes,
        max_used_bytes,
        min_free_bytes,
        ..
    } = *options;
    if reserved_bytes == 0 && max_used_bytes == 0 && min_free_bytes == 0 {
        return None;
    }
    let mut keep = max_used_bytes;
    let excess = min_free_bytes.saturating_sub(disk.free_bytes);
    if excess > 0 {
        let wanted = total_bytes.saturating_sub(excess);
        keep = if keep == 0 { wanted } else { keep.min(wanted) };
    } else if min_free_bytes != 0 && keep == 0 {
        keep = total_bytes;
    }
    Some(keep.max(reserved_bytes))
}

/// What decides which candidate goes first.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Candidate<T> {
    pub last_used_at_ns: Option<i64>,
    pub usage_count: u64,
    pub subject: T,
}

/// Orders candidates, first to go first: by age rank and use rank, weighed alike, as BuildKit does.
pub(crate) fn order<T>(mut candidates: Vec<Candidate<T>>) -> Vec<Candidate<T>> {
    fn ranks<T, V: PartialEq>(
        candidates: &[Candidate<T>],
        first: V,
        of: impl Fn(&Candidate<T>) -> V,
    ) -> Vec<u32> {
        let (mut rank, mut last) = (1, first);
        let mut next = |candidate| {
            let value = of(candidate);
            if value != last {
                (rank, last) = (rank + 1, value);
            }
            rank
        };
        candidates.iter().map(&mut next).collect()
    }
    // Stable sorts: equal ranks keep their order.
    candidates.sort_by_key(|candidate| candidate.last_used_at_ns);
    let by_age = ranks(&candidates, None, |candidate| candidate.last_used_at_ns);
    let mut ranked: Vec<(u32, Candidate<T>)> = by_age.into_iter().zip(candidates).collect();
    ranked.sort_by_key(|(_, candidate)| candidate.usage_count);
    let (by_age, candidates): (Vec<u32>, Vec<Candidate<T>>) = ranked.into_iter().unzip();
    let by_use = ranks(&candidates, 0, |candidate| candidate.usage_count);
    let highest = |ranks: &[u32]| f64::from(ranks.iter().copied().max().unwrap_or(1));
    let (ages, uses) = (highest(&by_age), highest(&by_use));
    let scores = by_age
        .iter()
        .zip(&by_use)
        .map(|(age, used)| f64::from(*age) / ages + f64::from(*used) / uses);
    let mut scored: Vec<(f64, Candidate<T>)> = scores.zip(candidates).collect();
    scored.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    scored.into_iter().map(|(_, candidate)| candidate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = GIGABYTE;

    #[test]
    fn default_policies_are_buildkits() {
        let disk = DiskStat {
            total_bytes: 1000 * GB,
            free_bytes: 500 * GB,
            available_bytes: 500 * GB,
        };
        let policies = default_policies(GcLimits::default(), disk);
        assert_eq!(policies.len(), 4);
        assert_eq!(policies[0].filter.len(), 3);
        assert_eq!(policies[0].max_used_bytes, 512_000_000);
        assert_eq!(
            (policies[1].reserved_bytes, policies[1].max_used_bytes),
            (10 * GB, 100 * GB)
        );
        // A fifth of the disk is 186.26 GiB.
        assert_eq!(policies[2].min_free_bytes, 187 * GB);
        assert!(policies[3].all && !policies[2].all);
    }

    #[test]
    fn small_disks_get_shares() {
        let disk = DiskStat {
            total_bytes: 40 << 30,
            ..DiskStat::default()
        };
        let limits = GcLimits::for_disk(disk);
        assert_eq!(limits.reserved.unwrap().to_bytes(disk), 5 * GB);
        assert_eq!(limits.max_used.unwrap().to_bytes(disk), 33 * GB);
        assert_eq!(DiskSpace::Percentage(10).to_bytes(DiskStat::default()), 2 * GB);
    }

    #[test]
    fn limits_combine() {
        let disk = DiskStat {
            total_bytes: 100,
            free_bytes: 10,
            available_bytes: 10,
        };
        let keep = |reserved_bytes, max_used_bytes, min_free_bytes| {
            let options = PruneOptions {
                reserved_bytes,
                max_used_bytes,
                min_free_bytes,
                ..PruneOptions::default()
            };
            keep_bytes(&options, 50, disk)
        };
        assert_eq!(keep(0, 0, 0), None);
        assert_eq!(keep(0, 30, 0), Some(30));
        assert_eq!(keep(0, 0, 15), Some(45));
        assert_eq!(keep(0, 30, 15), Some(30));
        assert_eq!(keep(0, 48, 15), Some(45));
        assert_eq!(keep(47, 30, 15), Some(47));
        assert_eq!(keep(0, 0, 5), Some(50));
    }

    #[test]
    fn old_and_unused_goes_first() {
        let candidate = |last_used_at_ns, usage_count, subject| Candidate {
            last_used_at_ns,
            usage_count,
            subject,
        };
        let ordered = order(vec![
            candidate(Some(30), 1, "recent"),
            candidate(Some(10), 5, "old and busy"),
            candidate(Some(10), 1, "old"),
            candidate(None, 0, "never used"),
            candidate(Some(30), 5, "recent and busy"),
        ]);
        let order: Vec<_> = ordered.into_iter().map(|candidate| candidate.subject).collect();
        assert_eq!(
            order,
            ["never used", "old", "recent", "old and busy", "recent and busy"]
        );
    }
}

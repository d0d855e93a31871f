//! The contract every backend keeps.

use std::fmt;
use std::path::PathBuf;

use crate::error::SnapshotError;
use crate::key::SnapshotKey;
use crate::mount::Mount;

/// What a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Writable through its mounts.
    Active,
    /// A read-only look at a committed snapshot.
    View,
    /// Immutable.
    Committed,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Active => "active",
            Self::View => "view",
            Self::Committed => "committed",
        })
    }
}

/// What is known of a snapshot without reading its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotStat {
    /// Its key, or its name when committed.
    pub key: SnapshotKey,
    /// What it is.
    pub kind: Kind,
    /// The committed snapshot it was prepared on.
    pub parent: Option<SnapshotKey>,
}

/// What a snapshot takes on disk on top of its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Allocated bytes; hard links once, holes not.
    pub size_bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
}

/// A step of a merge: what turns `lower` into `upper`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diff {
    /// The committed snapshot to compare with; `None` is the empty tree.
    pub lower: Option<SnapshotKey>,
    /// The committed snapshot whose changes are taken; `None` is the empty tree, which makes all of `lower` deletions.
    pub upper: Option<SnapshotKey>,
}

/// The outcome of a [`Snapshotter::sweep`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Swept {
    /// Snapshots removed.
    pub removed: Vec<SnapshotKey>,
    /// Snapshots nobody asked for that stay because one that was asked for stands on them.
    pub held: Vec<SnapshotKey>,
}

/// Keeps root file systems as layered snapshots. This is containerd's snapshotter contract, synchronous.
///
/// A build step uses it like this:
///
/// ```text
/// prepare("step-1", Some("base"))     an active snapshot that looks like "base"
/// mounts("step-1")                    where to mount it; the step runs and writes there
/// commit("layer-1", "step-1")         the key "step-1" is gone, the name "layer-1" is immutable
/// prepare("step-2", Some("layer-1"))  and so on
/// ```
///
/// or, to give up, `remove("step-1")`. Keys and names share one name space. Parents are committed snapshots always. Any
/// number of snapshots can be prepared on one parent, at once, from any thread.
///
/// Nothing is flushed to disk by these calls. After the process dies (`kill -9`) everything that returned is still there;
/// after the machine dies, everything that returned before the last successful [`sync`](Self::sync). A database that
/// records snapshots calls `sync` before each of its own durable commits; after opening it calls
/// [`sweep`](Self::sweep), and takes a recorded snapshot that [`stat`](Self::stat) does not know for a cache miss.
pub trait Snapshotter: Send + Sync {
    /// Returns the backend's name as BuildKit spells it: `overlayfs`, `native`.
    fn name(&self) -> &'static str;

    /// Makes the active snapshot `key` that looks like `parent`, or is empty. Errors: `Exists`, `NotFound` or `WrongKind`
    /// of the parent.
    fn prepare(&self, key: &SnapshotKey, parent: Option<&SnapshotKey>) -> Result<(), SnapshotError>;

    /// Makes the view `key` of `parent`. It holds the parent until removed. Errors as with [`prepare`](Self::prepare).
    fn view(&self, key: &SnapshotKey, parent: Option<&SnapshotKey>) -> Result<(), SnapshotError>;

    /// Describes how to mount the active snapshot or view `key`: for views read-only. Mounting one active snapshot twice at
    /// once is undefined with the overlay backend. Errors: `NotFound`, `WrongKind` for a committed one.
    fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>, SnapshotError>;

    /// Describes how to look at committed snapshot `name` read-only, without a view: nothing has to be removed
    /// afterwards, and the caller holds the snapshot by its own means. `None` is the empty tree.
    fn read_mounts(&self, name: Option<&SnapshotKey>) -> Result<Vec<Mount>, SnapshotError>;

    /// Makes the active snapshot `key` the committed snapshot `name`. `key` is gone then. It must not be mounted writable
    /// by anything that still writes. Errors: `NotFound`, `Exists` for `name`, `WrongKind`.
    fn commit(&self, name: &SnapshotKey, key: &SnapshotKey) -> Result<(), SnapshotError>;

    /// Removes a snapshot of any kind. Errors: `NotFound`, `HasChildren`. Once it returned or failed while deleting files,
    /// the key is free again.
    fn remove(&self, key: &SnapshotKey) -> Result<(), SnapshotError>;

    /// Tells what `key` is. Errors: `NotFound`.
    fn stat(&self, key: &SnapshotKey) -> Result<SnapshotStat, SnapshotError>;

    /// Looks on disk whether the files of `key` and of all it stands on are there, as someone may have removed them by hand.
    /// What was found is not looked at again until [`expire_checks`](Self::expire_checks): snapshots share what they stand on.
    /// Errors: `NotFound` of the snapshot whose files are gone.
    fn check(&self, key: &SnapshotKey) -> Result<(), SnapshotError>;

    /// Lets [`check`](Self::check) look again at everything.
    fn expire_checks(&self);

    /// Measures what `key` takes on top of its parent. Walks its files; callers remember the answer for committed ones.
    fn usage(&self, key: &SnapshotKey) -> Result<Usage, SnapshotError>;

    /// Lists all snapshots, ordered by key.
    fn list(&self) -> Vec<SnapshotStat>;

    /// Makes the committed snapshot `name` by applying `diffs` in order, starting from nothing, as if each were exported as
    /// a layer and the layers unpacked. Shares files by hard links, and a leading chain of whole snapshots as its parent,
    /// where the backend can. Errors: `NotFound`, `WrongKind` of a diff's side, `Exists`.
    fn merge(&self, name: &SnapshotKey, diffs: &[Diff]) -> Result<(), SnapshotError>;

    /// Makes durable whatever returned before this call. Costs nothing when nothing changed.
    fn sync(&self) -> Result<(), SnapshotError>;

    /// Removes every snapshot that `keep` does not claim and on which no kept one stands.
    fn sweep(&self, keep: &dyn Fn(&SnapshotKey) -> bool) -> Result<Swept, SnapshotError>;

    /// Tells where the files of `key` lie in this backend, for [`apply_layer`](crate::apply_layer) and
    /// [`diff_layer`](crate::diff_layer) to work on directly.
    fn storage(&self, key: &SnapshotKey) -> Result<Storage, SnapshotError>;
}

/// Where a snapshot's own files lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// The directory holds the whole tree.
    Whole(PathBuf),
    /// The directory holds the changes against the parent in overlayfs' notation; `lower` are the parents' directories,
    /// nearest first.
    Changes {
        /// The snapshot's own directory.
        upper: PathBuf,
        /// Those below it.
        lower: Vec<PathBuf>,
        /// Whether overlayfs' marks are `user.*` attributes.
        userxattr: bool,
    },
}

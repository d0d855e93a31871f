//! What can go wrong with snapshots and mounts.

use std::io;
use std::path::PathBuf;

use crate::key::SnapshotKey;
use crate::snapshotter::Kind;

/// A failed operation on a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No snapshot has this key.
    #[error("snapshot {key} does not exist: not found")]
    NotFound {
        /// What was asked for.
        key: SnapshotKey,
    },
    /// The key or name is taken.
    #[error("snapshot {key}: already exists")]
    Exists {
        /// The name in question.
        key: SnapshotKey,
    },
    /// The snapshot is of a kind that cannot do this.
    #[error("snapshot {key} is {kind}, not {wanted}")]
    WrongKind {
        /// The snapshot.
        key: SnapshotKey,
        /// What it is.
        kind: Kind,
        /// What it had to be.
        wanted: Kind,
    },
    /// Other snapshots stand on this one.
    #[error("cannot remove snapshot {key} with {children} children")]
    HasChildren {
        /// The snapshot.
        key: SnapshotKey,
        /// How many have it as their parent.
        children: u32,
    },
    /// The file system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried, in the form "open", "rename to".
        action: &'static str,
        /// What it was tried on.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The backend cannot work on this file system or with these rights.
    #[error("the {backend} snapshotter cannot work in {}", root.display())]
    Unsupported {
        /// The backend's name.
        backend: &'static str,
        /// Its directory.
        root: PathBuf,
        /// Why.
        #[source]
        source: MountError,
    },
    /// A mount failed.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// Copying a tree or working out a difference failed.
    #[error("snapshot {key}")]
    Tree {
        /// The snapshot being made.
        key: SnapshotKey,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl SnapshotError {
    /// Reports whether the failure says that a snapshot is absent.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Reports whether the failure says that the name is taken.
    pub fn is_exists(&self) -> bool {
        matches!(self, Self::Exists { .. })
    }
}

/// A failed mount or unmount.
#[derive(Debug, thiserror::Error)]
#[error("{action} {}", path.display())]
pub struct MountError {
    /// What was tried, in the form "mount overlay at".
    pub action: String,
    /// The mount point, or the source where there is no mount point.
    pub path: PathBuf,
    /// The system's answer.
    #[source]
    pub source: io::Error,
}

pub(crate) trait IoContext<T> {
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, SnapshotError>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, SnapshotError> {
        self.map_err(|source| SnapshotError::Io {
            action,
            path: path.into(),
            source: source.into(),
        })
    }
}

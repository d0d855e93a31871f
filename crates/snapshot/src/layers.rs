//! OCI layers in and out of snapshots.

use std::io::{Read, Write};

use layer::{ApplyError, ApplyOptions, Applied, DiffError, DiffOptions};

use crate::error::{MountError, SnapshotError};
use crate::key::SnapshotKey;
use crate::snapshotter::Snapshotter;

/// A failed conversion between a layer and a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The layer could not be unpacked.
    #[error("apply layer to snapshot {key}")]
    Apply {
        /// The snapshot it was for.
        key: SnapshotKey,
        /// Why.
        #[source]
        source: ApplyError,
    },
    /// The difference could not be written.
    #[error("diff of snapshot {key}")]
    Diff {
        /// The upper snapshot.
        key: SnapshotKey,
        /// Why.
        #[source]
        source: DiffError,
    },
}

/// Unpacks a layer (compressed or not) onto the active snapshot `key`, which must not be mounted meanwhile.
///
/// With overlayfs this writes straight to the upper directory: no mount, no copying up.
pub fn apply_layer(
    snapshotter: &dyn Snapshotter,
    key: &SnapshotKey,
    layer: impl Read,
    options: &ApplyOptions,
) -> Result<Applied, LayerError> {
    todo!()
}

/// Writes the uncompressed layer that turns `lower` into `upper` (a committed or unmounted active snapshot).
///
/// When `upper` stands directly on `lower` and the backend keeps changes, only those are read; otherwise both trees.
pub fn diff_layer(
    snapshotter: &dyn Snapshotter,
    lower: Option<&SnapshotKey>,
    upper: &SnapshotKey,
    out: impl Write,
    options: &DiffOptions,
) -> Result<(), LayerError> {
    todo!()
}

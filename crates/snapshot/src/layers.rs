//! OCI layers in and out of snapshots.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use layer::{Applied, ApplyError, ApplyOptions, DiffError, DiffOptions, Whiteouts};
use rustix::fs::{Mode, OFlags};

use crate::error::{IoContext, MountError, SnapshotError};
use crate::key::SnapshotKey;
use crate::mount::MountedTree;
use crate::snapshotter::{Kind, Snapshotter, Storage};

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

pub(crate) fn open_dir(path: &Path) -> Result<OwnedFd, SnapshotError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).at("open", path)
}

/// Unpacks a layer (compressed or not) onto the active snapshot `key`, which must not be mounted meanwhile. Whiteouts and
/// parents in `options` are set here, whatever they say.
///
/// With overlayfs this writes straight to the upper directory: no mount, no copying up.
pub fn apply_layer(
    snapshotter: &dyn Snapshotter,
    key: &SnapshotKey,
    layer: impl Read + Send,
    options: ApplyOptions,
) -> Result<Applied, LayerError> {
    let stat = snapshotter.stat(key)?;
    if stat.kind != Kind::Active {
        let (key, kind) = (stat.key, stat.kind);
        return Err(SnapshotError::WrongKind {
            key,
            kind,
            wanted: Kind::Active,
        }
        .into());
    }
    // Tells the backend that the files change.
    snapshotter.mounts(key)?;
    let (root, options) = match snapshotter.storage(key)? {
        Storage::Whole(root) => (
            open_dir(&root)?,
            ApplyOptions {
                whiteouts: Whiteouts::Remove,
                parents: Vec::new(),
                ..options
            },
        ),
        Storage::Changes {
            upper,
            lower,
            userxattr,
        } => {
            let parents = lower.iter().map(|dir| open_dir(dir)).collect::<Result<_, _>>()?;
            let whiteouts = if userxattr {
                Whiteouts::OverlayUser
            } else {
                Whiteouts::Overlay
            };
            (
                open_dir(&upper)?,
                ApplyOptions {
                    whiteouts,
                    parents,
                    ..options
                },
            )
        }
    };
    layer::apply(layer, &root, &options).map_err(|source| LayerError::Apply {
        key: key.clone(),
        source,
    })
}

/// Opens the tree of a snapshot of any kind for reading.
pub(crate) fn open_tree(
    snapshotter: &dyn Snapshotter,
    key: Option<&SnapshotKey>,
) -> Result<MountedTree, LayerError> {
    let mounts = match key {
        Some(key) if snapshotter.stat(key)?.kind != Kind::Committed => snapshotter.mounts(key)?,
        _ => snapshotter.read_mounts(key)?,
    };
    match mounts.as_slice() {
        [only] => Ok(only.open()?),
        _ => Err(MountError {
            action: "open several mounts as one tree of".into(),
            path: key.map_or("", SnapshotKey::as_str).into(),
            source: std::io::ErrorKind::Unsupported.into(),
        }
        .into()),
    }
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
    let stat = snapshotter.stat(upper)?;
    let failed = |source| LayerError::Diff {
        key: upper.clone(),
        source,
    };
    let below = match lower {
        Some(lower) => Some(open_tree(snapshotter, Some(lower))?),
        None => None,
    };
    let below = below.as_ref().map(AsFd::as_fd);
    if stat.kind != Kind::View && stat.parent.as_ref() == lower {
        return match snapshotter.storage(upper)? {
            Storage::Changes { upper, .. } => {
                layer::diff_upperdir(below, open_dir(&upper)?, out, options).map_err(failed)
            }
            Storage::Whole(whole) => layer::diff(below, open_dir(&whole)?, out, options).map_err(failed),
        };
    }
    let above = open_tree(snapshotter, Some(upper))?;
    layer::diff(below, &above, out, options).map_err(failed)
}

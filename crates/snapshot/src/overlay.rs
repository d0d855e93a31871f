//! The overlayfs backend: a snapshot is a directory of changes.

use std::path::Path;

use crate::error::SnapshotError;

/// How overlays are made.
#[derive(Debug, Clone, Default)]
pub struct OverlayOptions {
    /// Keeps overlayfs' marks in `user.*` attributes, as user namespaces need; `None` finds out.
    pub userxattr: Option<bool>,
}

/// Keeps snapshots as overlayfs directories. Cheap to prepare, and a layer is what lies in the directory.
#[derive(Debug)]
pub struct Overlay {}

impl Overlay {
    /// Opens or creates the backend in `root`; fails with `Unsupported` where overlays cannot be mounted.
    pub fn open(root: &Path, options: OverlayOptions) -> Result<Self, SnapshotError> {
        todo!()
    }
}

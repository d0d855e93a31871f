//! Writing what changed as an OCI layer.

use std::io::{self, Write};
use std::os::fd::AsFd;

use crate::tree::Timestamp;

/// How a layer is written.
#[derive(Debug, Clone, Default)]
pub struct DiffOptions {
    /// No entry is younger than this (`SOURCE_DATE_EPOCH`).
    pub latest: Option<Timestamp>,
    /// Keeps nanoseconds of modification times. Off, they are cut to seconds, as containerd does.
    pub keep_nanoseconds: bool,
    /// Leaves out `user.*` attributes, as containerd does, and writes `security.capability` alone.
    pub capability_only: bool,
}

/// A difference that could not be worked out or written.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// A file could not be read.
    #[error("{action} {path:?}")]
    Io {
        /// The path within the tree.
        path: String,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The layer could not be written.
    #[error("write layer")]
    Write(#[source] io::Error),
    /// A file shrank or grew while it was read.
    #[error("{path:?} changed while it was read")]
    Changed {
        /// The path within the tree.
        path: String,
    },
    /// The upper directory uses overlayfs features that hide where data comes from.
    #[error("{path:?}: overlay redirects are not supported")]
    Redirect {
        /// The path within the tree.
        path: String,
    },
}

/// Writes the uncompressed layer that turns `lower` (or nothing) into `upper`, from two whole trees.
pub fn diff<Lower: AsFd>(
    lower: Option<Lower>,
    upper: impl AsFd,
    out: impl Write,
    options: &DiffOptions,
) -> Result<(), DiffError> {
    todo!()
}

/// Writes the layer recorded in an overlay's upper directory; `lower` is the merged tree below it.
pub fn diff_upperdir<Lower: AsFd>(
    lower: Option<Lower>,
    upper: impl AsFd,
    out: impl Write,
    options: &DiffOptions,
) -> Result<(), DiffError> {
    todo!()
}

//! Rewriting a layer's timestamps.

use std::io::{Read, Write};

use crate::tar::ReadError;
use crate::tree::Timestamp;

/// A layer that could not be rewritten.
#[derive(Debug, thiserror::Error)]
pub enum RewriteError {
    /// The archive is damaged.
    #[error("read layer")]
    Read(#[from] ReadError),
    /// The output failed.
    #[error("write layer")]
    Write(#[source] std::io::Error),
}

/// Copies an uncompressed layer and sets every time later than `epoch` to `epoch`: the exporters' `rewrite-timestamp`.
pub fn rewrite_timestamps(layer: impl Read, out: impl Write, epoch: Timestamp) -> Result<(), RewriteError> {
    todo!()
}

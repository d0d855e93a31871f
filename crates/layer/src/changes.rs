//! What changed between two trees.

mod same;
mod upperdir;
mod walk;

use std::path::Path;

use crate::diff::DiffError;
use crate::tree::Stat;

pub(crate) use same::is_layer_xattr;
pub use upperdir::changes_upperdir;
pub use walk::changes;

/// How a path changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// Nothing changed, but the file has other names, which matters for hard links.
    Unmodified,
    /// It is new.
    Added,
    /// It was there and is different.
    Modified,
    /// It is gone, with all below it.
    Deleted,
}

/// One change. Paths are relative, without a leading slash.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    /// How it changed.
    pub kind: ChangeKind,
    /// Where.
    pub path: &'a Path,
    /// What is there now; `None` for deletions.
    pub stat: Option<&'a Stat>,
}

/// Receives changes one by one; its first error ends the walk.
pub type Visit<'v> = dyn FnMut(Change<'_>) -> Result<(), DiffError> + 'v;

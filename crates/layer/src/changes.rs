//! What changed between two trees.

use std::os::fd::AsFd;
use std::path::Path;

use crate::diff::DiffError;
use crate::tree::Stat;

/// How a path changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// Nothing changed, but the file has other names, which matters for hard links.
    Unmodified,
    /// It is new.
    Added,
    /// It was there and is different, or is the parent of something that changed.
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

/// Walks two trees and reports what turns `lower` (or nothing) into `upper`, in the order of containerd's differ:
/// names compared byte by byte, a directory before what is in it.
///
/// Files with equal metadata count as equal unless their times may have been truncated to seconds, in which case their
/// bytes are compared.
pub fn changes<Lower: AsFd>(
    lower: Option<Lower>,
    upper: impl AsFd,
    visit: &mut dyn FnMut(Change<'_>) -> Result<(), DiffError>,
) -> Result<(), DiffError> {
    todo!()
}

/// Reports the changes recorded in an overlay's upper directory, reading nothing else of the trees than what it names.
///
/// `upper` is the upper directory itself, `lower` the merged tree below it.
pub fn changes_upperdir<Lower: AsFd>(
    lower: Option<Lower>,
    upper: impl AsFd,
    visit: &mut dyn FnMut(Change<'_>) -> Result<(), DiffError>,
) -> Result<(), DiffError> {
    todo!()
}

//! Copying between trees as BuildKit's file operation does.

use std::io;
use std::path::{Path, PathBuf};

use crate::apply::ApplyError;
use crate::tree::{Root, Timestamp, TreeError};

/// A change of permission bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModeChange {
    /// Sets the twelve low bits.
    Bits(u32),
    /// A symbolic change such as `u+x,go-w` or `a=rX`, applied to each file's own mode.
    Symbolic(String),
}

/// How to copy. The defaults copy one path as `cp -a` does.
#[derive(Debug, Clone, Default)]
#[expect(clippy::struct_excessive_bools, reason = "mirrors LLB's FileActionCopy")]
pub struct CopyOptions {
    /// Owner and group of everything copied or created; `None` keeps the source's.
    pub owner: Option<(u32, u32)>,
    /// Access and modification time of everything copied or created; `None` keeps the source's.
    pub time: Option<Timestamp>,
    /// Mode of everything copied.
    pub mode: Option<ModeChange>,
    /// Only what matches one of these patterns.
    pub include: Vec<String>,
    /// Nothing that matches one of these patterns.
    pub exclude: Vec<String>,
    /// The source may have wildcards.
    pub allow_wildcard: bool,
    /// Wildcards that match nothing are no error.
    pub allow_empty_wildcard: bool,
    /// Copies what a symbolic link at the source points at.
    pub follow_symlinks: bool,
    /// Copies a directory's contents instead of the directory.
    pub dir_contents: bool,
    /// Creates the destination's missing parents; otherwise they must exist.
    pub create_dest_path: bool,
    /// Replaces what is at a destination even when it is of another type.
    pub always_replace: bool,
    /// Unpacks the source when it is an archive, as Dockerfile's ADD does.
    pub unpack: bool,
}

/// A failed copy.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A path could not be read or written.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// No source matches.
    #[error("{} not found", path.display())]
    NoMatch {
        /// The source pattern.
        path: PathBuf,
    },
    /// A directory is in the way of a file.
    #[error("cannot replace to directory {} with file", path.display())]
    FileOverDirectory {
        /// The destination.
        path: PathBuf,
    },
    /// A file is in the way of a directory.
    #[error("cannot copy to non-directory: {}", path.display())]
    DirectoryOverFile {
        /// The destination.
        path: PathBuf,
    },
    /// A pattern or mode cannot be understood.
    #[error("invalid {what} {text:?}")]
    Invalid {
        /// "mode", "include pattern", ….
        what: &'static str,
        /// The text.
        text: String,
    },
    /// Copying bytes failed.
    #[error("copy {}", path.display())]
    Data {
        /// The source.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// An archive could not be unpacked.
    #[error("unpack {}", path.display())]
    Unpack {
        /// The archive.
        path: PathBuf,
        /// Why.
        #[source]
        source: ApplyError,
    },
}

/// Copies `source` in `from` to `dest` in `to`: LLB's `FileActionCopy`.
pub fn copy(from: &Root, source: &Path, to: &Root, dest: &Path, options: &CopyOptions) -> Result<(), CopyError> {
    todo!()
}

/// Copies the whole tree `from` into the empty directory `to` with everything it has: owners, times, attributes, hard
/// links, holes, devices. Blocks are shared where the file system can.
pub fn copy_tree(from: &Root, to: &Root) -> Result<(), CopyError> {
    todo!()
}

//! Copying between trees as BuildKit's file operation does.

mod copier;
mod file;
mod mode;
mod pool;
mod whole;

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::Stop;
use crate::apply::{ApplyError, ApplyOptions, Whiteouts, apply_archive};
use crate::compress::decompress_archive;
use crate::tar::Reader;
use crate::tree::{Attributes, FileType, Root, Timestamp, TreeContext, TreeError, at, lexical};

pub use file::{copy_file, copy_metadata};
pub use whole::copy_tree;

/// A change of permission bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModeChange {
    /// Sets the twelve low bits.
    Bits(u32),
    /// A symbolic change such as `u+x,go-w` or `a=rX`, applied to each file's own mode; octal text is taken too.
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
    /// When to give up.
    pub stop: Stop,
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
    /// It was told to give up.
    #[error("copying was stopped")]
    Stopped,
    /// A pattern or mode cannot be understood.
    #[error("invalid {what} {text:?}")]
    Invalid {
        /// "mode", "include pattern", ….
        what: &'static str,
        /// The text.
        text: String,
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

/// Mode of directories made for a destination.
const DIR_MODE: u32 = 0o755;

/// Adds back what cleaning a path takes away but says something: a slash at its end, or a dot.
fn ends_as_dir(path: &Path) -> bool {
    let bytes = path.as_os_str().as_encoded_bytes();
    bytes.ends_with(b"/") || bytes.ends_with(b"/.") || bytes == b"."
}

/// Copies `source` in `from` to `dest` in `to`: LLB's `FileActionCopy`. Both paths are taken from their root.
pub fn copy(
    from: &Root,
    source: &Path,
    to: &Root,
    dest: &Path,
    options: &CopyOptions,
) -> Result<(), CopyError> {
    if !options.create_dest_path {
        let resolved = to.resolve(dest)?;
        let parent = resolved.parent().unwrap_or(Path::new(""));
        at::open_beneath(to, parent, OFlags::PATH).on("lstat", dest)?;
    }
    let sources = if options.allow_wildcard {
        let found = from.wildcard(source, options.follow_symlinks)?;
        if found.is_empty() {
            if options.allow_empty_wildcard {
                return Ok(());
            }
            return Err(CopyError::NoMatch {
                path: source.to_owned(),
            });
        }
        found
    } else {
        vec![lexical(source)]
    };
    // `dir/.` is the directory without its name, unless it came from a pattern.
    let has_name = options.allow_wildcard || !source.as_os_str().as_encoded_bytes().ends_with(b"/.");
    for source in sources {
        if options.unpack && unpack(from, &source, to, dest, options)? {
            continue;
        }
        // Each source is a copy of its own, as hard links between sources are not kept either.
        let mut copier = copier::Copier::new(from, to, options)?;
        copy_one(&mut copier, &source, dest, has_name)?;
    }
    Ok(())
}

/// Copies one source. Without `has_name` a directory goes to where a file of its name would be put.
fn copy_one(
    copier: &mut copier::Copier<'_>,
    source: &Path,
    dest: &Path,
    has_name: bool,
) -> Result<(), CopyError> {
    let (from, to, options) = (copier.from, copier.to, copier.options);
    let clean = lexical(dest);
    let needed = if ends_as_dir(dest) {
        Some(clean.as_path())
    } else {
        clean.parent()
    };
    let mode = match &options.mode {
        Some(ModeChange::Bits(bits)) => bits & 0o777,
        _ => DIR_MODE,
    };
    let attributes = Attributes {
        owner: options.owner,
        time: options.time,
    };
    let mut created = Vec::new();
    if let Some(needed) = needed {
        let resolved = to.resolve(needed)?;
        created.extend(to.make_dirs(&resolved, mode, attributes).on("mkdir", needed)?);
    }
    let mut target = to.resolve(&clean)?;
    let followed = if options.follow_symlinks {
        from.resolve(source)?
    } else {
        from.resolve_parent(source)?
    };
    let is_dir = stat(from, &followed).on("lstat", source)?.is_dir();
    let existing = match stat(to, &target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        done => Some(done.on("lstat", dest)?),
    };
    let existing_dir = existing.as_ref().is_some_and(crate::tree::Stat::is_dir);
    if !options.dir_contents && is_dir && existing.is_some() || !is_dir && existing_dir {
        // The root as a source has no name, so its contents go there.
        if let Some(name) = source.file_name().filter(|_| has_name) {
            target.push(name);
        }
    }
    let holder = if options.dir_contents && is_dir && existing.is_none() {
        target.as_path()
    } else {
        target.parent().unwrap_or(Path::new(""))
    };
    created.extend(to.make_dirs(holder, mode, attributes).on("mkdir", dest)?);
    copier.copy(&followed, &target)?;
    to.settle_dirs(&created, attributes).on("chtimes", dest)?;
    Ok(())
}

fn stat(root: &Root, path: &Path) -> io::Result<crate::tree::Stat> {
    at::open_beneath(root, path, OFlags::PATH | OFlags::NOFOLLOW).and_then(at::stat_fd)
}

/// Unpacks `source` into the directory `dest` if it is an archive; tells whether it was.
fn unpack(
    from: &Root,
    source: &Path,
    to: &Root,
    dest: &Path,
    options: &CopyOptions,
) -> Result<bool, CopyError> {
    let resolved = from.resolve(source)?;
    match stat(from, &resolved) {
        Ok(stat) if stat.file_type() == FileType::Regular => {}
        // What is wrong with it shows when it is copied.
        _ => return Ok(false),
    }
    let open = || at::open_regular_beneath(from, &resolved).on("open", source);
    let is_archive =
        decompress_archive(open()?).is_ok_and(|input| matches!(Reader::new(input).next_entry(), Ok(Some(_))));
    if !is_archive {
        return Ok(false);
    }
    let target = to.resolve(dest)?;
    let attributes = Attributes {
        owner: options.owner,
        time: options.time,
    };
    to.make_dirs(&target, DIR_MODE, attributes).on("mkdir", dest)?;
    let root = at::open_dir_beneath(to, &target).on("open", dest)?;
    let input = decompress_archive(open()?).on("open", source)?;
    let apply = ApplyOptions {
        whiteouts: Whiteouts::Literal,
        owner: options.owner,
        stop: options.stop.clone(),
        ..ApplyOptions::default()
    };
    apply_archive(input, root.as_fd(), &apply).map_err(|error| CopyError::Unpack {
        path: source.to_owned(),
        source: error,
    })?;
    Ok(true)
}

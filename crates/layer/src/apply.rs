//! Unpacking a layer onto a tree.

mod entry;
mod whiteout;

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use oci::{Digest, Digester};

use crate::compress;
use crate::tar::{ReadError, Reader};

/// How deletions in the layer are put into the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Whiteouts {
    /// What they name is deleted: the tree is the whole tree.
    #[default]
    Remove,
    /// They become overlayfs' marks: the tree is an overlay's upper directory. Character device 0:0 for a deleted name and
    /// the attribute `trusted.overlay.opaque` for an emptied directory.
    Overlay,
    /// As `Overlay`, with `user.overlay.opaque`, for mounts with `userxattr`.
    OverlayUser,
    /// They are files like others: the archive is no layer.
    Literal,
}

/// How to unpack.
#[derive(Debug, Default)]
pub struct ApplyOptions {
    /// What deletions become.
    pub whiteouts: Whiteouts,
    /// The directories below the tree when it is an overlay's upper directory, nearest first: a parent directory missing
    /// in the layer takes its attributes from there.
    pub parents: Vec<OwnedFd>,
    /// Leaves files to the calling user instead of setting owners, for unprivileged use.
    pub keep_owner: bool,
    /// Gives every entry this owner, as ADD with `--chown` does.
    pub owner: Option<(u32, u32)>,
    /// Most bytes the files of the layer may take in sum; `None` for no bound.
    pub limit_bytes: Option<u64>,
}

/// What was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Digest of the uncompressed archive: the layer's diffID.
    pub diff_id: Digest,
    /// Length of the uncompressed archive in bytes.
    pub archive_bytes: u64,
    /// Sum of the files' sizes.
    pub size_bytes: u64,
    /// Attributes the file system refused, as `path: name`; at most a hundred.
    pub ignored_xattrs: Vec<String>,
}

/// A layer that could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The archive is damaged, or its compressed stream is damaged or cut short.
    #[error("read layer")]
    Archive(#[from] ReadError),
    /// The stream could not be read or decompressed before the first or behind the last entry.
    #[error("decompress layer")]
    Decompress(#[source] io::Error),
    /// An entry that no honest archive has.
    #[error("layer entry {path:?}: {reason}")]
    Invalid {
        /// The entry's name.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The files exceed the given bound.
    #[error("layer is larger than {limit_bytes} bytes")]
    TooLarge {
        /// The bound.
        limit_bytes: u64,
    },
    /// The file system refused.
    #[error("layer entry {path:?}: {action}")]
    Io {
        /// The entry's name.
        path: String,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Unpacks `layer`, compressed or not (found out by its first bytes), onto the directory `root`.
///
/// Reads the stream to its end, so that the returned diffID covers it all. Names are resolved within `root`; absolute
/// names and `..` stay inside. Attributes of the root directory itself are not touched, as in containerd. On failure the
/// tree is left half unpacked: throw it away.
pub fn apply(layer: impl Read, root: impl AsFd, options: &ApplyOptions) -> Result<Applied, ApplyError> {
    let (_, input) = compress::decompress(layer).map_err(ApplyError::Decompress)?;
    apply_archive(input, root, options)
}

/// Unpacks an archive that is not compressed (any more).
pub(crate) fn apply_archive(
    input: impl Read,
    root: impl AsFd,
    options: &ApplyOptions,
) -> Result<Applied, ApplyError> {
    let mut hashing = Hashing {
        inner: input,
        digester: Digester::sha256(),
        count: 0,
    };
    let mut reader = Reader::new(&mut hashing);
    let mut unpacker = entry::Unpacker::new(root.as_fd(), options);
    while let Some(header) = reader.next_entry()? {
        unpacker.entry(&header, &mut reader)?;
    }
    drop(reader);
    io::copy(&mut hashing, &mut io::sink()).map_err(ApplyError::Decompress)?;
    let (size_bytes, ignored_xattrs) = unpacker.finish()?;
    let (diff_id, archive_bytes) = (hashing.digester.finish(), hashing.count);
    Ok(Applied {
        diff_id,
        archive_bytes,
        size_bytes,
        ignored_xattrs,
    })
}

/// Digests what is read through it.
struct Hashing<R> {
    inner: R,
    digester: Digester,
    count: u64,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buf)?;
        self.digester.update(&buf[..count]);
        self.count += count as u64;
        Ok(count)
    }
}

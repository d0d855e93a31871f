//! Unpacking a layer onto a tree.

mod entry;
mod whiteout;

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use oci::{Digest, Digester};

use crate::Stop;
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
    /// When to give up.
    pub stop: Stop,
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
    /// It was told to give up.
    #[error("unpacking was stopped")]
    Stopped,
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
/// Reads the stream to its end, so that the returned diffID covers it all; a second thread reads, decompresses and digests
/// while this one writes. Names are resolved within `root`; absolute names and `..` stay inside. Attributes of the root
/// directory itself are not touched, as in containerd. On failure the tree is left half unpacked: throw it away.
pub fn apply(
    layer: impl Read + Send,
    root: impl AsFd,
    options: &ApplyOptions,
) -> Result<Applied, ApplyError> {
    let root = root.as_fd();
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(CHUNKS);
        let ahead = scope.spawn(move || read_ahead(layer, &sender));
        let mut input = Chunks {
            receiver,
            chunk: Vec::new(),
            at: 0,
        };
        let unpacked = unpack(&mut input, root, options);
        // Ends the other thread if this one failed.
        drop(input);
        let (digester, archive_bytes) = ahead
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let (size_bytes, ignored_xattrs) = unpacked?;
        Ok(Applied {
            diff_id: digester.finish(),
            archive_bytes,
            size_bytes,
            ignored_xattrs,
        })
    })
}

/// Unpacks an archive that is not compressed (any more), up to its end mark.
pub(crate) fn apply_archive(
    input: impl Read,
    root: impl AsFd,
    options: &ApplyOptions,
) -> Result<(), ApplyError> {
    let mut reader = Reader::new(input);
    let mut unpacker = entry::Unpacker::new(root.as_fd(), options);
    while let Some(header) = reader.next_entry()? {
        unpacker.entry(&header, &mut reader)?;
    }
    unpacker.finish().map(drop)
}

fn unpack(
    input: &mut Chunks,
    root: BorrowedFd<'_>,
    options: &ApplyOptions,
) -> Result<(u64, Vec<String>), ApplyError> {
    let mut reader = Reader::new(&mut *input);
    let mut unpacker = entry::Unpacker::new(root, options);
    while let Some(header) = reader.next_entry()? {
        unpacker.entry(&header, &mut reader)?;
    }
    drop(reader);
    // The diffID covers what follows the end mark, too.
    io::copy(input, &mut io::sink()).map_err(ApplyError::Decompress)?;
    unpacker.finish()
}

/// Bytes read ahead at once, and how many times over.
const CHUNK: usize = 256 * 1024;
const CHUNKS: usize = 8;

/// Decompresses and digests until the end, a failure, or until nobody listens.
fn read_ahead(layer: impl Read, sender: &SyncSender<io::Result<Vec<u8>>>) -> (Digester, u64) {
    let mut digester = Digester::sha256();
    let mut count = 0;
    let mut input = match compress::decompress(layer) {
        Ok((_, input)) => input,
        Err(error) => {
            // When nobody listens, nobody misses it.
            let _ = sender.send(Err(error));
            return (digester, count);
        }
    };
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        let done = (&mut input).take(CHUNK as u64).read_to_end(&mut chunk);
        digester.update(&chunk);
        count += chunk.len() as u64;
        let is_end = chunk.is_empty();
        if !is_end && sender.send(Ok(chunk)).is_err() || is_end && done.is_ok() {
            return (digester, count);
        }
        if let Err(error) = done {
            let _ = sender.send(Err(error));
            return (digester, count);
        }
    }
}

/// Reads what the other thread has ready.
struct Chunks {
    receiver: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    at: usize,
}

impl Read for Chunks {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.at == self.chunk.len() {
            match self.receiver.recv() {
                Ok(chunk) => (self.chunk, self.at) = (chunk?, 0),
                // The other thread is through.
                Err(_) => return Ok(0),
            }
        }
        let count = buf.len().min(self.chunk.len() - self.at);
        buf[..count].copy_from_slice(&self.chunk[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

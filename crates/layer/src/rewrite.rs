//! Rewriting a layer's timestamps.

use std::io::{self, Read, Write};

use crate::tar::{EntryKind, ReadError, Reader, Writer};
use crate::tree::Timestamp;

/// A layer that could not be rewritten.
#[derive(Debug, thiserror::Error)]
pub enum RewriteError {
    /// The archive is damaged.
    #[error("read layer")]
    Read(#[from] ReadError),
    /// The layer's data could not be read, or the output failed.
    #[error("copy layer data")]
    Copy(#[source] io::Error),
}

/// Copies an uncompressed layer and sets every time later than `epoch` to `epoch`: the exporters' `rewrite-timestamp`.
///
/// Entries keep their order, names and attributes; formats other than PAX and ustar become those.
pub fn rewrite_timestamps(layer: impl Read, out: impl Write, epoch: Timestamp) -> Result<(), RewriteError> {
    let mut reader = Reader::new(layer);
    let mut writer = Writer::new(out);
    while let Some(mut header) = reader.next_entry()? {
        header.mtime = header.mtime.min(epoch);
        header.atime = header.atime.map(|time| time.min(epoch));
        header.ctime = header.ctime.map(|time| time.min(epoch));
        writer.write_header(&header).map_err(RewriteError::Copy)?;
        if header.kind == EntryKind::Regular {
            io::copy(&mut reader, &mut writer).map_err(RewriteError::Copy)?;
        }
    }
    writer.finish().map(drop).map_err(RewriteError::Copy)
}

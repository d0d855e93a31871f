//! The newest file of an archive in a build's result.

use std::path::Path;

use export::files::{Files, Part};
use layer::compress::decompress_archive;
use layer::tar::{EntryKind, Reader};

use crate::error::BuildError;
use crate::op::ResultRef;

/// Returns when the newest regular file of a tar archive was modified, in seconds since 1970; `None` for a file that is no
/// archive or has no regular files. Blocking.
///
/// # Errors
/// When the file cannot be opened.
pub(super) fn modified_s(result: ResultRef, path: &str) -> Result<Option<i64>, BuildError> {
    let part = Part::whole(result);
    let shown = Path::new("/").join(path);
    let file = Files::open(&part)?.open_file(&shown.to_string_lossy())?;
    let Ok(archive) = decompress_archive(file) else {
        return Ok(None);
    };
    let mut archive = Reader::new(archive);
    let mut newest = None;
    loop {
        match archive.next_entry() {
            Ok(Some(entry)) if entry.kind == EntryKind::Regular => {
                newest = newest.max(Some(entry.mtime.seconds))
            }
            Ok(Some(_)) => {}
            // A damaged rest says nothing about the files before it, and unpacking it will fail.
            Ok(None) | Err(_) => return Ok(newest),
        }
    }
}

//! `--verify`: looks through the state directory of a daemon that is not running.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;

use engine::setup::{SnapshotterChoice, open_store};
use engine::{BuildError, ErrorKind};

use crate::wiring::StartError;

/// Opens the store, which repairs what a crash left, reads all of it and writes what is wrong to `out`. Returns whether
/// everything is there and as it was stored; what merely takes room does not count.
///
/// # Errors
/// When the directory is in use or cannot be read.
pub fn verify(root: &Path, snapshotter: SnapshotterChoice, out: &mut dyn Write) -> Result<bool, StartError> {
    let (store, _) = open_store(root, None, snapshotter).map_err(StartError::Engine)?;
    let failed = |source| StartError::System {
        action: "write what was found".to_owned(),
        source,
    };
    let recovered = store.recovered();
    writeln!(
        out,
        "opened: {} refs forgotten, {} snapshots and {} blobs removed",
        recovered.refs, recovered.snapshots, recovered.blobs
    )
    .map_err(failed)?;
    let (mut problems, mut harmless, mut written) = (0_usize, 0_usize, Ok(()));
    let outcome = store.verify(true, &mut |finding| {
        if finding.is_harmless() {
            harmless += 1;
        } else {
            problems += 1;
        }
        written = writeln!(out, "{finding}");
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    });
    written.map_err(failed)?;
    outcome.map_err(|error| StartError::Engine(BuildError::from_source(ErrorKind::Internal, error)))?;
    writeln!(out, "verified: {problems} problems, {harmless} leftovers").map_err(failed)?;
    Ok(problems == 0)
}

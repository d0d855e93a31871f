//! Content digests of refs: computed once, kept with the ref.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use cache::ImmutableRef;
use layer::Stop;
use layer::checksum::{Attributes, ChecksumError, ChecksumTree, Listed, Selector};
use oci::Digest;
use tokio_util::sync::CancellationToken;

use crate::error::{BuildError, ErrorKind};
use crate::op::ResultRef;

/// Digests what `selectors` choose of a ref that is unpacked; none choose everything. What had to be computed is kept
/// with the ref for the next time.
///
/// # Errors
/// [`ErrorKind::NotFound`] with BuildKit's text when a selected path does not exist; [`ErrorKind::Canceled`] when `cancel`
/// fires, which ends the work.
pub async fn of(
    reference: &ResultRef,
    selectors: Vec<Selector>,
    cancel: &CancellationToken,
) -> Result<Digest, BuildError> {
    let Some(reference) = reference.get().cloned() else {
        return ChecksumTree::checksum_nothing(&selectors).map_err(|error| wrap(error, ""));
    };
    let token = cancel.clone();
    let stop = Stop::when(move || token.is_cancelled());
    tokio::task::spawn_blocking(move || of_blocking(&reference, &selectors, &stop))
        .await
        .map_err(|error| BuildError::internal(format!("checksum: {error}")))?
}

fn of_blocking(reference: &ImmutableRef, selectors: &[Selector], stop: &Stop) -> Result<Digest, BuildError> {
    let internal = |error| BuildError::from_source(ErrorKind::Internal, error);
    // A tree that cannot be decoded is as good as none.
    let kept = reference
        .checksums()
        .map_err(internal)?
        .and_then(|bytes| ChecksumTree::decode(&bytes).ok());
    let mut tree = kept.unwrap_or_default();
    let digest = tree
        .checksum_all(&mut || open(reference), selectors, stop)
        .map_err(|error| wrap(error, &reference.id().to_string()))?;
    if tree.is_dirty() {
        reference.set_checksums(&tree.encode()).map_err(internal)?;
    }
    Ok(digest)
}

/// Lists what `selectors` choose of a ref whose digest [`of`] computed. Blocking.
///
/// # Errors
/// Those of [`of`].
pub(crate) fn list(
    reference: &ImmutableRef,
    selectors: &[Selector],
    limit: usize,
) -> Result<Listed, BuildError> {
    let internal = |error| BuildError::from_source(ErrorKind::Internal, error);
    let kept = reference
        .checksums()
        .map_err(internal)?
        .and_then(|bytes| ChecksumTree::decode(&bytes).ok());
    kept.unwrap_or_default()
        .list(&mut || open(reference), selectors, limit)
        .map_err(|error| wrap(error, &reference.id().to_string()))
}

/// Digests a file of a listing as if it had other attributes; `None` when it cannot be read. Blocking.
pub(crate) fn hash_as(reference: &ImmutableRef, place: &str, attributes: Attributes) -> Option<[u8; 32]> {
    layer::checksum::hash_as(&mut || open(reference), place, attributes).ok()
}

fn open(reference: &ImmutableRef) -> io::Result<OwnedFd> {
    let mounts = reference.mounts().map_err(io::Error::other)?;
    let [mount] = mounts.as_slice() else {
        return Err(io::Error::other(format!(
            "a snapshot has {} mounts instead of one",
            mounts.len()
        )));
    };
    mount
        .open()
        .map_err(io::Error::other)?
        .as_fd()
        .try_clone_to_owned()
}

fn wrap(error: ChecksumError, id: &str) -> BuildError {
    if matches!(error, ChecksumError::Stopped) {
        return BuildError::canceled();
    }
    // What a build's author names and is not there is their error; BuildKit gives it no code of its own either.
    let kind = match &error {
        error if error.is_not_found() => ErrorKind::User,
        ChecksumError::Io { .. } | ChecksumError::Open { .. } => ErrorKind::Internal,
        _ => ErrorKind::User,
    };
    BuildError::from_source(kind, error).context(format!("failed to calculate checksum of ref {id}"))
}

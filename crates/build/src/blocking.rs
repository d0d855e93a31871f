//! Work that blocks, from code that must not.

use crate::error::{BuildError, ErrorKind};

/// Makes an error for which the engine is at fault.
pub fn internal(error: impl std::error::Error + Send + Sync + 'static) -> BuildError {
    BuildError::from_source(ErrorKind::Internal, error)
}

/// Runs what blocks on a thread for that. It goes on when the future is dropped.
///
/// # Errors
/// Those of the work; an internal one when it panics.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(internal(error)),
    }
}

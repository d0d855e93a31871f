//! What sources were last found to be: builds that may go without their network use it in place of an answer.
//!
//! Every answer is remembered, so that a build may be told to do without the network only when there is none. A
//! resolution is a small blob that a name in the store holds, also over restarts; only so many are kept.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use build::blocking::{blocking, internal};
use build::error::{BuildError, ErrorKind};
use build::job::{Job, ResolveCache};
use build::progress::{VertexProgress, VertexWarning};
use cache::{Store, StoreError};
use content::Durability;
use oci::Digest;

/// What the names of resolutions begin with; the source's digest and a time follow.
const PREFIX: &str = "resolved/";
/// Resolutions that are kept at most.
const MAX_KEPT: usize = 2000;
/// Longest resolution that is kept.
const MAX_BYTES: usize = 8 << 20;

/// A source as it is asked for.
pub(crate) struct Asked<'a> {
    /// Identifies it, with everything that decides on the answer.
    pub key: String,
    /// Names it to people.
    pub shown: String,
    /// What the builds at hand demand.
    pub mode: ResolveCache,
    /// Where to say that it was not asked.
    pub progress: &'a VertexProgress,
}

/// The mode of several builds: that of the one that is most particular.
pub(crate) fn mode(jobs: &[Arc<Job>]) -> ResolveCache {
    let modes = jobs.iter().map(|job| job.settings().resolve_cache);
    modes.max().unwrap_or_default()
}

/// Asks for a source, or finds out what it was last found to be, as the builds demand.
///
/// # Errors
/// Those of asking; when it is not asked and nothing is known of it, [`ErrorKind::Unavailable`].
pub(crate) async fn resolve<T>(
    store: &Store,
    asked: Asked<'_>,
    ask: impl Future<Output = Result<T, BuildError>>,
    encode: impl Fn(&T) -> Vec<u8>,
    recall: impl AsyncFnOnce(Vec<u8>) -> Option<T>,
) -> Result<T, BuildError> {
    let why = if asked.mode == ResolveCache::Offline {
        None
    } else {
        match ask.await {
            Ok(found) => {
                remember(store, &asked.key, encode(&found)).await?;
                return Ok(found);
            }
            Err(error) if asked.mode == ResolveCache::Fallback && error.kind() == ErrorKind::Unavailable => {
                Some(error)
            }
            Err(error) => return Err(error),
        }
    };
    let known = match last(store, &asked.key).await? {
        Some(known) => recall(known).await,
        None => None,
    };
    let Asked { shown, progress, .. } = asked;
    match (known, why) {
        (Some(found), None) => Ok(found),
        (Some(found), Some(error)) => {
            let text = format!("{shown} could not be asked for and is taken to be what it last was: {error}");
            progress.warn(VertexWarning::short(progress.digest(), text));
            Ok(found)
        }
        (None, Some(error)) => Err(error),
        (None, None) => Err(BuildError::new(
            ErrorKind::Unavailable,
            format!(
                "{shown} is not known here, and this build is to be done offline: build it once with a network"
            ),
        )),
    }
}

fn names_of(key: &str) -> String {
    format!("{PREFIX}{}/", Digest::sha256(key).hex())
}

/// Keeps what a source was found to be. Nothing is written while it stays the same.
async fn remember(store: &Store, key: &str, value: Vec<u8>) -> Result<(), BuildError> {
    if value.len() > MAX_BYTES {
        return Ok(());
    }
    let (store, names) = (store.clone(), names_of(key));
    blocking(move || {
        let digest = Digest::sha256(&value);
        let old = store.retained_names(&names);
        if old.last().is_some_and(|name| store.retained(name) == [digest]) {
            return Ok(());
        }
        let pin = store.pin(&[digest]);
        store
            .content()
            .put(&value, Durability::Deferred)
            .map_err(internal)?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        let name = format!("{names}{:020}", now.as_nanos());
        store.retain(&name, &[digest]).map_err(internal)?;
        drop(pin);
        for name in old {
            store.release(&name).map_err(internal)?;
        }
        forget_oldest(&store)
    })
    .await
}

/// Forgets what all sources were found to be. Blocking.
///
/// # Errors
/// When the store cannot be written.
pub fn forget_resolutions(store: &Store) -> Result<(), StoreError> {
    for name in store.retained_names(PREFIX) {
        store.release(&name)?;
    }
    Ok(())
}

fn forget_oldest(store: &Store) -> Result<(), BuildError> {
    let names = store.retained_names(PREFIX);
    let Some(excess) = names.len().checked_sub(MAX_KEPT) else {
        return Ok(());
    };
    let mut by_time: Vec<(&str, &String)> = names
        .iter()
        .map(|name| (name.rsplit('/').next().unwrap_or_default(), name))
        .collect();
    by_time.sort_unstable();
    for (_, name) in by_time.into_iter().take(excess) {
        store.release(name).map_err(internal)?;
    }
    Ok(())
}

/// Returns what a source was last found to be. A blob that is gone or damaged is a miss.
async fn last(store: &Store, key: &str) -> Result<Option<Vec<u8>>, BuildError> {
    let (store, names) = (store.clone(), names_of(key));
    blocking(move || {
        let names = store.retained_names(&names);
        let Some(digest) = names
            .last()
            .and_then(|name| store.retained(name).first().copied())
        else {
            return Ok(None);
        };
        let bytes = store
            .content()
            .reader(&digest)
            .ok()
            .and_then(|blob| blob.read_all(MAX_BYTES).ok());
        Ok(bytes.filter(|bytes| Digest::sha256(bytes) == digest))
    })
    .await
}

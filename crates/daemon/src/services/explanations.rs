//! Why steps of past builds ran: kept for the newest builds, over restarts, as blobs that the engine's store holds by name.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use api::pb::explain as pb;
use engine::Engine;
use engine::cache::Store;
use engine::content::Durability;
use engine::explanation::{Change, Explanation, Reason};
use engine::job::JobId;
use oci::Digest;
use prost::Message as _;
use tokio_util::task::TaskTracker;

use super::{system_time, timestamp};

/// What names of builds begin with.
const PREFIX: &str = "explain/";
/// Builds whose explanations are kept.
const MAX_BUILDS: usize = 50;
/// Largest blob that is read: many times what the steps of a build may come to.
const MAX_BLOB_BYTES: usize = 256 << 20;

/// Why explanations are not kept or not read.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The blob cannot be written.
    #[error("write explanations")]
    Write(#[from] engine::content::WriteError),
    /// The blob cannot be opened.
    #[error("open explanations")]
    Open(#[from] engine::content::StoreError),
    /// The blob cannot be read.
    #[error("read {digest} with explanations")]
    Read {
        /// The blob.
        digest: Digest,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The blob is none that was written.
    #[error("{digest} holds no explanations")]
    Damaged {
        /// The blob.
        digest: Digest,
    },
    /// The store refuses.
    #[error("keep explanations")]
    Store(#[from] engine::cache::StoreError),
}

/// The explanations of builds. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Explanations {
    store: Store,
    /// Builds, newest last, with the times of their ends.
    kept: Arc<Mutex<VecDeque<(String, SystemTime)>>>,
    tasks: TaskTracker,
}

/// A build that runs; what is known of its steps is kept when it ends or is dropped.
#[derive(Debug)]
pub struct Keeping {
    explanations: Explanations,
    engine: Engine,
    id: String,
    has_ended: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Explanations {
    /// Opens what a store keeps. What does not read is let go. Blocking.
    pub fn open(store: Store) -> Self {
        let this = Self {
            store,
            kept: Arc::default(),
            tasks: TaskTracker::new(),
        };
        let mut found = Vec::new();
        for name in this.store.retained_names(PREFIX) {
            let id = name.strip_prefix(PREFIX).unwrap_or(&name).to_owned();
            match this.read(&id) {
                Ok(Some(kept)) => found.push((id, system_time(kept.created_at.as_ref()))),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        name,
                        "explanations are let go"
                    );
                    this.release(&id);
                }
            }
        }
        found.sort_by_key(|(_, at)| *at);
        *lock(&this.kept) = found.into();
        this.let_go_of_old();
        this
    }

    /// Begins to look after a build of an engine.
    pub fn keeping(&self, engine: &Engine, id: &str) -> Keeping {
        Keeping {
            explanations: self.clone(),
            engine: engine.clone(),
            id: id.to_owned(),
            has_ended: false,
        }
    }

    /// Waits until all that has ended is kept.
    pub async fn drain(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Forgets a build. Blocking.
    pub fn forget(&self, id: &str) {
        let mut kept = lock(&self.kept);
        let before = kept.len();
        kept.retain(|(known, _)| known != id);
        if kept.len() < before {
            drop(kept);
            self.release(id);
        }
    }

    /// Tells whether the explanations of a build that ended at this time may have been let go of.
    pub fn may_be_forgotten(&self, ended: SystemTime) -> bool {
        let kept = lock(&self.kept);
        kept.len() >= MAX_BUILDS && kept.front().is_some_and(|(_, oldest)| ended < *oldest)
    }

    /// Reads what is kept of a build. Blocking.
    ///
    /// # Errors
    /// When the blob is gone or is none.
    pub fn read(&self, id: &str) -> Result<Option<pb::KeptExplanations>, KeepError> {
        let store = &self.store;
        let Some(digest) = store.retained(&format!("{PREFIX}{id}")).first().copied() else {
            return Ok(None);
        };
        let blob = store.content().reader(&digest)?;
        let bytes = blob
            .read_all(MAX_BLOB_BYTES)
            .map_err(|source| KeepError::Read { digest, source })?;
        let kept = pb::KeptExplanations::decode(bytes.as_slice());
        kept.map(Some).map_err(|_| KeepError::Damaged { digest })
    }

    fn release(&self, id: &str) {
        let released = self.store.release(&format!("{PREFIX}{id}"));
        if let Err(error) = released {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                build = id,
                "explanations are not let go of"
            );
        }
    }

    fn let_go_of_old(&self) {
        let mut kept = lock(&self.kept);
        let surplus = kept.len().saturating_sub(MAX_BUILDS);
        let old: Vec<_> = kept.drain(..surplus).collect();
        drop(kept);
        for (id, _) in old {
            self.release(&id);
        }
    }

    fn keep(&self, id: &str, explanations: &[Arc<Explanation>]) -> Result<(), KeepError> {
        let now = SystemTime::now();
        let message = pb::KeptExplanations {
            r#ref: id.to_owned(),
            created_at: Some(timestamp(now)),
            explanations: explanations.iter().map(|found| explanation(found)).collect(),
        };
        let bytes = message.encode_to_vec();
        let digest = Digest::sha256(&bytes);
        let store = &self.store;
        let _held = store.pin(&[digest]);
        store.content().put(&bytes, Durability::Deferred)?;
        store.retain(&format!("{PREFIX}{id}"), &[digest])?;
        let mut kept = lock(&self.kept);
        kept.retain(|(known, _)| known != id);
        kept.push_back((id.to_owned(), now));
        drop(kept);
        self.let_go_of_old();
        Ok(())
    }
}

/// Whether anything ran that could have been taken from the cache: a client's directory is looked at by every build.
pub fn is_telling(explanations: &[Arc<Explanation>]) -> bool {
    explanations
        .iter()
        .any(|explanation| explanation.reason != Reason::Client)
}

impl Keeping {
    /// Keeps what is known, and waits for that.
    pub async fn finish(mut self) {
        if let Some(task) = self.end()
            && let Err(error) = task.await
        {
            tracing::error!(%error, build = self.id, "explanations are not kept");
        }
    }

    fn end(&mut self) -> Option<tokio::task::JoinHandle<()>> {
        if std::mem::replace(&mut self.has_ended, true) {
            return None;
        }
        let (this, id) = (self.explanations.clone(), self.id.clone());
        let progress = self.engine.job_progress(&JobId(id.clone()))?;
        let explanations = progress.explanations();
        if !is_telling(&explanations) {
            return None;
        }
        let tasks = this.tasks.clone();
        Some(tasks.spawn_blocking(move || {
            if let Err(error) = this.keep(&id, &explanations) {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    build = id,
                    "explanations are not kept"
                );
            }
        }))
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        // Nobody waits for what a client that has gone leaves behind.
        let _task = self.end();
    }
}

/// Turns an explanation into its message.
pub fn explanation(found: &Explanation) -> pb::Explanation {
    pb::Explanation {
        vertex: found.vertex.to_string(),
        name: found.name.clone(),
        reason: found.reason.as_str().to_owned(),
        text: found.reason.text().to_owned(),
        compared_at: found.compared_at.map(timestamp),
        changes: found.changes.iter().map(change).collect(),
        omitted: i64::try_from(found.omitted).unwrap_or(i64::MAX),
    }
}

fn change(change: &Change) -> pb::Change {
    pb::Change {
        kind: change.kind.as_str().to_owned(),
        subject: change.subject.clone(),
        attribute: change.attribute.clone(),
        how: change.how.as_str().to_owned(),
        before: change.before.clone(),
        after: change.after.clone(),
        input: change.input.clone(),
        text: change.text(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path) -> Explanations {
        let content = engine::content::Store::open(&path.join("content")).unwrap();
        let snapshotter = snapshot::Native::open(&path.join("snapshots")).unwrap();
        let store = Store::open(path, content, Arc::new(snapshotter), Default::default()).unwrap();
        Explanations::open(store)
    }

    fn found(name: &str, reason: Reason) -> Arc<Explanation> {
        Arc::new(Explanation {
            vertex: Digest::sha256(name),
            name: name.to_owned(),
            reason,
            compared_at: Some(SystemTime::UNIX_EPOCH),
            changes: vec![Change::default()],
            omitted: 1,
        })
    }

    #[test]
    fn the_newest_builds_are_kept_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let explanations = open(dir.path());
        for number in 0..MAX_BUILDS + 2 {
            let name = format!("step {number}");
            explanations
                .keep(&format!("build{number}"), &[found(&name, Reason::Changed)])
                .unwrap();
        }
        let now = SystemTime::now();
        assert!(explanations.may_be_forgotten(SystemTime::UNIX_EPOCH) && !explanations.may_be_forgotten(now));
        explanations.forget("build7");
        drop(explanations);
        let explanations = open(dir.path());
        assert_eq!(lock(&explanations.kept).len(), MAX_BUILDS - 1);
        for gone in ["build0", "build1", "build7", "unknown"] {
            assert_eq!(explanations.read(gone).unwrap(), None, "{gone}");
        }
        let kept = explanations.read("build2").unwrap().unwrap();
        let step = &kept.explanations[0];
        assert_eq!((kept.r#ref.as_str(), step.name.as_str()), ("build2", "step 2"));
        assert_eq!((step.reason.as_str(), step.omitted), ("changed", 1));
        assert_eq!(step.changes[0].kind, "definition");
    }

    #[test]
    fn directories_of_clients_tell_nothing() {
        assert!(!is_telling(&[found("context", Reason::Client)]));
        assert!(is_telling(&[
            found("context", Reason::Client),
            found("step", Reason::Changed)
        ]));
    }
}

//! Garbage collection after builds.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use cache::{PruneOptions, Store};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// How long after a build its garbage is collected.
const DELAY: Duration = Duration::from_secs(1);
/// Least time between two collections.
const INTERVAL: Duration = Duration::from_secs(60);

/// Collects garbage some time after builds. Cheap to clone; the last clone ends it.
#[derive(Clone, Debug)]
pub struct Collector {
    wanted: Arc<Notify>,
    _task: Arc<AbortOnDropHandle<()>>,
}

/// Asks for a collection when it is dropped.
#[derive(Debug)]
pub struct AfterBuild(Arc<Notify>);

impl Drop for AfterBuild {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Collector {
    /// Starts collecting by the policies; without any, nothing is ever collected.
    pub fn start(store: Store, policies: Vec<PruneOptions>, stop: CancellationToken) -> Self {
        let wanted = Arc::new(Notify::new());
        let task = tokio::spawn(run(store, policies, Arc::clone(&wanted), stop));
        Self {
            wanted,
            _task: Arc::new(AbortOnDropHandle::new(task)),
        }
    }

    /// Returns a guard that asks for a collection when the build ends.
    pub fn after_build(&self) -> AfterBuild {
        AfterBuild(Arc::clone(&self.wanted))
    }
}

async fn run(store: Store, policies: Vec<PruneOptions>, wanted: Arc<Notify>, stop: CancellationToken) {
    if policies.is_empty() {
        return;
    }
    // The last run may have left more than is allowed, or the policies may have changed.
    wanted.notify_one();
    loop {
        tokio::select! {
            () = wanted.notified() => {}
            () = stop.cancelled() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(DELAY) => {}
            () = stop.cancelled() => return,
        }
        collect(store.clone(), policies.clone(), stop.clone()).await;
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn collect(store: Store, policies: Vec<PruneOptions>, stop: CancellationToken) {
    let work = move || {
        let mut bytes: u64 = 0;
        let outcome = store.prune(&policies, &mut |record| {
            bytes = bytes.saturating_add(record.size_bytes);
            if stop.is_cancelled() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        (bytes, outcome)
    };
    match tokio::task::spawn_blocking(work).await {
        Ok((0, Ok(()))) => {}
        Ok((bytes, Ok(()))) => tracing::debug!(bytes, "gc cleaned up"),
        Ok((_, Err(error))) => tracing::error!(error = &error as &dyn std::error::Error, "gc error"),
        Err(error) => tracing::error!(%error, "gc was aborted"),
    }
}

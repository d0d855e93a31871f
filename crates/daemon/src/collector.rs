//! Garbage collection during builds and after them; in the end the allocator's garbage, too.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cache::{PruneOptions, Store};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// How long after a build its garbage is collected.
const DELAY: Duration = Duration::from_secs(1);
/// Time between two collections while builds run, and the least one otherwise: a cap that is looked at more rarely is none.
const INTERVAL: Duration = Duration::from_secs(5);

/// Collects garbage while builds run and some time after them. Cheap to clone; the last clone ends it.
#[derive(Clone, Debug)]
pub struct Collector {
    builds: Arc<Builds>,
    _task: Arc<AbortOnDropHandle<()>>,
}

#[derive(Debug, Default)]
struct Builds {
    running: AtomicUsize,
    /// A build began or ended.
    changed: Notify,
}

/// Has garbage collected as long as it lives and once after.
#[derive(Debug)]
pub struct DuringBuild(Arc<Builds>);

impl Drop for DuringBuild {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_one();
    }
}

impl Collector {
    /// Starts collecting by the policies; without any, nothing is ever collected, and memory alone is given back.
    pub fn start(store: Store, policies: Vec<PruneOptions>, stop: CancellationToken) -> Self {
        let builds = Arc::new(Builds::default());
        let task = tokio::spawn(run(store, policies, Arc::clone(&builds), stop));
        Self {
            builds,
            _task: Arc::new(AbortOnDropHandle::new(task)),
        }
    }

    /// Returns a guard for the time of a build.
    pub fn during_build(&self) -> DuringBuild {
        self.builds.running.fetch_add(1, Ordering::AcqRel);
        self.builds.changed.notify_one();
        DuringBuild(Arc::clone(&self.builds))
    }
}

async fn run(store: Store, policies: Vec<PruneOptions>, builds: Arc<Builds>, stop: CancellationToken) {
    // The last run may have left more than is allowed, or the policies may have changed.
    builds.changed.notify_one();
    loop {
        // While a build runs the next collection is due anyway.
        if builds.running.load(Ordering::Acquire) == 0 {
            tokio::select! {
                () = builds.changed.notified() => {}
                () = stop.cancelled() => return,
            }
        }
        tokio::select! {
            () = tokio::time::sleep(DELAY) => {}
            () = stop.cancelled() => return,
        }
        collect(store.clone(), policies.clone(), stop.clone()).await;
        if builds.running.load(Ordering::Acquire) == 0 {
            // What a build took is free by now, in pieces that the allocator would keep.
            let _ = tokio::task::spawn_blocking(engine::executor::trim_heaps).await;
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn collect(store: Store, policies: Vec<PruneOptions>, stop: CancellationToken) {
    let work = move || {
        let mut bytes: u64 = 0;
        let outcome = store.collect(&policies, &mut |record| {
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

//! The builds that a client can ask for: those that run, and for a while those that ended.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::job::{Job, JobId};

#[derive(Debug)]
struct KnownJob {
    job: Arc<Job>,
    closed_at: Option<Instant>,
}

/// Jobs by id.
#[derive(Debug)]
pub(crate) struct Jobs {
    known: Mutex<BTreeMap<JobId, KnownJob>>,
    /// How long a job is known after its end.
    linger: Duration,
    /// A job ended.
    ended: Notify,
}

impl Jobs {
    pub(crate) fn new(linger: Duration) -> Self {
        Self {
            known: Mutex::default(),
            linger,
            ended: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<JobId, KnownJob>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job; `false` if there is one with its id.
    pub(crate) fn add(&self, job: &Arc<Job>) -> bool {
        self.forget_ended(Instant::now());
        let mut known = self.lock();
        if known.contains_key(job.id()) {
            return false;
        }
        let new = KnownJob {
            job: Arc::clone(job),
            closed_at: None,
        };
        known.insert(job.id().clone(), new);
        true
    }

    /// Finds a job that runs or ended not long ago.
    pub(crate) fn get(&self, id: &JobId) -> Option<Arc<Job>> {
        self.lock().get(id).map(|known| Arc::clone(&known.job))
    }

    /// Finds a job that runs.
    pub(crate) fn running(&self, id: &JobId) -> Option<Arc<Job>> {
        let known = self.lock();
        let running = known.get(id).filter(|known| known.closed_at.is_none());
        running.map(|known| Arc::clone(&known.job))
    }

    /// Notes that a job has ended.
    pub(crate) fn close(&self, id: &JobId) {
        if let Some(known) = self.lock().get_mut(id) {
            known.closed_at = Some(Instant::now());
        }
        self.ended.notify_one();
    }

    /// Forgets what ended long ago; returns when the next one is due.
    fn forget_ended(&self, now: Instant) -> Option<Instant> {
        let due = |known: &KnownJob| known.closed_at.map(|at| at + self.linger);
        let mut known = self.lock();
        known.retain(|_, known| due(known).is_none_or(|due| due > now));
        known.values().filter_map(due).min()
    }

    /// Forgets what ended in time, also when no job follows: what a job showed includes all its logs. Does not end.
    pub(crate) async fn forget_in_time(self: Arc<Self>) {
        loop {
            self.ended.notified().await;
            while let Some(due) = self.forget_ended(Instant::now()) {
                tokio::time::sleep_until(due.into()).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::task::AbortOnDropHandle;

    use super::*;

    fn job(name: &str) -> Arc<Job> {
        Job::new(JobId(name.to_owned()), 1, crate::job::JobSettings::default())
    }

    #[tokio::test]
    async fn what_ended_is_forgotten_though_no_job_follows() {
        let jobs = Arc::new(Jobs::new(Duration::from_millis(20)));
        let _forgetting = AbortOnDropHandle::new(tokio::spawn(Arc::clone(&jobs).forget_in_time()));
        let (runs, ends) = (job("runs"), job("ends"));
        assert!(jobs.add(&runs) && jobs.add(&ends));
        assert!(!jobs.add(&ends), "has its id");
        jobs.close(ends.id());
        let gone = async {
            while jobs.get(ends.id()).is_some() {
                tokio::task::yield_now().await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(30), gone).await;
        assert!(waited.is_ok(), "it is still known");
        assert!(jobs.running(runs.id()).is_some());
    }

    #[test]
    fn what_ended_can_be_asked_for_a_while() {
        let jobs = Jobs::new(Duration::from_secs(10));
        let ends = job("ends");
        assert!(jobs.add(&ends));
        jobs.close(ends.id());
        let due = jobs.forget_ended(Instant::now()).expect("is still known");
        assert!(jobs.get(ends.id()).is_some() && jobs.running(ends.id()).is_none());
        assert_eq!(jobs.forget_ended(due), None);
        assert!(jobs.get(ends.id()).is_none());
    }
}

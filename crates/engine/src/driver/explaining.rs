//! Explanations on their way: found out beside the work, and stored with the record whichever is there first.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use cache::{Batch, RecordDescription, Records};
use solver::VertexId;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use super::why::{Explained, Work};
use crate::explanation::Explanation;
use crate::job::Job;
use crate::op::VertexJobs;
use crate::progress::{LogStream, VertexProgress};

/// Explanations that are found out at once: they must not take the machine from the steps.
const AT_ONCE: usize = 2;

/// Whom to tell.
pub(super) struct Audience {
    pub progress: VertexProgress,
    pub jobs: Arc<VertexJobs>,
}

impl Audience {
    fn tell(&self, explanation: Explanation) {
        if self.jobs.all().iter().any(|job| job.settings().explain) {
            let text = format!("not cached: {}\n", explanation.lines().join("; "));
            self.progress.log(LogStream::Stderr, text);
        }
        self.progress.explain(explanation);
    }
}

enum State {
    Running {
        audience: Audience,
        /// Records that were saved meanwhile, with the time of their results.
        saved: Vec<(String, SystemTime)>,
        is_removed: bool,
    },
    /// Its listings go with the first record that is saved: they may be large, and are stored once.
    Ready(RecordDescription),
}

/// All that are on their way, and descriptions that may still be wanted.
pub(super) struct Explaining {
    pub tasks: JoinSet<(VertexId, Option<Explained>)>,
    states: BTreeMap<VertexId, State>,
    limit: Arc<Semaphore>,
    waiting: Vec<(Arc<Job>, oneshot::Sender<()>)>,
    records: Records,
}

impl Explaining {
    pub fn new(records: Records) -> Self {
        Self {
            tasks: JoinSet::new(),
            states: BTreeMap::new(),
            limit: Arc::new(Semaphore::new(AT_ONCE)),
            waiting: Vec::new(),
            records,
        }
    }

    /// Begins to find out why a vertex runs.
    pub fn start(&mut self, vertex: VertexId, work: Work, audience: Audience) {
        if self.states.contains_key(&vertex) {
            // It is tried again; why it was needed in the first place is known or being found out.
            return;
        }
        if work.record.is_none() {
            // Nothing has to be looked for.
            audience.tell(work.explain().explanation);
            return;
        }
        self.states.insert(
            vertex,
            State::Running {
                audience,
                saved: Vec::new(),
                is_removed: false,
            },
        );
        let limit = Arc::clone(&self.limit);
        self.tasks.spawn(async move {
            let _turn = limit.acquire_owned().await;
            let explained = tokio::task::spawn_blocking(move || work.explain()).await;
            if let Err(error) = &explained {
                tracing::error!(%error, "why a step runs is not found out");
            }
            (vertex, explained.ok())
        });
    }

    /// Takes what was found out, tells it, and describes records that were saved before.
    pub fn ended(&mut self, vertex: VertexId, explained: Option<Explained>) {
        let Some(State::Running {
            audience,
            saved,
            is_removed,
        }) = self.states.remove(&vertex)
        else {
            return;
        };
        if let Some(Explained {
            explanation,
            description,
        }) = explained
        {
            audience.tell(explanation);
            if let Some(mut description) = description {
                if !saved.is_empty() {
                    self.describe(saved, &description);
                    description.listings.clear();
                }
                if !is_removed {
                    self.states.insert(vertex, State::Ready(description));
                }
            }
        }
        self.tell_waiting();
    }

    fn describe(&self, saved: Vec<(String, SystemTime)>, description: &RecordDescription) {
        let mut batch = Batch::new();
        for (record, created_at) in saved {
            let description = description.clone();
            batch.describe(
                record,
                RecordDescription {
                    created_at,
                    ..description
                },
            );
        }
        if batch.is_empty() {
            return;
        }
        if let Err(error) = self.records.apply_later(batch) {
            tracing::warn!(%error, "a cache record is not described");
        }
    }

    /// Returns the description of a vertex whose record is being saved. `Err`: the vertex was not executed; `Ok(None)`: its
    /// description is stored later.
    pub fn description(
        &mut self,
        vertex: VertexId,
        record: String,
        created_at: SystemTime,
    ) -> Result<Option<RecordDescription>, NotExecuted> {
        match self.states.get_mut(&vertex) {
            Some(State::Ready(description)) => {
                let listings = std::mem::take(&mut description.listings);
                Ok(Some(RecordDescription {
                    created_at,
                    listings,
                    ..description.clone()
                }))
            }
            Some(State::Running { saved, .. }) => {
                saved.push((record, created_at));
                Ok(None)
            }
            None => Err(NotExecuted),
        }
    }

    /// Forgets a vertex that is given up.
    pub fn removed(&mut self, vertex: VertexId) {
        match self.states.get_mut(&vertex) {
            Some(State::Running { is_removed, .. }) => *is_removed = true,
            Some(State::Ready(_)) => {
                self.states.remove(&vertex);
            }
            None => {}
        }
    }

    /// Answers once all vertices are explained that ran for a job.
    pub fn wait(&mut self, job: Arc<Job>, reply: oneshot::Sender<()>) {
        self.waiting.push((job, reply));
        self.tell_waiting();
    }

    fn tell_waiting(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        for (job, reply) in waiting {
            if reply.is_closed() {
                continue;
            }
            let is_open = self.states.values().any(|state| match state {
                State::Running { audience, .. } => {
                    audience.jobs.all().iter().any(|known| Arc::ptr_eq(known, &job))
                }
                State::Ready(_) => false,
            });
            if is_open {
                self.waiting.push((job, reply));
            } else {
                // Whoever waited may have left.
                let _ = reply.send(());
            }
        }
    }
}

/// The vertex was not executed.
pub(super) struct NotExecuted;

//! Builds that run and builds that have ended, for `ListenBuildHistory`: kept up to a number and an age, over restarts, too.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use api::pb::control::{
    BuildHistoryEvent, BuildHistoryEventType, BuildHistoryRecord, BuildResultInfo, Descriptor, StatusResponse,
};
use engine::progress::{JobProgress, Subscription, Vertex};
use engine::solve::{HeldBlobs, Statement};
use engine::trace::Trace;
use tokio::sync::{broadcast, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::archive::{Archive, ArchiveError, Draft};
use super::spans;
use super::traces::{Collecting, Traces};
use super::{system_time, timestamp};

/// Events that a slow listener may lag behind.
const EVENTS: usize = 256;
/// Builds that have ended whose progress is kept in memory, where it is kept nowhere else: each may hold megabytes of logs.
const KEPT_PROGRESS: usize = 3;

/// How many builds are remembered, and how long.
#[derive(Clone, Copy, Debug)]
pub struct HistoryLimits {
    /// Builds that have ended.
    pub max_entries: usize,
    /// How long a build is remembered.
    pub max_age: Duration,
}

impl Default for HistoryLimits {
    fn default() -> Self {
        Self {
            max_entries: 50,
            max_age: Duration::from_secs(48 * 3600),
        }
    }
}

#[derive(Debug)]
struct Entry {
    record: BuildHistoryRecord,
    progress: Option<JobProgress>,
    ended: Option<SystemTime>,
    number: u64,
    /// Is cancelled when nothing more is added to the record.
    complete: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<String, Entry>,
    next: u64,
}

/// The history. Cheap to clone.
#[derive(Clone, Debug)]
pub struct History {
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<BuildHistoryEvent>,
    limits: HistoryLimits,
    archive: Option<Archive>,
    /// Held while a record changes in the archive, so that what is kept last is what was said last.
    saving: Arc<Mutex<()>>,
    /// Tasks that write to the archive.
    tasks: TaskTracker,
    /// The spans that others have of builds that run.
    traces: Traces,
}

impl History {
    /// Makes an empty history that lasts as long as the process.
    pub fn new(limits: HistoryLimits) -> Self {
        let (events, _) = broadcast::channel(EVENTS);
        Self {
            state: Arc::default(),
            events,
            limits,
            archive: None,
            saving: Arc::default(),
            tasks: TaskTracker::new(),
            traces: Traces::default(),
        }
    }

    /// Opens the history that is kept in a store. Blocking.
    pub fn open(limits: HistoryLimits, store: engine::cache::Store) -> Self {
        let archive = Archive::new(store);
        let mut records = archive.load().unwrap_or_else(|error| {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "the build history does not read"
            );
            Vec::new()
        });
        records.sort_by_key(|record| system_time(record.created_at.as_ref()));
        let this = Self {
            archive: Some(archive),
            ..Self::new(limits)
        };
        let mut state = this.lock();
        for record in records {
            let (number, id) = (state.next, record.r#ref.clone());
            state.next += 1;
            let ended = Some(system_time(record.completed_at.as_ref()));
            let complete = CancellationToken::new();
            complete.cancel();
            let entry = Entry {
                record,
                progress: None,
                ended,
                number,
                complete,
            };
            state.entries.insert(id, entry);
        }
        let forgotten = this.forget_old(&mut state, SystemTime::now());
        drop(state);
        this.forget(&forgotten);
        this
    }

    /// Returns the collector of spans, which end up in the records of their builds.
    pub fn traces(&self) -> Traces {
        self.traces.clone()
    }

    /// Waits until all that has ended is kept.
    pub async fn drain(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Lets the archive forget builds.
    fn forget(&self, ids: &[String]) {
        let _saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        for id in ids {
            let forgotten = self.archive.as_ref().map(|archive| archive.forget(id));
            if let Some(Err(error)) = forgotten {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    build = id,
                    "a build is not forgotten"
                );
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, kind: BuildHistoryEventType, record: BuildHistoryRecord) {
        // Without a listener there is nobody to tell.
        let _ = self.events.send(BuildHistoryEvent {
            r#type: kind.into(),
            record: Some(record),
        });
    }

    /// Records that a build starts, as part of a trace; the returned guard records its end.
    pub fn start(&self, mut record: BuildHistoryRecord, trace: Trace) -> Running {
        record.created_at = Some(timestamp(SystemTime::now()));
        record.generation = 1;
        let id = record.r#ref.clone();
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.entries.insert(
            id.clone(),
            Entry {
                record: record.clone(),
                progress: None,
                ended: None,
                number,
                complete: CancellationToken::new(),
            },
        );
        drop(state);
        self.send(BuildHistoryEventType::Started, record);
        let collecting = self.archive.as_ref().map(|_| self.traces.collect(trace.id()));
        Running {
            history: self.clone(),
            id,
            trace,
            collecting,
            has_ended: false,
        }
    }

    /// Lets the record of a running build tell of its steps.
    pub fn attach(&self, id: &str, progress: JobProgress) {
        if let Some(entry) = self.lock().entries.get_mut(id) {
            entry.progress = Some(progress);
        }
    }

    /// Lets the record of a build be complete when the guard is dropped.
    fn completes(&self, id: &str) -> Option<DropGuard> {
        let state = self.lock();
        let entry = state.entries.get(id)?;
        Some(entry.complete.clone().drop_guard())
    }

    fn vertices(&self, id: &str) -> Vec<Vertex> {
        let progress = self
            .lock()
            .entries
            .get(id)
            .and_then(|entry| entry.progress.clone());
        progress.map(|progress| progress.vertices()).unwrap_or_default()
    }

    /// Records the end of a build, and keeps what it leaves. Blocking where there is an archive.
    fn end(&self, id: &str, outcome: Outcome) {
        let saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut record, progress) = {
            let mut state = self.lock();
            let Some(entry) = state.entries.get_mut(id) else {
                return;
            };
            count_steps(entry);
            (entry.record.clone(), entry.progress.clone())
        };
        let now = SystemTime::now();
        record.completed_at = Some(timestamp(now));
        record.error = outcome.error;
        record.generation += 1;
        if let Err(error) = self.keep(&mut record, outcome.finished, progress.as_ref()) {
            warn_not_kept(id, &error);
        }
        let mut state = self.lock();
        if let Some(entry) = state.entries.get_mut(id) {
            entry.ended = Some(now);
            entry.record = record.clone();
            entry.progress = progress.filter(|_| record.logs.is_none());
        }
        let forgotten = self.forget_old(&mut state, now);
        drop(state);
        drop(saving);
        self.forget(&forgotten);
        self.send(BuildHistoryEventType::Complete, record);
    }

    /// Adds the trace to the record of a build that has ended, where there is an archive to keep it. Blocking.
    fn add_trace(&self, id: &str, trace: &Trace, collected: Option<Collecting>, vertices: &[Vertex]) {
        let ended = |state: &State| state.entries.get(id).map(|entry| entry.record.clone());
        let (Some(archive), Some(record)) = (&self.archive, ended(&self.lock())) else {
            return;
        };
        let mut draft = archive.draft();
        let mut encoded = spans::encode(&record, vertices, trace);
        encoded.extend(collected.iter().flat_map(Collecting::spans));
        match draft.trace(&encoded) {
            Ok(trace) => self.amend(id, Some(draft), |record| record.trace = Some(trace)),
            Err(error) => warn_not_kept(id, &error),
        }
    }

    /// Changes the record of a build, and has the archive keep it if the build has ended. Blocking.
    fn amend(&self, id: &str, draft: Option<Draft>, change: impl FnOnce(&mut BuildHistoryRecord)) {
        let _saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let (record, has_ended) = {
            let mut state = self.lock();
            let Some(entry) = state.entries.get_mut(id) else {
                return;
            };
            change(&mut entry.record);
            entry.record.generation += 1;
            (entry.record.clone(), entry.ended.is_some())
        };
        if let Some(archive) = self.archive.as_ref().filter(|_| has_ended)
            && let Err(error) = archive.save(&record, draft.unwrap_or_else(|| archive.draft()))
        {
            warn_not_kept(id, &error);
        }
        self.send(BuildHistoryEventType::Complete, record);
    }

    /// Waits until nothing more is added to the record of a build that has ended; returns whether there is one. A build
    /// that runs is not waited for.
    pub async fn finalize(&self, id: &str) -> bool {
        let complete = {
            let state = self.lock();
            let Some(entry) = state.entries.get(id) else {
                return false;
            };
            entry.ended.map(|_| entry.complete.clone())
        };
        if let Some(complete) = complete {
            complete.cancelled().await;
        }
        true
    }

    /// Completes the record of a build, and has the archive keep it with its blobs.
    fn keep(
        &self,
        record: &mut BuildHistoryRecord,
        finished: Finished,
        progress: Option<&JobProgress>,
    ) -> Result<(), ArchiveError> {
        record.exporter_response = finished.response;
        if !finished.results.is_empty() {
            record.result = Some(BuildResultInfo {
                result_deprecated: finished.results.values().next().cloned(),
                results: finished.results,
                attestations: Vec::new(),
            });
        }
        let Some(archive) = &self.archive else {
            return Ok(());
        };
        let mut draft = archive.draft();
        if let Some(progress) = progress {
            record.logs = draft.logs(&mut progress.subscribe())?;
        }
        if let Some(error) = &mut record.error {
            record.external_error = Some(draft.error(error)?);
            // They can be large, and every listener is sent every record.
            error.details.clear();
        }
        for Statement {
            key,
            predicate_type,
            predicate,
        } in finished.statements
        {
            let result = match key.as_str() {
                "" => record.result.get_or_insert_default(),
                _ => record.results.entry(key).or_default(),
            };
            result
                .attestations
                .push(draft.statement(&predicate, &predicate_type)?);
        }
        archive.save(record, draft)
    }

    /// Drops what is too old or too much, and returns which builds that were; pinned builds stay.
    fn forget_old(&self, state: &mut State, now: SystemTime) -> Vec<String> {
        let mut ended: Vec<(u64, String, SystemTime)> = state
            .entries
            .iter()
            .filter(|(_, entry)| !entry.record.pinned)
            .filter_map(|(id, entry)| Some((entry.number, id.clone(), entry.ended?)))
            .collect();
        ended.sort();
        for (_, id, _) in ended.iter().rev().skip(KEPT_PROGRESS) {
            if let Some(entry) = state.entries.get_mut(id) {
                entry.progress = None;
            }
        }
        let surplus = ended.len().saturating_sub(self.limits.max_entries);
        let mut forgotten = Vec::new();
        for (index, (_, id, at)) in ended.into_iter().enumerate() {
            let is_old = now.duration_since(at).is_ok_and(|age| age > self.limits.max_age);
            if index < surplus || is_old {
                state.entries.remove(&id);
                forgotten.push(id);
            }
        }
        forgotten
    }

    /// Returns the present records, oldest first, and what happens from now on. `wanted` chooses a build; empty: all.
    pub fn listen(
        &self,
        wanted: &str,
        active_only: bool,
    ) -> (Vec<BuildHistoryEvent>, broadcast::Receiver<BuildHistoryEvent>) {
        let mut state = self.lock();
        let receiver = self.events.subscribe();
        let mut found: Vec<(u64, BuildHistoryEvent)> = Vec::new();
        for (id, entry) in &mut state.entries {
            if (!wanted.is_empty() && wanted != id) || (active_only && entry.ended.is_some()) {
                continue;
            }
            let kind = match entry.ended {
                Some(_) => BuildHistoryEventType::Complete,
                None => {
                    count_steps(entry);
                    BuildHistoryEventType::Started
                }
            };
            found.push((
                entry.number,
                BuildHistoryEvent {
                    r#type: kind.into(),
                    record: Some(entry.record.clone()),
                },
            ));
        }
        found.sort_by_key(|(number, _)| *number);
        (found.into_iter().map(|(_, event)| event).collect(), receiver)
    }

    /// Follows the progress of a build that is remembered, from its beginning.
    pub fn progress(&self, id: &str) -> Option<Subscription> {
        self.lock()
            .entries
            .get(id)?
            .progress
            .as_ref()
            .map(JobProgress::subscribe)
    }

    /// Reads the progress of a build that has ended; `None` if it is not kept. Blocking.
    ///
    /// # Errors
    /// When the archive does not read.
    pub fn logs(&self, id: &str) -> Result<Option<Vec<StatusResponse>>, ArchiveError> {
        let entry = self
            .lock()
            .entries
            .get(id)
            .and_then(|entry| entry.record.logs.clone());
        match (&self.archive, entry) {
            (Some(archive), Some(logs)) => archive.logs(&logs).map(Some),
            _ => Ok(None),
        }
    }

    /// Pins or unpins a build; returns whether there is one. Blocking.
    pub fn pin(&self, id: &str, pinned: bool) -> bool {
        let is_pinned = self.lock().entries.get(id).map(|entry| entry.record.pinned);
        if is_pinned.is_some_and(|is_pinned| is_pinned != pinned) {
            self.amend(id, None, |record| record.pinned = pinned);
        }
        is_pinned.is_some()
    }

    /// Forgets a build that has ended, once nothing more is added to its record: that would be left, for a moment at least.
    /// Returns whether there is such a build.
    pub async fn delete(&self, id: &str) -> bool {
        self.finalize(id).await;
        let (this, id) = (self.clone(), id.to_owned());
        let deleting = tokio::task::spawn_blocking(move || this.delete_complete(&id));
        deleting.await.unwrap_or(false)
    }

    fn delete_complete(&self, id: &str) -> bool {
        let mut state = self.lock();
        if state.entries.get(id).is_none_or(|entry| entry.ended.is_none()) {
            return false;
        }
        let Some(entry) = state.entries.remove(id) else {
            return false;
        };
        drop(state);
        self.forget(&[id.to_owned()]);
        self.send(BuildHistoryEventType::Deleted, entry.record);
        true
    }

    /// Describes the builds that run, one a line.
    pub fn describe_running(&self) -> String {
        let state = self.lock();
        let running = state.entries.iter().filter(|(_, entry)| entry.ended.is_none());
        let mut text = String::new();
        for (id, entry) in running {
            text.push_str(&format!("build {id} frontend={:?}\n", entry.record.frontend));
            for vertex in entry.progress.iter().flat_map(JobProgress::vertices) {
                if vertex.started.is_some() && vertex.completed.is_none() {
                    text.push_str(&format!("  running {} {}\n", vertex.digest, vertex.name));
                }
            }
        }
        text
    }
}

fn warn_not_kept(id: &str, error: &ArchiveError) {
    tracing::warn!(
        error = error as &dyn std::error::Error,
        build = id,
        "a build's record is not kept"
    );
}

fn count_steps(entry: &mut Entry) {
    let Some(progress) = &entry.progress else { return };
    let vertices = progress.vertices();
    let count = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
    entry.record.num_total_steps = count(vertices.len());
    entry.record.num_cached_steps = count(vertices.iter().filter(|vertex| vertex.cached).count());
    entry.record.num_completed_steps = count(
        vertices
            .iter()
            .filter(|vertex| vertex.completed.is_some())
            .count(),
    );
    entry.record.num_warnings = count(progress.warnings());
}

/// What a build that succeeded made.
#[derive(Clone, Debug, Default)]
pub struct Finished {
    /// What exporters tell.
    pub response: BTreeMap<String, String>,
    /// What exporters made, by the index of the exporter.
    pub results: BTreeMap<i64, Descriptor>,
    /// What is to be remembered of the result.
    pub statements: Vec<Statement>,
    /// Holds what exporters made until it is kept.
    pub held: Vec<HeldBlobs>,
}

/// How a build ended.
#[derive(Clone, Debug, Default)]
struct Outcome {
    error: Option<api::pb::rpc::Status>,
    finished: Finished,
}

/// A running build's place in the history; dropped without an outcome, the build was cancelled.
#[derive(Debug)]
pub struct Running {
    history: History,
    id: String,
    trace: Trace,
    /// The spans that others have of it, where they can be kept.
    collecting: Option<Collecting>,
    has_ended: bool,
}

impl Running {
    /// Records how the build ended; waits until that is kept.
    pub async fn finish(mut self, result: Result<Finished, api::pb::rpc::Status>) {
        let outcome = match result {
            Ok(finished) => Outcome {
                error: None,
                finished,
            },
            Err(error) => Outcome {
                error: Some(error),
                finished: Finished::default(),
            },
        };
        if let Some(kept) = self.end(outcome) {
            // Whoever would have sent has failed, and said so.
            let _ = kept.await;
        }
    }

    /// Records the end once. Where that takes a task, it is one of the history's, and tells when the record is kept; it
    /// then adds what nobody needs to wait for.
    fn end(&mut self, outcome: Outcome) -> Option<oneshot::Receiver<()>> {
        if std::mem::replace(&mut self.has_ended, true) {
            return None;
        }
        let (history, id) = (self.history.clone(), self.id.clone());
        if history.archive.is_none() {
            let _complete = history.completes(&id);
            history.end(&id, outcome);
            return None;
        }
        let (kept, is_kept) = oneshot::channel();
        let (trace, collected) = (self.trace.clone(), self.collecting.take());
        self.history.tasks.spawn_blocking(move || {
            let _complete = history.completes(&id);
            let vertices = history.vertices(&id);
            history.end(&id, outcome);
            // A client that has gone needs no answer.
            let _ = kept.send(());
            history.add_trace(&id, &trace, collected, &vertices);
        });
        Some(is_kept)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nobody waits for what a client that has gone leaves behind.
        let _kept = self.end(Outcome {
            error: Some(api::errors::Failure::new(tonic::Code::Cancelled, "context canceled").to_rpc()),
            finished: Finished::default(),
        });
    }
}

#[cfg(test)]
mod tests;

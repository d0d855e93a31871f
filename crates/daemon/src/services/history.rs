//! Builds that run and builds that have ended, for `ListenBuildHistory`: kept up to a number and an age, over restarts, too.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use api::pb::control::{
    BuildHistoryEvent, BuildHistoryEventType, BuildHistoryRecord, BuildResultInfo, Descriptor, StatusResponse,
};
use engine::progress::{JobProgress, Subscription};
use engine::solve::{Statement, WrittenImage};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::archive::{Archive, ArchiveError};
use super::progress::timestamp;

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
    /// Tasks that write to the archive.
    tasks: TaskTracker,
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
            tasks: TaskTracker::new(),
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
            let entry = Entry {
                record,
                progress: None,
                ended,
                number,
            };
            state.entries.insert(id, entry);
        }
        let forgotten = this.forget_old(&mut state, SystemTime::now());
        drop(state);
        this.forget(&forgotten);
        this
    }

    /// Waits until all that has ended is kept.
    pub async fn drain(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Lets the archive forget builds.
    fn forget(&self, ids: &[String]) {
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

    /// Records that a build starts; the returned guard records its end.
    pub fn start(&self, mut record: BuildHistoryRecord) -> Running {
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
            },
        );
        drop(state);
        self.send(BuildHistoryEventType::Started, record);
        Running {
            history: self.clone(),
            id,
            has_ended: false,
        }
    }

    /// Lets the record of a running build tell of its steps.
    pub fn attach(&self, id: &str, progress: JobProgress) {
        if let Some(entry) = self.lock().entries.get_mut(id) {
            entry.progress = Some(progress);
        }
    }

    /// Records the end of a build, and keeps what it leaves. Blocking where there is an archive.
    fn end(&self, id: &str, outcome: Outcome) {
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
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                build = id,
                "a build's record is not kept"
            );
        }
        let mut state = self.lock();
        if let Some(entry) = state.entries.get_mut(id) {
            entry.ended = Some(now);
            entry.record = record.clone();
            entry.progress = progress.filter(|_| record.logs.is_none());
        }
        let forgotten = self.forget_old(&mut state, now);
        drop(state);
        self.forget(&forgotten);
        self.send(BuildHistoryEventType::Complete, record);
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
        let mut state = self.lock();
        let Some(entry) = state.entries.get_mut(id) else {
            return false;
        };
        if entry.record.pinned != pinned {
            entry.record.pinned = pinned;
            entry.record.generation += 1;
            let (record, has_ended) = (entry.record.clone(), entry.ended.is_some());
            drop(state);
            let saved = self.archive.as_ref().filter(|_| has_ended);
            let saved = saved.map(|archive| archive.save(&record, archive.draft()));
            if let Some(Err(error)) = saved {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    build = id,
                    "a build's record is not kept"
                );
            }
            self.send(BuildHistoryEventType::Complete, record);
        }
        true
    }

    /// Forgets a build that has ended; returns whether there is one. Blocking.
    pub fn delete(&self, id: &str) -> bool {
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

    /// Returns whether a build is remembered.
    pub fn knows(&self, id: &str) -> bool {
        self.lock().entries.contains_key(id)
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
    pub held: Vec<WrittenImage>,
}

fn system_time(at: Option<&prost_types::Timestamp>) -> SystemTime {
    at.and_then(|at| SystemTime::try_from(*at).ok())
        .unwrap_or(SystemTime::UNIX_EPOCH)
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
        if let Some(kept) = self.end(outcome)
            && let Err(error) = kept.await
        {
            tracing::error!(%error, build = self.id, "a build's record is not kept");
        }
    }

    /// Records the end once; the task that keeps it, if keeping it takes one, is one of the history's.
    fn end(&mut self, outcome: Outcome) -> Option<JoinHandle<()>> {
        if std::mem::replace(&mut self.has_ended, true) {
            return None;
        }
        let (history, id) = (self.history.clone(), self.id.clone());
        if history.archive.is_none() {
            history.end(&id, outcome);
            return None;
        }
        let tasks = self.history.tasks.clone();
        Some(tasks.spawn_blocking(move || history.end(&id, outcome)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nobody waits for what a client that has gone leaves behind.
        let _task = self.end(Outcome {
            error: Some(api::errors::Failure::new(tonic::Code::Cancelled, "context canceled").to_rpc()),
            finished: Finished::default(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> BuildHistoryRecord {
        BuildHistoryRecord {
            r#ref: id.to_owned(),
            ..Default::default()
        }
    }

    fn ids(history: &History, active_only: bool) -> Vec<String> {
        let (events, _) = history.listen("", active_only);
        events
            .into_iter()
            .filter_map(|event| event.record.map(|record| record.r#ref))
            .collect()
    }

    #[tokio::test]
    async fn builds_start_and_end() {
        let history = History::new(HistoryLimits::default());
        let (_, mut events) = history.listen("", false);
        let running = history.start(record("a"));
        assert_eq!(ids(&history, true), ["a"]);
        assert!(!history.delete("a"));
        running.finish(Ok(Finished::default())).await;
        assert!(ids(&history, true).is_empty());
        assert_eq!(
            events.try_recv().unwrap().r#type(),
            BuildHistoryEventType::Started
        );
        let event = events.try_recv().unwrap();
        assert_eq!(event.r#type(), BuildHistoryEventType::Complete);
        assert!(event.record.unwrap().completed_at.is_some());
        assert!(history.delete("a") && !history.knows("a"));
        drop(history.start(record("b")));
        let (events, _) = history.listen("b", false);
        assert_eq!(events[0].record.as_ref().unwrap().error.as_ref().unwrap().code, 1);
    }

    #[tokio::test]
    async fn old_builds_are_forgotten_unless_pinned() {
        let history = History::new(HistoryLimits {
            max_entries: 2,
            ..HistoryLimits::default()
        });
        for id in ["a", "b", "c", "d"] {
            history.start(record(id)).finish(Ok(Finished::default())).await;
            if id == "a" {
                assert!(history.pin("a", true));
            }
        }
        assert_eq!(ids(&history, false), ["a", "c", "d"]);
        assert!(!history.pin("b", true));
    }

    #[tokio::test]
    async fn progress_can_be_read_later() {
        let history = History::new(HistoryLimits::default());
        let running = history.start(record("a"));
        let progress = JobProgress::new();
        history.attach("a", progress.clone());
        assert!(history.describe_running().contains("build a"));
        progress.close();
        running.finish(Ok(Finished::default())).await;
        let mut subscription = history.progress("a").unwrap();
        assert!(subscription.next().await.is_none());
    }
}

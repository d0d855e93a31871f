//! What a build shows while it runs: vertices, their statuses, logs and warnings.
//!
//! [`JobProgress`] holds one build's present state and lets any number of subscribers follow it, also late ones.
//! Vertices and statuses are *state*: an update replaces the earlier one for whoever has not read that yet, so a slow
//! reader costs nothing. Logs and warnings are *kept*, in order, up to a byte limit; beyond it the oldest logs are
//! dropped and readers that missed them are told so in the stream.
//!
//! [`VertexProgress`] is what an op writes to: it fans out to every job that shares the vertex and replays to those
//! that join later.

mod explained;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use bytes::Bytes;
use llb::pb;
use oci::Digest;
use tokio::sync::watch;

use crate::explanation::Explanation;
pub use explained::ExplanationSubscription;

/// Bytes of log text kept per job, and per vertex for jobs that join later.
const MAX_LOG_BYTES: usize = 16 << 20;
/// Warnings kept per job or vertex.
const MAX_WARNINGS: usize = 1_000;
/// Bytes of logs and warnings in one [`StatusBatch`]; one larger log still comes whole.
const MAX_BATCH_BYTES: usize = 1 << 20;
/// Entries in one [`StatusBatch`].
const MAX_BATCH_ENTRIES: usize = 2_000;
/// Longest piece of one log entry; longer writes are split.
const MAX_LOG_PIECE: usize = 256 << 10;

/// The state of one vertex.
#[derive(Clone, Debug, PartialEq)]
pub struct Vertex {
    /// The vertex's digest.
    pub digest: Digest,
    /// Digests of its inputs.
    pub inputs: Vec<Digest>,
    /// What it does, for people.
    pub name: String,
    /// Whether its result came from cache.
    pub cached: bool,
    /// When it started; `None`: it waits.
    pub started: Option<SystemTime>,
    /// When it ended; `None`: it waits or runs.
    pub completed: Option<SystemTime>,
    /// Why it failed; empty: it did not.
    pub error: String,
    /// Vertices shown as one.
    pub progress_group: Option<pb::ProgressGroup>,
}

/// One thing inside a vertex that makes progress, such as a blob's download.
#[derive(Clone, Debug, PartialEq)]
pub struct VertexStatus {
    /// Names the status within its vertex.
    pub id: String,
    /// The vertex.
    pub vertex: Digest,
    /// What is being done, e.g. `downloading`.
    pub name: String,
    /// How far it is, usually in bytes.
    pub current: i64,
    /// Where it ends; 0: unknown.
    pub total: i64,
    /// When this was true.
    pub timestamp: SystemTime,
    /// When it started.
    pub started: Option<SystemTime>,
    /// When it ended.
    pub completed: Option<SystemTime>,
}

/// Which stream a log came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl LogStream {
    /// Returns the stream's number on the wire.
    pub const fn number(self) -> i64 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
        }
    }
}

/// A piece of a vertex's output.
#[derive(Clone, Debug, PartialEq)]
pub struct VertexLog {
    /// The vertex.
    pub vertex: Digest,
    /// When it was written.
    pub timestamp: SystemTime,
    /// The stream.
    pub stream: LogStream,
    /// The bytes, not necessarily whole lines nor UTF-8.
    pub data: Bytes,
}

/// A remark on a vertex.
#[derive(Clone, Debug, PartialEq)]
pub struct VertexWarning {
    /// The vertex.
    pub vertex: Digest,
    /// 1 is the ordinary level.
    pub level: i64,
    /// One line.
    pub short: Bytes,
    /// More lines.
    pub detail: Vec<Bytes>,
    /// Where to read more; empty: nowhere.
    pub url: String,
    /// The text that is remarked on.
    pub source: Option<pb::SourceInfo>,
    /// Ranges in that text.
    pub ranges: Vec<pb::Range>,
}

impl VertexWarning {
    /// Makes a warning of one line.
    pub fn short(vertex: Digest, text: impl Into<String>) -> Self {
        Self {
            vertex,
            level: 1,
            short: Bytes::from(text.into()),
            detail: Vec::new(),
            url: String::new(),
            source: None,
            ranges: Vec::new(),
        }
    }

    /// About how many bytes it is in a message; each has the whole text that is remarked on.
    fn size(&self) -> usize {
        let of_source = |source: &pb::SourceInfo| {
            let definition = source.definition.iter().flat_map(|definition| &definition.def);
            source.data.len() + definition.map(|raw| raw.len()).sum::<usize>()
        };
        self.short.len()
            + self.detail.iter().map(Bytes::len).sum::<usize>()
            + self.source.as_ref().map_or(0, of_source)
    }
}

/// What changed since a subscriber last looked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StatusBatch {
    /// Vertices, in the order in which they changed.
    pub vertices: Vec<Vertex>,
    /// Statuses, in the order in which they changed.
    pub statuses: Vec<VertexStatus>,
    /// Logs in order.
    pub logs: Vec<VertexLog>,
    /// Warnings in order.
    pub warnings: Vec<VertexWarning>,
}

impl StatusBatch {
    fn is_empty(&self) -> bool {
        self.vertices.is_empty()
            && self.statuses.is_empty()
            && self.logs.is_empty()
            && self.warnings.is_empty()
    }
}

/// One thing that can be shown.
#[derive(Clone, Debug)]
enum Entry {
    Vertex(Digest),
    /// An earlier time of a vertex whose work was taken up again.
    Ended(Box<Vertex>),
    Status(Digest, String),
    Log(VertexLog),
    Warning(Box<VertexWarning>),
}

/// State that changes are merged into and that readers walk by sequence number.
#[derive(Debug, Default)]
struct Board {
    /// Everything to show, by the number of its last change.
    order: BTreeMap<u64, Entry>,
    next: u64,
    vertices: BTreeMap<Digest, (u64, Vertex)>,
    statuses: BTreeMap<(Digest, String), (u64, VertexStatus)>,
    logs: VecDeque<u64>,
    log_bytes: usize,
    /// Logs up to this number were dropped.
    logs_dropped: u64,
    warnings: usize,
    /// How many warnings were not kept, and the vertex of the last of them.
    warnings_dropped: Option<(usize, Digest)>,
}

impl Board {
    fn push(&mut self, entry: Entry) -> u64 {
        let number = self.next;
        self.next += 1;
        self.order.insert(number, entry);
        number
    }

    fn vertex(&mut self, vertex: Vertex) {
        let digest = vertex.digest;
        if let Some((number, old)) = self.vertices.remove(&digest) {
            // Readers add up the times of a vertex: one that never ended for them would be shown as running for ever.
            if old.completed.is_some() && !old.cached && old.started != vertex.started {
                self.order.insert(number, Entry::Ended(Box::new(old)));
            } else {
                self.order.remove(&number);
            }
        }
        let number = self.push(Entry::Vertex(digest));
        self.vertices.insert(digest, (number, vertex));
    }

    fn status(&mut self, status: VertexStatus) {
        let key = (status.vertex, status.id.clone());
        if let Some((number, _)) = self.statuses.get(&key) {
            let number = *number;
            self.order.remove(&number);
        }
        let number = self.push(Entry::Status(key.0, key.1.clone()));
        self.statuses.insert(key, (number, status));
    }

    fn log(&mut self, log: VertexLog) {
        self.log_bytes += log.data.len();
        let number = self.push(Entry::Log(log));
        self.logs.push_back(number);
        while self.log_bytes > MAX_LOG_BYTES {
            let Some(oldest) = self.logs.pop_front() else {
                break;
            };
            if let Some(Entry::Log(log)) = self.order.remove(&oldest) {
                self.log_bytes -= log.data.len();
                self.logs_dropped = oldest + 1;
            }
        }
    }

    fn warning(&mut self, warning: VertexWarning) {
        if self.warnings < MAX_WARNINGS {
            self.warnings += 1;
            self.push(Entry::Warning(Box::new(warning)));
        } else {
            self.drop_warnings(1, warning.vertex);
        }
    }

    fn drop_warnings(&mut self, count: usize, vertex: Digest) {
        let before = self.warnings_dropped.map_or(0, |(dropped, _)| dropped);
        self.warnings_dropped = Some((before.saturating_add(count), vertex));
    }

    /// Shows how many warnings were not kept.
    fn tell_dropped_warnings(&mut self) {
        if let Some((count, vertex)) = self.warnings_dropped {
            let verb = if count == 1 { "warning is" } else { "warnings are" };
            let text = format!("{count} more {verb} not shown: a build shows at most {MAX_WARNINGS}");
            self.push(Entry::Warning(Box::new(VertexWarning::short(vertex, text))));
        }
    }

    /// Returns what changed from `cursor` on, bounded, and moves the cursor behind it.
    fn read(&self, cursor: &mut u64) -> StatusBatch {
        let mut batch = StatusBatch::default();
        let mut bytes = 0;
        let mut clipped = *cursor < self.logs_dropped;
        for (entries, (number, entry)) in self.order.range(*cursor..).enumerate() {
            if entries >= MAX_BATCH_ENTRIES || bytes >= MAX_BATCH_BYTES {
                return batch;
            }
            *cursor = number + 1;
            match entry {
                Entry::Vertex(digest) => batch
                    .vertices
                    .extend(self.vertices.get(digest).map(|(_, v)| v.clone())),
                Entry::Ended(vertex) => batch.vertices.push(vertex.as_ref().clone()),
                Entry::Status(vertex, id) => {
                    let key = (*vertex, id.clone());
                    batch
                        .statuses
                        .extend(self.statuses.get(&key).map(|(_, s)| s.clone()));
                }
                Entry::Log(log) => {
                    if clipped {
                        clipped = false;
                        let data = Bytes::from_static(b"[output clipped, log limit reached]\n");
                        batch.logs.push(VertexLog { data, ..log.clone() });
                    }
                    bytes += log.data.len();
                    batch.logs.push(log.clone());
                }
                Entry::Warning(warning) => {
                    bytes += warning.size();
                    batch.warnings.push(warning.as_ref().clone());
                }
            }
        }
        *cursor = self.next;
        batch
    }
}

#[derive(Debug, Default)]
struct JobBoard {
    board: Board,
    explanations: Vec<Arc<Explanation>>,
    closed: bool,
}

#[derive(Debug)]
struct JobShared {
    state: Mutex<JobBoard>,
    changed: watch::Sender<u64>,
}

/// One build's progress. Cheap to clone; clones are the same progress.
#[derive(Clone, Debug)]
pub struct JobProgress(Arc<JobShared>);

impl Default for JobProgress {
    fn default() -> Self {
        Self::new()
    }
}

impl JobProgress {
    /// Makes an empty, open progress.
    pub fn new() -> Self {
        let (changed, _) = watch::channel(0);
        Self(Arc::new(JobShared {
            state: Mutex::default(),
            changed,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, JobBoard> {
        self.0
            .state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self, change: impl FnOnce(&mut Board)) {
        let mut state = self.lock();
        if !state.closed {
            change(&mut state.board);
            drop(state);
            self.0.changed.send_modify(|version| *version += 1);
        }
    }

    /// Shows a vertex. When it starts, inputs that never started are shown as cached, as their results were not needed.
    pub fn vertex(&self, vertex: Vertex) {
        self.write(|board| {
            if let Some(at) = vertex.started {
                mark_inputs_cached(board, &vertex.inputs, at);
            }
            board.vertex(vertex);
        });
    }

    /// Shows a status.
    pub fn status(&self, status: VertexStatus) {
        self.write(|board| board.status(status));
    }

    /// Shows a log.
    pub fn log(&self, log: VertexLog) {
        self.write(|board| board.log(log));
    }

    /// Shows a warning; more than 1,000 are dropped, and at the end it is shown how many.
    pub fn warn(&self, warning: VertexWarning) {
        self.write(|board| board.warning(warning));
    }

    /// Ends the progress: what still runs is shown as cancelled, subscribers end once they read everything.
    pub fn close(&self) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        let now = SystemTime::now();
        let running: Vec<Vertex> = state
            .board
            .vertices
            .values()
            .filter(|(_, vertex)| vertex.started.is_some() && vertex.completed.is_none())
            .map(|(_, vertex)| vertex.clone())
            .collect();
        for mut vertex in running {
            vertex.completed = Some(now);
            if !vertex.cached && vertex.error.is_empty() {
                "context canceled".clone_into(&mut vertex.error);
            }
            state.board.vertex(vertex);
        }
        state.board.tell_dropped_warnings();
        state.closed = true;
        drop(state);
        self.0.changed.send_modify(|version| *version += 1);
    }

    /// Follows the progress from its present state on.
    pub fn subscribe(&self) -> Subscription {
        Subscription {
            shared: self.clone(),
            cursor: 0,
            changed: self.0.changed.subscribe(),
        }
    }

    /// Returns the present state of all vertices, by digest.
    pub fn vertices(&self) -> Vec<Vertex> {
        self.lock()
            .board
            .vertices
            .values()
            .map(|(_, vertex)| vertex.clone())
            .collect()
    }

    /// Returns how many warnings there were, shown or not.
    pub fn warnings(&self) -> usize {
        let board = &self.lock().board;
        let dropped = board.warnings_dropped.map_or(0, |(dropped, _)| dropped);
        board.warnings.saturating_add(dropped)
    }
}

/// Marks waiting inputs, and theirs, as cached. Each vertex is marked once, so the work is linear over a build.
fn mark_inputs_cached(board: &mut Board, inputs: &[Digest], at: SystemTime) {
    let mut open: Vec<Digest> = inputs.to_vec();
    while let Some(digest) = open.pop() {
        let Some((_, input)) = board.vertices.get(&digest) else {
            continue;
        };
        if input.started.is_some() {
            continue;
        }
        let mut input = input.clone();
        input.cached = true;
        input.started = Some(at);
        input.completed = Some(at);
        open.extend(input.inputs.iter().copied());
        board.vertex(input);
    }
}

/// Follows one build's progress.
#[derive(Debug)]
pub struct Subscription {
    shared: JobProgress,
    cursor: u64,
    changed: watch::Receiver<u64>,
}

impl Subscription {
    /// Waits for changes; `None` when the progress is closed and everything was read. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<StatusBatch> {
        loop {
            self.changed.borrow_and_update();
            let (batch, closed) = {
                let state = self.shared.lock();
                (state.board.read(&mut self.cursor), state.closed)
            };
            if !batch.is_empty() {
                return Some(batch);
            }
            if closed {
                return None;
            }
            // The sender lives in `shared`, so this only fails when it does not.
            self.changed.changed().await.ok()?;
        }
    }
}

#[derive(Debug)]
struct VertexBoard {
    board: Board,
    vertex: Vertex,
    jobs: Vec<JobProgress>,
    explanation: Option<Arc<Explanation>>,
    /// How many guards of [`VertexProgress::resume`] there are.
    resumed: usize,
}

/// A vertex's progress, shared by all jobs that wait for it. Cheap to clone; clones are the same vertex.
#[derive(Clone, Debug)]
pub struct VertexProgress(Arc<Mutex<VertexBoard>>);

impl VertexProgress {
    /// Makes the progress of a vertex that waits.
    pub fn new(digest: Digest, name: String, inputs: Vec<Digest>, group: Option<pb::ProgressGroup>) -> Self {
        let vertex = Vertex {
            digest,
            inputs,
            name,
            cached: false,
            started: None,
            completed: None,
            error: String::new(),
            progress_group: group,
        };
        Self(Arc::new(Mutex::new(VertexBoard {
            board: Board::default(),
            vertex,
            jobs: Vec::new(),
            explanation: None,
            resumed: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, VertexBoard> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Shows the vertex in a job from now on, with everything that it showed before.
    pub fn attach(&self, job: &JobProgress) {
        let mut this = self.lock();
        if this.jobs.iter().any(|known| Arc::ptr_eq(&known.0, &job.0)) {
            return;
        }
        job.vertex(this.vertex.clone());
        for entry in this.board.order.values() {
            match entry {
                Entry::Vertex(_) | Entry::Ended(_) => {}
                Entry::Status(vertex, id) => {
                    if let Some((_, status)) = this.board.statuses.get(&(*vertex, id.clone())) {
                        job.status(status.clone());
                    }
                }
                Entry::Log(log) => job.log(log.clone()),
                Entry::Warning(warning) => job.warn(warning.as_ref().clone()),
            }
        }
        if let Some((count, vertex)) = this.board.warnings_dropped {
            job.write(|board| board.drop_warnings(count, vertex));
        }
        if let Some(explanation) = &this.explanation {
            job.explain(Arc::clone(explanation));
        }
        this.jobs.push(job.clone());
    }

    /// No longer shows the vertex in a job.
    pub fn detach(&self, job: &JobProgress) {
        self.lock().jobs.retain(|known| !Arc::ptr_eq(&known.0, &job.0));
    }

    /// Returns the vertex's digest.
    pub fn digest(&self) -> Digest {
        self.lock().vertex.digest
    }

    /// Shows that work on the vertex starts.
    pub fn started(&self, cached: bool) {
        self.change(|vertex| {
            vertex.started = Some(SystemTime::now());
            vertex.completed = None;
            vertex.cached = cached;
            vertex.error.clear();
        });
    }

    /// Shows that work on the vertex ended, with the failure's text if it failed.
    pub fn completed(&self, cached: bool, error: Option<String>) {
        self.change(|vertex| {
            vertex.completed = Some(SystemTime::now());
            vertex.cached = cached;
            vertex.error = error.unwrap_or_default();
        });
    }

    fn change(&self, change: impl FnOnce(&mut Vertex)) {
        self.lock().change(change);
    }

    /// Shows that work on a vertex that has ended is taken up again, until the guard is dropped; what overlaps is shown
    /// as one.
    pub fn resume(&self) -> Resumed {
        let mut this = self.lock();
        this.resumed += 1;
        if this.vertex.completed.is_some() || this.vertex.started.is_none() {
            this.change(|vertex| {
                vertex.started = Some(SystemTime::now());
                vertex.completed = None;
                vertex.cached = false;
            });
        }
        Resumed(self.clone())
    }

    /// Writes to the vertex's log. Never waits.
    pub fn log(&self, stream: LogStream, data: impl Into<Bytes>) {
        let mut data: Bytes = data.into();
        let mut this = self.lock();
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(MAX_LOG_PIECE));
            let log = VertexLog {
                vertex: this.vertex.digest,
                timestamp: SystemTime::now(),
                stream,
                data: piece,
            };
            for job in &this.jobs {
                job.log(log.clone());
            }
            this.board.log(log);
        }
    }

    /// Shows a warning on the vertex.
    pub fn warn(&self, warning: VertexWarning) {
        let mut this = self.lock();
        for job in &this.jobs {
            job.warn(warning.clone());
        }
        this.board.warning(warning);
    }

    /// Shows how far something inside the vertex is.
    pub fn status(&self, id: &str, name: &str, current: u64, total: u64) {
        self.update_status(id, name, amount(current), amount(total), false);
    }

    /// Shows that something inside the vertex starts; the returned handle shows its end when it is dropped.
    pub fn step(&self, id: impl Into<String>, name: impl Into<String>) -> StatusStep {
        let step = StatusStep {
            progress: self.clone(),
            id: id.into(),
            name: name.into(),
            current: 0,
            total: 0,
        };
        self.update_status(&step.id, &step.name, 0, 0, false);
        step
    }

    fn update_status(&self, id: &str, name: &str, current: i64, total: i64, done: bool) {
        let mut this = self.lock();
        let now = SystemTime::now();
        let vertex = this.vertex.digest;
        let known = this.board.statuses.get(&(vertex, id.to_owned()));
        let started = known.and_then(|(_, status)| status.started).unwrap_or(now);
        let status = VertexStatus {
            id: id.to_owned(),
            vertex,
            name: name.to_owned(),
            current,
            total,
            timestamp: now,
            started: Some(started),
            completed: done.then_some(now),
        };
        for job in &this.jobs {
            job.status(status.clone());
        }
        this.board.status(status);
    }
}

impl VertexBoard {
    fn change(&mut self, change: impl FnOnce(&mut Vertex)) {
        change(&mut self.vertex);
        for job in &self.jobs {
            job.vertex(self.vertex.clone());
        }
    }
}

/// Work on a vertex that was taken up again; dropping it shows its end.
#[derive(Debug)]
pub struct Resumed(VertexProgress);

impl Drop for Resumed {
    fn drop(&mut self) {
        let mut this = self.0.lock();
        this.resumed -= 1;
        if this.resumed == 0 && this.vertex.completed.is_none() {
            this.change(|vertex| vertex.completed = Some(SystemTime::now()));
        }
    }
}

fn amount(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Something inside a vertex that is under way; dropping it shows its end.
#[derive(Debug)]
pub struct StatusStep {
    progress: VertexProgress,
    id: String,
    name: String,
    current: i64,
    total: i64,
}

impl StatusStep {
    /// Shows how far it is.
    pub fn update(&mut self, current: u64, total: u64) {
        self.current = amount(current);
        self.total = amount(total);
        self.progress
            .update_status(&self.id, &self.name, self.current, self.total, false);
    }
}

impl Drop for StatusStep {
    fn drop(&mut self) {
        self.progress
            .update_status(&self.id, &self.name, self.current, self.total, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::sha256(name.as_bytes())
    }

    fn vertex(name: &str, inputs: &[&str]) -> VertexProgress {
        VertexProgress::new(
            digest(name),
            name.to_owned(),
            inputs.iter().map(|input| digest(input)).collect(),
            None,
        )
    }

    fn take(subscription: &mut Subscription) -> StatusBatch {
        futures_util::FutureExt::now_or_never(subscription.next())
            .flatten()
            .unwrap_or_default()
    }

    #[test]
    fn a_late_subscriber_sees_the_present_state() {
        let job = JobProgress::new();
        let run = vertex("run", &[]);
        run.attach(&job);
        run.started(false);
        run.log(LogStream::Stdout, "one\n");
        run.status("blob", "downloading", 1, 10);
        run.status("blob", "downloading", 9, 10);
        run.completed(false, None);
        let batch = take(&mut job.subscribe());
        assert_eq!(batch.vertices.len(), 1);
        assert!(batch.vertices[0].completed.is_some());
        assert_eq!(batch.statuses.len(), 1);
        assert_eq!(batch.statuses[0].current, 9);
        assert_eq!(batch.logs[0].data, "one\n");
    }

    #[test]
    fn several_subscribers_read_at_their_own_pace() {
        let job = JobProgress::new();
        let run = vertex("run", &[]);
        run.attach(&job);
        let (mut one, mut two) = (job.subscribe(), job.subscribe());
        run.log(LogStream::Stdout, "1");
        assert_eq!(take(&mut one).logs.len(), 1);
        run.log(LogStream::Stderr, "2");
        assert_eq!(take(&mut one).logs.len(), 1);
        assert_eq!(take(&mut two).logs.len(), 2);
        job.close();
        assert!(futures_util::FutureExt::now_or_never(one.next()).is_some_and(|end| end.is_none()));
    }

    #[test]
    fn inputs_that_were_not_needed_are_shown_as_cached() {
        let job = JobProgress::new();
        let (base, copy, run) = (
            vertex("base", &[]),
            vertex("copy", &["base"]),
            vertex("run", &["copy"]),
        );
        for progress in [&base, &copy, &run] {
            progress.attach(&job);
        }
        base.started(false);
        base.completed(false, None);
        run.started(true);
        run.completed(true, None);
        let states = job.vertices();
        let cached = |name: &str| {
            states
                .iter()
                .find(|vertex| vertex.name == name)
                .map(|vertex| vertex.cached)
        };
        assert_eq!(
            (cached("base"), cached("copy"), cached("run")),
            (Some(false), Some(true), Some(true))
        );
        assert!(states.iter().all(|vertex| vertex.completed.is_some()));
    }

    #[test]
    fn inputs_that_run_are_not_cached() {
        let job = JobProgress::new();
        let (base, run) = (vertex("base", &[]), vertex("run", &["base"]));
        base.attach(&job);
        run.attach(&job);
        base.started(false);
        run.started(false);
        run.completed(false, Some("failed".to_owned()));
        let base = &job.vertices()[usize::from(job.vertices()[0].name != "base")];
        assert!(!base.cached && base.completed.is_none(), "{base:?}");
    }

    #[test]
    fn every_time_a_vertex_worked_ends_for_readers() {
        let job = JobProgress::new();
        let base = vertex("base", &[]);
        base.attach(&job);
        base.started(false);
        let mut early = job.subscribe();
        assert!(take(&mut early).vertices[0].completed.is_none());
        base.completed(false, None);
        let (one, two) = (base.resume(), base.resume());
        drop(one);
        let running = take(&mut early).vertices;
        assert_eq!(
            running
                .iter()
                .map(|vertex| vertex.completed.is_some())
                .collect::<Vec<_>>(),
            [true, false]
        );
        drop(two);
        let ended = take(&mut early).vertices;
        assert!(ended.len() == 1 && ended[0].completed.is_some());
        assert_eq!(ended[0].started, running[1].started);
    }

    #[test]
    fn a_job_that_joins_later_gets_everything_of_the_vertex() {
        let (first, second) = (JobProgress::new(), JobProgress::new());
        let run = vertex("run", &[]);
        run.attach(&first);
        run.started(false);
        run.log(LogStream::Stdout, "early");
        run.warn(VertexWarning::short(digest("run"), "careful"));
        run.attach(&second);
        run.log(LogStream::Stdout, "late");
        let batch = take(&mut second.subscribe());
        assert_eq!((batch.logs.len(), batch.warnings.len()), (2, 1));
        assert!(batch.vertices[0].started.is_some());
        run.detach(&second);
        run.log(LogStream::Stdout, "alone");
        assert_eq!(take(&mut second.subscribe()).logs.len(), 2);
    }

    #[test]
    fn old_logs_are_dropped_and_that_is_said() {
        let job = JobProgress::new();
        let run = vertex("run", &[]);
        run.attach(&job);
        for _ in 0..100 {
            run.log(LogStream::Stdout, vec![b'x'; MAX_LOG_PIECE]);
        }
        let mut subscription = job.subscribe();
        let mut bytes = 0;
        let mut first = None;
        loop {
            let batch = take(&mut subscription);
            if batch.is_empty() {
                break;
            }
            assert!(
                batch.logs.iter().map(|log| log.data.len()).sum::<usize>() <= MAX_BATCH_BYTES + MAX_LOG_PIECE
            );
            bytes += batch.logs.iter().map(|log| log.data.len()).sum::<usize>();
            first = first.or_else(|| batch.logs.first().map(|log| log.data.clone()));
        }
        assert!(bytes <= MAX_LOG_BYTES + 100);
        assert!(first.unwrap().starts_with(b"[output clipped"));
    }

    #[test]
    fn warnings_with_long_texts_come_a_few_at_a_time() {
        let job = JobProgress::new();
        let text = pb::SourceInfo {
            data: vec![b'x'; MAX_BATCH_BYTES / 4].into(),
            ..pb::SourceInfo::default()
        };
        for _ in 0..10 {
            let mut warning = VertexWarning::short(digest("v"), "short");
            warning.source = Some(text.clone());
            job.warn(warning);
        }
        let mut subscription = job.subscribe();
        let counts: Vec<usize> = (0..3).map(|_| take(&mut subscription).warnings.len()).collect();
        assert_eq!(counts, [4, 4, 2]);
    }

    #[test]
    fn it_is_told_how_many_warnings_are_not_shown() {
        let (first, later) = (JobProgress::new(), JobProgress::new());
        let run = vertex("run", &[]);
        run.attach(&first);
        for number in 0..MAX_WARNINGS + 7 {
            run.warn(VertexWarning::short(run.digest(), format!("{number}")));
        }
        run.attach(&later);
        later.warn(VertexWarning::short(digest("other"), "another"));
        for (job, dropped) in [(first, 7), (later, 8)] {
            assert_eq!(job.warnings(), MAX_WARNINGS + dropped);
            job.close();
            let mut subscription = job.subscribe();
            let mut shown = Vec::new();
            for _ in 0..MAX_WARNINGS {
                shown.extend(take(&mut subscription).warnings);
            }
            assert_eq!(shown.len(), MAX_WARNINGS + 1);
            let last = String::from_utf8_lossy(&shown[MAX_WARNINGS].short).into_owned();
            assert_eq!(
                last,
                format!("{dropped} more warnings are not shown: a build shows at most 1000")
            );
        }
    }

    #[test]
    fn what_still_runs_at_the_end_is_cancelled() {
        let job = JobProgress::new();
        let run = vertex("run", &[]);
        run.attach(&job);
        run.started(false);
        job.close();
        run.log(LogStream::Stdout, "unheard");
        let batch = take(&mut job.subscribe());
        assert_eq!(batch.vertices[0].error, "context canceled");
        assert!(batch.logs.is_empty());
    }

    #[test]
    fn a_step_shows_its_end_when_it_is_dropped() {
        let job = JobProgress::new();
        let run = vertex("run", &[]);
        run.attach(&job);
        let mut step = run.step("extracting", "extracting");
        step.update(3, 4);
        drop(step);
        let status = &take(&mut job.subscribe()).statuses[0];
        assert_eq!((status.current, status.total), (3, 4));
        assert!(status.completed.is_some());
    }
}

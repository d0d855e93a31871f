//! The state of every vertex of a build, as told by the messages so far.

use std::collections::{BTreeMap, BTreeSet};

use super::event::{ProgressGroup, Status, Vertex, VertexStatus, VertexWarning};
use super::interval::{self, Interval};
use super::screen::Screen;
use crate::format::time::Instant;

/// Names a line of the display: a vertex, or a group of vertices shown as one.
pub type Index = usize;

/// A progress bar inside a vertex.
#[derive(Clone, Debug)]
pub struct StatusLine {
    /// Its last state.
    pub status: VertexStatus,
    /// Whether it changed since it was printed.
    pub changed: bool,
}

/// What is known of a vertex or group.
#[derive(Debug, Default)]
pub struct VertexState {
    /// The vertex's last state; of a group, made of its members.
    pub vertex: Vertex,
    /// Bars, in order of their start.
    pub statuses: Vec<StatusLine>,
    /// Number in plain output; 0: not printed yet.
    pub number: usize,
    /// Lines of output with the second they were written at, not printed yet in plain output.
    pub logs: Vec<Vec<u8>>,
    /// Whether the last of `logs` has no end yet.
    pub logs_partial: bool,
    /// How much of the first of `logs` is printed already.
    pub logs_offset: usize,
    /// Changes since the plain output last turned away from this vertex, and since when they are counted.
    pub count: usize,
    /// See `count`.
    pub counted_since: Option<Instant>,
    /// Warnings.
    pub warnings: Vec<VertexWarning>,
    /// How many of them are printed.
    pub warnings_printed: usize,
    /// When it ran.
    pub intervals: Vec<Interval>,
    /// Last lines of output, for a terminal.
    pub screen: Option<Screen>,
    /// Whether the line is not to be shown.
    pub hidden: bool,
    by_start: BTreeMap<Instant, Interval>,
    members: BTreeMap<String, Vertex>,
    announced: bool,
}

impl VertexState {
    /// Returns whether it has started.
    pub fn is_started(&self) -> bool {
        !self.intervals.is_empty()
    }

    /// Returns when it ended last; `None` while it waits or runs.
    pub fn ended(&self) -> Option<Instant> {
        self.intervals.last().and_then(|interval| interval.stop)
    }

    /// Returns whether it was cancelled rather than failed.
    pub fn is_canceled(&self) -> bool {
        self.vertex.error.ends_with("context canceled")
    }

    /// Counts changes.
    fn touch(&mut self, now: Instant) {
        if self.count == 0 {
            self.counted_since = Some(now);
        }
        self.count += 1;
    }

    fn set_interval(&mut self, vertex: &Vertex) -> bool {
        let Some(start) = vertex.started else { return false };
        let interval = Interval {
            start,
            stop: vertex.completed,
        };
        let changed = self.by_start.insert(start, interval) != Some(interval);
        self.intervals = interval::merge(self.by_start.values().copied().collect());
        changed
    }

    fn log(&mut self, data: &[u8], at: Instant) {
        if let Some(screen) = &mut self.screen {
            screen.write(data);
        }
        if data.is_empty() {
            return;
        }
        let seconds = self
            .intervals
            .last()
            .map_or(0.0, |interval| at.seconds_since(interval.start));
        let stamp = if seconds < 10.0 {
            format!("{seconds:.3} ")
        } else if seconds < 100.0 {
            format!("{seconds:.2} ")
        } else {
            format!("{seconds:.1} ")
        };
        let complete = data.ends_with(b"\n");
        let body = data.strip_suffix(b"\n").unwrap_or(data);
        for (index, line) in body.split(|byte| *byte == b'\n').enumerate() {
            match self.logs.last_mut() {
                Some(last) if index == 0 && self.logs_partial => last.extend_from_slice(line),
                _ => self.logs.push([stamp.as_bytes(), line].concat()),
            }
        }
        self.logs_partial = !complete;
    }
}

/// Everything known of a build.
#[derive(Debug, Default)]
pub struct Trace {
    states: Vec<VertexState>,
    by_digest: BTreeMap<String, Index>,
    groups: BTreeMap<String, Index>,
    /// Lines in order of their start.
    pub shown: Vec<Index>,
    /// Lines that changed since they were printed.
    pub updates: BTreeSet<Index>,
    /// When the build started, by the daemon's clock.
    pub started: Option<Instant>,
    /// How much this machine's clock is ahead of the daemon's, with the way of the message, in nanoseconds.
    pub clock_ahead_ns: Option<i64>,
    /// Width of the screens of running steps; `None`: no terminal.
    pub screen_width: Option<usize>,
}

impl Trace {
    /// Returns a line's state.
    pub fn state(&self, index: Index) -> &VertexState {
        &self.states[index]
    }

    /// Returns a line's state.
    pub fn state_mut(&mut self, index: Index) -> &mut VertexState {
        &mut self.states[index]
    }

    /// Returns all lines with their states.
    pub fn states(&self) -> impl Iterator<Item = (Index, &VertexState)> {
        self.states.iter().enumerate()
    }

    /// Takes in a message.
    pub fn update(&mut self, status: Status, now: Instant) {
        let mut touched_groups = BTreeSet::new();
        for vertex in status.vertexes {
            self.started = self.started.or(vertex.started);
            match vertex.group.clone() {
                Some(group) => {
                    touched_groups.insert(self.update_member(&group, vertex));
                }
                None => self.update_vertex(vertex, now),
            }
        }
        for index in touched_groups {
            self.refresh_group(index, now);
        }
        for status in status.statuses {
            self.update_status(status, now);
        }
        for warning in status.warnings {
            if let Some(index) = self.by_digest.get(&warning.vertex).copied() {
                self.states[index].warnings.push(warning);
                self.states[index].touch(now);
            }
        }
        for log in status.logs {
            if let Some(index) = self.by_digest.get(&log.vertex).copied() {
                self.states[index].log(&log.data, log.timestamp);
                self.states[index].touch(now);
                self.updates.insert(index);
            }
        }
    }

    fn add(&mut self, vertex: Vertex, hidden: bool) -> Index {
        let screen = self.screen_width.map(Screen::new);
        self.states.push(VertexState {
            vertex,
            hidden,
            screen,
            ..VertexState::default()
        });
        self.states.len() - 1
    }

    fn set_clock(&mut self, started: Option<Instant>, now: Instant) {
        if let Some(started) = started {
            self.clock_ahead_ns
                .get_or_insert(now.unix_ns.saturating_sub(started.unix_ns));
        }
    }

    fn update_vertex(&mut self, vertex: Vertex, now: Instant) {
        let index = match self.by_digest.get(&vertex.digest).copied() {
            Some(index) => index,
            None => {
                let index = self.add(
                    Vertex {
                        started: None,
                        completed: None,
                        ..vertex.clone()
                    },
                    false,
                );
                self.by_digest.insert(vertex.digest.clone(), index);
                index
            }
        };
        let was_started = self.states[index].is_started();
        let state = &mut self.states[index];
        if vertex.started.is_some() {
            let old = &state.vertex;
            let changed = !state.announced
                || vertex.name != old.name
                || vertex.started != old.started
                || (vertex.completed.is_some() && vertex.completed != old.completed)
                || vertex.cached != old.cached
                || vertex.error != old.error;
            if changed {
                state.announced = true;
                state.touch(now);
                self.updates.insert(index);
            }
            state.set_interval(&vertex);
            if !was_started {
                self.shown.push(index);
            }
            self.set_clock(vertex.started, now);
        }
        // A vertex that is told of again before it starts must not undo what is known of its earlier run.
        if !was_started || vertex.started.is_some() {
            self.states[index].vertex = vertex;
        }
    }

    fn update_member(&mut self, group: &ProgressGroup, vertex: Vertex) -> Index {
        let index = match self.groups.get(&group.id).copied() {
            Some(index) => index,
            None => {
                let shown = Vertex {
                    digest: group.id.clone(),
                    name: group.name.clone(),
                    ..Vertex::default()
                };
                let index = self.add(shown, true);
                self.groups.insert(group.id.clone(), index);
                self.by_digest.insert(group.id.clone(), index);
                index
            }
        };
        self.by_digest.insert(vertex.digest.clone(), index);
        self.states[index].members.insert(vertex.digest.clone(), vertex);
        index
    }

    /// Makes a group's state of its members': cached when all are, failed when one is, running when one runs.
    fn refresh_group(&mut self, index: Index, now: Instant) {
        let state = &mut self.states[index];
        let was_hidden = state.hidden;
        let was_started = state.is_started();
        let members = std::mem::take(&mut state.members);
        let mut changed = false;
        let mut error = state.vertex.error.clone();
        for member in members.values() {
            changed |= state.set_interval(member);
            if member.started.is_some() && !member.group.as_ref().is_some_and(|group| group.weak) {
                state.hidden = false;
            }
            if error.is_empty() {
                error.clone_from(&member.error);
            }
        }
        let cached = members.values().all(|member| member.cached);
        state.members = members;
        if !error.is_empty() {
            state.hidden = false;
        }
        changed |= cached != state.vertex.cached || error != state.vertex.error;
        state.vertex.cached = cached;
        state.vertex.error = error;
        let first = state.intervals.first().map(|interval| interval.start);
        let hidden = state.hidden;
        if !was_started {
            self.set_clock(first, now);
        }
        if hidden {
            return;
        }
        if was_hidden {
            self.shown.push(index);
        }
        if changed || was_hidden {
            self.states[index].touch(now);
            self.updates.insert(index);
        }
    }

    fn update_status(&mut self, status: VertexStatus, now: Instant) {
        let Some(index) = self.by_digest.get(&status.vertex).copied() else {
            return;
        };
        let state = &mut self.states[index];
        match state.statuses.iter_mut().find(|line| line.status.id == status.id) {
            Some(line) => {
                line.status = status;
                line.changed = true;
            }
            None if status.started.is_some() => state.statuses.push(StatusLine {
                status,
                changed: true,
            }),
            None => {}
        }
        state.touch(now);
        self.updates.insert(index);
    }
}

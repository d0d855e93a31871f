//! Progress as numbered lines, one vertex's lines kept together: `#5 [build 2/4] RUN make`, `#5 DONE 1.2s`.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::io::{self, Write};

use super::event::{Status, VertexStatus};
use super::interval::total_seconds;
use super::trace::{Index, Trace, VertexState};
use super::{Display, write_out};
use crate::format::time::Instant;
use crate::format::units;

/// Seconds after which another vertex may take over from one that keeps printing.
const SWITCH_AFTER_S: f64 = 5.0;
/// Seconds after which a vertex that waits to print must get its turn.
const LONGEST_WAIT_S: f64 = 10.0;
/// A bar is printed again after this many seconds or this part of its total.
const BAR_EVERY_S: f64 = 5.0;
const BAR_EVERY_PART: f64 = 0.05;
/// Last lines repeated when a step fails.
const ERROR_LINES: usize = 10;
/// Longest name printed when names are to be cut.
const NAME_LIMIT: usize = 72;

/// Prints progress as lines.
#[derive(Debug)]
pub struct PlainDisplay<W> {
    out: W,
    trace: Trace,
    printer: Printer,
}

impl<W: Write> PlainDisplay<W> {
    /// Makes a display on `out`.
    pub fn new(out: W) -> Self {
        let cut_names = std::env::var("PROGRESS_NO_TRUNC").is_ok_and(|value| value == "0");
        Self {
            out,
            trace: Trace::default(),
            printer: Printer {
                cut_names,
                ..Printer::default()
            },
        }
    }
}

impl<W: Write + Send> Display for PlainDisplay<W> {
    fn update(&mut self, status: Status) -> io::Result<()> {
        self.trace.update(status, Instant::now());
        Ok(())
    }

    fn refresh(&mut self) -> io::Result<()> {
        let text = self.printer.print(&mut self.trace, Instant::now());
        self.out.write_all(&text)?;
        self.out.flush()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.refresh()?;
        let text = self.printer.error_logs(&self.trace);
        self.out.write_all(&text)?;
        write_out(&mut self.out, "")
    }
}

#[derive(Debug, Default)]
struct Printer {
    cut_names: bool,
    current: Option<Index>,
    printed_any: bool,
    numbers: usize,
    bars: BTreeMap<(Index, String), (i64, Instant)>,
    tails: BTreeMap<Index, VecDeque<Vec<u8>>>,
}

/// How much a vertex that waits to print has to say.
struct Waiting {
    index: Index,
    waited_s: f64,
    speed: f64,
    overdue: bool,
}

impl Printer {
    fn print(&mut self, trace: &mut Trace, now: Instant) -> Vec<u8> {
        let mut out = Vec::new();
        let mut ended: Vec<(Instant, Index)> = Vec::new();
        let mut rest: Vec<Index> = Vec::new();
        for index in trace.updates.iter().copied() {
            let state = trace.state(index);
            if state.hidden {
                continue;
            }
            match state.ended() {
                Some(at) => ended.push((at, index)),
                None => rest.push(index),
            }
        }
        ended.sort();
        let current = self.current;
        let current_ended = current.is_some_and(|current| ended.iter().any(|(_, index)| *index == current));
        if let Some(index) = current
            && current_ended
        {
            self.print_vertex(trace, index, now, &mut out);
        }
        for (_, index) in ended {
            if Some(index) != current {
                self.print_vertex(trace, index, now, &mut out);
            }
        }
        if rest.is_empty() {
            self.stay_with_open(trace, current, now, &mut out);
            return out;
        }
        if let Some(index) = current
            && rest.contains(&index)
        {
            self.print_vertex(trace, index, now, &mut out);
        }
        if let Some(index) = current
            && !rest.contains(&index)
        {
            rest.push(index);
        }
        if let Some(next) = self.next(trace, &rest, current, current_ended, now) {
            self.print_vertex(trace, next, now, &mut out);
        }
        out
    }

    /// Without news, makes sure that some running vertex is the one whose lines come next.
    fn stay_with_open(&mut self, trace: &mut Trace, current: Option<Index>, now: Instant, out: &mut Vec<u8>) {
        let open = |state: &VertexState| state.is_started() && state.ended().is_none() && !state.hidden;
        if current.is_some_and(|index| open(trace.state(index))) {
            return;
        }
        let next = trace
            .states()
            .find(|(_, state)| open(state))
            .map(|(index, _)| index);
        if let Some(index) = next {
            self.print_vertex(trace, index, now, out);
        }
    }

    /// Picks the vertex to turn to, if it is time to turn away from the current one.
    fn next(
        &self,
        trace: &Trace,
        rest: &[Index],
        current: Option<Index>,
        current_ended: bool,
        now: Instant,
    ) -> Option<Index> {
        let waiting: Vec<Waiting> = rest
            .iter()
            .filter_map(|index| {
                let state = trace.state(*index);
                let waited_s = now.seconds_since(state.counted_since?);
                let speed = state.count as f64 / waited_s.max(1e-9);
                let overdue = waited_s > LONGEST_WAIT_S && Some(*index) != current;
                Some(Waiting {
                    index: *index,
                    waited_s,
                    speed,
                    overdue,
                })
            })
            .collect();
        let busiest = waiting.iter().fold(None::<&Waiting>, |best, one| match best {
            Some(best) if !one.overdue && best.speed >= one.speed => Some(best),
            _ => Some(one),
        })?;
        if current_ended || current.is_none() {
            return Some(busiest.index);
        }
        if let Some(overdue) = waiting.iter().find(|one| one.overdue) {
            return Some(overdue.index);
        }
        let sum: f64 = waiting.iter().map(|one| one.speed).sum();
        let shown = waiting.iter().find(|one| Some(one.index) == current)?;
        let share = shown.speed / sum;
        (SWITCH_AFTER_S / (1.0 - share) < shown.waited_s).then_some(busiest.index)
    }

    fn print_vertex(&mut self, trace: &mut Trace, index: Index, now: Instant, out: &mut Vec<u8>) {
        self.turn_to(trace, index, out);
        let state = trace.state_mut(index);
        let number = state.number;
        let open_bar = self.print_bars(state, index, out);
        for warning in &state.warnings[state.warnings_printed..] {
            line(out, &format!("#{number} WARN: {}", warning.short));
        }
        state.warnings_printed = state.warnings.len();
        self.print_logs(state, index, out);
        self.current = Some(index);
        if state.ended().is_some() && !open_bar {
            self.current = None;
            state.count = 0;
            if state.logs_partial {
                out.push(b'\n');
                state.logs_partial = false;
                state.logs.clear();
                state.logs_offset = 0;
            }
            line(out, &format!("#{number} {}", verdict(state, now)));
        }
        trace.updates.remove(&index);
    }

    /// Prints the heading of a vertex unless it is the one printed last.
    fn turn_to(&mut self, trace: &mut Trace, index: Index, out: &mut Vec<u8>) {
        if trace.state(index).number == 0 {
            self.numbers += 1;
            trace.state_mut(index).number = self.numbers;
        }
        if self.current == Some(index) {
            return;
        }
        if let Some(old) = self.current {
            let old = trace.state_mut(old);
            if old.logs_partial {
                out.push(b'\n');
            }
            old.logs_offset = 0;
            old.count = 0;
            line(out, &format!("#{} ...", old.number));
        }
        if self.printed_any {
            out.push(b'\n');
        }
        self.printed_any = true;
        let state = trace.state(index);
        let name = &state.vertex.name;
        match name.char_indices().nth(NAME_LIMIT) {
            Some((end, _)) if self.cut_names => line(out, &format!("#{} {}...", state.number, &name[..end])),
            _ => line(out, &format!("#{} {name}", state.number)),
        }
    }

    /// Prints bars that moved; returns whether one has not ended.
    fn print_bars(&mut self, state: &mut VertexState, index: Index, out: &mut Vec<u8>) -> bool {
        let mut open = false;
        let number = state.number;
        for bar in &mut state.statuses {
            if !std::mem::take(&mut bar.changed) {
                continue;
            }
            let status = &bar.status;
            let key = (index, status.id.clone());
            if let Some((current, at)) = self.bars.get(&key)
                && status.completed.is_none()
            {
                let part = if status.total > 0 {
                    (status.current - current) as f64 / status.total as f64
                } else {
                    0.0
                };
                if part < BAR_EVERY_PART && status.timestamp.seconds_since(*at) < BAR_EVERY_S {
                    continue;
                }
            }
            self.bars.insert(key, (status.current, status.timestamp));
            open |= status.completed.is_none();
            line(out, &format!("#{number} {}{}", status.id, bar_text(status)));
        }
        open
    }

    fn print_logs(&mut self, state: &mut VertexState, index: Index, out: &mut Vec<u8>) {
        let count = state.logs.len();
        let tail = self.tails.entry(index).or_default();
        for (position, log) in state.logs.iter().enumerate() {
            let last = position + 1 == count;
            if position == 0 && state.logs_offset > 0 {
                out.extend_from_slice(log.get(state.logs_offset..).unwrap_or_default());
                tail.pop_back();
            } else {
                out.extend_from_slice(format!("#{} ", state.number).as_bytes());
                out.extend_from_slice(log);
            }
            if !last || !state.logs_partial {
                out.push(b'\n');
            }
            tail.push_back(log.clone());
            if tail.len() > ERROR_LINES {
                tail.pop_front();
            }
        }
        if state.logs_partial {
            let open = state.logs.pop();
            state.logs.clear();
            state.logs_offset = open.as_ref().map_or(0, Vec::len);
            state.logs.extend(open);
        } else {
            state.logs.clear();
            state.logs_offset = 0;
        }
    }

    fn error_logs(&self, trace: &Trace) -> Vec<u8> {
        let mut out = Vec::new();
        for index in &trace.shown {
            let state = trace.state(*index);
            if state.vertex.error.is_empty() || state.is_canceled() {
                continue;
            }
            line(&mut out, &format!("------\n > {}:", state.vertex.name));
            for log in self.tails.get(index).into_iter().flatten() {
                out.extend_from_slice(log);
                out.push(b'\n');
            }
            line(&mut out, "------");
        }
        out
    }
}

fn line(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(text.as_bytes());
    out.push(b'\n');
}

/// Formats a bar's amount, for both plain and terminal output; empty when it has none.
pub fn amount_text(status: &VertexStatus) -> String {
    if status.total != 0 {
        format!(
            "{} / {}",
            units::two_decimals(status.current),
            units::two_decimals(status.total)
        )
    } else if status.current != 0 {
        units::two_decimals(status.current)
    } else {
        String::new()
    }
}

fn bar_text(status: &VertexStatus) -> String {
    let mut text = String::new();
    let amount = amount_text(status);
    if !amount.is_empty() {
        let _ = write!(text, " {amount}");
    }
    let end = status.completed.unwrap_or(status.timestamp);
    if let Some(started) = status.started {
        let seconds = end.seconds_since(started);
        if seconds > 0.01 {
            let _ = write!(text, " {seconds:.1}s");
        }
    }
    if status.completed.is_some() {
        text.push_str(" done");
    }
    text
}

fn verdict(state: &VertexState, now: Instant) -> String {
    if state.is_canceled() {
        "CANCELED".to_owned()
    } else if !state.vertex.error.is_empty() {
        format!("ERROR: {}", state.vertex.error)
    } else if state.vertex.cached {
        "CACHED".to_owned()
    } else {
        format!("DONE {:.1}s", total_seconds(&state.intervals, now))
    }
}

#[cfg(test)]
mod tests {
    use super::super::event::{Vertex, VertexLog};
    use super::*;

    fn at(seconds: i64) -> Instant {
        Instant {
            unix_ns: seconds * 1_000_000_000,
        }
    }

    fn vertex(digest: &str, name: &str, started: i64, completed: Option<i64>) -> Vertex {
        Vertex {
            digest: digest.to_owned(),
            name: name.to_owned(),
            started: Some(at(started)),
            completed: completed.map(at),
            ..Vertex::default()
        }
    }

    fn show(display: &mut PlainDisplay<Vec<u8>>, status: Status) -> String {
        display.update(status).unwrap();
        display.refresh().unwrap();
        String::from_utf8(std::mem::take(&mut display.out)).unwrap()
    }

    fn vertexes(vertexes: Vec<Vertex>) -> Status {
        Status {
            vertexes,
            ..Status::default()
        }
    }

    fn log(digest: &str, seconds: i64, data: &str) -> Status {
        let log = VertexLog {
            vertex: digest.to_owned(),
            stream: 1,
            data: data.as_bytes().to_vec(),
            timestamp: at(seconds),
        };
        Status {
            logs: vec![log],
            ..Status::default()
        }
    }

    #[test]
    fn numbers_vertices_and_tells_their_end() {
        let mut display = PlainDisplay::new(Vec::new());
        assert_eq!(
            show(
                &mut display,
                vertexes(vec![vertex("a", "[internal] load x", 10, None)])
            ),
            "#1 [internal] load x\n"
        );
        assert_eq!(
            show(
                &mut display,
                vertexes(vec![vertex("a", "[internal] load x", 10, Some(12))])
            ),
            "#1 DONE 2.0s\n"
        );
        let mut cached = vertex("b", "[1/2] FROM x", 12, Some(12));
        cached.cached = true;
        assert_eq!(
            show(&mut display, vertexes(vec![cached])),
            "\n#2 [1/2] FROM x\n#2 CACHED\n"
        );
    }

    #[test]
    fn stamps_log_lines_and_continues_open_ones() {
        let mut display = PlainDisplay::new(Vec::new());
        show(&mut display, vertexes(vec![vertex("a", "RUN x", 10, None)]));
        assert_eq!(
            show(&mut display, log("a", 11, "one\ntw")),
            "#1 1.000 one\n#1 1.000 tw"
        );
        assert_eq!(
            show(&mut display, log("a", 12, "o\n\nthree\n")),
            "o\n#1 2.000 \n#1 2.000 three\n"
        );
        assert_eq!(show(&mut display, log("a", 30, "x\n")), "#1 20.00 x\n");
    }

    #[test]
    fn repeats_the_last_lines_of_a_failed_step() {
        let mut display = PlainDisplay::new(Vec::new());
        show(&mut display, vertexes(vec![vertex("a", "RUN x", 10, None)]));
        for number in 0..12 {
            show(&mut display, log("a", 11, &format!("{number}\n")));
        }
        let mut failed = vertex("a", "RUN x", 10, Some(12));
        failed.error = "exit code: 1".to_owned();
        assert_eq!(
            show(&mut display, vertexes(vec![failed])),
            "#1 ERROR: exit code: 1\n"
        );
        display.finish().unwrap();
        let text = String::from_utf8(display.out).unwrap();
        assert!(text.starts_with("------\n > RUN x:\n1.000 2\n"), "{text}");
        assert!(text.ends_with("1.000 11\n------\n"), "{text}");
    }

    #[test]
    fn canceled_steps_are_not_failures() {
        let mut display = PlainDisplay::new(Vec::new());
        let mut canceled = vertex("a", "RUN x", 10, Some(12));
        canceled.error = "rpc error: context canceled".to_owned();
        assert_eq!(
            show(&mut display, vertexes(vec![canceled])),
            "#1 RUN x\n#1 CANCELED\n"
        );
        display.finish().unwrap();
        assert!(display.out.is_empty());
    }

    #[test]
    fn prints_bars_when_they_move_enough() {
        let bar = |current, timestamp, completed: Option<i64>| Status {
            statuses: vec![VertexStatus {
                id: "sha256:1".to_owned(),
                vertex: "a".to_owned(),
                name: String::new(),
                total: 1_000_000,
                current,
                timestamp: at(timestamp),
                started: Some(at(10)),
                completed: completed.map(at),
            }],
            ..Status::default()
        };
        let mut display = PlainDisplay::new(Vec::new());
        show(&mut display, vertexes(vec![vertex("a", "FROM x", 10, None)]));
        assert_eq!(show(&mut display, bar(0, 10, None)), "#1 sha256:1 0B / 1.00MB\n");
        assert_eq!(show(&mut display, bar(10_000, 11, None)), "");
        assert_eq!(
            show(&mut display, bar(500_000, 12, None)),
            "#1 sha256:1 500.00kB / 1.00MB 2.0s\n"
        );
        assert_eq!(
            show(&mut display, bar(1_000_000, 13, Some(13))),
            "#1 sha256:1 1.00MB / 1.00MB 3.0s done\n"
        );
    }

    #[test]
    fn a_group_is_one_line() {
        let member = |digest: &str, weak, started: i64, completed| {
            let mut vertex = vertex(digest, "inner", started, completed);
            vertex.group = Some(super::super::event::ProgressGroup {
                id: "g".to_owned(),
                name: "COPY x".to_owned(),
                weak,
            });
            vertex
        };
        let mut display = PlainDisplay::new(Vec::new());
        assert_eq!(
            show(&mut display, vertexes(vec![member("a", true, 10, Some(11))])),
            ""
        );
        assert_eq!(
            show(&mut display, vertexes(vec![member("b", false, 12, None)])),
            "#1 COPY x\n"
        );
        assert_eq!(
            show(&mut display, vertexes(vec![member("b", false, 12, Some(13))])),
            "#1 DONE 2.0s\n"
        );
    }
}

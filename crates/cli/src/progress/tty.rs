//! Progress drawn in place on a terminal: one line a vertex, its bars, and the last lines of steps that run.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::os::fd::AsFd;

use super::event::Status;
use super::interval::{self, Interval};
use super::plain::amount_text;
use super::trace::{Index, Trace, VertexState};
use super::{Display, write_out};
use crate::format::csv;
use crate::format::time::Instant;

/// Least lines of a running step's output.
const LEAST_LOG_LINES: usize = 6;
/// Columns left free beside a step's output.
const LOG_MARGIN: usize = 10;

/// Colours and sizes.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// Escape of completed steps' colour; empty: none.
    pub run: String,
    /// Escape of cancelled steps' colour.
    pub cancel: String,
    /// Escape of failed steps' colour.
    pub error: String,
    /// Lines of a running step's output, where there is room.
    pub log_lines: usize,
}

impl Look {
    /// Reads `NO_COLOR`, `BUILDKIT_COLORS` and `BUILDKIT_TTY_LOG_LINES`.
    pub fn from_env() -> Self {
        let var = |name| std::env::var(name).ok();
        let log_lines = var("BUILDKIT_TTY_LOG_LINES")
            .and_then(|lines| lines.parse().ok())
            .filter(|lines| *lines > 0);
        let mut look = Self {
            log_lines: log_lines.unwrap_or(LEAST_LOG_LINES),
            ..Self::default()
        };
        if var("NO_COLOR").is_some_and(|value| !value.is_empty()) {
            return look;
        }
        look.run = named_color("blue").unwrap_or_default();
        look.cancel = named_color("yellow").unwrap_or_default();
        look.error = named_color("red").unwrap_or_default();
        for entry in var("BUILDKIT_COLORS").iter().flat_map(|colors| colors.split(':')) {
            look.set(entry);
        }
        look
    }

    /// Takes in one `part=color` of `BUILDKIT_COLORS`; what cannot be read changes nothing.
    fn set(&mut self, entry: &str) {
        let Some((part, color)) = entry.split_once('=') else {
            return;
        };
        let Some(escape) = named_color(&color.to_lowercase()).or_else(|| rgb_color(color)) else {
            return;
        };
        match part.to_lowercase().as_str() {
            "run" => self.run = escape,
            "cancel" => self.cancel = escape,
            "error" => self.error = escape,
            _ => {}
        }
    }
}

fn named_color(name: &str) -> Option<String> {
    let (name, bright) = match name.strip_prefix("light-") {
        Some(name) => (name, 60),
        None => (name, 0),
    };
    let names = [
        "black", "red", "green", "yellow", "blue", "magenta", "cyan", "white",
    ];
    if name == "default" {
        return Some("\u{1b}[39m".to_owned());
    }
    let code = names.iter().position(|known| *known == name)? + 30 + bright;
    Some(format!("\u{1b}[{code}m"))
}

fn rgb_color(text: &str) -> Option<String> {
    let fields = csv::fields(text.trim_matches('"')).ok()?;
    let [red, green, blue] = fields.as_slice() else {
        return None;
    };
    let level = |text: &str| text.parse::<u8>().ok();
    Some(format!(
        "\u{1b}[38;2;{};{};{}m",
        level(red)?,
        level(green)?,
        level(blue)?
    ))
}

/// Draws progress in place.
#[derive(Debug)]
pub struct TtyDisplay<W> {
    out: W,
    look: Look,
    trace: Trace,
    lines: usize,
    drawn: bool,
}

/// One line of the drawing.
#[derive(Debug)]
struct Row {
    intervals: Vec<Interval>,
    name: String,
    amount: String,
    verdict: Verdict,
    vertex: Option<Index>,
    log_lines: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Running,
    Done,
    Canceled,
    Failed,
}

impl<W: Write + AsFd> TtyDisplay<W> {
    /// Makes a display on `out`, which is a terminal.
    pub fn new(out: W, look: Look) -> Self {
        let mut display = Self {
            out,
            look,
            trace: Trace::default(),
            lines: 0,
            drawn: false,
        };
        display.trace.screen_width = Some(display.size().0.saturating_sub(LOG_MARGIN).max(1));
        display
    }

    fn size(&self) -> (usize, usize) {
        match rustix::termios::tcgetwinsize(self.out.as_fd()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
                (usize::from(size.ws_col), usize::from(size.ws_row))
            }
            _ => (80, 10),
        }
    }

    fn draw(&mut self, last: bool) -> io::Result<()> {
        let (width, height) = self.size();
        let frame = draw_frame(&self.trace, &self.look, width, height, last, Instant::now());
        let mut text = String::new();
        let up = if self.drawn { self.lines + 1 } else { 0 };
        if up > 0 {
            let _ = write!(text, "\u{1b}[{up}A");
        }
        text.push_str("\r\u{1b}[?25l");
        let lines = frame.lines().count().saturating_sub(1);
        text.push_str(&frame);
        let leftover = self.lines.saturating_sub(lines);
        for _ in 0..leftover {
            text.push_str("\u{1b}[2K\n");
        }
        if leftover > 0 {
            let _ = write!(text, "\u{1b}[{leftover}A\r");
        }
        text.push_str("\u{1b}[?25h");
        self.lines = lines;
        self.drawn = true;
        write_out(&mut self.out, &text)
    }
}

impl<W: Write + AsFd + Send> Display for TtyDisplay<W> {
    fn update(&mut self, status: Status) -> io::Result<()> {
        self.trace.screen_width = Some(self.size().0.saturating_sub(LOG_MARGIN).max(1));
        self.trace.update(status, Instant::now());
        Ok(())
    }

    fn refresh(&mut self) -> io::Result<()> {
        self.draw(false)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.draw(true)?;
        let text = error_logs(&self.trace);
        self.out.write_all(&text)?;
        self.out.flush()
    }
}

/// Formats the whole output of every step that failed.
fn error_logs(trace: &Trace) -> Vec<u8> {
    let mut out = Vec::new();
    for index in &trace.shown {
        let state = trace.state(*index);
        if state.vertex.error.is_empty() || state.is_canceled() {
            continue;
        }
        out.extend_from_slice(format!("------\n > {}:\n", state.vertex.name).as_bytes());
        for log in &state.logs {
            out.extend_from_slice(log);
            out.push(b'\n');
        }
        out.extend_from_slice(b"------\n");
    }
    out
}

fn rows_of(state: &VertexState, index: Index, ahead_ns: i64) -> Vec<Row> {
    let shift = |at: Instant| Instant {
        unix_ns: at.unix_ns.saturating_add(ahead_ns),
    };
    let shift_span = |span: &Interval| Interval {
        start: shift(span.start),
        stop: span.stop.map(shift),
    };
    let intervals: Vec<Interval> = state.intervals.iter().map(shift_span).collect();
    let mut name = state.vertex.name.replace('\t', " ");
    let mut verdict = if state.ended().is_some() {
        Verdict::Done
    } else {
        Verdict::Running
    };
    if state.is_canceled() {
        verdict = Verdict::Canceled;
        name = format!("CANCELED {name}");
    } else if !state.vertex.error.is_empty() {
        verdict = Verdict::Failed;
        name = format!("ERROR {name}");
    }
    if state.vertex.cached {
        name = format!("CACHED {name}");
    }
    let row = |intervals, name, amount, verdict, vertex| Row {
        intervals,
        name,
        amount,
        verdict,
        vertex,
        log_lines: 0,
    };
    let mut rows = vec![row(intervals.clone(), name, String::new(), verdict, Some(index))];
    for bar in &state.statuses {
        let status = &bar.status;
        let Some(start) = status.started else { continue };
        let span = Interval {
            start: shift(start),
            stop: status.completed.map(shift),
        };
        let verdict = if span.stop.is_some() {
            Verdict::Done
        } else {
            Verdict::Running
        };
        rows.push(row(
            vec![span],
            format!("=> {}", status.id),
            amount_text(status),
            verdict,
            None,
        ));
    }
    let last: Vec<Interval> = intervals.last().copied().into_iter().collect();
    for warning in &state.warnings {
        rows.push(row(
            last.clone(),
            format!("WARN: {}", warning.short),
            String::new(),
            Verdict::Canceled,
            None,
        ));
    }
    rows
}

/// Draws everything: a heading and the rows that fit; all rows when it is the last time.
fn draw_frame(trace: &Trace, look: &Look, width: usize, height: usize, last: bool, now: Instant) -> String {
    let ahead_ns = trace.clock_ahead_ns.unwrap_or(0);
    let lines = trace.states().filter(|(_, state)| !state.hidden);
    let (total, completed) = lines.fold((0, 0), |(total, completed), (_, state)| {
        (total + 1, completed + usize::from(state.ended().is_some()))
    });
    let started = trace.started.map_or(now, |at| Instant {
        unix_ns: at.unix_ns.saturating_add(ahead_ns),
    });
    let finished = if last && completed > 0 && completed == total {
        "FINISHED"
    } else {
        ""
    };
    let heading = format!(
        "[+] Building {:.1}s ({completed}/{total}) {finished}",
        now.seconds_since(started)
    );
    let mut rows: Vec<Row> = trace
        .shown
        .iter()
        .flat_map(|index| rows_of(trace.state(*index), *index, ahead_ns))
        .collect();
    if !last {
        let used = give_log_lines(&mut rows, trace, look, height);
        rows = fit(rows, height.saturating_sub(2 + used));
    }
    let mut out = pad(&cut(&heading, width), width);
    out.push('\n');
    for row in &rows {
        draw_row(row, trace, look, width, now, &mut out);
    }
    out
}

/// Gives running steps with output room for their last lines, the busiest first; returns how many lines that takes.
fn give_log_lines(rows: &mut [Row], trace: &Trace, look: &Look, height: usize) -> usize {
    let room = height.saturating_sub(LEAST_LOG_LINES + 1);
    let lines = look.log_lines.min(room).max(LEAST_LOG_LINES);
    let running = rows.iter().filter(|row| row.verdict == Verdict::Running).count();
    let mut free = height.saturating_sub(2 + running);
    let written = |row: &Row| {
        let state = row.vertex.map(|index| trace.state(index))?;
        state
            .screen
            .as_ref()
            .map(|screen| screen.written)
            .filter(|written| *written > 0)
    };
    let mut candidates: Vec<usize> = (0..rows.len())
        .filter(|at| rows[*at].verdict == Verdict::Running && written(&rows[*at]).is_some())
        .collect();
    candidates.sort_by_key(|at| std::cmp::Reverse(written(&rows[*at])));
    let mut used = 0;
    for at in candidates {
        if free <= lines + 3 {
            break;
        }
        let screen = rows[at]
            .vertex
            .and_then(|index| trace.state(index).screen.as_ref());
        rows[at].log_lines = lines;
        used += screen.map_or(0, |screen| screen.tail(lines).len());
        free -= lines + 3;
    }
    used
}

/// Keeps the last rows, and running ones before completed ones.
fn fit(mut rows: Vec<Row>, limit: usize) -> Vec<Row> {
    let mut surplus = rows.len().saturating_sub(limit);
    rows.retain(|row| {
        let drop = surplus > 0 && row.verdict != Verdict::Running;
        surplus -= usize::from(drop);
        !drop
    });
    let surplus = rows.len().saturating_sub(limit);
    rows.split_off(surplus)
}

fn draw_row(row: &Row, trace: &Trace, look: &Look, width: usize, now: Instant, out: &mut String) {
    let seconds = interval::total_seconds(&interval::merge(row.intervals.clone()), now);
    let timer = format!(" {:.1}s", if seconds < 0.05 { 0.0 } else { seconds });
    let prefix = " => ";
    let mut left = width.saturating_sub(prefix.len() + timer.len() + 2);
    let show_amount = !row.amount.is_empty() && left + row.amount.len() > 20;
    if show_amount {
        left = left.saturating_sub(row.amount.len() + 1);
    }
    if left < 12 {
        return;
    }
    let mut text = format!("{prefix}{}", cut(&row.name, left));
    if show_amount {
        let _ = write!(text, " {}", row.amount);
    }
    let text = format!("{}{timer}", pad(&text, width.saturating_sub(timer.len() + 1)));
    let color = match row.verdict {
        Verdict::Running => "",
        Verdict::Done => &look.run,
        Verdict::Canceled => &look.cancel,
        Verdict::Failed => &look.error,
    };
    if color.is_empty() {
        let _ = writeln!(out, "{text} ");
    } else {
        let _ = writeln!(out, "{color}{text} \u{1b}[0m");
    }
    let screen = row.vertex.and_then(|index| trace.state(index).screen.as_ref());
    if let Some(screen) = screen
        && row.log_lines > 0
    {
        for line in screen.tail(row.log_lines) {
            let line = pad(&cut(&format!(" => => # {line}"), width), width);
            let _ = writeln!(out, "\u{1b}[2m{line}\u{1b}[0m");
        }
    }
}

fn cut(text: &str, width: usize) -> String {
    text.chars().take(width).collect()
}

fn pad(text: &str, width: usize) -> String {
    format!("{text:width$}")
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

    fn vertex(digest: &str, completed: Option<i64>) -> Vertex {
        Vertex {
            digest: digest.to_owned(),
            name: format!("RUN {digest}"),
            started: Some(at(10)),
            completed: completed.map(at),
            ..Vertex::default()
        }
    }

    fn trace_of(vertexes: Vec<Vertex>, logs: Vec<VertexLog>) -> Trace {
        let mut trace = Trace::default();
        trace.screen_width = Some(30);
        trace.update(
            Status {
                vertexes,
                logs,
                ..Status::default()
            },
            at(10),
        );
        trace
    }

    #[test]
    fn draws_a_heading_and_a_row_a_vertex() {
        let trace = trace_of(vec![vertex("a", Some(12)), vertex("b", None)], Vec::new());
        let frame = draw_frame(&trace, &Look::default(), 40, 20, false, at(13));
        let lines: Vec<&str> = frame.lines().collect();
        assert_eq!(lines[0].trim_end(), "[+] Building 3.0s (1/2)");
        assert_eq!(lines[1], " => RUN a                          2.0s ");
        assert_eq!(lines[2], " => RUN b                          3.0s ");
        let frame = draw_frame(
            &trace_of(vec![vertex("a", Some(12))], Vec::new()),
            &Look::default(),
            40,
            20,
            true,
            at(13),
        );
        assert!(frame.starts_with("[+] Building 3.0s (1/1) FINISHED"));
    }

    #[test]
    fn shows_the_last_lines_of_a_running_step() {
        let log = |data: &str| VertexLog {
            vertex: "a".to_owned(),
            stream: 1,
            data: data.as_bytes().to_vec(),
            timestamp: at(11),
        };
        let trace = trace_of(vec![vertex("a", None)], vec![log("one\ntwo\n")]);
        let frame = draw_frame(
            &trace,
            &Look {
                log_lines: 6,
                ..Look::default()
            },
            40,
            30,
            false,
            at(13),
        );
        assert!(
            frame.contains(" => => # one") && frame.contains(" => => # two"),
            "{frame}"
        );
        let frame = draw_frame(&trace, &Look::default(), 40, 8, false, at(13));
        assert!(!frame.contains("# one"), "{frame}");
    }

    #[test]
    fn running_rows_outlive_completed_ones() {
        let vertexes = (0..20)
            .map(|n| vertex(&format!("v{n}"), (n != 3).then_some(12)))
            .collect();
        let frame = draw_frame(
            &trace_of(vertexes, Vec::new()),
            &Look::default(),
            40,
            8,
            false,
            at(13),
        );
        assert_eq!(frame.lines().count(), 7);
        assert!(
            frame.contains("RUN v3 ") && frame.contains("RUN v19") && !frame.contains("RUN v0 "),
            "{frame}"
        );
    }

    #[test]
    fn reads_colors() {
        let mut look = Look::default();
        look.set("run=green");
        look.set("error=1,2,3");
        look.set("cancel=nonsense");
        assert_eq!(look.run, "\u{1b}[32m");
        assert_eq!(look.error, "\u{1b}[38;2;1;2;3m");
        assert_eq!(look.cancel, "");
    }
}

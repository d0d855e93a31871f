//! Showing the lines of a source file that an error points to.

use std::fmt::Write as _;

use crate::pb::errdefs::Source;

const RULE: &str = "--------------------";

/// Renders the lines with some context, as BuildKit's clients do; `None` where the source points nowhere.
pub fn render_source(source: &Source) -> Option<String> {
    let info = source.info.as_ref()?;
    let text = String::from_utf8_lossy(&info.data);
    let lines: Vec<&str> = text.split('\n').collect();
    let ranges: Vec<(usize, usize)> = source.ranges.iter().map(line_range).collect::<Option<_>>()?;
    let first = ranges.iter().map(|range| range.0).min()?;
    let last = ranges.iter().map(|range| range.1).max()?;
    if first < 1 || first > lines.len() {
        return None;
    }
    let (mut start, mut end) = (first, last.min(lines.len()));
    let padding = if start == end { 4 } else { 2 };
    let mut padded = 0;
    while padded < padding {
        if start > 1 {
            start -= 1;
            padded += 1;
        }
        if end != lines.len() {
            end += 1;
            padded += 1;
        }
        padded += 1;
    }
    let mut out = format!("{}:{first}\n{RULE}\n", info.filename);
    for (at, line) in lines.iter().enumerate().take(end).skip(start - 1) {
        let number = at + 1;
        let marked = ranges.iter().any(|range| (range.0..=range.1).contains(&number));
        let _ = writeln!(out, " {number:3} | {} {line}", if marked { ">>>" } else { "   " });
    }
    out.push_str(RULE);
    out.push('\n');
    Some(out)
}

/// Returns the first and the last line; an end before the start counts as the start.
fn line_range(range: &llb::pb::Range) -> Option<(usize, usize)> {
    let line = |position: &Option<llb::pb::Position>| {
        usize::try_from(position.as_ref().map_or(0, |position| position.line)).ok()
    };
    let (start, end) = (line(&range.start)?, line(&range.end)?);
    Some((start, end.max(start)))
}

//! Some lines of a file, those that matter marked.

use std::borrow::Cow;

use llb::pb::SourceInfo;

use crate::position::Range;

/// A file, split into lines.
pub(crate) struct Printer<'a> {
    filename: &'a str,
    lines: Vec<Cow<'a, str>>,
}

impl<'a> Printer<'a> {
    pub(crate) fn new(source: &'a SourceInfo) -> Self {
        let lines = source.data.split(|byte| *byte == b'\n');
        Self {
            filename: &source.filename,
            lines: lines.map(String::from_utf8_lossy).collect(),
        }
    }

    /// Prints the lines of `ranges` with some around them; nothing if they are not in the file.
    pub(crate) fn print(&self, ranges: &[Range]) -> String {
        let count = u32::try_from(self.lines.len()).unwrap_or(u32::MAX);
        let last_of = |range: &Range| range.end.line.max(range.start.line);
        let first = ranges.iter().map(|range| range.start.line).min();
        let (Some(first), Some(last)) = (first, ranges.iter().map(last_of).max()) else {
            return String::new();
        };
        if first < 1 || first > count {
            return String::new();
        }
        let (mut start, mut end) = (first, last.min(count));
        let padding = if start == end { 4 } else { 2 };
        let mut padded = 0;
        while padded < padding {
            if start > 1 {
                start -= 1;
                padded += 1;
            }
            if end != count {
                end += 1;
                padded += 1;
            }
            padded += 1;
        }
        let rule = "--------------------\n";
        let mut out = format!("{}:{first}\n{rule}", self.filename);
        for (number, line) in (start..=end).zip(
            self.lines
                .iter()
                .skip(usize::try_from(start - 1).unwrap_or(usize::MAX)),
        ) {
            let marked = ranges
                .iter()
                .any(|range| (range.start.line..=last_of(range)).contains(&number));
            let mark = if marked { ">>>" } else { "   " };
            out.push_str(&format!(" {number:3} | {mark} {line}\n"));
        }
        out.push_str(rule);
        out
    }
}

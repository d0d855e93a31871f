//! Physical lines.

use super::MAX_LINE;

/// Hands out lines with their ends, and counts them.
pub(super) struct Lines<'a> {
    rest: &'a str,
    count: u32,
    too_long: bool,
}

impl<'a> Lines<'a> {
    pub(super) const fn new(text: &'a str) -> Self {
        Self {
            rest: text,
            count: 0,
            too_long: false,
        }
    }

    /// Returns the next line; nothing at the end and nothing from the first overlong line on.
    pub(super) fn next(&mut self) -> Option<&'a str> {
        if self.too_long || self.rest.is_empty() {
            return None;
        }
        let (length, limit) = match self.rest.find('\n') {
            Some(at) => (at + 1, MAX_LINE),
            None => (self.rest.len(), MAX_LINE - 1),
        };
        if length > limit {
            self.too_long = true;
            return None;
        }
        let (line, rest) = self.rest.split_at(length);
        self.rest = rest;
        self.count = self.count.saturating_add(1);
        Some(line)
    }

    /// Number of lines handed out.
    pub(super) const fn count(&self) -> u32 {
        self.count
    }

    pub(super) const fn too_long(&self) -> bool {
        self.too_long
    }
}

pub(super) fn trim_newline(line: &str) -> &str {
    line.trim_end_matches(['\r', '\n'])
}

pub(super) fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with('#')
}

/// Cuts the escape character off that continues a line; tells whether the line ends here.
///
/// An escape character in front of it takes its meaning away.
pub(super) fn trim_continuation(line: &str, escape: char) -> (&str, bool) {
    let trimmed = line.trim_end_matches([' ', '\t']);
    match trimmed.strip_suffix(escape) {
        Some(part) if !part.ends_with(escape) => (part, false),
        _ => (line, true),
    }
}

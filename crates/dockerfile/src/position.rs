//! Places in a Dockerfile.

use serde::{Deserialize, Serialize};

/// A point: lines count from 1, characters from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Line.
    pub line: u32,
    /// Character; this frontend only knows whole lines and always says 0.
    pub character: u32,
}

/// From one point to another, both included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Range {
    /// First point.
    pub start: Position,
    /// Last point.
    pub end: Position,
}

impl Range {
    /// Makes the range of one whole line.
    pub const fn line(line: u32) -> Self {
        let at = Position { line, character: 0 };
        Self { start: at, end: at }
    }
}

/// How many lines are listed one by one. Every argument, finding and vertex of an instruction has the list.
const MAX_LISTED: u32 = 100;

/// Lists lines one by one, from `start` to `end`, or as one range if they are many; just `start` if `end` is not
/// behind it.
pub(crate) fn line_ranges(start: u32, end: u32) -> Vec<Range> {
    if end.saturating_sub(start) >= MAX_LISTED {
        return vec![Range {
            start: Range::line(start).start,
            end: Range::line(end).end,
        }];
    }
    (start..=end.max(start)).map(Range::line).collect()
}

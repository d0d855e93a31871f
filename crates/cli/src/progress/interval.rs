//! Spans of time in which a vertex ran; a vertex shared by builds runs several times, or at once.

use crate::format::time::Instant;

/// A span that may still be open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// Its start.
    pub start: Instant,
    /// Its end; `None`: not yet.
    pub stop: Option<Instant>,
}

impl Interval {
    /// Length in seconds; of an open span, until `now`.
    pub fn seconds(self, now: Instant) -> f64 {
        self.stop.unwrap_or(now).seconds_since(self.start)
    }
}

/// Joins spans that overlap or touch. An open span takes in everything after its start.
pub fn merge(mut intervals: Vec<Interval>) -> Vec<Interval> {
    intervals.sort_by_key(|interval| interval.start);
    let mut merged: Vec<Interval> = Vec::new();
    for next in intervals {
        match merged.last_mut() {
            Some(last) if last.stop.is_none_or(|stop| stop >= next.start) => {
                last.stop = last.stop.and_then(|stop| next.stop.map(|next| stop.max(next)));
            }
            _ => merged.push(next),
        }
    }
    merged
}

/// Sums the lengths in seconds.
pub fn total_seconds(intervals: &[Interval], now: Instant) -> f64 {
    intervals.iter().map(|interval| interval.seconds(now)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: i64, stop: i64) -> Interval {
        let at = |unix_ns| Instant { unix_ns };
        Interval {
            start: at(start),
            stop: (stop >= 0).then(|| at(stop)),
        }
    }

    #[test]
    fn joins_what_overlaps() {
        assert_eq!(merge(vec![]), []);
        assert_eq!(merge(vec![span(2, 4), span(2, 4)]), [span(2, 4)]);
        assert_eq!(
            merge(vec![span(7, 8), span(0, 1), span(2, 3)]),
            [span(0, 1), span(2, 3), span(7, 8)]
        );
        assert_eq!(merge(vec![span(0, 10), span(1, 2), span(9, 10)]), [span(0, 10)]);
        assert_eq!(
            merge(vec![span(0, 2), span(2, 4), span(8, 10)]),
            [span(0, 4), span(8, 10)]
        );
        assert_eq!(merge(vec![span(1, -1), span(3, 5)]), [span(1, -1)]);
        assert_eq!(
            merge(vec![span(30, 31), span(32, 35), span(33, -1)]),
            [span(30, 31), span(32, -1)]
        );
    }

    #[test]
    fn sums_open_spans_until_now() {
        let now = Instant {
            unix_ns: 5_000_000_000,
        };
        assert!((total_seconds(&[span(0, 1_000_000_000), span(4_000_000_000, -1)], now) - 2.0).abs() < 1e-9);
    }
}

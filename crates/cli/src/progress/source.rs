//! Prints the lines of a Dockerfile around the place that an error or a warning points at.

use std::fmt::Write as _;

use llb::pb;

/// Formats the place: the file with its line, and the lines around it with a mark at those meant. `None` when nothing
/// in the text is pointed at.
pub fn excerpt(info: &pb::SourceInfo, ranges: &[pb::Range]) -> Option<String> {
    let text = String::from_utf8_lossy(&info.data);
    let lines: Vec<&str> = text.split('\n').collect();
    let spans: Vec<(usize, usize)> = ranges.iter().filter_map(span).collect();
    let first = spans.iter().map(|span| span.0).min()?;
    let last = spans.iter().map(|span| span.1).max()?;
    if first < 1 || first > lines.len() {
        return None;
    }
    let (start, end) = widen(first, last.min(lines.len()), lines.len());
    let mut out = format!("{}:{first}\n--------------------\n", info.filename);
    for (index, line) in lines.iter().enumerate().take(end).skip(start - 1) {
        let number = index + 1;
        let marked = spans.iter().any(|(from, to)| (*from..=*to).contains(&number));
        let mark = if marked { ">>>" } else { "   " };
        let _ = writeln!(out, " {number:3} | {mark} {line}");
    }
    out.push_str("--------------------\n");
    Some(out)
}

/// Adds lines before and after in turn: four in all around one line, two around several.
fn widen(mut start: usize, mut end: usize, len: usize) -> (usize, usize) {
    let wanted = if start == end { 4 } else { 2 };
    let mut added = 0;
    while added < wanted {
        if start > 1 {
            start -= 1;
            added += 1;
        }
        if end != len {
            end += 1;
            added += 1;
        }
        added += 1;
    }
    (start, end)
}

fn span(range: &pb::Range) -> Option<(usize, usize)> {
    let start = range.start.as_ref().map_or(0, |position| position.line);
    let end = range.end.as_ref().map_or(0, |position| position.line).max(start);
    Some((usize::try_from(start).ok()?, usize::try_from(end).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn excerpt_of(text: &str, from: i32, to: i32) -> Option<String> {
        let position = |line| Some(pb::Position { line, character: 0 });
        let info = pb::SourceInfo {
            filename: "Dockerfile".into(),
            data: text.as_bytes().to_vec().into(),
            ..Default::default()
        };
        excerpt(
            &info,
            &[pb::Range {
                start: position(from),
                end: position(to),
            }],
        )
    }

    #[test]
    fn shows_the_lines_around() {
        let text = "FROM a\nRUN b\nRUN c\nRUN d\nRUN e\n";
        assert_eq!(
            excerpt_of(text, 3, 3).unwrap(),
            "Dockerfile:3\n--------------------\n   1 |     FROM a\n   2 |     RUN b\n   3 | >>> RUN c\n   4 |     \
             RUN d\n   5 |     RUN e\n--------------------\n"
        );
    }

    #[test]
    fn points_nowhere_outside_of_the_text() {
        assert_eq!(excerpt_of("FROM a", 0, 0), None);
        assert_eq!(excerpt_of("FROM a", 9, 9), None);
        assert_eq!(excerpt_of("FROM a", -4, -3), None);
        assert!(excerpt_of("FROM a", 1, i32::MAX).unwrap().contains(">>> FROM a"));
    }
}

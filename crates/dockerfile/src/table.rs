//! Text in columns.

/// Lays rows out in columns as wide as their widest cell plus `padding`; the last cell of a row is not padded.
pub(crate) fn table(rows: &[Vec<String>], padding: usize) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (at, cell) in row.iter().take(row.len().saturating_sub(1)).enumerate() {
            let width = cell.chars().count() + padding;
            match widths.get_mut(at) {
                Some(known) => *known = width.max(*known),
                None => widths.push(width),
            }
        }
    }
    let mut out = String::new();
    for row in rows {
        for (at, cell) in row.iter().enumerate() {
            if at + 1 == row.len() {
                out.push_str(cell);
            } else {
                let width = widths.get(at).copied().unwrap_or_default();
                out.push_str(&format!("{cell:width$}"));
            }
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligns() {
        let rows = [
            vec!["A".to_owned(), "B".to_owned()],
            vec!["ccc".to_owned(), "d".to_owned()],
        ];
        assert_eq!(table(&rows, 1), "A   B\nccc d\n");
    }
}

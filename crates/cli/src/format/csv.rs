//! One line of comma separated values (RFC 4180 quoting), as `--output`, `--secret` and cache options are written.

/// Why a line is no list of values. The texts are those of Go's `encoding/csv`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CsvError {
    /// The line is empty.
    #[error("EOF")]
    Empty,
    /// A quote inside a value that does not start with one.
    #[error("parse error on line 1, column {column}: bare \" in non-quoted-field")]
    BareQuote {
        /// Column in bytes, from 1.
        column: usize,
    },
    /// A quoted value that does not end, or goes on after its end.
    #[error("parse error on line 1, column {column}: extraneous or missing \" in quoted-field")]
    Quote {
        /// Column in bytes, from 1.
        column: usize,
    },
}

/// Splits a line at commas; a value in quotes may hold commas, and `""` for a quote.
///
/// # Errors
/// [`CsvError`] for an empty line or a misplaced quote.
pub fn fields(line: &str) -> Result<Vec<String>, CsvError> {
    let line = line
        .strip_suffix('\n')
        .map_or(line, |rest| rest.strip_suffix('\r').unwrap_or(rest));
    if line.is_empty() {
        return Err(CsvError::Empty);
    }
    let mut out = Vec::new();
    let mut rest = line;
    let column = |rest: &str| line.len() - rest.len() + 1;
    loop {
        if let Some(quoted) = rest.strip_prefix('"') {
            let (value, after) = unquote(quoted).map_err(|at| CsvError::Quote { column: column(at) })?;
            out.push(value);
            match after.strip_prefix(',') {
                Some(next) => rest = next,
                None => return Ok(out),
            }
            continue;
        }
        let (value, next) = match rest.split_once(',') {
            Some((value, next)) => (value, Some(next)),
            None => (rest, None),
        };
        if let Some(at) = value.find('"') {
            return Err(CsvError::BareQuote {
                column: column(rest) + at,
            });
        }
        out.push(value.to_owned());
        match next {
            Some(next) => rest = next,
            None => return Ok(out),
        }
    }
}

/// Reads up to the closing quote; returns the value and what follows, or where it went wrong.
fn unquote(mut rest: &str) -> Result<(String, &str), &str> {
    let mut value = String::new();
    loop {
        let Some((piece, after)) = rest.split_once('"') else {
            return Err(rest);
        };
        value.push_str(piece);
        if let Some(more) = after.strip_prefix('"') {
            value.push('"');
            rest = more;
        } else if after.is_empty() || after.starts_with(',') {
            return Ok((value, after));
        } else {
            return Err(after);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_like_a_csv_reader() {
        assert_eq!(fields("type=local,dest=out").unwrap(), ["type=local", "dest=out"]);
        assert_eq!(fields("\"a,b\",c").unwrap(), ["a,b", "c"]);
        assert_eq!(fields("\"a\"\"b\"").unwrap(), ["a\"b"]);
        assert_eq!(fields("a,").unwrap(), ["a", ""]);
        assert_eq!(fields("a,b\n").unwrap(), ["a", "b"]);
    }

    #[test]
    fn names_the_column_of_a_misplaced_quote() {
        assert_eq!(fields(""), Err(CsvError::Empty));
        assert_eq!(fields("ab\"c"), Err(CsvError::BareQuote { column: 3 }));
        assert!(matches!(fields("\"ab"), Err(CsvError::Quote { .. })));
        assert!(matches!(fields("\"ab\"c"), Err(CsvError::Quote { .. })));
    }
}

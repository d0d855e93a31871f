//! One line of comma-separated values, as options and mounts use it.

/// Why a line is refused. The texts are those of Go's CSV reader.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CsvError {
    #[error("EOF")]
    Empty,
    #[error("parse error on line 1, column {0}: bare \" in non-quoted-field")]
    BareQuote(usize),
    #[error("parse error on line 1, column {0}: extraneous or missing \" in quoted-field")]
    Quote(usize),
}

/// Splits a line into its fields.
pub(crate) fn fields(line: &str) -> Result<Vec<String>, CsvError> {
    let line = line
        .strip_suffix('\n')
        .map_or(line, |line| line.strip_suffix('\r').unwrap_or(line));
    if line.is_empty() {
        return Err(CsvError::Empty);
    }
    let mut fields = Vec::new();
    let mut at = 0;
    loop {
        let rest = &line[at..];
        if let Some(quoted) = rest.strip_prefix('"') {
            let (field, length) = quoted_field(quoted, at + 1)?;
            fields.push(field);
            at += 1 + length;
            if at == line.len() {
                return Ok(fields);
            }
            at += 1;
            continue;
        }
        let end = rest.find(',').unwrap_or(rest.len());
        if let Some(quote) = rest[..end].find('"') {
            return Err(CsvError::BareQuote(at + quote + 1));
        }
        fields.push(rest[..end].to_owned());
        at += end;
        if at == line.len() {
            return Ok(fields);
        }
        at += 1;
    }
}

/// Reads what stands behind an opening quote: the field, and how long it is with its closing quote.
fn quoted_field(text: &str, column: usize) -> Result<(String, usize), CsvError> {
    let mut field = String::new();
    let mut at = 0;
    loop {
        let Some(end) = text[at..].find('"') else {
            return Err(CsvError::Quote(column + at + 1));
        };
        field.push_str(&text[at..at + end]);
        at += end + 1;
        match text.as_bytes().get(at) {
            Some(b'"') => {
                field.push('"');
                at += 1;
            }
            None | Some(b',') => return Ok((field, at)),
            Some(_) => return Err(CsvError::Quote(column + at)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_fields() {
        assert_eq!(fields("a,b=c,").unwrap(), ["a", "b=c", ""]);
        assert_eq!(fields("\"a,b\",\"c\"\"d\"\n").unwrap(), ["a,b", "c\"d"]);
        assert_eq!(fields(""), Err(CsvError::Empty));
        assert_eq!(fields("a,b\"c"), Err(CsvError::BareQuote(4)));
        assert_eq!(fields("\"ab"), Err(CsvError::Quote(2)));
        assert_eq!(fields("\"a\"b"), Err(CsvError::Quote(3)));
    }
}

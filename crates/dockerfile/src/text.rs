//! Small facts about text that error messages and history depend on.

use crate::raw;

/// Quotes as Go's `%q` does.
pub(crate) fn quote(text: &str) -> String {
    if !raw::is_in(text) {
        return llb::quote(text);
    }
    let mut out = String::from('"');
    for c in text.chars() {
        match raw::byte_of(c) {
            Some(byte) => out.push_str(&format!("\\x{byte:02x}")),
            None => {
                let quoted = llb::quote(c.encode_utf8(&mut [0; 4]));
                out.push_str(&quoted[1..quoted.len() - 1]);
            }
        }
    }
    out.push('"');
    out
}

/// Quotes each text and puts the list in brackets, as Go's `%q` does with a slice.
pub(crate) fn quote_list(texts: &[String]) -> String {
    let quoted: Vec<String> = texts.iter().map(|text| quote(text)).collect();
    format!("[{}]", quoted.join(" "))
}

/// Tells whether writing a text in lower case leaves it as it is. Bytes that are not UTF-8 do not survive that.
pub(crate) fn is_lower(text: &str) -> bool {
    if text.is_ascii() {
        !text.bytes().any(|byte| byte.is_ascii_uppercase())
    } else {
        !raw::is_in(text) && text == text.to_lowercase()
    }
}

/// Tells whether writing a text in upper case leaves it as it is. Bytes that are not UTF-8 do not survive that.
pub(crate) fn is_upper(text: &str) -> bool {
    if text.is_ascii() {
        !text.bytes().any(|byte| byte.is_ascii_lowercase())
    } else {
        !raw::is_in(text) && text == text.to_uppercase()
    }
}

/// Joins with spaces in brackets, as Go's `%v` does with a slice.
pub(crate) fn list(texts: &[String]) -> String {
    format!("[{}]", texts.join(" "))
}

/// Tells whether a byte, read as a Latin-1 character, is a space to Go.
pub(crate) const fn is_latin1_space(byte: u8) -> bool {
    matches!(byte, b'\t' | b'\n' | 0x0b | 0x0c | b'\r' | b' ' | 0x85 | 0xa0)
}

/// Tells whether a character separates the words of an instruction.
pub(crate) const fn is_separator(c: char) -> bool {
    matches!(c, '\t' | '\u{b}' | '\u{c}' | '\r' | ' ')
}

/// Cuts at the first run of separators; the second part is `None` without one.
pub(crate) fn split_separator(text: &str) -> (&str, Option<&str>) {
    match text.find(is_separator) {
        None => (text, None),
        Some(at) => (&text[..at], Some(text[at..].trim_start_matches(is_separator))),
    }
}

/// Splits at every run of separators; a leading or trailing run makes an empty word, as it does for Go's regexp.
pub(crate) fn split_separators(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = text;
    loop {
        let (word, tail) = split_separator(rest);
        words.push(word.to_owned());
        match tail {
            Some(tail) => rest = tail,
            None => return words,
        }
    }
}

/// Reads a truth value as Go's `strconv.ParseBool` does.
pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Words the error of Go's integer parsing functions.
pub(crate) fn int_error(function: &str, text: &str, out_of_range: bool) -> String {
    let reason = if out_of_range {
        "value out of range"
    } else {
        "invalid syntax"
    };
    format!("strconv.{function}: parsing {}: {reason}", quote(text))
}

/// Reads a decimal number as Go's `strconv.ParseInt(text, 10, 64)` does; the error is Go's text.
pub(crate) fn parse_int(text: &str) -> Result<i64, String> {
    text.parse::<i64>().map_err(|err| {
        let overflow = matches!(
            err.kind(),
            std::num::IntErrorKind::PosOverflow | std::num::IntErrorKind::NegOverflow
        );
        int_error("ParseInt", text, overflow)
    })
}

/// Reads a decimal number as Go's `strconv.ParseUint(text, 10, 64)` does; the error is Go's text.
pub(crate) fn parse_uint(text: &str) -> Result<u64, String> {
    if text.starts_with('+') {
        return Err(int_error("ParseUint", text, false));
    }
    text.parse::<u64>().map_err(|err| {
        int_error(
            "ParseUint",
            text,
            matches!(err.kind(), std::num::IntErrorKind::PosOverflow),
        )
    })
}

/// Upper-cases the first word only.
pub(crate) fn uppercase_first_word(text: &str) -> String {
    match text.split_once(' ') {
        None => text.to_uppercase(),
        Some((word, rest)) => format!("{} {rest}", word.to_uppercase()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_bytes_among_characters() {
        assert_eq!(quote("a\"é"), "\"a\\\"é\"");
        assert_eq!(quote(&raw::decode(b"a\"\\\xff\n")), r#""a\"\\\xff\n""#);
    }

    #[test]
    fn splits_at_runs() {
        assert_eq!(split_separators("a  b\tc"), ["a", "b", "c"]);
        assert_eq!(split_separators("a "), ["a", ""]);
        assert_eq!(split_separator("a\u{b}  b c"), ("a", Some("b c")));
    }

    #[test]
    fn parses_numbers_like_go() {
        assert_eq!(
            parse_int("x").unwrap_err(),
            r#"strconv.ParseInt: parsing "x": invalid syntax"#
        );
        assert_eq!(
            parse_int("99999999999999999999").unwrap_err(),
            r#"strconv.ParseInt: parsing "99999999999999999999": value out of range"#
        );
        assert_eq!(parse_uint("7"), Ok(7));
    }
}

//! What the attributes of all object stores have in common.

use std::collections::BTreeMap;
use std::time::Duration;

use build::error::BuildError;

use super::Variable;

/// The cache's names: the first is read, all are written.
pub(super) fn names(attrs: &BTreeMap<String, String>) -> Vec<String> {
    let given = attrs.get("name").map_or("buildkit", String::as_str);
    given.split(';').map(ToOwned::to_owned).collect()
}

/// An attribute, or else a variable of the environment.
pub(super) fn attr_or_variable(
    attrs: &BTreeMap<String, String>,
    name: &str,
    variable: Variable,
    fallback: &str,
) -> Option<String> {
    attrs.get(name).cloned().or_else(|| variable(fallback))
}

/// Keys are sent as paths of URLs, where such segments mean other places.
pub(super) fn check_key(kind: &str, key: &str) -> Result<(), BuildError> {
    if key.split('/').any(|segment| matches!(segment, "." | "..")) {
        return Err(BuildError::user(format!(
            "invalid object name {key:?} for {kind} cache: it must not contain \".\" or \"..\" as a part"
        )));
    }
    Ok(())
}

/// Reads a duration as Go writes it: `24h`, `1m30s`, `1.5h`, `0`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let end = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number * unit).ok()?)?;
        rest = &rest[end..];
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read() {
        for (text, seconds) in [
            ("24h", 86_400.0),
            ("1m30s", 90.0),
            ("1.5h", 5400.0),
            ("0", 0.0),
            ("500ms", 0.5),
        ] {
            assert_eq!(duration(text), Some(Duration::from_secs_f64(seconds)), "{text}");
        }
        for text in ["", "24", "h", "-1h", "1d", "1h1", "..s"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn names_are_listed() {
        let attrs = |name: &str| BTreeMap::from([("name".to_owned(), name.to_owned())]);
        assert_eq!(names(&BTreeMap::new()), ["buildkit"]);
        assert_eq!(names(&attrs("a;b")), ["a", "b"]);
        assert!(check_key("s3", "a/../b").is_err() && check_key("s3", "a..b/c").is_ok());
    }
}

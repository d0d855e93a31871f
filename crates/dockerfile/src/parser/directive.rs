//! Parser directives: `# syntax=`, `# escape=` and `# check=` at the very top.

use std::collections::BTreeSet;

use super::{MAX_LINE, SyntaxError};
use crate::position::Range;

/// A directive and its line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Directive {
    /// `syntax`, `escape` or `check`.
    pub(crate) name: String,
    pub(crate) value: String,
    pub(crate) ranges: Vec<Range>,
}

/// Reads directives line by line, until the first line that is none.
pub(super) struct DirectiveReader {
    comment: &'static str,
    line: u32,
    seen: BTreeSet<String>,
    done: bool,
}

impl DirectiveReader {
    pub(super) const fn new(comment: &'static str, line: u32) -> Self {
        Self {
            comment,
            line,
            seen: BTreeSet::new(),
            done: false,
        }
    }

    pub(super) fn line(&mut self, line: &str) -> Result<Option<Directive>, SyntaxError> {
        self.line = self.line.saturating_add(1);
        if self.done {
            return Ok(None);
        }
        let found = line
            .strip_prefix(self.comment)
            .and_then(|rest| split(rest.trim_start()));
        let Some((name, value)) = found else {
            self.done = true;
            return Ok(None);
        };
        if !self.seen.insert(name.clone()) {
            return Err(SyntaxError::RepeatedDirective(name));
        }
        Ok(Some(Directive {
            name,
            value: value.to_owned(),
            ranges: vec![Range::line(self.line)],
        }))
    }
}

/// Splits `name = value`; nothing if it is none or the name is unknown.
fn split(text: &str) -> Option<(String, &str)> {
    let is_space = |c: char| matches!(c, '\t' | '\n' | '\u{c}' | '\r' | ' ');
    let (name, value) = text.split_once('=')?;
    let name = name.trim_end_matches(is_space);
    let value = value.trim_matches(is_space);
    if value.is_empty() || value.contains('\n') {
        return None;
    }
    let name = name.to_ascii_lowercase();
    ["syntax", "escape", "check"]
        .contains(&name.as_str())
        .then_some((name, value))
}

/// Finds `# check=` in a comment line without its `#`.
pub(crate) fn check_directive(comment: &str) -> Option<String> {
    let found = DirectiveReader::new("", 0).line(comment).ok()??;
    (found.name == "check").then(|| first_word(&found.value).to_owned())
}

fn first_word(value: &str) -> &str {
    value.split(' ').next().unwrap_or_default()
}

/// Finds a directive by name; the value is cut at its first space.
pub(crate) fn directive(name: &str, text: &str) -> Option<Directive> {
    let (text, line) = without_shebang(text);
    let mut found = search(name, text, "#", line)?;
    found.value = first_word(&found.value).to_owned();
    Some(found)
}

/// Finds which frontend a file asks for: its image, the whole value and where it stands.
///
/// Besides `# syntax=` there are `// syntax=` and a JSON object with the key `syntax`.
pub(crate) fn detect_syntax(text: &str) -> Option<(String, Directive)> {
    let (text, line) = without_shebang(text);
    let found = search("syntax", text, "#", line)
        .or_else(|| search("syntax", text, "//", line))
        .or_else(|| {
            if !text.trim_start().starts_with('{') {
                return None;
            }
            let value: serde_json::Value = serde_json::from_str(text).ok()?;
            let value = value.get("syntax")?.as_str()?.to_owned();
            Some(Directive {
                name: "syntax".into(),
                value,
                ranges: vec![Range::line(line)],
            })
        })?;
    let image = if text.trim_start().starts_with('{') {
        &found.value
    } else {
        first_word(&found.value)
    };
    Some((image.to_owned(), found))
}

fn without_shebang(text: &str) -> (&str, u32) {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.starts_with("#!") {
        (text.split_once('\n').map_or("", |(_, rest)| rest), 1)
    } else {
        (text, 0)
    }
}

fn search(name: &str, text: &str, comment: &'static str, line: u32) -> Option<Directive> {
    let mut reader = DirectiveReader::new(comment, line);
    for line in text.split('\n') {
        if line.len() >= MAX_LINE {
            return None;
        }
        match reader.line(line.strip_suffix('\r').unwrap_or(line)) {
            Ok(Some(found)) if found.name == name => return Some(found),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detects_every_form_of_syntax() {
        let (image, found) = detect_syntax("#!/bin/x\n#syntax = docker/dockerfile:1 more\nFROM x").unwrap();
        assert_eq!(
            (image.as_str(), found.value.as_str()),
            ("docker/dockerfile:1", "docker/dockerfile:1 more")
        );
        assert_eq!(found.ranges, [Range::line(2)]);
        assert_eq!(detect_syntax("// syntax=a").unwrap().0, "a");
        assert_eq!(detect_syntax("{ \"syntax\": \"a b\" }").unwrap().0, "a b");
        assert_eq!(detect_syntax("# about\n# syntax=a\n"), None);
        assert_eq!(
            directive("check", "# syntax=a\n# check=skip=all x\n")
                .unwrap()
                .value,
            "skip=all"
        );
        assert_eq!(check_directive("check=skip=X"), Some("skip=X".into()));
        assert_eq!(check_directive("checks"), None);
    }
}

//! How each instruction's line is split into arguments.

use super::flags::split_flags;
use super::{Node, SyntaxError, takes_heredocs};
use crate::raw;
use crate::text::{is_latin1_space, split_separator, split_separators};

/// Splits a logical line.
pub(super) fn node(line: &str, escape: char) -> Result<Node, SyntaxError> {
    let (name, flags, rest) = split_command(line, escape);
    let mut node = Node {
        name,
        flags,
        ..Node::default()
    };
    match node.name.to_lowercase().as_str() {
        "add" | "copy" | "volume" => json_or_words(&mut node, &rest)?,
        "expose" | "from" => node.args = words_of(&rest),
        "cmd" | "entrypoint" | "run" | "shell" => json_or_text(&mut node, &rest)?,
        "arg" => node.args = quoted_words(&rest, escape),
        "env" => node.args = name_values(&rest, "ENV", escape)?,
        "label" => node.args = name_values(&rest, "LABEL", escape)?,
        "healthcheck" => healthcheck(&mut node, &rest)?,
        "maintainer" | "stopsignal" | "user" | "workdir" if !rest.is_empty() => node.args.push(rest),
        "onbuild" if !rest.is_empty() => onbuild(&mut node, &rest, escape)?,
        // What an unknown instruction says does not matter.
        _ => {}
    }
    Ok(node)
}

fn split_command(line: &str, escape: char) -> (String, Vec<String>, String) {
    let (name, rest) = split_separator(line.trim());
    let (flags, rest) = rest.map(|rest| split_flags(rest, escape)).unwrap_or_default();
    (name.to_owned(), flags, rest.trim().to_owned())
}

/// ONBUILD: the arguments are the trigger's name and arguments. Triggers of triggers are refused later, so they are not
/// looked into.
fn onbuild(node: &mut Node, rest: &str, escape: char) -> Result<(), SyntaxError> {
    if split_separator(rest).0.eq_ignore_ascii_case("onbuild") {
        node.args.push("ONBUILD".into());
        return Ok(());
    }
    let child = self::node(rest, escape)?;
    node.child_takes_heredocs = takes_heredocs(&child.name) && !child.json;
    node.args.push(child.name);
    node.args.extend(child.args);
    Ok(())
}

fn words_of(rest: &str) -> Vec<String> {
    if rest.is_empty() {
        Vec::new()
    } else {
        split_separators(rest)
    }
}

/// Reads a JSON array of strings; `None` if it is not JSON.
fn json_array(rest: &str) -> Result<Option<Vec<String>>, SyntaxError> {
    if !rest.trim_start().starts_with('[') {
        return Ok(None);
    }
    let rest = raw::shown(rest.trim_start().to_owned());
    let rest = rest.as_str();
    let parse = |text: &str| serde_json::from_str::<Vec<serde_json::Value>>(text);
    let Ok(values) = parse(rest).or_else(|_| parse(&without_lone_surrogates(rest))) else {
        return Ok(None);
    };
    let strings = values.into_iter().map(|value| match value {
        serde_json::Value::String(text) => Ok(text),
        _ => Err(SyntaxError::JsonNotStrings),
    });
    strings.collect::<Result<_, _>>().map(Some)
}

/// Replaces escapes of halves of UTF-16 pairs that stand alone by that of the replacement character, as Go reads them.
fn without_lone_surrogates(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let pair = (utf16_escape(escape), escape.get(6..).and_then(utf16_escape));
        let (len, replaced) = match pair {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => (12, None),
            (Some(0xd800..=0xdfff), _) => (6, Some("\\ufffd")),
            (Some(_), _) => (6, None),
            // The character behind the backslash may be a backslash.
            (None, _) => (1 + escape[1..].chars().next().map_or(0, char::len_utf8), None),
        };
        let (escape, behind) = escape.split_at(len);
        out.push_str(replaced.unwrap_or(escape));
        rest = behind;
    }
    out.push_str(rest);
    out
}

/// Reads `\u` and its four digits at the start of a text.
fn utf16_escape(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..4)?;
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u16::from_str_radix(digits, 16).ok()
}

fn json_or_text(node: &mut Node, rest: &str) -> Result<(), SyntaxError> {
    match json_array(rest)? {
        Some(args) => {
            node.args.extend(args);
            node.json = true;
        }
        None if rest.is_empty() => {}
        None => node.args.push(rest.to_owned()),
    }
    Ok(())
}

fn json_or_words(node: &mut Node, rest: &str) -> Result<(), SyntaxError> {
    match json_array(rest)? {
        Some(args) => {
            node.args = args;
            node.json = true;
        }
        None => node.args = words_of(rest),
    }
    Ok(())
}

fn healthcheck(node: &mut Node, rest: &str) -> Result<(), SyntaxError> {
    let bytes = raw::encode(rest);
    let end = bytes
        .iter()
        .position(|byte| is_latin1_space(*byte))
        .unwrap_or(bytes.len());
    if end == 0 {
        return Ok(());
    }
    let next = bytes[end..]
        .iter()
        .position(|byte| !is_latin1_space(*byte))
        .map_or(bytes.len(), |at| end + at);
    node.args.push(raw::decode(&bytes[..end]));
    json_or_text(node, &raw::decode(&bytes[next..]))
}

/// Splits at spaces outside of quotes; quotes and escapes stay.
fn quoted_words(rest: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut keep_empty = false;
    let mut quote = None;
    let mut in_word = false;
    let mut chars = rest.chars().map(raw::replaced);
    while let Some(c) = chars.next() {
        if quote.is_none() && c.is_whitespace() {
            if in_word && (keep_empty || !word.is_empty()) {
                words.push(std::mem::take(&mut word));
            }
            (in_word, keep_empty) = (false, false);
            continue;
        }
        in_word = true;
        match quote {
            None if matches!(c, '\'' | '"') => {
                quote = Some(c);
                keep_empty = true;
            }
            Some(open) if c == open => quote = None,
            _ => {}
        }
        if c == escape && quote != Some('\'') {
            // At the very end it is dropped.
            if let Some(next) = chars.next() {
                word.push(c);
                word.push(next);
            }
            continue;
        }
        word.push(c);
    }
    if in_word && (keep_empty || !word.is_empty()) {
        words.push(word);
    }
    words
}

/// Reads `name=value …` or the old `name value`: three arguments each, the third says whether there was a `=`.
fn name_values(rest: &str, instruction: &'static str, escape: char) -> Result<Vec<String>, SyntaxError> {
    let words = quoted_words(rest, escape);
    let Some(first) = words.first() else {
        return Ok(Vec::new());
    };
    if !first.contains('=') {
        let (name, Some(value)) = split_separator(rest) else {
            return Err(SyntaxError::TwoArguments(instruction));
        };
        return Ok(vec![name.to_owned(), value.to_owned(), String::new()]);
    }
    let mut args = Vec::with_capacity(words.len() * 3);
    for word in words {
        let Some((name, value)) = word.split_once('=') else {
            return Err(SyntaxError::NoEquals(word));
        };
        args.extend([name.to_owned(), value.to_owned(), "=".to_owned()]);
    }
    Ok(args)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Vec<String> {
        node(line, '\\').unwrap().args
    }

    #[test]
    fn splits_each_instruction_its_own_way() {
        assert_eq!(
            args("ENV a=1 b='x y' c=\\ z"),
            ["a", "1", "=", "b", "'x y'", "=", "c", "\\ z", "="]
        );
        assert_eq!(args("ENV a  b c"), ["a", "b c", ""]);
        assert_eq!(args("ARG a b=\"\" c"), ["a", "b=\"\"", "c"]);
        assert_eq!(args("RUN echo  hi"), ["echo  hi"]);
        assert_eq!(args("RUN [\"a\", \"b\"]"), ["a", "b"]);
        assert_eq!(args("RUN [ -f x ]"), ["[ -f x ]"]);
        assert_eq!(args("HEALTHCHECK CMD [\"x\"]"), ["CMD", "x"]);
        assert_eq!(args("ONBUILD COPY a b"), ["COPY", "a", "b"]);
        assert_eq!(args("WORKDIR /a b"), ["/a b"]);
        assert_eq!(node("ENV a", '\\'), Err(SyntaxError::TwoArguments("ENV")));
        assert_eq!(
            node("ENV a=1 b", '\\').unwrap_err().to_string(),
            "Syntax error - can't find = in \"b\". Must be of the form: name=value"
        );
    }
}

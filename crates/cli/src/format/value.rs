//! A value as a Go program holds it: fields have a Go name for templates and a JSON name for `{{json .}}`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::time::{Instant, go_duration};

/// A field of a struct.
#[derive(Clone, Debug)]
pub struct Field {
    /// Name in templates.
    pub name: &'static str,
    /// Name in JSON.
    pub json: &'static str,
    /// Whether JSON leaves it out when it is empty.
    pub omit_empty: bool,
    /// The value.
    pub value: Value,
}

/// A value that is printed, queried by templates or encoded to JSON.
#[derive(Clone, Debug)]
pub enum Value {
    /// Nothing; an absent pointer, list or map.
    Null,
    /// A boolean.
    Bool(bool),
    /// A number.
    Int(i64),
    /// A text.
    Text(String),
    /// Bytes; base64 in JSON.
    Bytes(Vec<u8>),
    /// An instant.
    Time(Instant),
    /// A duration in nanoseconds; a number in JSON.
    Duration(i64),
    /// A list.
    List(Vec<Value>),
    /// A map with text keys, printed in key order.
    Map(BTreeMap<String, Value>),
    /// A struct, printed in field order.
    Struct(Vec<Field>),
}

impl Value {
    /// Makes a text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// Makes a list of texts; an empty one is nothing, as a nil slice is.
    pub fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let list: Vec<Value> = texts.into_iter().map(Self::text).collect();
        if list.is_empty() {
            Self::Null
        } else {
            Self::List(list)
        }
    }

    /// Makes a map of texts; an empty one is nothing, as a nil map is.
    pub fn text_map<'a>(entries: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let map: BTreeMap<String, Value> = entries
            .into_iter()
            .map(|(key, value)| (key.to_owned(), Self::text(value)))
            .collect();
        if map.is_empty() {
            Self::Null
        } else {
            Self::Map(map)
        }
    }

    /// Makes an optional value.
    pub fn option<T>(value: Option<T>, make: impl FnOnce(T) -> Self) -> Self {
        value.map_or(Self::Null, make)
    }

    /// Returns whether the value counts as empty: for `omitempty`, and for `if` in templates.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Null => true,
            Self::Bool(value) => !value,
            Self::Int(value) | Self::Duration(value) => *value == 0,
            Self::Text(text) => text.is_empty(),
            Self::Bytes(bytes) => bytes.is_empty(),
            Self::List(list) => list.is_empty(),
            Self::Map(map) => map.is_empty(),
            Self::Time(_) | Self::Struct(_) => false,
        }
    }

    /// Encodes as Go's `encoding/json` does. `escape_html` writes `<`, `>` and `&` as `\u` escapes.
    pub fn to_json(&self, escape_html: bool) -> String {
        let mut out = String::new();
        self.write_json(escape_html, &mut out);
        out
    }

    fn write_json(&self, escape_html: bool, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Self::Int(value) | Self::Duration(value) => {
                let _ = write!(out, "{value}");
            }
            Self::Text(text) => quote(text, escape_html, out),
            Self::Bytes(bytes) => quote(&base64(bytes), escape_html, out),
            Self::Time(at) => quote(&at.rfc3339_nano(), escape_html, out),
            Self::List(list) => write_all(out, '[', ']', list, |value, out| {
                value.write_json(escape_html, out)
            }),
            Self::Map(map) => write_all(out, '{', '}', map, |(key, value), out| {
                quote(key, escape_html, out);
                out.push(':');
                value.write_json(escape_html, out);
            }),
            Self::Struct(fields) => {
                let shown = fields
                    .iter()
                    .filter(|field| !(field.omit_empty && field.value.is_empty()));
                write_all(out, '{', '}', shown, |field, out| {
                    quote(field.json, escape_html, out);
                    out.push(':');
                    field.value.write_json(escape_html, out);
                });
            }
        }
    }

    /// Prints as Go's `fmt` prints with `%v`.
    pub fn to_plain(&self) -> String {
        let join = |values: Vec<String>| values.join(" ");
        match self {
            Self::Null => "<nil>".to_owned(),
            Self::Bool(value) => value.to_string(),
            Self::Int(value) => value.to_string(),
            Self::Text(text) => text.clone(),
            Self::Bytes(bytes) => format!("[{}]", join(bytes.iter().map(u8::to_string).collect())),
            Self::Time(at) => at.go_string(),
            Self::Duration(ns) => go_duration(*ns),
            Self::List(list) => format!("[{}]", join(list.iter().map(Self::to_plain).collect())),
            Self::Map(map) => {
                format!(
                    "map[{}]",
                    join(
                        map.iter()
                            .map(|(key, value)| format!("{key}:{}", value.to_plain()))
                            .collect()
                    )
                )
            }
            Self::Struct(fields) => {
                format!(
                    "{{{}}}",
                    join(fields.iter().map(|field| field.value.to_plain()).collect())
                )
            }
        }
    }
}

fn write_all<T>(
    out: &mut String,
    open: char,
    close: char,
    items: impl IntoIterator<Item = T>,
    mut write: impl FnMut(T, &mut String),
) {
    out.push(open);
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        write(item, out);
    }
    out.push(close);
}

/// Encodes bytes as standard base64 with padding.
pub fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn quote(text: &str, escape_html: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '<' | '>' | '&' if escape_html => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            '\u{0}'..='\u{1f}' | '\u{2028}' | '\u{2029}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            _ => out.push(c),
        }
    }
    out.push('"');
}

/// Makes a [`Value::Struct`]: `Go name, "json name", value;`, with `?` after the JSON name for `omitempty`.
macro_rules! go_struct {
    ($($name:ident $json:literal $(? $omit:tt)? = $value:expr;)*) => {
        $crate::format::value::Value::Struct(vec![$($crate::format::value::Field {
            name: stringify!($name),
            json: $json,
            omit_empty: go_struct!(@omit $($omit)?),
            value: $value,
        }),*])
    };
    (@omit empty) => { true };
    (@omit) => { false };
}
pub(crate) use go_struct;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_as_go_does() {
        let value = go_struct! {
            ID "id" = Value::text("a<b>\u{1}\n");
            Parents "parents" = Value::Null;
            Cached "cached" ?empty = Value::Bool(false);
            Data "data" = Value::Bytes(b"hi".to_vec());
            At "at" = Value::Time(Instant { unix_ns: 1 });
        };
        assert_eq!(
            value.to_json(true),
            r#"{"id":"a\u003cb\u003e\u0001\n","parents":null,"data":"aGk=","at":"1970-01-01T00:00:00.000000001Z"}"#
        );
        assert!(value.to_json(false).starts_with(r#"{"id":"a<b>"#));
    }
}

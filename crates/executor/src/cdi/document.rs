//! Reading YAML and JSON into a tree, with errors that say where.
//!
//! Only what describes plain values is taken: no anchors, aliases or tags, so a small file cannot describe a large tree.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Parser, ScalarStyle};

/// How deep a document may be.
const MAX_DEPTH: usize = 32;
/// How many values a document may have.
const MAX_VALUES: usize = 1 << 18;

/// A value of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// A scalar; whether it was quoted, and therefore is text whatever it looks like.
    Scalar {
        text: String,
        quoted: bool,
    },
    List(Vec<Value>),
    Map(BTreeMap<String, Value>),
}

/// Reads YAML.
pub(super) fn yaml(text: &str) -> Result<Value, String> {
    let mut reader = Reader {
        events: Parser::new_from_str(text),
        values: 0,
    };
    loop {
        match reader.next()? {
            Event::StreamStart | Event::DocumentStart(_) | Event::Nothing => {}
            Event::StreamEnd => return Err("it is empty".to_owned()),
            first => {
                let value = reader.value(first, 0)?;
                return reader.end().map(|()| value);
            }
        }
    }
}

/// Reads JSON.
pub(super) fn json(text: &str) -> Result<Value, String> {
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    Ok(from_json(value))
}

fn from_json(value: serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match value {
        Json::String(text) => Value::Scalar { text, quoted: true },
        Json::Array(values) => Value::List(values.into_iter().map(from_json).collect()),
        Json::Object(entries) => Value::Map(
            entries
                .into_iter()
                .map(|(key, value)| (key, from_json(value)))
                .collect(),
        ),
        Json::Null | Json::Bool(_) | Json::Number(_) => Value::Scalar {
            text: value.to_string(),
            quoted: false,
        },
    }
}

struct Reader<'a> {
    events: Parser<'a, saphyr_parser::StrInput<'a>>,
    values: usize,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<Event<'a>, String> {
        match self.events.next() {
            Some(Ok((event, _))) => Ok(event),
            Some(Err(error)) => Err(error.to_string()),
            None => Ok(Event::StreamEnd),
        }
    }

    fn end(&mut self) -> Result<(), String> {
        match self.next()? {
            Event::DocumentEnd => self.end(),
            Event::StreamEnd => Ok(()),
            _ => Err("it has more than one document".to_owned()),
        }
    }

    fn value(&mut self, event: Event<'a>, depth: usize) -> Result<Value, String> {
        self.values += 1;
        if depth > MAX_DEPTH {
            return Err(format!("it is nested deeper than {MAX_DEPTH} levels"));
        }
        if self.values > MAX_VALUES {
            return Err(format!("it has more than {MAX_VALUES} values"));
        }
        match event {
            Event::Scalar(text, style, 0, None) => Ok(Value::Scalar {
                text: text.into_owned(),
                quoted: style != ScalarStyle::Plain,
            }),
            Event::SequenceStart(0, None) => self.list(depth),
            Event::MappingStart(0, None) => self.map(depth),
            Event::Alias(_) => Err("it has an alias, which is not supported".to_owned()),
            Event::Scalar(..) | Event::SequenceStart(..) | Event::MappingStart(..) => {
                Err("it has an anchor or a tag, which is not supported".to_owned())
            }
            _ => Err("a value is missing".to_owned()),
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value, String> {
        let mut values = Vec::new();
        loop {
            match self.next()? {
                Event::SequenceEnd => return Ok(Value::List(values)),
                event => values.push(self.value(event, depth + 1)?),
            }
        }
    }

    fn map(&mut self, depth: usize) -> Result<Value, String> {
        let mut entries = BTreeMap::new();
        loop {
            let key = match self.next()? {
                Event::MappingEnd => return Ok(Value::Map(entries)),
                event => self.value(event, depth + 1)?,
            };
            let Value::Scalar { text: key, .. } = key else {
                return Err("a key is no text".to_owned());
            };
            let event = self.next()?;
            let value = self.value(event, depth + 1)?;
            if entries.insert(key.clone(), value).is_some() {
                return Err(format!("{key:?} is there twice"));
            }
        }
    }
}

impl Value {
    fn is_null(&self) -> bool {
        matches!(self, Self::Scalar { text, quoted: false } if matches!(text.as_str(), "" | "~" | "null"))
    }
}

/// The entries of a map, to be taken one by one; what is left at the end is not known.
#[derive(Debug)]
pub(super) struct Fields {
    place: String,
    entries: BTreeMap<String, Value>,
}

impl Fields {
    /// Takes a value that has to be a map; `place` is what errors call it.
    pub(super) fn new(value: Value, place: String) -> Result<Self, String> {
        match value {
            Value::Map(entries) => Ok(Self { place, entries }),
            value if value.is_null() => Ok(Self {
                place,
                entries: BTreeMap::new(),
            }),
            _ => Err(format!("{place} is no map")),
        }
    }

    fn place_of(&self, name: &str) -> String {
        if self.place.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.place)
        }
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        self.entries.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a text; numbers and truth values count as how they are written. Absent: empty.
    pub(super) fn text(&mut self, name: &str) -> Result<String, String> {
        match self.take(name) {
            None => Ok(String::new()),
            Some(Value::Scalar { text, .. }) if !text.contains('\0') => Ok(text),
            Some(_) => Err(format!("{} is no text", self.place_of(name))),
        }
    }

    /// Takes a number: decimal, or octal after `0` or `0o`, or hexadecimal after `0x`.
    pub(super) fn number(&mut self, name: &str) -> Result<Option<u32>, String> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let parsed = match &value {
            Value::Scalar { text, quoted: false } => {
                let octal = text.strip_prefix("0o").or(text.strip_prefix('0'));
                match (text.strip_prefix("0x"), octal) {
                    (Some(digits), _) => u32::from_str_radix(digits, 16).ok(),
                    (None, Some(digits)) if !digits.is_empty() => u32::from_str_radix(digits, 8).ok(),
                    _ => text.parse().ok(),
                }
            }
            _ => None,
        };
        parsed
            .map(Some)
            .ok_or_else(|| format!("{} is no number from 0 to {}", self.place_of(name), u32::MAX))
    }

    /// Takes a list and makes something of each value.
    pub(super) fn list<T>(
        &mut self,
        name: &str,
        mut each: impl FnMut(Value, String) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        let place = self.place_of(name);
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::List(values)) => values
                .into_iter()
                .enumerate()
                .map(|(at, value)| each(value, format!("{place}[{at}]")))
                .collect(),
            Some(_) => Err(format!("{place} is no list")),
        }
    }

    /// Takes a list of texts.
    pub(super) fn texts(&mut self, name: &str) -> Result<Vec<String>, String> {
        self.list(name, |value, place| match value {
            Value::Scalar { text, .. } if !text.contains('\0') => Ok(text),
            _ => Err(format!("{place} is no text")),
        })
    }

    /// Takes a map of texts.
    pub(super) fn text_map(&mut self, name: &str) -> Result<BTreeMap<String, String>, String> {
        let mut fields = self.fields(name)?;
        let names: Vec<String> = fields.entries.keys().cloned().collect();
        names
            .into_iter()
            .map(|name| fields.text(&name).map(|text| (name, text)))
            .collect()
    }

    /// Takes a map.
    pub(super) fn fields(&mut self, name: &str) -> Result<Self, String> {
        let place = self.place_of(name);
        let value = self.take(name).unwrap_or(Value::Map(BTreeMap::new()));
        Self::new(value, place)
    }

    /// Tells whether something is there, and takes it whatever it is.
    pub(super) fn is_set(&mut self, name: &str) -> bool {
        self.take(name).is_some()
    }

    /// Refuses what nobody took.
    pub(super) fn finish(self) -> Result<(), String> {
        match self.entries.keys().next() {
            None => Ok(()),
            Some(name) => Err(format!("unknown field {:?}", self.place_of(name))),
        }
    }
}

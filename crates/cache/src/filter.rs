//! containerd's filter language, as `--filter` takes it.
//!
//! A filter is a comma-separated list of selectors that all have to match; of several filters one has to. A selector is a
//! field, alone (the field is present) or with `==`, `!=` or `~=` (a regular expression) and a value, bare or quoted.

use regex::Regex;

use crate::error::FilterError;

/// Longest filter taken, in bytes.
const MAX_LENGTH: usize = 64 * 1024;

/// Parsed filters, one of which has to match; none match everything.
#[derive(Debug, Default)]
pub(crate) struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    field: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    /// Absent for an expression that does not compile, which matches nothing.
    Matches(Option<Regex>),
}

/// Looks a field up: `None` if it is not present.
pub(crate) trait Subject {
    fn field(&self, path: &[String]) -> Option<String>;
}

impl Filters {
    pub fn parse(filters: &[String]) -> Result<Self, FilterError> {
        let parsed: Result<Vec<_>, _> = filters
            .iter()
            .map(|filter| Parser::new(filter)?.selectors())
            .collect();
        Ok(Self(parsed?))
    }

    pub fn matches(&self, subject: &dyn Subject) -> bool {
        self.0.is_empty()
            || self
                .0
                .iter()
                .any(|all| all.iter().all(|selector| selector.matches(subject)))
    }
}

impl Selector {
    fn matches(&self, subject: &dyn Subject) -> bool {
        let value = subject.field(&self.field);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.as_ref() == Some(wanted),
            Test::NotEqual(unwanted) => value.unwrap_or_default() != *unwanted,
            Test::Matches(regex) => regex
                .as_ref()
                .is_some_and(|regex| regex.is_match(&value.unwrap_or_default())),
        }
    }
}

struct Parser<'a> {
    input: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn new(input: &'a str) -> Result<Self, FilterError> {
        let parser = Self { input, at: 0 };
        if input.len() > MAX_LENGTH {
            Err(parser.error("filter is too long"))
        } else {
            Ok(parser)
        }
    }

    fn error(&self, message: &str) -> FilterError {
        let input = self.input.chars().take(200).collect();
        FilterError {
            input,
            offset: self.at,
            message: message.to_owned(),
        }
    }

    fn rest(&self) -> &'a str {
        &self.input[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn skip_space(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    fn take_while(&mut self, keep: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let length = rest.find(|c| !keep(c)).unwrap_or(rest.len());
        self.at += length;
        &rest[..length]
    }

    /// An empty filter matches everything.
    fn selectors(mut self) -> Result<Vec<Selector>, FilterError> {
        let mut selectors = Vec::new();
        if self.input.is_empty() {
            return Ok(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            self.skip_space();
            match self.next() {
                None => return Ok(selectors),
                Some(',') => {}
                Some(_) => return Err(self.error("unexpected input")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut field = vec![self.field()?];
        while self.peek() == Some('.') {
            self.next();
            field.push(self.field()?);
        }
        self.skip_space();
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector {
                field,
                test: Test::Present,
            });
        }
        let operator = self.take_while(|c| matches!(c, '=' | '!' | '~'));
        self.skip_space();
        let test = match operator {
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            "~=" => Test::Matches(Regex::new(&self.value(true)?).ok()),
            "" => return Err(self.error("expected an operator (\"==\"|\"!=\"|\"~=\")")),
            _ => return Err(self.error("unsupported operator")),
        };
        Ok(Selector { field, test })
    }

    fn field(&mut self) -> Result<String, FilterError> {
        self.skip_space();
        if matches!(self.peek(), Some('"' | '\'')) {
            return self.quoted();
        }
        let field = self.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
        if field.starts_with(|c: char| c.is_ascii_alphabetic()) {
            Ok(field.to_owned())
        } else {
            Err(self.error("expected field or quoted"))
        }
    }

    fn value(&mut self, is_regex: bool) -> Result<String, FilterError> {
        match self.peek() {
            Some('"' | '\'') => self.quoted(),
            Some('/' | '|') if is_regex => self.quoted(),
            _ => {
                let value = self.take_while(|c| c != ',' && !c.is_whitespace() && !c.is_control());
                if value.is_empty() {
                    Err(self.error("expected value or quoted"))
                } else {
                    Ok(value.to_owned())
                }
            }
        }
    }

    /// Reads Go string syntax with any quote; the slash and the bar, for regular expressions, keep other escapes as they are.
    fn quoted(&mut self) -> Result<String, FilterError> {
        let quote = self
            .next()
            .ok_or_else(|| self.error("expected value or quoted"))?;
        let is_raw = matches!(quote, '/' | '|');
        let mut out = String::new();
        loop {
            match self.next() {
                None => return Err(self.error("literal not terminated")),
                Some(c) if c == quote => return Ok(out),
                Some('\\') => match self.next() {
                    Some(c) if c == quote => out.push(c),
                    Some(c) if is_raw => out.extend(['\\', c]),
                    Some(c) => out.push(self.escape(c)?),
                    None => return Err(self.error("literal not terminated")),
                },
                Some(c) => out.push(c),
            }
        }
    }

    fn escape(&mut self, escape: char) -> Result<char, FilterError> {
        let digits = match escape {
            'a' => return Ok('\x07'),
            'b' => return Ok('\x08'),
            'f' => return Ok('\x0c'),
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            'v' => return Ok('\x0b'),
            '\\' | '\'' | '"' => return Ok(escape),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => return Err(self.error("unquoting failed: invalid escape")),
        };
        let code = self
            .rest()
            .get(..digits)
            .and_then(|text| u32::from_str_radix(text, 16).ok());
        let c = code
            .and_then(char::from_u32)
            .ok_or_else(|| self.error("unquoting failed: invalid escape"))?;
        self.at += digits;
        Ok(c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fields(&'static [(&'static str, &'static str)]);

    impl Subject for Fields {
        fn field(&self, path: &[String]) -> Option<String> {
            let [name] = path else { return None };
            self.0
                .iter()
                .find(|(field, _)| field == name)
                .map(|(_, value)| (*value).to_owned())
        }
    }

    const SUBJECT: Fields = Fields(&[
        ("id", "abc"),
        ("description", "[2/3] RUN echo, hi"),
        ("mutable", ""),
    ]);

    fn matches(filters: &[&str]) -> bool {
        let filters: Vec<String> = filters.iter().map(|filter| (*filter).to_owned()).collect();
        Filters::parse(&filters).unwrap().matches(&SUBJECT)
    }

    #[test]
    fn selectors_match_as_containerds() {
        for filter in [
            "",
            "id==abc",
            "id == abc",
            "id",
            "mutable",
            "id!=x",
            "immutable!=x",
            "id~=^a.c$",
            "id~=/b/",
            "id==abc,mutable",
            "id==\"a\\x62c\"",
            "'id'=='abc'",
            "description~=\"RUN echo, \"",
            "description~=/\\[2\\/3\\]/",
        ] {
            assert!(matches(&[filter]), "{filter}");
        }
        for filter in [
            "id==ab",
            "immutable",
            "id!=abc",
            "id~=^b",
            "id==abc,immutable",
            "id~=(",
            "id.x==abc",
        ] {
            assert!(!matches(&[filter]), "{filter}");
        }
        assert!(matches(&[]));
        assert!(matches(&["id==x", "id==abc"]));
    }

    #[test]
    fn what_does_not_parse_is_refused() {
        for filter in [
            "=",
            "id=",
            "id=x",
            "id==",
            "id==a b",
            ",id",
            "id,",
            "id==\"x",
            "1d",
            "id==/x/ y",
            "id===x",
        ] {
            let error = Filters::parse(&[filter.to_owned()]);
            assert!(error.is_err(), "{filter}: {error:?}");
        }
    }
}

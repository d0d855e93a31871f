//! Expansion of variables in a word, and splitting into words, as a shell would.
//!
//! Quotes are removed unless asked otherwise; `$name`, `${name}` and the modifiers `-`, `+`, `?` (each with `:`), `#`,
//! `##`, `%`, `%%`, `/` and `//` are known. Bytes that are not UTF-8 become U+FFFD.

mod pattern;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::str::Chars;

use crate::{raw, text};

/// How deep substitutions may nest in each other.
const MAX_DEPTH: usize = 100;
/// How many bytes of values, and steps of matching patterns, all words of a lexer may come to. A variable can double
/// with each line, so without a bound there is none to time and memory.
const MAX_WORK: usize = 32 << 20;

/// Why a word cannot be expanded. The texts are BuildKit's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WordError {
    #[error("unexpected end of statement while looking for matching {0}")]
    Unclosed(char),
    #[error("unexpected end of statement while looking for matching single-quote")]
    SingleQuote,
    #[error("unexpected end of statement while looking for matching double-quote")]
    DoubleQuote,
    #[error("syntax error: missing '}}'")]
    MissingBrace,
    #[error("syntax error: missing '/' in ${{}}")]
    MissingSlash,
    #[error("syntax error: bad substitution")]
    BadSubstitution,
    #[error("syntax error: substitutions nested too deeply")]
    TooDeep,
    #[error("the values of variables are too large: they come to more than {MAX_WORK} bytes")]
    TooLarge,
    #[error("unsupported modifier ({0}) in substitution")]
    Modifier(String),
    #[error("{name}: {message}")]
    Required { name: String, message: String },
    #[error("invalid pattern ({pattern}) in substitution: {error}")]
    Pattern {
        pattern: String,
        #[source]
        error: pattern::PatternError,
    },
    #[error("internal lexing of heredoc produced inconsistent results: {0}")]
    Heredoc(String),
    #[error("failed to process {}: {error}", text::quote(.word))]
    In {
        word: String,
        #[source]
        error: Box<WordError>,
    },
}

/// Where variables come from.
pub(crate) trait Variables {
    /// Returns a variable's value.
    fn get(&self, name: &str) -> Option<&str>;
    /// Lists the names, in the order in which they were set.
    fn names(&self) -> Vec<&str>;
}

/// No variables at all.
pub(crate) struct NoVariables;

impl Variables for NoVariables {
    fn get(&self, _name: &str) -> Option<&str> {
        None
    }

    fn names(&self) -> Vec<&str> {
        Vec::new()
    }
}

/// What became of a word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Expanded {
    pub(crate) text: String,
    /// Variables that were used and set.
    pub(crate) matched: BTreeSet<String>,
    /// Variables that were used and not set.
    pub(crate) unmatched: BTreeSet<String>,
}

/// Expands words; its settings say how literally. Clones share the bound of what they may do.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "four independent switches of the lexer, set by name"
)]
pub(crate) struct Lexer {
    escape: char,
    /// Quotes stay.
    pub(crate) raw_quotes: bool,
    /// Escape characters stay.
    pub(crate) raw_escapes: bool,
    /// Quotes are characters like others.
    pub(crate) skip_quotes: bool,
    /// Variables that are not set stay as written.
    pub(crate) skip_unset: bool,
    /// What may still be done.
    work: Rc<Cell<usize>>,
}

impl Lexer {
    pub(crate) fn new(escape: char) -> Self {
        Self {
            escape,
            raw_quotes: false,
            raw_escapes: false,
            skip_quotes: false,
            skip_unset: false,
            work: Rc::new(Cell::new(MAX_WORK)),
        }
    }

    /// Makes a lexer for another escape character that shares the bound of this one.
    pub(crate) fn with_escape(&self, escape: char) -> Self {
        Self {
            work: Rc::clone(&self.work),
            ..Self::new(escape)
        }
    }

    /// Counts work.
    fn spend(&self, work: usize) -> Result<(), WordError> {
        let left = self.work.get().checked_sub(work).ok_or(WordError::TooLarge)?;
        self.work.set(left);
        Ok(())
    }

    /// Expands a word. What was found before an error is returned along with it.
    pub(crate) fn expand(&self, word: &str, variables: &dyn Variables) -> (Expanded, Result<(), WordError>) {
        let mut scan = Scan::new(self, word, variables);
        let result = scan.run(None, self.raw_escapes);
        let (text, result) = match result {
            Ok((text, _)) => (text, Ok(())),
            Err(error) => (
                String::new(),
                Err(WordError::In {
                    word: word.to_owned(),
                    error: Box::new(error),
                }),
            ),
        };
        (
            Expanded {
                text,
                matched: scan.matched,
                unmatched: scan.unmatched,
            },
            result,
        )
    }

    /// Expands and splits at spaces outside of quotes.
    pub(crate) fn words(&self, word: &str, variables: &dyn Variables) -> Result<Vec<String>, WordError> {
        let mut scan = Scan::new(self, word, variables);
        let result = scan.run(None, self.raw_escapes);
        result.map(|(_, words)| words).map_err(|error| WordError::In {
            word: word.to_owned(),
            error: Box::new(error),
        })
    }
}

/// Collects words. Nested scans share the buffer of the word in work, as BuildKit's do.
#[derive(Default)]
struct Words {
    done: Vec<String>,
    in_word: bool,
}

struct Scan<'a> {
    lexer: &'a Lexer,
    rest: Chars<'a>,
    variables: &'a dyn Variables,
    raw_escapes: bool,
    depth: usize,
    buffer: String,
    matched: BTreeSet<String>,
    unmatched: BTreeSet<String>,
}

impl<'a> Scan<'a> {
    fn new(lexer: &'a Lexer, word: &'a str, variables: &'a dyn Variables) -> Self {
        Self {
            lexer,
            rest: word.strip_prefix('\u{feff}').unwrap_or(word).chars(),
            variables,
            raw_escapes: lexer.raw_escapes,
            depth: 0,
            buffer: String::new(),
            matched: BTreeSet::new(),
            unmatched: BTreeSet::new(),
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.clone().next().map(raw::replaced)
    }

    fn next(&mut self) -> Option<char> {
        self.rest.next().map(raw::replaced)
    }

    fn add_char(&mut self, words: &mut Words, c: char) {
        if !c.is_whitespace() {
            self.buffer.push(c);
            words.in_word = true;
        } else if words.in_word && !self.buffer.is_empty() {
            words.done.push(std::mem::take(&mut self.buffer));
            words.in_word = false;
        }
    }

    fn add_raw(&mut self, words: &mut Words, text: &str) {
        self.buffer.push_str(text);
        words.in_word = true;
    }

    fn finish(&mut self, mut words: Words) -> Vec<String> {
        if !self.buffer.is_empty() {
            words.done.push(std::mem::take(&mut self.buffer));
        }
        words.done
    }

    /// Scans up to `stop`, or to the end; returns the text and the words.
    fn run(&mut self, stop: Option<char>, raw_escapes: bool) -> Result<(String, Vec<String>), WordError> {
        if self.depth >= MAX_DEPTH {
            return Err(WordError::TooDeep);
        }
        self.depth += 1;
        let before = std::mem::replace(&mut self.raw_escapes, raw_escapes);
        let result = self.scan(stop);
        self.raw_escapes = before;
        self.depth -= 1;
        result
    }

    fn scan(&mut self, stop: Option<char>) -> Result<(String, Vec<String>), WordError> {
        let mut out = String::new();
        let mut words = Words::default();
        self.buffer.clear();
        while let Some(c) = self.peek() {
            if Some(c) == stop {
                self.next();
                return Ok((out, self.finish(words)));
            }
            let part = match c {
                '$' => {
                    let value = self.dollar()?;
                    value.chars().for_each(|c| self.add_char(&mut words, c));
                    out.push_str(&value);
                    continue;
                }
                '<' => self.possible_heredoc(),
                '\'' if !self.lexer.skip_quotes => self.single_quote()?,
                '"' if !self.lexer.skip_quotes => self.double_quote()?,
                _ => {
                    if !self.plain(&mut out, &mut words) {
                        break;
                    }
                    continue;
                }
            };
            out.push_str(&part);
            self.add_raw(&mut words, &part);
        }
        match stop {
            Some(stop) => Err(WordError::Unclosed(stop)),
            None => Ok((out, self.finish(words))),
        }
    }

    /// Takes one character, or an escaped one; false at the end.
    fn plain(&mut self, out: &mut String, words: &mut Words) -> bool {
        let Some(c) = self.next() else { return false };
        if c != self.lexer.escape {
            self.add_char(words, c);
            out.push(c);
            return true;
        }
        if self.raw_escapes {
            self.buffer.push(c);
            words.in_word = true;
            out.push(c);
        }
        let Some(escaped) = self.next() else { return false };
        self.buffer.push(escaped);
        words.in_word = true;
        out.push(escaped);
        true
    }

    fn single_quote(&mut self) -> Result<String, WordError> {
        self.next();
        let mut out = String::new();
        loop {
            match self.next() {
                None => return Err(WordError::SingleQuote),
                Some('\'') => break,
                Some(c) => out.push(c),
            }
        }
        Ok(if self.lexer.raw_quotes {
            format!("'{out}'")
        } else {
            out
        })
    }

    fn double_quote(&mut self) -> Result<String, WordError> {
        self.next();
        let mut out = String::new();
        if self.lexer.raw_quotes {
            out.push('"');
        }
        loop {
            match self.peek() {
                None => return Err(WordError::DoubleQuote),
                Some('"') => {
                    self.next();
                    break;
                }
                Some('$') => out.push_str(&self.dollar()?),
                Some(c) => {
                    self.next();
                    self.quoted(c, &mut out);
                }
            }
        }
        if self.lexer.raw_quotes {
            out.push('"');
        }
        Ok(out)
    }

    /// Takes a character in double quotes. Only `"`, `$` and the escape character itself can be escaped there.
    fn quoted(&mut self, c: char, out: &mut String) {
        if c != self.lexer.escape {
            out.push(c);
            return;
        }
        if self.raw_escapes {
            out.push(c);
        }
        match self.peek() {
            None => {}
            Some(next) if next == '"' || next == '$' || next == self.lexer.escape => {
                self.next();
                out.push(next);
            }
            Some(_) => out.push(c),
        }
    }

    fn possible_heredoc(&mut self) -> String {
        self.next();
        if self.peek() != Some('<') {
            return "<".to_owned();
        }
        self.next();
        let mut out = "<<".to_owned();
        while let Some(c) = self.peek().filter(|c| matches!(c, '\t' | '\r' | ' ')) {
            self.next();
            out.push(c);
        }
        out
    }

    fn lookup(&mut self, name: &str) -> Option<&'a str> {
        let value = self.variables.get(name);
        let set = if value.is_some() {
            &mut self.matched
        } else {
            &mut self.unmatched
        };
        if !set.contains(name) {
            set.insert(name.to_owned());
        }
        value
    }

    /// Reads a substitution and returns what takes its place.
    fn dollar(&mut self) -> Result<String, WordError> {
        let value = self.substitution()?;
        self.lexer.spend(value.len())?;
        Ok(value)
    }

    fn substitution(&mut self) -> Result<String, WordError> {
        self.next();
        if self.peek() != Some('{') {
            let name = self.name();
            if name.is_empty() {
                return Ok("$".to_owned());
            }
            return Ok(match self.lookup(&name) {
                Some(value) => value.to_owned(),
                None if self.lexer.skip_unset => format!("${name}"),
                None => String::new(),
            });
        }
        self.next();
        match self.peek() {
            None => return Err(WordError::MissingBrace),
            Some('{' | '}' | ':') => return Err(WordError::BadSubstitution),
            Some(_) => {}
        }
        let name = self.name();
        match self.next() {
            Some('}') => Ok(match self.lookup(&name) {
                Some(value) => value.to_owned(),
                None if self.lexer.skip_unset => format!("${{{name}}}"),
                None => String::new(),
            }),
            Some(':') => {
                let modifier = self.next().unwrap_or('\u{fffd}');
                self.modified(&name, modifier, true)
            }
            Some(modifier @ ('+' | '-' | '?' | '#' | '%')) => self.modified(&name, modifier, false),
            Some('/') => self.replaced(&name),
            other => Err(WordError::Modifier(other.unwrap_or('\u{fffd}').to_string())),
        }
    }

    /// Scans up to `stop` within a substitution.
    fn inner(&mut self, stop: char, raw_escapes: bool, missing: WordError) -> Result<String, WordError> {
        match self.run(Some(stop), raw_escapes) {
            Ok((word, _)) => Ok(word),
            Err(error @ (WordError::TooDeep | WordError::TooLarge)) => Err(error),
            Err(_) if self.peek().is_none() => Err(missing),
            Err(error) => Err(error),
        }
    }

    fn modified(&mut self, name: &str, modifier: char, empty_is_unset: bool) -> Result<String, WordError> {
        let shown = if empty_is_unset {
            format!(":{modifier}")
        } else {
            modifier.to_string()
        };
        let trims = matches!(modifier, '#' | '%');
        if trims && empty_is_unset {
            return Err(WordError::Modifier(shown));
        }
        let word = self.inner('}', trims, WordError::MissingBrace)?;
        let value = self.lookup(name);
        if self.lexer.skip_unset && value.is_none() {
            return Ok(format!("${{{name}{shown}{word}}}"));
        }
        let usable = value.filter(|value| !(empty_is_unset && value.is_empty()));
        match modifier {
            '-' => Ok(usable.map_or(word, str::to_owned)),
            '+' => Ok(if usable.is_some() { word } else { String::new() }),
            '?' => match (usable, value) {
                (Some(value), _) => Ok(value.to_owned()),
                (None, value) => {
                    let reason = if value.is_none() {
                        "is not allowed to be unset"
                    } else {
                        "is not allowed to be empty"
                    };
                    let message = if word.is_empty() { reason.to_owned() } else { word };
                    Err(WordError::Required {
                        name: name.to_owned(),
                        message,
                    })
                }
            },
            '#' | '%' => {
                let (word, greedy) = word
                    .strip_prefix(modifier)
                    .map_or((word.as_str(), false), |rest| (rest, true));
                let value = value.unwrap_or_default();
                let trim = if modifier == '#' {
                    pattern::trim_prefix
                } else {
                    pattern::trim_suffix
                };
                trim(self.lexer, word, value, greedy)
            }
            _ => Err(WordError::Modifier(shown)),
        }
    }

    fn replaced(&mut self, name: &str) -> Result<String, WordError> {
        let all = self.peek() == Some('/');
        if all {
            self.next();
        }
        let pattern = self.inner('/', true, WordError::MissingSlash)?;
        let replacement = self.inner('}', true, WordError::MissingBrace)?;
        let value = self.lookup(name);
        if self.lexer.skip_unset && value.is_none() {
            return Ok(format!("${{{name}/{pattern}/{replacement}}}"));
        }
        pattern::replace(self.lexer, &pattern, value.unwrap_or_default(), &replacement, all)
    }

    /// Reads a name, a number or a special parameter; empty if there is none.
    fn name(&mut self) -> String {
        let mut name = String::new();
        match self.peek() {
            Some(c) if c.is_ascii_digit() => {
                while let Some(c) = self.peek().filter(char::is_ascii_digit) {
                    self.next();
                    name.push(c);
                }
            }
            Some(c @ ('@' | '*' | '#' | '?' | '-' | '$' | '!')) => {
                self.next();
                name.push(c);
            }
            _ => {
                while let Some(c) = self
                    .peek()
                    .filter(|c| c.is_alphabetic() || c.is_ascii_digit() || *c == '_')
                {
                    self.next();
                    name.push(c);
                }
            }
        }
        name
    }
}

#[cfg(test)]
mod tests;

//! Matching one pattern: a small program of steps, each of which moves a set of positions in the path onwards.

use super::PatternError;

/// How a pattern of a list is matched.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// By equality.
    Exact,
    /// By what stands before a final `**`.
    Prefix,
    /// By what stands behind an initial `**`.
    Suffix,
    /// By a [`Program`].
    General,
}

/// Finds the shape of a cleaned pattern. A star is only special where it is not escaped.
pub(super) fn classify(pattern: &str) -> Shape {
    let mut shape = Shape::Exact;
    let mut chars = pattern.chars().peekable();
    let mut first = true;
    while let Some(c) = chars.next() {
        match c {
            '*' if chars.peek() == Some(&'*') => {
                chars.next();
                if chars.peek() == Some(&'/') {
                    chars.next();
                }
                shape = match (chars.peek(), shape) {
                    _ if first => Shape::Suffix,
                    (None, Shape::Exact) => Shape::Prefix,
                    _ => Shape::General,
                };
            }
            '*' | '?' | '[' | ']' => shape = Shape::General,
            '\\' if chars.next().is_some() => shape = Shape::General,
            _ => {}
        }
        first = false;
    }
    shape
}

#[derive(Clone, Debug)]
enum Step {
    Char(char),
    /// Any character but a slash.
    AnyChar,
    /// Any run of characters without a slash.
    Star,
    /// Nothing, or anything that ends in a slash.
    Directories,
    /// Anything.
    Rest,
    Class(Class),
}

#[derive(Clone, Debug)]
struct Class {
    negated: bool,
    ranges: Vec<(char, char)>,
}

impl Class {
    fn contains(&self, c: char) -> bool {
        self.ranges.iter().any(|(low, high)| (*low..=*high).contains(&c)) != self.negated
    }
}

/// A compiled pattern.
#[derive(Clone, Debug)]
pub(super) struct Program(Vec<Step>);

impl Program {
    /// Compiles a pattern of a list. Fails where the ecosystem's matcher cannot compile it either: an escaped letter or
    /// digit has no meaning of its own here, and silently giving it one would match other files.
    pub(super) fn compile(pattern: &str) -> Result<Self, PatternError> {
        let mut steps = Vec::new();
        let mut rest = pattern;
        while let Some(c) = rest.chars().next() {
            let after = &rest[c.len_utf8()..];
            rest = after;
            match c {
                '*' => match after.strip_prefix('*') {
                    Some(after) => {
                        rest = after.strip_prefix('/').unwrap_or(after);
                        steps.push(if rest.is_empty() {
                            Step::Rest
                        } else {
                            Step::Directories
                        });
                    }
                    None => steps.push(Step::Star),
                },
                '?' => steps.push(Step::AnyChar),
                '[' => {
                    let (class, after) = parse_class(after)?;
                    steps.push(Step::Class(class));
                    rest = after;
                }
                '\\' => {
                    let escaped = after.chars().next().ok_or(PatternError::Syntax)?;
                    steps.push(escape(escaped)?);
                    rest = &after[escaped.len_utf8()..];
                }
                c => steps.push(Step::Char(c)),
            }
        }
        Ok(Self(steps))
    }

    pub(super) fn matches(&self, path: &[u8]) -> bool {
        let text = String::from_utf8_lossy(path);
        if let Some(Step::Char(first)) = self.0.first()
            && !text.starts_with(*first)
        {
            return false;
        }
        let chars: Vec<char> = text.chars().collect();
        let mut positions = vec![false; chars.len() + 1];
        positions[0] = true;
        for step in &self.0 {
            advance(step, &chars, &mut positions);
            if !positions.contains(&true) {
                return false;
            }
        }
        positions[chars.len()]
    }
}

/// Replaces the set of positions reached before a step by the set reached after it.
fn advance(step: &Step, chars: &[char], positions: &mut [bool]) {
    let mut one = |accepts: &dyn Fn(char) -> bool| {
        for at in (0..chars.len()).rev() {
            positions[at + 1] = positions[at] && accepts(chars[at]);
        }
        positions[0] = false;
    };
    match step {
        Step::Char(want) => one(&|c| c == *want),
        Step::AnyChar => one(&|c| c != '/'),
        Step::Class(class) => one(&|c| class.contains(c)),
        Step::Star => {
            for at in 0..chars.len() {
                positions[at + 1] |= positions[at] && chars[at] != '/';
            }
        }
        Step::Directories => {
            let mut reached = false;
            for at in 0..chars.len() {
                reached |= positions[at];
                positions[at + 1] |= reached && chars[at] == '/';
            }
        }
        Step::Rest => {
            for at in 0..chars.len() {
                positions[at + 1] |= positions[at];
            }
        }
    }
}

/// What a backslash in front of a character means to Go's regular expressions, which these patterns are made of.
fn escape(c: char) -> Result<Step, PatternError> {
    let class = |negated, ranges: &[(char, char)]| {
        Step::Class(Class {
            negated,
            ranges: ranges.to_vec(),
        })
    };
    const DIGIT: &[(char, char)] = &[('0', '9')];
    const WORD: &[(char, char)] = &[('0', '9'), ('A', 'Z'), ('_', '_'), ('a', 'z')];
    const SPACE: &[(char, char)] = &[('\t', '\n'), ('\u{c}', '\r'), (' ', ' ')];
    Ok(match c {
        'd' => class(false, DIGIT),
        'D' => class(true, DIGIT),
        'w' => class(false, WORD),
        'W' => class(true, WORD),
        's' => class(false, SPACE),
        'S' => class(true, SPACE),
        'a' => Step::Char('\u{7}'),
        'f' => Step::Char('\u{c}'),
        'n' => Step::Char('\n'),
        'r' => Step::Char('\r'),
        't' => Step::Char('\t'),
        'v' => Step::Char('\u{b}'),
        c if c.is_ascii_alphanumeric() || !c.is_ascii() => return Err(PatternError::Syntax),
        c => Step::Char(c),
    })
}

/// Parses a character class behind its `[`; returns it and what follows its `]`. Source: Go's `filepath.Match`.
fn parse_class(text: &str) -> Result<(Class, &str), PatternError> {
    let negated = text.starts_with('^');
    let mut rest = if negated { &text[1..] } else { text };
    let mut ranges = Vec::new();
    loop {
        if let Some(after) = rest.strip_prefix(']')
            && !ranges.is_empty()
        {
            return Ok((Class { negated, ranges }, after));
        }
        let low = class_char(&mut rest)?;
        let high = match rest.strip_prefix('-') {
            Some(after) => {
                rest = after;
                class_char(&mut rest)?
            }
            None => low,
        };
        ranges.push((low, high));
    }
}

fn class_char(rest: &mut &str) -> Result<char, PatternError> {
    let mut chars = rest.chars();
    let c = match chars.next() {
        None | Some('-' | ']') => return Err(PatternError::Syntax),
        Some('\\') => chars.next().ok_or(PatternError::Syntax)?,
        Some(c) => c,
    };
    *rest = chars.as_str();
    if rest.is_empty() {
        Err(PatternError::Syntax)
    } else {
        Ok(c)
    }
}

/// Checks a pattern as Go's `filepath.Match` does.
pub fn validate(pattern: &str) -> Result<(), PatternError> {
    compile_glob(pattern).map(drop)
}

/// Matches `name` against a pattern of Go's `filepath.Match`: no `**`, a star stops at slashes.
pub fn glob_match(pattern: &str, name: impl AsRef<[u8]>) -> Result<bool, PatternError> {
    Ok(compile_glob(pattern)?.matches(name.as_ref()))
}

fn compile_glob(pattern: &str) -> Result<Program, PatternError> {
    let mut steps = Vec::new();
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '*' => steps.push(Step::Star),
            '?' => steps.push(Step::AnyChar),
            '[' => {
                let (class, after) = parse_class(rest)?;
                steps.push(Step::Class(class));
                rest = after;
            }
            '\\' => {
                let escaped = rest.chars().next().ok_or(PatternError::Syntax)?;
                steps.push(Step::Char(escaped));
                rest = &rest[escaped.len_utf8()..];
            }
            c => steps.push(Step::Char(c)),
        }
    }
    Ok(Program(steps))
}

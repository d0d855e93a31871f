//! File patterns: the language of `.dockerignore` and of include and exclude lists, and Go's `filepath.Match`.
//!
//! A [`Matcher`] holds an ordered list of patterns; later ones override earlier ones and `!` turns a match off again.
//! `*` and `?` stop at slashes, `**` does not, and a pattern that matches a directory matches everything below it.
//! The facts are those of `moby/patternmatcher`; the work per match is linear in pattern length times path length.

mod glob;
mod ignore_file;

pub use glob::{glob_match, validate};
pub use ignore_file::read_ignore_file;

use glob::Program;

/// Why a pattern is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// The pattern is only `!`.
    #[error("illegal exclusion pattern: \"!\"")]
    BareExclusion,
    /// The pattern is malformed. The text is Go's.
    #[error("syntax error in pattern")]
    Syntax,
}

/// One pattern of a list.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    exclusion: bool,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Exact,
    /// Ends in `**`; holds the length of what stands before.
    Prefix(usize),
    /// Begins with `**`; holds where the rest begins.
    Suffix(usize),
    Program(Program),
    /// Passes the syntax check, but can never be compiled: every match is an error.
    Broken,
}

impl Pattern {
    /// Compiles one cleaned pattern, without its `!`.
    fn new(text: &str, exclusion: bool) -> Result<Self, PatternError> {
        validate(text)?;
        let kind = match glob::classify(text) {
            glob::Shape::Exact => Kind::Exact,
            glob::Shape::Prefix => Kind::Prefix(text.len() - 2),
            glob::Shape::Suffix => Kind::Suffix(2),
            glob::Shape::General => Program::compile(text).map_or(Kind::Broken, Kind::Program),
        };
        Ok(Self {
            text: text.into(),
            exclusion,
            kind,
        })
    }

    /// Returns the cleaned text, without `!`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Tells whether the pattern began with `!`.
    pub const fn is_exclusion(&self) -> bool {
        self.exclusion
    }

    /// Matches `path` alone, regardless of its parents and of `!`.
    pub fn matches(&self, path: impl AsRef<[u8]>) -> Result<bool, PatternError> {
        let path = path.as_ref();
        let text = self.text.as_bytes();
        match &self.kind {
            Kind::Exact => Ok(path == text),
            Kind::Prefix(length) => Ok(path.starts_with(&text[..*length])),
            Kind::Suffix(from) => {
                let suffix = &text[*from..];
                Ok(path.ends_with(suffix) || suffix.strip_prefix(b"/").is_some_and(|rest| rest == path))
            }
            Kind::Program(program) => Ok(program.matches(path)),
            Kind::Broken => Err(PatternError::Syntax),
        }
    }
}

/// What each pattern of a [`Matcher`] said about a directory; passed on to what lies below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParentState(Vec<bool>);

/// An ordered list of patterns.
#[derive(Clone, Debug, Default)]
pub struct Matcher {
    patterns: Vec<Pattern>,
    exclusions: bool,
}

impl Matcher {
    /// Compiles patterns; blank ones are dropped, the others cleaned as paths are.
    pub fn new<S: AsRef<str>>(patterns: impl IntoIterator<Item = S>) -> Result<Self, PatternError> {
        let mut matcher = Self::default();
        for pattern in patterns {
            let pattern = pattern.as_ref().trim();
            if pattern.is_empty() {
                continue;
            }
            let cleaned = crate::path::clean(pattern);
            let (text, exclusion) = cleaned
                .strip_prefix('!')
                .map_or((cleaned.as_str(), false), |rest| (rest, true));
            if exclusion && text.is_empty() {
                return Err(PatternError::BareExclusion);
            }
            matcher.exclusions |= exclusion;
            matcher.patterns.push(Pattern::new(text, exclusion)?);
        }
        Ok(matcher)
    }

    /// Returns the patterns in order.
    pub fn patterns(&self) -> &[Pattern] {
        &self.patterns
    }

    /// Tells whether there are no patterns.
    pub const fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Tells whether any pattern begins with `!`.
    pub const fn has_exclusions(&self) -> bool {
        self.exclusions
    }

    /// Tells whether the last pattern to match `path` or one of its parents is not an exclusion.
    ///
    /// `path` is relative and delimited by slashes.
    pub fn matches_or_parent(&self, path: impl AsRef<[u8]>) -> Result<bool, PatternError> {
        let path = path.as_ref();
        let mut matched = false;
        for pattern in &self.patterns {
            if pattern.exclusion == matched && matches_self_or_parent(pattern, path)? {
                matched = !pattern.exclusion;
            }
        }
        Ok(matched)
    }

    /// Does what [`Matcher::matches_or_parent`] does, taking over what is known about the parent directory.
    ///
    /// `parent` is `None` at the top of a walk. The returned state is to be passed for the children of `path`.
    pub fn matches_with_parent(
        &self,
        path: impl AsRef<[u8]>,
        parent: Option<&ParentState>,
    ) -> Result<(bool, ParentState), PatternError> {
        let path = path.as_ref();
        let parent = parent
            .map(|state| state.0.as_slice())
            .filter(|state| state.len() == self.patterns.len());
        let mut state = ParentState(vec![false; self.patterns.len()]);
        let mut matched = false;
        for (at, pattern) in self.patterns.iter().enumerate() {
            let mut hit = parent.is_some_and(|parent| parent[at]);
            if !hit {
                if pattern.exclusion != matched {
                    continue;
                }
                hit = match parent {
                    Some(_) => pattern.matches(path)?,
                    None => matches_self_or_parent(pattern, path)?,
                };
            }
            state.0[at] = hit;
            if hit {
                matched = !pattern.exclusion;
            }
        }
        Ok((matched, state))
    }
}

fn matches_self_or_parent(pattern: &Pattern, path: &[u8]) -> Result<bool, PatternError> {
    if pattern.matches(path)? {
        return Ok(true);
    }
    for at in path
        .iter()
        .enumerate()
        .filter_map(|(at, c)| (*c == b'/').then_some(at))
    {
        if pattern.matches(&path[..at])? {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests;

//! The wildcards of `${name#pattern}` and `${name/pattern/replacement}`: `*` is any text, `?` any character, neither a
//! line end.

use super::{Lexer, WordError};

/// How many steps a match may take; beyond it the pattern is refused.
const MAX_STEPS: usize = 20_000_000;

/// Why a pattern is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PatternError {
    #[error("invalid escape '\\{0}'")]
    Escape(char),
    #[error("pattern too complex")]
    TooComplex,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Char(char),
    Any,
    Star,
}

fn compile(pattern: impl Iterator<Item = char>) -> Result<Vec<Token>, PatternError> {
    let mut tokens = Vec::new();
    let mut chars = pattern.peekable();
    while let Some(c) = chars.next() {
        tokens.push(match c {
            '*' => Token::Star,
            '?' => Token::Any,
            // `}` and `/` have to be escaped in a substitution; the escape is not part of the pattern.
            '\\' if matches!(chars.peek(), Some('}' | '/')) => continue,
            '\\' => match chars.next() {
                Some(c @ ('*' | '?' | '\\')) => Token::Char(c),
                other => return Err(PatternError::Escape(other.unwrap_or('\u{fffd}'))),
            },
            c => Token::Char(c),
        });
    }
    Ok(tokens)
}

/// One way of matching so far, in order of preference: where it began and which token comes next.
#[derive(Clone, Copy)]
struct Thread {
    start: usize,
    token: usize,
}

struct Matcher<'a> {
    tokens: &'a [Token],
    greedy: bool,
    steps: usize,
}

impl Matcher<'_> {
    /// Finds the first match at `from` or, unless anchored, behind it: its start and end.
    fn find(
        &mut self,
        text: &[char],
        from: usize,
        anchored: bool,
    ) -> Result<Option<(usize, usize)>, PatternError> {
        let mut current: Vec<Thread> = Vec::new();
        let mut next: Vec<Thread> = Vec::new();
        // For each token, the last position for which it was added.
        let mut seen = vec![usize::MAX; self.tokens.len() + 1];
        let mut found = None;
        for at in from..=text.len() {
            if found.is_none() && (at == from || !anchored) {
                self.add(&mut current, &mut seen, Thread { start: at, token: 0 }, at);
            }
            if current.is_empty() {
                break;
            }
            self.steps += current.len();
            if self.steps > MAX_STEPS {
                return Err(PatternError::TooComplex);
            }
            next.clear();
            for thread in &current {
                let Some(token) = self.tokens.get(thread.token) else {
                    // Less preferred ways no longer matter.
                    found = Some((thread.start, at));
                    break;
                };
                let Some(c) = text.get(at) else { continue };
                let advance = match token {
                    Token::Char(wanted) if wanted == c => thread.token + 1,
                    Token::Any if *c != '\n' => thread.token + 1,
                    Token::Star if *c != '\n' => thread.token,
                    _ => continue,
                };
                self.add(
                    &mut next,
                    &mut seen,
                    Thread {
                        start: thread.start,
                        token: advance,
                    },
                    at + 1,
                );
            }
            std::mem::swap(&mut current, &mut next);
        }
        Ok(found)
    }

    /// Adds a way, and the ways that go on behind a star without another character.
    fn add(&self, threads: &mut Vec<Thread>, seen: &mut [usize], thread: Thread, at: usize) {
        let mut token = thread.token;
        let first = threads.len();
        loop {
            if seen[token] == at {
                break;
            }
            seen[token] = at;
            threads.push(Thread {
                start: thread.start,
                token,
            });
            if self.tokens.get(token) != Some(&Token::Star) {
                break;
            }
            token += 1;
        }
        if !self.greedy {
            // Shortest first: leaving the star is preferred to staying in it.
            threads[first..].reverse();
        }
    }
}

fn located(pattern: &str) -> impl FnOnce(PatternError) -> WordError {
    let pattern = pattern.to_owned();
    move |error| WordError::Pattern { pattern, error }
}

/// Removes the shortest, or longest, text at the start that matches.
pub(super) fn trim_prefix(
    lexer: &Lexer,
    pattern: &str,
    value: &str,
    greedy: bool,
) -> Result<String, WordError> {
    let text: Vec<char> = value.chars().collect();
    trim(lexer, pattern, compile(pattern.chars()), &text, greedy).map(|rest| rest.iter().collect())
}

/// Removes the shortest, or longest, text at the end that matches.
pub(super) fn trim_suffix(
    lexer: &Lexer,
    pattern: &str,
    value: &str,
    greedy: bool,
) -> Result<String, WordError> {
    let reversed = reverse(pattern);
    let text: Vec<char> = value.chars().rev().collect();
    trim(lexer, &reversed, compile(reversed.chars()), &text, greedy).map(|rest| rest.iter().rev().collect())
}

fn trim<'t>(
    lexer: &Lexer,
    pattern: &str,
    tokens: Result<Vec<Token>, PatternError>,
    text: &'t [char],
    greedy: bool,
) -> Result<&'t [char], WordError> {
    let tokens = tokens.map_err(located(pattern))?;
    let mut matcher = Matcher {
        tokens: &tokens,
        greedy,
        steps: 0,
    };
    let found = matcher.find(text, 0, true).map_err(located(pattern))?;
    lexer.spend(text.len() + matcher.steps)?;
    Ok(found.map_or(text, |(_, end)| &text[end..]))
}

/// Reverses a pattern, keeping each escape in front of what it escapes.
fn reverse(pattern: &str) -> String {
    let chars: Vec<char> = pattern.chars().collect();
    let mut pieces: Vec<&[char]> = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        let length = if chars[at] == '\\' && at + 1 < chars.len() {
            2
        } else {
            1
        };
        pieces.push(&chars[at..at + length]);
        at += length;
    }
    pieces.into_iter().rev().flatten().collect()
}

/// Replaces the first match, or all of them.
///
/// With `all` the replacement is a template: `$0` is the matched text, other names are empty, `$$` is a dollar.
pub(super) fn replace(
    lexer: &Lexer,
    pattern: &str,
    value: &str,
    replacement: &str,
    all: bool,
) -> Result<String, WordError> {
    let tokens = compile(pattern.chars()).map_err(located(pattern))?;
    let text: Vec<char> = value.chars().collect();
    let mut matcher = Matcher {
        tokens: &tokens,
        greedy: true,
        steps: 0,
    };
    let mut out = String::with_capacity(value.len());
    let mut copied = 0;
    let mut from = 0;
    while from <= text.len() {
        let found = matcher.find(&text, from, false).map_err(located(pattern))?;
        lexer.spend(tokens.len() + std::mem::take(&mut matcher.steps))?;
        let Some((start, end)) = found else { break };
        out.extend(&text[copied..start]);
        lexer.spend(replacement.len())?;
        // An empty match right behind another match does not count.
        if end > copied || start == 0 || !all {
            if all {
                expand_template(lexer, replacement, &text[start..end], &mut out)?;
            } else {
                out.push_str(replacement);
            }
        }
        copied = end;
        if !all {
            break;
        }
        from = if end > start { end } else { end + 1 };
    }
    out.extend(&text[copied.min(text.len())..]);
    Ok(out)
}

fn expand_template(
    lexer: &Lexer,
    template: &str,
    matched: &[char],
    out: &mut String,
) -> Result<(), WordError> {
    let mut rest = template;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(tail) = rest.strip_prefix('$') {
            out.push('$');
            rest = tail;
            continue;
        }
        let (braced, body) = rest.strip_prefix('{').map_or((false, rest), |body| (true, body));
        let length = body
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(body.len());
        let (name, tail) = body.split_at(length);
        let tail = if braced {
            tail.strip_prefix('}')
        } else {
            Some(tail)
        };
        match tail {
            Some(tail) if !name.is_empty() => {
                if name == "0" {
                    lexer.spend(matched.len())?;
                    out.extend(matched);
                }
                rest = tail;
            }
            // Malformed: the dollar stands for itself.
            _ => out.push('$'),
        }
    }
    out.push_str(rest);
    Ok(())
}

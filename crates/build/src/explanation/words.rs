//! Explanations in words.

use super::{Change, ChangeKind, Explanation, How, Reason};

/// Longest value that is shown; the middle of longer ones is left out.
const MAX_SHOWN: usize = 100;
/// Characters shown before the first that differs.
const CONTEXT: usize = 16;
/// Characters of a digest that are shown.
const DIGEST_SHOWN: usize = 19;

impl Reason {
    /// Returns the name that programs read.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Changed => "changed",
            Self::NeverBuilt => "never-built",
            Self::Expired => "expired",
            Self::Unusable => "unusable",
            Self::Ignored => "ignored",
            Self::Client => "client",
            Self::Unidentified => "unidentified",
        }
    }

    /// Returns the reason in words.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Changed => "it differs from what ran before",
            Self::NeverBuilt => "never built here before",
            Self::Expired => "it ran before, but its result is not in the cache any more",
            Self::Unusable => "it ran before, but its result could not be loaded",
            Self::Ignored => "the build ignores the cache for it",
            Self::Client => "a client's directory is looked at by every build",
            Self::Unidentified => {
                "something it uses has no identity that lasts, such as a client's directory that is used as a whole"
            }
        }
    }
}

impl ChangeKind {
    /// Returns the name that programs read.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Argument => "argument",
            Self::Environment => "environment",
            Self::Platform => "platform",
            Self::Definition => "definition",
            Self::File => "file",
            Self::Source => "source",
            Self::Input => "input",
        }
    }
}

impl How {
    /// Returns the name that programs read.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Changed => "changed",
            Self::Added => "added",
            Self::Removed => "removed",
        }
    }
}

impl Explanation {
    /// Says why, in lines.
    pub fn lines(&self) -> Vec<String> {
        if self.changes.is_empty() {
            return vec![self.reason.text().to_owned()];
        }
        let mut lines: Vec<String> = self.changes.iter().map(Change::text).collect();
        if self.omitted > 0 {
            lines.push(format!("and {} more", self.omitted));
        }
        lines
    }
}

impl Change {
    /// Says what differs.
    pub fn text(&self) -> String {
        let Self { subject, .. } = self;
        match self.kind {
            ChangeKind::File => self.file_text(),
            ChangeKind::Source => match (&self.before, &self.after) {
                (Some(before), Some(after)) => format!("{subject} {}→{}", short(before), short(after)),
                _ => format!("{subject} changed"),
            },
            ChangeKind::Input => match (&self.before, &self.after) {
                (Some(before), Some(after)) => format!("input {} became {}", quoted(before), quoted(after)),
                _ => format!("input {} {}", quoted(subject), self.how.as_str()),
            },
            _ => match (self.how, &self.before, &self.after) {
                (How::Changed, Some(before), Some(after)) if before != after => {
                    let (before, after) = around(before, after);
                    format!("{subject} {}→{}", quoted(&before), quoted(&after))
                }
                (How::Added, _, Some(after)) => format!("{subject} was added: {}", quoted(after)),
                (How::Removed, Some(before), _) => format!("{subject} was removed: {}", quoted(before)),
                (How::Changed, ..) => format!("{subject} changed"),
                (how, ..) => format!("{subject} was {}", how.as_str()),
            },
        }
    }

    fn file_text(&self) -> String {
        let Self {
            subject, attribute, ..
        } = self;
        match (self.how, &self.before, &self.after) {
            (How::Changed, Some(before), Some(after)) if attribute == "content" => {
                format!("content of {subject} changed, {before}→{after}")
            }
            (How::Changed, Some(before), Some(after)) => {
                format!("{attribute} of {subject} {}→{}", cut(before), cut(after))
            }
            (How::Changed, ..) => format!("{attribute} of {subject} changed"),
            (how, ..) => format!("{subject} was {}", how.as_str()),
        }
    }
}

/// Cuts what two long values begin with alike, so that what differs is among what is shown.
fn around(before: &str, after: &str) -> (String, String) {
    if before.chars().count().max(after.chars().count()) <= MAX_SHOWN {
        return (before.to_owned(), after.to_owned());
    }
    let alike = before
        .chars()
        .zip(after.chars())
        .take_while(|(a, b)| a == b)
        .count();
    let skipped = alike.saturating_sub(CONTEXT);
    let rest = |text: &str| {
        let rest = text.chars().skip(skipped);
        let rest: String = rest.take(MAX_SHOWN / 2).collect();
        let is_all = skipped + rest.chars().count() == text.chars().count();
        let (start, end) = (if skipped > 0 { "…" } else { "" }, if is_all { "" } else { "…" });
        format!("{start}{rest}{end}")
    };
    (rest(before), rest(after))
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", cut(text))
}

/// Shows a value in one line; of long ones the middle is left out.
fn cut(text: &str) -> String {
    let line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let count = line.chars().count();
    if count <= MAX_SHOWN {
        return line;
    }
    let first: String = line.chars().take(MAX_SHOWN / 2).collect();
    let last: String = line.chars().skip(count - MAX_SHOWN / 2).collect();
    format!("{first}…{last}")
}

fn short(value: &str) -> String {
    match value.split_once(':') {
        Some((_, hash)) if hash.len() >= 32 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            value.chars().take(DIGEST_SHOWN).collect()
        }
        _ => cut(value),
    }
}

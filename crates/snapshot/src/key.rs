//! The name of a snapshot.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Identifies a snapshot, both while it is active (its *key*) and when committed (its *name*).
///
/// 1 to 200 bytes of `A-Z a-z 0-9 . _ -`, not beginning with a dot: it is a directory's name. Cloning is cheap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotKey(Arc<str>);

/// A text that cannot name a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid snapshot key {text:?}")]
pub struct KeyError {
    /// What was offered.
    pub text: String,
}

impl SnapshotKey {
    /// Checks `text` and makes a key of it.
    pub fn new(text: &str) -> Result<Self, KeyError> {
        check(text)?;
        Ok(Self(text.into()))
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn check(text: &str) -> Result<(), KeyError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if text.is_empty() || text.len() > 200 || text.starts_with('.') || !text.bytes().all(allowed) {
        return Err(KeyError {
            text: text.to_owned(),
        });
    }
    Ok(())
}

impl TryFrom<Arc<str>> for SnapshotKey {
    type Error = KeyError;

    /// Checks `text` and makes a key of it that shares it.
    fn try_from(text: Arc<str>) -> Result<Self, KeyError> {
        check(&text)?;
        Ok(Self(text))
    }
}

impl FromStr for SnapshotKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::new(text)
    }
}

impl fmt::Display for SnapshotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SnapshotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl AsRef<str> for SnapshotKey {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_not_a_plain_name() {
        for text in ["", ".", "..", ".x", "a/b", "a\0b", "a b", "ä", &"a".repeat(201)] {
            assert!(SnapshotKey::new(text).is_err(), "{text:?}");
        }
        for text in ["a", "sha256-00", "x.y_z-1", &"a".repeat(200)] {
            assert_eq!(SnapshotKey::new(text).unwrap().as_str(), text);
        }
    }
}

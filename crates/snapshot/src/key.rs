//! The name of a snapshot.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

/// Identifies a snapshot, both while it is active (its *key*) and when committed (its *name*).
///
/// 1 to 200 bytes of `A-Z a-z 0-9 . _ -`, not beginning with a dot: it is a directory's name. Cloning is cheap.
#[derive(Clone)]
pub struct SnapshotKey(Text);

/// Bytes of a key that are no allocation of their own: as many as fit into four words, and more than ids of refs have.
const SHORT: usize = 30;

/// Long-lived processes have many keys; as many small allocations would keep memory around them that is free.
#[derive(Clone)]
enum Text {
    Short { length: u8, bytes: [u8; SHORT] },
    Long(Arc<str>),
}

impl Text {
    fn new(text: &str) -> Self {
        let mut bytes = [0; SHORT];
        match (bytes.get_mut(..text.len()), u8::try_from(text.len())) {
            (Some(place), Ok(length)) => {
                place.copy_from_slice(text.as_bytes());
                Self::Short { length, bytes }
            }
            _ => Self::Long(text.into()),
        }
    }

    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Short { length, bytes } => &bytes[..usize::from(*length)],
            Self::Long(text) => text.as_bytes(),
        }
    }

    fn as_str(&self) -> &str {
        match self {
            Self::Short { .. } => str::from_utf8(self.as_bytes()).expect("made of a text"),
            Self::Long(text) => text,
        }
    }
}

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
        Ok(Self(Text::new(text)))
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl PartialEq for SnapshotKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes() == other.0.as_bytes()
    }
}

impl Eq for SnapshotKey {}

impl PartialOrd for SnapshotKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SnapshotKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.as_bytes().cmp(other.0.as_bytes())
    }
}

impl Hash for SnapshotKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.as_bytes().hash(state);
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

impl FromStr for SnapshotKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::new(text)
    }
}

impl fmt::Display for SnapshotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for SnapshotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl AsRef<str> for SnapshotKey {
    fn as_ref(&self) -> &str {
        self.as_str()
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

    #[test]
    fn keys_of_any_length_are_in_the_order_of_their_texts() {
        assert_eq!(size_of::<SnapshotKey>(), size_of::<Option<SnapshotKey>>());
        assert!(size_of::<SnapshotKey>() <= 32);
        let mut texts: Vec<String> = ["a", "b"]
            .iter()
            .flat_map(|letter| [1, 2, SHORT - 1, SHORT, SHORT + 1, 200].map(|length| letter.repeat(length)))
            .collect();
        texts.sort();
        let keys: Vec<SnapshotKey> = texts.iter().map(|text| text.parse().unwrap()).collect();
        assert!(keys.is_sorted());
        for (key, text) in keys.iter().zip(&texts) {
            assert_eq!(key.as_str(), text);
            assert_eq!(key, &text.parse().unwrap());
        }
        let set: std::collections::HashSet<SnapshotKey> = keys.iter().chain(&keys).cloned().collect();
        assert_eq!(set.len(), keys.len());
    }
}

//! What this program says it is.

use std::fmt;

/// A program's version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Version {
    /// Whose program it is.
    pub package: String,
    /// The version of BuildKit that it is compatible with, and its own after a `+`.
    pub version: String,
    /// The commit it was built from; may be empty.
    pub revision: String,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.package, self.version, self.revision)
    }
}

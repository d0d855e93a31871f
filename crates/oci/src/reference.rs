//! Image references in Docker's normal form: `domain/path[:tag][@digest]`.
//!
//! Grammar and normalization are those of the `distribution/reference` library, as are the texts of errors.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::{Digest, DigestError};

const HUB: &str = "docker.io";
const HUB_LEGACY: &str = "index.docker.io";
const OFFICIAL: &str = "library/";
const NAME_MAX: usize = 255;

/// Why a text is not a reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// The text does not follow the grammar.
    #[error("invalid reference format")]
    Format,
    /// There is no text.
    #[error("repository name must have at least one component")]
    NoName,
    /// The name has upper-case letters.
    #[error("invalid reference format: repository name ({0}) must be lowercase")]
    UppercaseName(String),
    /// Only lower case would make the text a reference.
    #[error("repository name must be lowercase")]
    Uppercase,
    /// The name is longer than 255 bytes.
    #[error("repository name must not be more than 255 characters")]
    TooLong,
    /// The text is what an image ID looks like.
    #[error("invalid repository name ({0}), cannot specify 64-byte hexadecimal strings")]
    Identifier(String),
    /// The tag does not follow the grammar.
    #[error("invalid tag format")]
    Tag,
    /// The digest is not one.
    #[error("{0}")]
    Digest(#[source] DigestError),
}

/// A reference to an image: a name, perhaps a tag, perhaps a digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    /// Empty when what stands before the first slash cannot be a domain, such as `a_b.c/d`.
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Parses a reference as people write it: `alpine` is `docker.io/library/alpine`.
    ///
    /// Source: `ParseNormalizedNamed` of `distribution/reference`. No tag is added, see [`Reference::with_default_tag`].
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        if text.len() == 64 && text.bytes().all(|c| matches!(c, b'a'..=b'f' | b'0'..=b'9')) {
            return Err(ReferenceError::Identifier(text.into()));
        }
        let (domain, remainder) = split_domain(text);
        let remote = remainder.split(':').next().unwrap_or_default();
        if remote.to_lowercase() != remote {
            return Err(ReferenceError::UppercaseName(remote.into()));
        }
        let full = format!("{domain}/{remainder}");
        parse_grammar(&full).map_err(|err| match err {
            ReferenceError::Format if parse_grammar(&full.to_lowercase()).is_ok_or_digest() => {
                ReferenceError::Uppercase
            }
            other => other,
        })
    }

    /// Parses a reference as it is written: nothing is added to the name.
    ///
    /// Source: `Parse` of `distribution/reference`.
    pub fn parse_exact(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::NoName);
        }
        parse_grammar(text).map_err(|err| match err {
            ReferenceError::Format if parse_grammar(&text.to_lowercase()).is_ok_or_digest() => {
                ReferenceError::Uppercase
            }
            other => other,
        })
    }

    /// Returns the registry, such as `docker.io`, with its port.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Returns the repository within the registry, such as `library/alpine`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Returns domain and path, without tag and digest.
    pub fn name(&self) -> String {
        if self.domain.is_empty() {
            self.path.clone()
        } else {
            format!("{}/{}", self.domain, self.path)
        }
    }

    /// Returns the tag.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Returns the digest.
    pub const fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Tells whether there is neither tag nor digest.
    pub const fn is_name_only(&self) -> bool {
        self.tag.is_none() && self.digest.is_none()
    }

    /// Adds the tag `latest` where there is neither tag nor digest.
    #[must_use]
    pub fn with_default_tag(mut self) -> Self {
        if self.is_name_only() {
            self.tag = Some("latest".into());
        }
        self
    }

    /// Replaces the tag.
    pub fn with_tag(mut self, tag: &str) -> Result<Self, ReferenceError> {
        if !is_tag(tag) {
            return Err(ReferenceError::Tag);
        }
        self.tag = Some(tag.into());
        Ok(self)
    }

    /// Replaces the digest.
    #[must_use]
    pub fn with_digest(mut self, digest: Digest) -> Self {
        self.digest = Some(digest);
        self
    }

    /// Removes tag and digest.
    #[must_use]
    pub fn without_tag_and_digest(mut self) -> Self {
        self.tag = None;
        self.digest = None;
        self
    }

    /// Removes the tag.
    #[must_use]
    pub fn without_tag(mut self) -> Self {
        self.tag = None;
        self
    }

    /// Returns the name as people write it: without `docker.io/` and `library/`.
    pub fn familiar_name(&self) -> String {
        if self.domain != HUB {
            return self.name();
        }
        match self.path.strip_prefix(OFFICIAL) {
            Some(rest) if !rest.contains('/') => rest.into(),
            _ => self.path.clone(),
        }
    }

    /// Returns the whole reference as people write it.
    pub fn familiar(&self) -> String {
        self.with_suffixes(self.familiar_name())
    }

    fn with_suffixes(&self, mut out: String) -> String {
        if let Some(tag) = &self.tag {
            out.push(':');
            out.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            out.push('@');
            out.push_str(&digest.to_string());
        }
        out
    }
}

/// Formats the normal form.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.with_suffixes(self.name()))
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        Self::parse(text)
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Splits off what people mean as a registry, and fills in Docker Hub where they name none.
fn split_domain(text: &str) -> (&str, String) {
    let Some((first, rest)) = text.split_once('/') else {
        return (HUB, format!("{OFFICIAL}{text}"));
    };
    let (domain, remainder) = if first == HUB_LEGACY {
        (HUB, rest)
    } else if first == "localhost" || first.contains(['.', ':']) || first.to_lowercase() != first {
        (first, rest)
    } else {
        (HUB, text)
    };
    if domain == HUB && !remainder.contains('/') {
        return (HUB, format!("{OFFICIAL}{remainder}"));
    }
    (domain, remainder.into())
}

trait Outcome {
    /// Tells whether the text followed the grammar, whatever its digest or length.
    fn is_ok_or_digest(&self) -> bool;
}

impl Outcome for Result<Reference, ReferenceError> {
    fn is_ok_or_digest(&self) -> bool {
        !matches!(self, Err(ReferenceError::Format))
    }
}

fn parse_grammar(text: &str) -> Result<Reference, ReferenceError> {
    let (rest, digest) = match text.split_once('@') {
        None => (text, None),
        Some((rest, digest)) if is_digest(digest) => (rest, Some(digest)),
        Some(_) => return Err(ReferenceError::Format),
    };
    let last_slash = rest.rfind('/').map_or(0, |at| at + 1);
    let (name, tag) = match rest[last_slash..].find(':') {
        None => (rest, None),
        Some(at) => (&rest[..last_slash + at], Some(&rest[last_slash + at + 1..])),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(ReferenceError::Format);
    }
    let (domain, path) = match name.split_once('/') {
        Some((domain, path)) if is_domain(domain) && is_path(path) => (domain, path),
        _ if is_path(name) => ("", name),
        _ => return Err(ReferenceError::Format),
    };
    if path.len() > NAME_MAX {
        return Err(ReferenceError::TooLong);
    }
    let digest = digest
        .map(str::parse)
        .transpose()
        .map_err(ReferenceError::Digest)?;
    Ok(Reference {
        domain: domain.into(),
        path: path.into(),
        tag: tag.map(str::to_owned),
        digest,
    })
}

fn is_tag(tag: &str) -> bool {
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    (1..=128).contains(&tag.len())
        && tag.bytes().all(|c| word(c) || c == b'.' || c == b'-')
        && tag.bytes().next().is_some_and(word)
}

fn is_digest(text: &str) -> bool {
    let Some((algorithm, hex)) = text.split_once(':') else {
        return false;
    };
    let component = |part: &str| {
        part.bytes().next().is_some_and(|c| c.is_ascii_alphabetic())
            && part.bytes().all(|c| c.is_ascii_alphanumeric())
    };
    hex.len() >= 32
        && hex.bytes().all(|c| c.is_ascii_hexdigit())
        && algorithm.split(['-', '_', '+', '.']).all(component)
}

fn is_domain(domain: &str) -> bool {
    if let Some(rest) = domain.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return false;
        };
        return !address.is_empty()
            && address.bytes().all(|c| c.is_ascii_hexdigit() || c == b':')
            && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
    }
    let (host, port) = domain
        .split_once(':')
        .map_or((domain, None), |(host, port)| (host, Some(port)));
    let component = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    port.is_none_or(is_port) && host.split('.').all(component)
}

fn is_port(port: &str) -> bool {
    !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit())
}

fn is_path(path: &str) -> bool {
    path.split('/').all(is_path_component)
}

/// Lower-case words joined by one dot, one or two underscores, or any number of dashes.
fn is_path_component(component: &str) -> bool {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let mut rest = component;
    loop {
        let after = rest.trim_start_matches(is_word);
        if after.len() == rest.len() {
            return false;
        }
        if after.is_empty() {
            return true;
        }
        let word = after.find(is_word).unwrap_or(after.len());
        let separator = &after[..word];
        if !matches!(separator, "." | "_" | "__") && !separator.bytes().all(|c| c == b'-') {
            return false;
        }
        rest = &after[word..];
    }
}

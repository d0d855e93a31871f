//! Content digests: `algorithm:hex`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256, Sha384, Sha512};

/// Hash algorithm of a [`Digest`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// SHA-256, the canonical one.
    #[default]
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    /// Returns the name that stands before the colon.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    /// Returns the length of the hash in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        match name {
            "sha256" => Some(Self::Sha256),
            "sha384" => Some(Self::Sha384),
            "sha512" => Some(Self::Sha512),
            _ => None,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a string is not a digest. The texts are those of Go's `go-digest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// The text does not have the form `algorithm:encoded`.
    #[error("invalid checksum digest format")]
    Format,
    /// The hexadecimal part has the wrong length for the algorithm.
    #[error("invalid checksum digest length")]
    Length,
    /// The algorithm is well-formed but not supported.
    #[error("unsupported digest algorithm")]
    Unsupported,
}

/// The digest of some bytes. Ordered as its text is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: Algorithm,
    /// The hash, zero-filled behind `algorithm.size()`.
    bytes: [u8; 64],
}

impl Digest {
    /// Computes the SHA-256 digest of `bytes`.
    pub fn sha256(bytes: impl AsRef<[u8]>) -> Self {
        Self::of(Algorithm::Sha256, bytes)
    }

    /// Computes the digest of `bytes` with `algorithm`.
    pub fn of(algorithm: Algorithm, bytes: impl AsRef<[u8]>) -> Self {
        let mut digester = Digester::new(algorithm);
        digester.update(bytes.as_ref());
        digester.finish()
    }

    /// Wraps an already computed hash; `Length` unless it has `algorithm.size()` bytes.
    pub fn from_hash(algorithm: Algorithm, hash: &[u8]) -> Result<Self, DigestError> {
        if hash.len() != algorithm.size() {
            return Err(DigestError::Length);
        }
        let mut bytes = [0; 64];
        bytes[..hash.len()].copy_from_slice(hash);
        Ok(Self { algorithm, bytes })
    }

    /// Returns the algorithm.
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Returns the raw hash.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.algorithm.size()]
    }

    /// Returns the part after the colon, in lower-case hexadecimal.
    pub fn hex(&self) -> String {
        hex_of(self.as_bytes())
    }

    /// Starts a digester that computes a digest comparable with this one.
    pub fn verifier(&self) -> Digester {
        Digester::new(self.algorithm)
    }
}

const HEX: &[u8; 16] = b"0123456789abcdef";

fn hex_of(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        out.push(char::from(HEX[usize::from(byte >> 4)]));
        out.push(char::from(HEX[usize::from(byte & 15)]));
    }
    out
}

/// Longest text of a digest: `sha512:` and 128 digits.
const MAX_TEXT: usize = 7 + 128;

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Definitions name each vertex several times: no allocation here.
        let mut text = [0_u8; MAX_TEXT];
        let name = self.algorithm.as_str().as_bytes();
        text[..name.len()].copy_from_slice(name);
        text[name.len()] = b':';
        let hash = self.as_bytes();
        let end = name.len() + 1 + hash.len() * 2;
        for (slot, byte) in text[name.len() + 1..end].chunks_exact_mut(2).zip(hash) {
            slot[0] = HEX[usize::from(byte >> 4)];
            slot[1] = HEX[usize::from(byte & 15)];
        }
        f.pad(std::str::from_utf8(&text[..end]).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(s: &str) -> Result<Self, DigestError> {
        let (name, encoded) = s.split_once(':').ok_or(DigestError::Format)?;
        if name.is_empty() || encoded.is_empty() {
            return Err(DigestError::Format);
        }
        let Some(algorithm) = Algorithm::from_name(name) else {
            return Err(if is_foreign_digest(name, encoded) {
                DigestError::Unsupported
            } else {
                DigestError::Format
            });
        };
        if encoded.len() != algorithm.size() * 2 {
            return Err(DigestError::Length);
        }
        let mut bytes = [0; 64];
        for (slot, pair) in bytes.iter_mut().zip(encoded.as_bytes().chunks_exact(2)) {
            *slot = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self { algorithm, bytes })
    }
}

fn nibble(c: u8) -> Result<u8, DigestError> {
    match c {
        b'0'..=b'9' => Ok(c - b'0'),
        b'a'..=b'f' => Ok(c - b'a' + 10),
        _ => Err(DigestError::Format),
    }
}

/// Tells whether the two parts would form a digest of some algorithm this crate does not know.
fn is_foreign_digest(name: &str, encoded: &str) -> bool {
    let mut separated = true;
    for c in name.bytes() {
        match c {
            b'a'..=b'z' | b'0'..=b'9' => separated = false,
            b'.' | b'+' | b'_' | b'-' if !separated => separated = true,
            _ => return false,
        }
    }
    !separated
        && encoded
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'=' | b'_' | b'-'))
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Computes a digest piece by piece. Also an [`std::io::Write`] that never fails.
#[derive(Clone)]
pub struct Digester(State);

#[derive(Clone)]
enum State {
    Sha256(Sha256),
    Sha384(Sha384),
    Sha512(Sha512),
}

impl Digester {
    /// Starts an empty digester.
    pub fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Sha256 => State::Sha256(Sha256::new()),
            Algorithm::Sha384 => State::Sha384(Sha384::new()),
            Algorithm::Sha512 => State::Sha512(Sha512::new()),
        })
    }

    /// Starts an empty SHA-256 digester.
    pub fn sha256() -> Self {
        Self::new(Algorithm::Sha256)
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: impl AsRef<[u8]>) {
        match &mut self.0 {
            State::Sha256(hash) => hash.update(bytes),
            State::Sha384(hash) => hash.update(bytes),
            State::Sha512(hash) => hash.update(bytes),
        }
    }

    /// Returns the digest of everything added.
    pub fn finish(self) -> Digest {
        let mut bytes = [0; 64];
        let algorithm = match self.0 {
            State::Sha256(hash) => {
                bytes[..32].copy_from_slice(&hash.finalize());
                Algorithm::Sha256
            }
            State::Sha384(hash) => {
                bytes[..48].copy_from_slice(&hash.finalize());
                Algorithm::Sha384
            }
            State::Sha512(hash) => {
                bytes.copy_from_slice(&hash.finalize());
                Algorithm::Sha512
            }
        };
        Digest { algorithm, bytes }
    }
}

impl Default for Digester {
    fn default() -> Self {
        Self::sha256()
    }
}

impl fmt::Debug for Digester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digester")
    }
}

impl std::io::Write for Digester {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.update(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Returns the chain ID of a stack of layers given by diffIDs, bottom first; none for no layers.
///
/// Source: OCI image specification, "Layer ChainID".
pub fn chain_id(diff_ids: &[Digest]) -> Option<Digest> {
    chain_ids(diff_ids).pop()
}

/// Returns the chain ID of every prefix of a stack of layers, bottom first.
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut out: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match out.last() {
            None => *diff_id,
            Some(parent) => Digest::sha256(format!("{parent} {diff_id}")),
        };
        out.push(next);
    }
    out
}

//! The keys by which a daemon recognises who may use a token again: each is made of the daemon's salt and a seed that this
//! user keeps for a registry host, in the same file as other clients do.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

const SEEDS: &str = ".token_seed";
const LOCK: &str = ".token_seed.lock";
const SEED_BYTES: usize = 16;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The seeds cannot be kept.
    #[error("token seeds in {dir}: {source}")]
    Seeds {
        /// Where.
        dir: String,
        /// Why.
        source: io::Error,
    },
    /// The system gives no random bytes, or no key can be made of them.
    #[error("no key can be made")]
    Key,
}

impl From<ring::error::Unspecified> for AuthorityError {
    fn from(_: ring::error::Unspecified) -> Self {
        Self::Key
    }
}

/// A key for one registry host and one daemon.
#[derive(Debug)]
pub(super) struct Authority(Ed25519KeyPair);

impl Authority {
    /// Makes the key; `dir` has the seeds, which are not needed for anonymous access. Blocking.
    pub(super) fn new(
        dir: Option<&Path>,
        host: &str,
        salt: &[u8],
        has_secret: bool,
    ) -> Result<Self, AuthorityError> {
        let mut mac = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, salt));
        if has_secret {
            mac.update(&seed(dir, host)?);
        }
        let pair =
            Ed25519KeyPair::from_seed_unchecked(mac.sign().as_ref()).map_err(|_| AuthorityError::Key)?;
        Ok(Self(pair))
    }

    /// The public half.
    pub(super) fn public_key(&self) -> Vec<u8> {
        self.0.public_key().as_ref().to_vec()
    }

    /// A message behind its signature.
    pub(super) fn signed(&self, message: &[u8]) -> Vec<u8> {
        [self.0.sign(message).as_ref(), message].concat()
    }
}

#[derive(Default, Deserialize, Serialize)]
struct Seed {
    #[serde(rename = "Seed", default)]
    seed: String,
}

/// Reads a host's seed, or makes it. Where nothing can be written it is new every time.
fn seed(dir: Option<&Path>, host: &str) -> Result<Vec<u8>, AuthorityError> {
    let Some(dir) = dir else { return new_seed() };
    let failed = |source| AuthorityError::Seeds {
        dir: dir.display().to_string(),
        source,
    };
    unless_unwritable(DirBuilder::new().recursive(true).mode(0o755).create(dir)).map_err(failed)?;
    let _lock = unless_unwritable(lock(&dir.join(LOCK))).map_err(failed)?;
    let path = dir.join(SEEDS);
    let text = match fs::read(&path) {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            unless_unwritable(Err(error)).map_err(failed)?.unwrap_or_default()
        }
        read => read.unwrap_or_default(),
    };
    // What was cut off by a crash is no loss.
    let mut seeds: BTreeMap<String, Seed> = serde_json::from_slice(&text).unwrap_or_default();
    let known = seeds
        .get(host)
        .and_then(|known| STANDARD.decode(&known.seed).ok());
    if let Some(known) = known.filter(|known| !known.is_empty()) {
        return Ok(known);
    }
    let made = new_seed()?;
    let entry = Seed {
        seed: STANDARD.encode(&made),
    };
    seeds.insert(host.to_owned(), entry);
    let text = serde_json::to_vec_pretty(&seeds).map_err(|error| failed(error.into()))?;
    unless_unwritable(write(&path, &text)).map_err(failed)?;
    Ok(made)
}

fn new_seed() -> Result<Vec<u8>, AuthorityError> {
    let mut seed = [0; SEED_BYTES];
    SystemRandom::new().fill(&mut seed)?;
    Ok(seed.to_vec())
}

fn lock(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockExclusive))?;
    Ok(file)
}

fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text)
}

/// Turns the failures of a home that cannot be written to into `None`.
fn unless_unwritable<T>(done: io::Result<T>) -> io::Result<Option<T>> {
    match done {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ReadOnlyFilesystem
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        done => done.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(dir: &Path, host: &str, salt: &[u8], has_secret: bool) -> Vec<u8> {
        Authority::new(Some(dir), host, salt, has_secret)
            .unwrap()
            .public_key()
    }

    #[test]
    fn a_key_is_of_a_user_a_host_and_a_daemon() {
        let (home, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let dir = home.path().join("docker");
        let first = key(&dir, "h", b"salt", true);
        assert_eq!(first.len(), 32);
        assert_eq!(key(&dir, "h", b"salt", true), first);
        assert_ne!(key(&dir, "i", b"salt", true), first);
        assert_ne!(key(&dir, "h", b"pepper", true), first);
        assert_ne!(key(other.path(), "h", b"salt", true), first);
        // Everybody is the same stranger.
        let anonymous = key(&dir, "h", b"salt", false);
        assert_eq!(key(other.path(), "h", b"salt", false), anonymous);
    }

    #[test]
    fn seeds_of_other_clients_are_used_and_kept() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(SEEDS);
        fs::write(&path, r#"{"h":{"Seed":"AAECAwQFBgcICQoLDA0ODw=="}}"#).unwrap();
        assert_eq!(
            seed(Some(home.path()), "h").unwrap(),
            (0..16).collect::<Vec<u8>>()
        );
        let made = seed(Some(home.path()), "i").unwrap();
        assert_eq!(made.len(), SEED_BYTES);
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            text.contains("AAECAwQFBgcICQoLDA0ODw==") && text.contains(&STANDARD.encode(&made)),
            "{text}"
        );
        fs::write(&path, "{\"h\":").unwrap();
        assert_eq!(seed(Some(home.path()), "h").unwrap().len(), SEED_BYTES);
    }

    #[test]
    fn a_signature_is_that_of_the_key() {
        let authority = Authority::new(None, "h", b"salt", false).unwrap();
        let signed = authority.signed(b"message");
        let (signature, message) = signed.split_at(64);
        assert_eq!(message, b"message");
        let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, authority.public_key());
        key.verify(message, signature).unwrap();
    }
}

//! Detached signatures of OpenPGP and SSH, checked against public keys that the client gives.
//!
//! Sources: RFC 9580 (keys and signatures of version 4, which are those of RFC 4880), and `PROTOCOL.sshsig` of OpenSSH.
//! What is not known is refused, also where a more lenient reader would go on: unknown critical parts, weak hashes, keys
//! that are not for signing.

mod pgp;
mod ssh;

use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{UnparsedPublicKey, VerificationAlgorithm};

/// Why a signature does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SignatureError {
    /// It is neither of OpenPGP nor of SSH.
    #[error("invalid signature format")]
    Format,
    /// The key is no OpenPGP key.
    #[error("failed to read armored public key: {0}")]
    PgpKey(&'static str),
    /// The signature is no OpenPGP signature.
    #[error("failed to read armored signature: {0}")]
    Pgp(&'static str),
    /// The key is no SSH key.
    #[error("failed to parse ssh public key: {0}")]
    SshKey(&'static str),
    /// The signature is no SSH signature.
    #[error("failed to parse ssh signature: {0}")]
    Ssh(&'static str),
    /// It is of a kind that is not accepted.
    #[error("rejecting {what}: {name}")]
    Rejected {
        /// Of what.
        what: &'static str,
        /// Its name or number.
        name: String,
    },
    /// The key is not good for this signature.
    #[error("signature by {issuer}: {reason}")]
    Key {
        /// The key that the signature names.
        issuer: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The key did not make the signature.
    #[error("failed to verify {0} signature")]
    Mismatch(&'static str),
}

/// Under what a signature is checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// The time of the check.
    pub now: SystemTime,
    /// Refuse keys that have expired since they signed.
    pub reject_expired: bool,
}

/// Checks an armored signature of `signed`. SSH signatures must be made for `namespace`.
pub(super) fn verify(
    signed: &[u8],
    signature: &str,
    public_key: &str,
    namespace: &str,
    terms: Terms,
) -> Result<(), SignatureError> {
    if signature.starts_with("-----BEGIN PGP SIGNATURE-----") {
        pgp::verify(signed, signature, public_key, terms)
    } else if signature.starts_with(ssh::ARMOR) {
        ssh::verify(signed, signature, public_key, namespace)
    } else {
        Err(SignatureError::Format)
    }
}

/// Checks an armored signature of `signed` as [`verify`] does, that must be of OpenPGP.
pub(super) fn verify_openpgp(
    signed: &[u8],
    signature: &str,
    public_key: &str,
    terms: Terms,
) -> Result<(), SignatureError> {
    pgp::verify(signed, signature, public_key, terms)
}

/// Reads numbers and strings in the order in which they are written; all are big-endian.
#[derive(Clone, Copy, Debug)]
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    fn number(&mut self, bytes: usize) -> Option<u32> {
        let bytes = self.take(bytes)?;
        Some(
            bytes
                .iter()
                .fold(0, |number, byte| (number << 8) | u32::from(*byte)),
        )
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    /// A string after its length in as many bytes.
    fn string(&mut self, length_bytes: usize) -> Option<&'a [u8]> {
        let length = usize::try_from(self.number(length_bytes)?).ok()?;
        self.take(length)
    }
}

/// Makes a number of a fixed length.
fn padded(number: &[u8], length: usize) -> Option<Vec<u8>> {
    let start = number.iter().position(|byte| *byte != 0).unwrap_or(number.len());
    let digits = number.get(start..)?;
    let mut out = vec![0; length.checked_sub(digits.len())?];
    out.extend_from_slice(digits);
    Some(out)
}

fn base64(lines: impl Iterator<Item = impl AsRef<str>>) -> Option<Vec<u8>> {
    let text: String = lines.map(|line| line.as_ref().trim().to_owned()).collect();
    STANDARD.decode(text).ok()
}

fn holds(
    algorithm: &'static dyn VerificationAlgorithm,
    key: &[u8],
    message: &[u8],
    signature: &[u8],
) -> bool {
    UnparsedPublicKey::new(algorithm, key)
        .verify(message, signature)
        .is_ok()
}

#[cfg(test)]
mod tests;

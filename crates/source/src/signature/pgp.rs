//! OpenPGP signatures of data: by a key of the given keyring that was for signing, not revoked, and not expired.
//!
//! A key is what its owner says of it in the newest signature of its own that holds; what is not signed by the owner counts
//! for nothing.

mod keyring;
mod packet;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{SignatureError, Terms, base64};
use keyring::{Entity, Usable};
use packet::{PublicKey, Signature};

/// How far a signer's clock may be ahead.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);
/// The type of a signature of bytes as they are.
const OVER_BYTES: u8 = 0x00;

/// Decodes the armored blocks of a text: their type and their bytes.
fn dearmored(text: &str) -> Option<Vec<(String, Vec<u8>)>> {
    let mut blocks = Vec::new();
    let mut lines = text.lines().map(str::trim_end);
    while let Some(line) = lines.next() {
        let kind = line
            .strip_prefix("-----BEGIN PGP ")
            .and_then(|rest| rest.strip_suffix("-----"));
        let Some(kind) = kind else { continue };
        let end = format!("-----END PGP {kind}-----");
        let mut body = Vec::new();
        let mut in_headers = true;
        loop {
            let line = lines.next()?;
            if line == end {
                break;
            }
            if in_headers && (line.is_empty() || line.contains(": ")) {
                in_headers = !line.is_empty();
                continue;
            }
            in_headers = false;
            // The checksum at the end is optional, and guards against nothing that the signature does not.
            if !line.starts_with('=') {
                body.push(line);
            }
        }
        blocks.push((kind.to_owned(), base64(body.iter())?));
    }
    Some(blocks)
}

fn read_signature(text: &str) -> Result<Signature, SignatureError> {
    let blocks = dearmored(text).ok_or(SignatureError::Pgp("it is not in armor"))?;
    let (_, bytes) = blocks
        .into_iter()
        .find(|(kind, _)| kind == "SIGNATURE")
        .ok_or(SignatureError::Pgp("there is no signature"))?;
    let packets = packet::read(&bytes).ok_or(SignatureError::Pgp("it is malformed"))?;
    let signature = packets
        .iter()
        .find(|packet| packet.tag == packet::SIGNATURE)
        .ok_or(SignatureError::Pgp("no signature packet found"))?;
    Signature::read(signature.body).ok_or(SignatureError::Pgp("it is malformed, or of a version not known"))
}

fn read_keys(text: &str) -> Result<Vec<Entity>, SignatureError> {
    let blocks = dearmored(text).ok_or(SignatureError::PgpKey("it is malformed"))?;
    let mut entities = Vec::new();
    for (kind, bytes) in blocks {
        if kind != "PUBLIC KEY BLOCK" {
            return Err(SignatureError::PgpKey("it is no public key block"));
        }
        let packets = packet::read(&bytes).ok_or(SignatureError::PgpKey("it is malformed"))?;
        entities.extend(Entity::read(&packets));
    }
    if entities.is_empty() {
        return Err(SignatureError::PgpKey("no armored data found"));
    }
    Ok(entities)
}

/// Checks a signature.
pub(super) fn verify(
    message: &[u8],
    armored: &str,
    public_key: &str,
    terms: Terms,
) -> Result<(), SignatureError> {
    let signature = read_signature(armored)?;
    let entities = read_keys(public_key)?;
    signature.check_algorithms()?;
    if signature.kind != OVER_BYTES {
        return Err(SignatureError::Rejected {
            what: "signature type",
            name: signature.kind.to_string(),
        });
    }
    let issuer = signature.issuer().unwrap_or_default();
    let refuse = |reason| SignatureError::Key {
        issuer: issuer.iter().map(|byte| format!("{byte:02X}")).collect(),
        reason,
    };
    let made = signature
        .created()
        .ok_or_else(|| refuse("it does not say when it was made"))?;
    if made > terms.now + CLOCK_SKEW {
        return Err(refuse("signature creation time is in the future"));
    }
    let at = if terms.reject_expired { terms.now } else { made };
    if signature.expires().is_some_and(|expiry| at >= expiry) {
        return Err(refuse("signature expired"));
    }
    let mut reason = "openpgp: signature made by unknown entity";
    for key in entities.iter().flat_map(|entity| entity.keys(&issuer)) {
        match usable(&key, made, at) {
            Ok(()) if signature.holds(key.key, &[message]) => return Ok(()),
            Ok(()) => reason = "openpgp: invalid signature",
            Err(found) => reason = found,
        }
    }
    Err(refuse(reason))
}

/// Whether a key was good for a signature of a time, and still is at another.
fn usable(key: &Usable<'_>, made: SystemTime, at: SystemTime) -> Result<(), &'static str> {
    if key.is_revoked {
        return Err("key revoked");
    }
    if !key.is_for_signing {
        return Err("openpgp: key is not for signing");
    }
    if created(key.key) > made {
        return Err("openpgp: key is younger than the signature");
    }
    if key.expiry.is_some_and(|expiry| at >= expiry) {
        return Err("openpgp: key expired");
    }
    Ok(())
}

fn created(key: &PublicKey) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::from(key.created))
}

//! Packets, keys and signatures as they are written.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, SHA384, SHA512, digest};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RsaPublicKeyComponents,
};

use super::super::{Reader, SignatureError, holds, padded};

/// Tag of a signature.
pub(super) const SIGNATURE: u8 = 2;
/// Tag of a primary key.
pub(super) const PUBLIC_KEY: u8 = 6;
/// Tag of a name of a key's owner.
pub(super) const USER_ID: u8 = 13;
/// Tag of a subkey.
pub(super) const PUBLIC_SUBKEY: u8 = 14;
/// Tag of a picture or the like of a key's owner.
pub(super) const USER_ATTRIBUTE: u8 = 17;

/// Subpackets, by type.
const CREATED: u8 = 2;
const EXPIRES: u8 = 3;
const KEY_EXPIRES: u8 = 9;
const ISSUER: u8 = 16;
const KEY_FLAGS: u8 = 27;
const EMBEDDED: u8 = 32;
const ISSUER_FINGERPRINT: u8 = 33;
/// Types that are understood, or say nothing that matters here, although they are critical.
const KNOWN: [u8; 14] = [2, 3, 9, 11, 16, 21, 22, 23, 25, 27, 28, 30, 32, 33];

const RSA: [u8; 2] = [1, 3];
const ECDSA: u8 = 19;
const EDDSA: u8 = 22;

/// One packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet<'a> {
    /// What it is.
    pub tag: u8,
    /// Its bytes.
    pub body: &'a [u8],
}

/// Reads packets. None of partial or unknown length: keys and signatures have no such.
pub(super) fn read(bytes: &[u8]) -> Option<Vec<Packet<'_>>> {
    let mut from = Reader(bytes);
    let mut packets = Vec::new();
    while !from.0.is_empty() {
        let head = from.byte()?;
        if head & 0x80 == 0 {
            return None;
        }
        let (tag, length) = if head & 0x40 == 0 {
            let length = match head & 3 {
                0 => from.number(1)?,
                1 => from.number(2)?,
                2 => from.number(4)?,
                _ => return None,
            };
            ((head >> 2) & 0x0f, length)
        } else {
            (head & 0x3f, new_length(&mut from, 224)?)
        };
        let body = from.take(usize::try_from(length).ok()?)?;
        packets.push(Packet { tag, body });
    }
    Some(packets)
}

/// A length in one, two or five bytes; first bytes between `partial` and 255 are not lengths of two.
fn new_length(from: &mut Reader<'_>, partial: u8) -> Option<u32> {
    match from.byte()? {
        first @ ..192 => Some(u32::from(first)),
        255 => from.number(4),
        first if first < partial => Some(((u32::from(first) - 192) << 8) + u32::from(from.byte()?) + 192),
        _ => None,
    }
}

/// A number after the count of its bits.
fn mpi<'a>(from: &mut Reader<'a>) -> Option<&'a [u8]> {
    let bits = from.number(2)?;
    from.take(usize::try_from(bits.div_ceil(8)).ok()?)
}

/// What a key's numbers are.
#[derive(Clone, Debug)]
enum Numbers {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
    /// Of a kind that signs nothing here.
    Other,
}

/// A public key of version 4.
#[derive(Clone, Debug)]
pub(super) struct PublicKey {
    /// Seconds since 1970.
    pub created: u32,
    /// The last bytes of its fingerprint.
    pub id: [u8; 8],
    /// The packet's bytes, which signatures cover.
    pub body: Vec<u8>,
    numbers: Numbers,
}

impl PublicKey {
    /// Reads a packet's body; `None` for another version.
    pub fn read(body: &[u8]) -> Option<Self> {
        let mut from = Reader(body);
        if from.byte()? != 4 {
            return None;
        }
        let created = from.number(4)?;
        let numbers = match from.byte()? {
            kind if RSA.contains(&kind) => Numbers::Rsa {
                n: mpi(&mut from)?.to_vec(),
                e: mpi(&mut from)?.to_vec(),
            },
            kind @ (ECDSA | EDDSA) => {
                let curve = from.string(1)?;
                let point = mpi(&mut from)?;
                match (kind, curve) {
                    (ECDSA, b"\x2a\x86\x48\xce\x3d\x03\x01\x07") => Numbers::P256(point.to_vec()),
                    (ECDSA, b"\x2b\x81\x04\x00\x22") => Numbers::P384(point.to_vec()),
                    (EDDSA, b"\x2b\x06\x01\x04\x01\xda\x47\x0f\x01") => {
                        Numbers::Ed25519(point.strip_prefix(&[0x40])?.to_vec())
                    }
                    _ => Numbers::Other,
                }
            }
            _ => Numbers::Other,
        };
        let mut covered = vec![0x99];
        covered.extend_from_slice(&u16::try_from(body.len()).ok()?.to_be_bytes());
        covered.extend_from_slice(body);
        let fingerprint = digest(&SHA1_FOR_LEGACY_USE_ONLY, &covered);
        let id = fingerprint.as_ref().get(12..20)?.try_into().ok()?;
        Some(Self {
            created,
            id,
            body: covered,
            numbers,
        })
    }
}

/// A signature of version 4.
#[derive(Clone, Debug)]
pub(super) struct Signature {
    /// What it is about.
    pub kind: u8,
    algorithm: u8,
    hash: u8,
    /// The part of it that it covers itself.
    covered: Vec<u8>,
    hashed: Vec<(u8, Vec<u8>)>,
    unhashed: Vec<(u8, Vec<u8>)>,
    numbers: Vec<Vec<u8>>,
}

impl Signature {
    /// Reads a packet's body; `None` for another version, and for what is critical and not known.
    pub fn read(body: &[u8]) -> Option<Self> {
        let mut from = Reader(body);
        let &[4, kind, algorithm, hash] = from.take(4)? else {
            return None;
        };
        let hashed = from.string(2)?;
        let covered = body.get(..6 + hashed.len())?.to_vec();
        let unhashed = subpackets(from.string(2)?)?;
        from.take(2)?;
        let mut numbers = Vec::new();
        while !from.0.is_empty() {
            numbers.push(mpi(&mut from)?.to_vec());
        }
        Some(Self {
            kind,
            algorithm,
            hash,
            covered,
            hashed: subpackets(hashed)?,
            unhashed,
            numbers,
        })
    }

    /// Refuses what is weak or not known.
    pub fn check_algorithms(&self) -> Result<(), SignatureError> {
        let rejected = |what, number: u8| SignatureError::Rejected {
            what,
            name: number.to_string(),
        };
        if !matches!(self.hash, 8..=10) {
            return Err(rejected("weak/unknown hash", self.hash));
        }
        if !RSA.contains(&self.algorithm) && ![ECDSA, EDDSA].contains(&self.algorithm) {
            return Err(rejected("unsupported pubkey algorithm", self.algorithm));
        }
        Ok(())
    }

    fn find(&self, kind: u8) -> Option<&[u8]> {
        let found = self.hashed.iter().find(|(known, _)| *known == kind);
        found.map(|(_, value)| value.as_slice())
    }

    fn seconds(&self, kind: u8) -> Option<u64> {
        let value = self.find(kind)?;
        Some(u64::from(u32::from_be_bytes(value.try_into().ok()?)))
    }

    /// When it was made.
    pub fn created(&self) -> Option<SystemTime> {
        Some(UNIX_EPOCH + Duration::from_secs(self.seconds(CREATED)?))
    }

    /// When it is good no more; `None`: never.
    pub fn expires(&self) -> Option<SystemTime> {
        let after = self.seconds(EXPIRES).filter(|seconds| *seconds > 0)?;
        Some(self.created()? + Duration::from_secs(after))
    }

    /// For how many seconds from its making the key is good that this is about; `None`: for ever.
    pub fn key_lifetime(&self) -> Option<u64> {
        self.seconds(KEY_EXPIRES).filter(|seconds| *seconds > 0)
    }

    /// Whether the key that this is about signs data; `None`: it does not say.
    pub fn is_for_signing(&self) -> Option<bool> {
        self.find(KEY_FLAGS)
            .map(|flags| flags.first().is_some_and(|first| first & 2 != 0))
    }

    /// A signature within this one. It proves itself, so it need not be covered.
    pub fn embedded(&self) -> Option<Self> {
        let all = self.hashed.iter().chain(&self.unhashed);
        let mut embedded = all.filter(|(kind, _)| *kind == EMBEDDED);
        embedded.find_map(|(_, body)| Self::read(body))
    }

    /// The id of the key that is said to have made it. Only a hint, so it need not be covered.
    pub fn issuer(&self) -> Option<[u8; 8]> {
        let all = || self.hashed.iter().chain(&self.unhashed);
        let value = |kind| all().find(|(known, _)| *known == kind).map(|(_, value)| value);
        let by_fingerprint = || {
            let value = value(ISSUER_FINGERPRINT)?;
            (value.first() == Some(&4)).then_some(value)?.get(13..21)
        };
        let id = match value(ISSUER) {
            Some(id) => id.as_slice(),
            None => by_fingerprint()?,
        };
        id.try_into().ok()
    }

    /// Whether a key made this signature of these bytes.
    pub fn holds(&self, key: &PublicKey, parts: &[&[u8]]) -> bool {
        let mut message = parts.concat();
        message.extend_from_slice(&self.covered);
        message.extend_from_slice(&[4, 0xff]);
        let Ok(length) = u32::try_from(self.covered.len()) else {
            return false;
        };
        message.extend_from_slice(&length.to_be_bytes());
        self.check(key, &message).unwrap_or(false)
    }

    fn check(&self, key: &PublicKey, message: &[u8]) -> Option<bool> {
        let is_rsa = RSA.contains(&self.algorithm);
        match (&key.numbers, self.algorithm) {
            (Numbers::Rsa { n, e }, _) if is_rsa => {
                let parameters = match self.hash {
                    8 => &RSA_PKCS1_2048_8192_SHA256,
                    9 => &RSA_PKCS1_2048_8192_SHA384,
                    10 => &RSA_PKCS1_2048_8192_SHA512,
                    _ => return None,
                };
                let [number] = self.numbers.as_slice() else {
                    return None;
                };
                let number = padded(number, n.len())?;
                let key = RsaPublicKeyComponents { n, e };
                Some(key.verify(parameters, message, &number).is_ok())
            }
            // Curves sign with the hash of their own length.
            (Numbers::P256(point), ECDSA) if self.hash == 8 => {
                Some(holds(&ECDSA_P256_SHA256_FIXED, point, message, &self.pair(32)?))
            }
            (Numbers::P384(point), ECDSA) if self.hash == 9 => {
                Some(holds(&ECDSA_P384_SHA384_FIXED, point, message, &self.pair(48)?))
            }
            (Numbers::Ed25519(point), EDDSA) => {
                let hashed = match self.hash {
                    8 => digest(&SHA256, message),
                    9 => digest(&SHA384, message),
                    10 => digest(&SHA512, message),
                    _ => return None,
                };
                Some(holds(&ED25519, point, hashed.as_ref(), &self.pair(32)?))
            }
            _ => None,
        }
    }

    /// Two numbers, one after the other.
    fn pair(&self, length: usize) -> Option<Vec<u8>> {
        let [first, second] = self.numbers.as_slice() else {
            return None;
        };
        Some([padded(first, length)?, padded(second, length)?].concat())
    }
}

fn subpackets(bytes: &[u8]) -> Option<Vec<(u8, Vec<u8>)>> {
    let mut from = Reader(bytes);
    let mut found = Vec::new();
    while !from.0.is_empty() {
        let length = new_length(&mut from, 255)?;
        let mut body = Reader(from.take(usize::try_from(length).ok()?)?);
        let kind = body.byte()?;
        if kind & 0x80 != 0 && !KNOWN.contains(&(kind & 0x7f)) {
            return None;
        }
        found.push((kind & 0x7f, body.0.to_vec()));
    }
    Some(found)
}

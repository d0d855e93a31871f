//! Keys with what their owners say of them.

use std::time::{Duration, SystemTime};

use super::created;
use super::packet::{
    PUBLIC_KEY, PUBLIC_SUBKEY, Packet, PublicKey, SIGNATURE, Signature, USER_ATTRIBUTE, USER_ID,
};

/// Types of signatures of keys.
const CERTIFIES: std::ops::RangeInclusive<u8> = 0x10..=0x13;
const BINDS_SUBKEY: u8 = 0x18;
const BINDS_PRIMARY: u8 = 0x19;
const DIRECT: u8 = 0x1f;
const REVOKES_KEY: u8 = 0x20;
const REVOKES_SUBKEY: u8 = 0x28;
const REVOKES_NAME: u8 = 0x30;

/// A primary key, its names and its subkeys.
#[derive(Clone, Debug)]
pub(super) struct Entity {
    primary: PublicKey,
    /// Signatures that are about the primary key itself.
    direct: Vec<Signature>,
    /// Names, in the form in which signatures cover them, with the signatures after them.
    names: Vec<(Vec<u8>, Vec<Signature>)>,
    subkeys: Vec<(PublicKey, Vec<Signature>)>,
}

/// A key that may have made a signature.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usable<'a> {
    /// The key.
    pub key: &'a PublicKey,
    /// Whether its owner says that it signs data.
    pub is_for_signing: bool,
    /// When it is good no more; `None`: never.
    pub expiry: Option<SystemTime>,
    /// Whether its owner took it back.
    pub is_revoked: bool,
}

/// To what the signatures that follow belong.
enum Subject {
    Primary,
    Name,
    Subkey,
    /// Something that is passed over.
    Other,
}

impl Entity {
    /// Reads all keys of a block. What is of a version or kind that is not known is passed over with all that belongs to it.
    pub fn read(packets: &[Packet<'_>]) -> Vec<Self> {
        let mut entities: Vec<Self> = Vec::new();
        let mut subject = Subject::Other;
        let mut is_known = false;
        for packet in packets {
            if packet.tag == PUBLIC_KEY {
                let primary = PublicKey::read(packet.body);
                is_known = primary.is_some();
                subject = Subject::Primary;
                entities.extend(primary.map(|primary| Self {
                    primary,
                    direct: Vec::new(),
                    names: Vec::new(),
                    subkeys: Vec::new(),
                }));
                continue;
            }
            let Some(entity) = entities.last_mut().filter(|_| is_known) else {
                continue;
            };
            match packet.tag {
                SIGNATURE => entity.add(&subject, packet.body),
                USER_ID | USER_ATTRIBUTE => {
                    entity.names.push((covered_name(packet), Vec::new()));
                    subject = Subject::Name;
                }
                PUBLIC_SUBKEY => {
                    let subkey = PublicKey::read(packet.body);
                    subject = if subkey.is_some() {
                        Subject::Subkey
                    } else {
                        Subject::Other
                    };
                    entity.subkeys.extend(subkey.map(|subkey| (subkey, Vec::new())));
                }
                _ => subject = Subject::Other,
            }
        }
        entities
    }

    fn add(&mut self, subject: &Subject, body: &[u8]) {
        let Some(signature) = Signature::read(body) else {
            return;
        };
        let signatures = match subject {
            Subject::Primary => Some(&mut self.direct),
            Subject::Name => self.names.last_mut().map(|(_, signatures)| signatures),
            Subject::Subkey => self.subkeys.last_mut().map(|(_, signatures)| signatures),
            Subject::Other => None,
        };
        if let Some(signatures) = signatures {
            signatures.push(signature);
        }
    }

    /// Returns the keys with an id whose owner says what they are for.
    pub fn keys(&self, id: &[u8; 8]) -> Vec<Usable<'_>> {
        let mut found = Vec::new();
        let is_revoked = self.is_revoked();
        let Some(own) = self.own_signature() else {
            // Nobody says that this is a key for anything.
            return found;
        };
        let primary_expiry = expiry(&self.primary, own);
        if self.primary.id == *id {
            found.push(Usable {
                key: &self.primary,
                is_for_signing: own.is_for_signing().unwrap_or(true),
                expiry: primary_expiry,
                is_revoked,
            });
        }
        for (subkey, signatures) in self.subkeys.iter().filter(|(subkey, _)| subkey.id == *id) {
            let Some(binding) = self.binding(subkey, signatures) else {
                continue;
            };
            let own = expiry(subkey, binding);
            found.push(Usable {
                key: subkey,
                is_for_signing: binding.is_for_signing() == Some(true) && self.agrees(subkey, binding),
                // A subkey is good no longer than the key that it belongs to.
                expiry: own.into_iter().chain(primary_expiry).min(),
                is_revoked: is_revoked || self.is_subkey_revoked(subkey, signatures),
            });
        }
        found
    }

    fn is_good(&self, signature: &Signature, parts: &[&[u8]]) -> bool {
        signature.check_algorithms().is_ok() && signature.holds(&self.primary, parts)
    }

    fn is_revoked(&self) -> bool {
        let mut revocations = self
            .direct
            .iter()
            .filter(|signature| signature.kind == REVOKES_KEY);
        revocations.any(|signature| self.is_good(signature, &[&self.primary.body]))
    }

    fn is_subkey_revoked(&self, subkey: &PublicKey, signatures: &[Signature]) -> bool {
        let mut revocations = signatures
            .iter()
            .filter(|signature| signature.kind == REVOKES_SUBKEY);
        revocations.any(|signature| self.is_good(signature, &[&self.primary.body, &subkey.body]))
    }

    /// The newest of the owner's signatures that says what the primary key is for.
    fn own_signature(&self) -> Option<&Signature> {
        let direct = self
            .direct
            .iter()
            .filter(|signature| signature.kind == DIRECT && self.is_good(signature, &[&self.primary.body]));
        let named = self.names.iter().flat_map(|(name, signatures)| {
            let holds = |signature: &&Signature| self.is_good(signature, &[&self.primary.body, name]);
            let is_revoked = signatures
                .iter()
                .filter(|signature| signature.kind == REVOKES_NAME)
                .any(|signature| holds(&signature));
            let certifying = signatures
                .iter()
                .filter(move |signature| CERTIFIES.contains(&signature.kind) && !is_revoked);
            certifying.filter(holds).collect::<Vec<_>>()
        });
        direct.chain(named).max_by_key(|signature| signature.created())
    }

    /// The newest of the owner's signatures that says what a subkey is for.
    fn binding<'a>(&self, subkey: &PublicKey, signatures: &'a [Signature]) -> Option<&'a Signature> {
        let bindings = signatures.iter().filter(|signature| {
            signature.kind == BINDS_SUBKEY && self.is_good(signature, &[&self.primary.body, &subkey.body])
        });
        bindings.max_by_key(|signature| signature.created())
    }

    /// Whether a subkey that signs says itself that it belongs to this key: else anybody could call it theirs.
    fn agrees(&self, subkey: &PublicKey, binding: &Signature) -> bool {
        binding.embedded().is_some_and(|embedded| {
            embedded.kind == BINDS_PRIMARY
                && embedded.check_algorithms().is_ok()
                && embedded.holds(subkey, &[&self.primary.body, &subkey.body])
        })
    }
}

fn covered_name(packet: &Packet<'_>) -> Vec<u8> {
    let mark = if packet.tag == USER_ID { 0xb4 } else { 0xd1 };
    let length = u32::try_from(packet.body.len()).unwrap_or(u32::MAX);
    let mut out = vec![mark];
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(packet.body);
    out
}

fn expiry(key: &PublicKey, own: &Signature) -> Option<SystemTime> {
    Some(created(key) + Duration::from_secs(own.key_lifetime()?))
}

//! Manifests and configurations in memory, so that one build does not fetch what another just did.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use oci::{Descriptor, Digest};
use serde::{Deserialize, Serialize};

/// Bytes of documents kept at most.
const MAX_BYTES: usize = 16 << 20;

/// Documents by repository and digest. A repository's documents serve only references to that repository: whoever
/// may not pull from it does not get them under another name.
#[derive(Debug, Default)]
pub struct Documents {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    entries: BTreeMap<(String, Digest), Entry>,
    size_bytes: usize,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    media_type: String,
    bytes: Bytes,
    used: u64,
}

/// A document as a ref keeps it.
#[derive(Serialize, Deserialize)]
struct Stored {
    media_type: String,
    text: String,
}

impl Documents {
    /// Returns a document and its media type.
    pub fn get(&self, repository: &str, digest: &Digest) -> Option<(Descriptor, Bytes)> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let now = kept.clock;
        let entry = kept.entries.get_mut(&(repository.to_owned(), *digest))?;
        entry.used = now;
        let size = u64::try_from(entry.bytes.len()).unwrap_or(u64::MAX);
        Some((
            Descriptor::new(entry.media_type.clone(), *digest, size),
            entry.bytes.clone(),
        ))
    }

    /// Keeps a document whose digest was verified, dropping those not used for longest.
    pub fn put(&self, repository: &str, digest: Digest, media_type: &str, bytes: Bytes) {
        if bytes.len() > MAX_BYTES / 4 {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let entry = Entry {
            media_type: media_type.to_owned(),
            used: kept.clock,
            bytes,
        };
        kept.size_bytes += entry.bytes.len();
        if let Some(old) = kept.entries.insert((repository.to_owned(), digest), entry) {
            kept.size_bytes -= old.bytes.len();
        }
        while kept.size_bytes > MAX_BYTES {
            let oldest = kept
                .entries
                .iter()
                .min_by_key(|(_, entry)| entry.used)
                .map(|(key, _)| key.clone());
            let Some(entry) = oldest.and_then(|key| kept.entries.remove(&key)) else {
                return;
            };
            kept.size_bytes -= entry.bytes.len();
        }
    }

    /// Keeps what [`encode`] wrote; returns the digest of its first document.
    pub fn load(&self, repository: &str, stored: &[u8]) -> Option<Digest> {
        let stored = serde_json::from_slice::<Vec<Stored>>(stored).ok()?;
        let mut first = None;
        for document in stored {
            let digest = Digest::sha256(&document.text);
            first.get_or_insert(digest);
            self.put(repository, digest, &document.media_type, document.text.into());
        }
        first
    }
}

/// Encodes documents for storage with a ref. Documents that are not text, or not named by SHA-256, are left out: they
/// are fetched again.
pub fn encode<'a>(documents: impl Iterator<Item = (&'a Descriptor, &'a Bytes)>) -> Vec<u8> {
    let stored: Vec<Stored> = documents
        .filter_map(|(descriptor, bytes)| {
            let text = std::str::from_utf8(bytes).ok()?.to_owned();
            Some(Stored {
                media_type: descriptor.media_type.clone(),
                text,
            })
        })
        .collect();
    serde_json::to_vec(&stored).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_recently_used() {
        let documents = Documents::default();
        let big = |fill: u8| Bytes::from(vec![fill; MAX_BYTES / 4]);
        let digest = |fill: u8| Digest::sha256(big(fill));
        for fill in 0..4 {
            documents.put("r", digest(fill), "t", big(fill));
        }
        assert!(documents.get("r", &digest(0)).is_some());
        documents.put("r", digest(4), "t", big(4));
        assert!(documents.get("r", &digest(0)).is_some());
        assert!(documents.get("r", &digest(1)).is_none());
        assert!(documents.get("other", &digest(0)).is_none());
    }

    #[test]
    fn survives_a_round_trip() {
        let bytes = Bytes::from_static(b"{}");
        let descriptor = Descriptor::of_bytes("t", &bytes);
        let stored = encode([(&descriptor, &bytes)].into_iter());
        let documents = Documents::default();
        assert_eq!(documents.load("r", &stored), Some(descriptor.digest));
        assert_eq!(documents.get("r", &descriptor.digest), Some((descriptor, bytes)));
        assert_eq!(documents.load("r", b"garbage"), None);
    }
}

//! What a container fetched, for the log and for provenance.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oci::Digest;
use url::Url;

/// Most notes of each kind; what is beyond makes the record incomplete.
const MAX_NOTES: usize = 10_000;

/// A request that was answered by a server, or could not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: String,
    /// What was asked for, without credentials and the usual port.
    pub url: String,
    /// The status.
    pub status: u16,
}

/// Something that was fetched to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Material {
    /// From where, as in [`Request::url`].
    pub url: String,
    /// Checksum of its bytes.
    pub digest: Digest,
}

/// A request whose effect on the container is not pinned by a [`Material`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incomplete {
    /// The method.
    pub method: String,
    /// What was asked for, as in [`Request::url`].
    pub url: String,
    /// Why, in BuildKit's words, e.g. `unsuccessful_response`.
    pub reason: &'static str,
}

/// Notes of one container's requests. Cheap to clone; all clones are one record.
#[derive(Clone, Debug, Default)]
pub struct Record(Arc<Mutex<Notes>>);

#[derive(Debug, Default)]
struct Notes {
    requests: Vec<Request>,
    materials: Vec<Material>,
    incomplete: Vec<Incomplete>,
    /// From where to where servers redirected.
    redirects: BTreeMap<String, String>,
    is_full: bool,
}

impl Record {
    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add_request(&self, request: Request, redirect: Option<String>) {
        let mut notes = self.lock();
        if notes.requests.len() >= MAX_NOTES {
            notes.overflow(&request);
            return;
        }
        if let Some(target) = redirect.filter(|target| *target != request.url) {
            notes.redirects.insert(request.url.clone(), target);
        }
        notes.requests.push(request);
    }

    pub(crate) fn add_material(&self, material: Material) {
        let mut notes = self.lock();
        if notes.materials.len() < MAX_NOTES {
            notes.materials.push(material);
        }
    }

    pub(crate) fn add_incomplete(&self, incomplete: Incomplete) {
        let mut notes = self.lock();
        if notes.incomplete.len() < MAX_NOTES {
            notes.incomplete.push(incomplete);
        }
    }

    /// Returns the requests in the order in which they were answered.
    pub fn requests(&self) -> Vec<Request> {
        self.lock().requests.clone()
    }

    /// Returns what was fetched, and what redirected there under its own URL as well.
    pub fn materials(&self) -> Vec<Material> {
        let notes = self.lock();
        let mut materials = notes.materials.clone();
        let mut known: BTreeMap<&str, Digest> = notes
            .materials
            .iter()
            .map(|found| (found.url.as_str(), found.digest))
            .collect();
        loop {
            let resolved: Vec<(&str, Digest)> = notes
                .redirects
                .iter()
                .filter(|(from, _)| !known.contains_key(from.as_str()))
                .filter_map(|(from, to)| Some((from.as_str(), *known.get(to.as_str())?)))
                .collect();
            if resolved.is_empty() {
                return materials;
            }
            for (from, digest) in resolved {
                known.insert(from, digest);
                materials.push(Material {
                    url: from.to_owned(),
                    digest,
                });
            }
        }
    }

    /// Returns what is not pinned.
    pub fn incomplete(&self) -> Vec<Incomplete> {
        self.lock().incomplete.clone()
    }
}

impl Notes {
    fn overflow(&mut self, request: &Request) {
        if !self.is_full {
            self.is_full = true;
            self.incomplete.push(Incomplete {
                method: request.method.clone(),
                url: request.url.clone(),
                reason: "too_many_requests",
            });
        }
    }
}

/// Hides user and password, as BuildKit does.
pub(crate) fn redacted(url: &Url) -> Url {
    let mut url = url.clone();
    if !url.username().is_empty() {
        let _ = url.set_username("xxxxx");
    }
    if url.password().is_some() {
        let _ = url.set_password(Some("xxxxx"));
    }
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(url: &str) -> Request {
        Request {
            method: "GET".to_owned(),
            url: url.to_owned(),
            status: 302,
        }
    }

    #[test]
    fn what_redirects_to_a_material_is_one() {
        let record = Record::default();
        record.add_request(request("a"), Some("b".to_owned()));
        record.add_request(request("b"), Some("c".to_owned()));
        record.add_request(request("x"), Some("y".to_owned()));
        record.add_request(request("l"), Some("m".to_owned()));
        record.add_request(request("m"), Some("l".to_owned()));
        let digest = Digest::sha256(b"c");
        record.add_material(Material {
            url: "c".to_owned(),
            digest,
        });
        let urls: Vec<String> = record
            .materials()
            .into_iter()
            .map(|material| material.url)
            .collect();
        assert_eq!(urls, ["c", "b", "a"]);
        assert!(
            record
                .materials()
                .iter()
                .all(|material| material.digest == digest)
        );
    }

    #[test]
    fn notes_are_bounded_and_say_so() {
        let record = Record::default();
        for number in 0..MAX_NOTES + 5 {
            record.add_request(request(&number.to_string()), None);
        }
        assert_eq!(record.requests().len(), MAX_NOTES);
        assert_eq!(record.incomplete().len(), 1);
    }

    #[test]
    fn credentials_are_hidden() {
        let url = Url::parse("https://user:secret@example.test/x").unwrap();
        assert_eq!(redacted(&url).as_str(), "https://xxxxx:xxxxx@example.test/x");
    }
}

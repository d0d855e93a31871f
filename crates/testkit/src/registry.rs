//! A registry in the test's process: the distribution API over HTTP/1.1 on a loopback port, with accounts, and with
//! faults on request.

mod api;
pub(crate) mod http;
mod token;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use oci::{Descriptor, Digest, Reference};
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};

use crate::image::{Image, index};

/// What a registry does by itself.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Who may do what; `None`: everybody everything.
    pub accounts: Option<Accounts>,
    /// What it lacks.
    pub quirks: BTreeSet<Quirk>,
    /// Refuses uploads in one PUT that are larger than this, with 413.
    pub max_put_bytes: Option<usize>,
}

impl Options {
    /// A registry with one quirk.
    pub fn quirk(quirk: Quirk) -> Self {
        Self {
            quirks: BTreeSet::from([quirk]),
            ..Self::default()
        }
    }
}

/// Something that a registry may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Quirk {
    /// Ignores `Range` in GET.
    NoRanges,
    /// Leaves `Docker-Content-Digest` out.
    NoDigestHeader,
    /// Answers HEAD of manifests with 405.
    NoHead,
    /// Does not know the referrers API.
    NoReferrers,
}

/// Accounts of a registry with a token server at `/token`, or with basic authentication.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    /// Passwords by user name.
    pub users: BTreeMap<String, String>,
    /// Repositories anybody may pull from.
    pub public: BTreeSet<String>,
    /// Repositories no account may push to.
    pub read_only: BTreeSet<String>,
    /// Challenges with `Basic` instead of a token server.
    pub basic: bool,
    /// The token server knows POST only.
    pub post_only: bool,
    /// Validity of tokens in seconds; 0: not told.
    pub expires_in_s: u64,
}

/// What happens to a request instead of its answer.
#[derive(Clone, Debug)]
pub enum Action {
    /// A status with headers and a body.
    Status(u16, Vec<(&'static str, String)>, &'static str),
    /// The connection ends before the answer.
    Reset,
    /// The answer's body ends, with its connection, after so many bytes.
    Truncate(usize),
    /// The connection ends after so many bytes of the request's body were stored.
    ResetUpload(usize),
    /// The first byte of the answer's body is another one.
    Corrupt,
    /// Nothing is answered until the registry ends.
    Hang,
    /// The answer comes after a while.
    Delay(Duration),
    /// The answer carries this digest in its header.
    WrongDigestHeader(Digest),
}

/// A fault waiting for its request.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The request's method, or empty for any.
    pub method: &'static str,
    /// What the path must contain.
    pub path: String,
    /// How many requests it hits.
    pub times: usize,
    /// What happens.
    pub action: Action,
}

/// One request as received.
#[derive(Clone, Debug)]
pub struct Seen {
    /// `GET`, `HEAD`, …
    pub method: String,
    /// Path with query.
    pub target: String,
    /// Header values by lower-case name.
    pub headers: BTreeMap<String, String>,
}

#[derive(Debug, Default)]
struct Repository {
    manifests: BTreeMap<Digest, (String, Bytes)>,
    tags: BTreeMap<String, Digest>,
    blobs: BTreeMap<Digest, Bytes>,
}

#[derive(Debug, Default)]
struct Contents {
    repositories: BTreeMap<String, Repository>,
    uploads: BTreeMap<u64, Vec<u8>>,
    next_upload: u64,
    faults: Vec<Fault>,
    seen: Vec<Seen>,
}

#[derive(Debug)]
struct Shared {
    options: Options,
    address: SocketAddr,
    contents: Mutex<Contents>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running registry; it ends when dropped.
#[derive(Debug)]
pub struct Registry {
    shared: Arc<Shared>,
    serving: AbortHandle,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Registry {
    /// Starts an open registry.
    pub async fn start() -> Self {
        Self::start_with(Options::default()).await
    }

    /// Starts a registry.
    pub async fn start_with(options: Options) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a loopback port");
        let address = listener.local_addr().expect("a bound listener");
        let shared = Arc::new(Shared {
            options,
            address,
            contents: Mutex::default(),
        });
        let state = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(http::serve(Arc::clone(&state), stream));
                while connections.try_join_next().is_some() {}
            }
        });
        Self {
            shared,
            serving: task.abort_handle(),
        }
    }

    /// `127.0.0.1:port`.
    pub fn domain(&self) -> String {
        self.shared.address.to_string()
    }

    /// A reference into this registry.
    pub fn reference(&self, name: &str) -> Reference {
        Reference::parse(&format!("{}/{name}", self.domain())).expect("a well-formed name")
    }

    /// Stores a blob.
    pub fn add_blob(&self, repository: &str, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::sha256(&bytes);
        self.shared
            .lock()
            .repositories
            .entry(repository.to_owned())
            .or_default()
            .blobs
            .insert(digest, bytes);
        digest
    }

    /// Stores a manifest or index, under a tag if one is given.
    pub fn add_manifest(
        &self,
        repository: &str,
        tag: Option<&str>,
        media_type: &str,
        bytes: Bytes,
    ) -> Descriptor {
        let descriptor = Descriptor::of_bytes(media_type, &bytes);
        let mut contents = self.shared.lock();
        let stored = contents.repositories.entry(repository.to_owned()).or_default();
        stored
            .manifests
            .insert(descriptor.digest, (media_type.to_owned(), bytes));
        if let Some(tag) = tag {
            stored.tags.insert(tag.to_owned(), descriptor.digest);
        }
        descriptor
    }

    /// Stores an image.
    pub fn add_image(&self, repository: &str, tag: &str, image: &Image) -> Descriptor {
        self.add_blob(repository, image.config.clone());
        for layer in &image.layers {
            self.add_blob(repository, layer.blob.clone());
        }
        self.add_manifest(
            repository,
            Some(tag),
            &image.descriptor.media_type,
            image.manifest.clone(),
        )
    }

    /// Stores several images under one index.
    pub fn add_index(&self, repository: &str, tag: &str, images: &[&Image]) -> Descriptor {
        for image in images {
            self.add_image(repository, &image.descriptor.digest.hex()[..12], image);
        }
        let (descriptor, bytes) = index(images);
        self.add_manifest(repository, Some(tag), &descriptor.media_type, bytes)
    }

    /// Removes a blob.
    pub fn remove_blob(&self, repository: &str, digest: &Digest) {
        if let Some(stored) = self.shared.lock().repositories.get_mut(repository) {
            stored.blobs.remove(digest);
        }
    }

    /// Stores other bytes in a blob's place.
    pub fn replace_blob(&self, repository: &str, digest: &Digest, bytes: impl Into<Bytes>) {
        if let Some(stored) = self.shared.lock().repositories.get_mut(repository) {
            stored.blobs.insert(*digest, bytes.into());
        }
    }

    /// Returns a stored blob.
    pub fn blob(&self, repository: &str, digest: &Digest) -> Option<Bytes> {
        self.shared
            .lock()
            .repositories
            .get(repository)?
            .blobs
            .get(digest)
            .cloned()
    }

    /// Returns a stored manifest by tag or digest, with its media type.
    pub fn manifest(&self, repository: &str, object: &str) -> Option<(String, Bytes)> {
        let contents = self.shared.lock();
        let stored = contents.repositories.get(repository)?;
        let digest = stored.tags.get(object).copied().or_else(|| object.parse().ok())?;
        stored.manifests.get(&digest).cloned()
    }

    /// Arranges a fault; faults are tried in the order they were arranged.
    pub fn fault(&self, method: &'static str, path: &str, times: usize, action: Action) {
        self.shared.lock().faults.push(Fault {
            method,
            path: path.to_owned(),
            times,
            action,
        });
    }

    /// Takes all faults back.
    pub fn clear_faults(&self) {
        self.shared.lock().faults.clear();
    }

    /// The requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.lock().seen.clone()
    }

    /// The requests so far as `METHOD target`, the registry's own prefix left out.
    pub fn log(&self) -> Vec<String> {
        self.seen()
            .into_iter()
            .map(|seen| format!("{} {}", seen.method, seen.target))
            .collect()
    }

    /// How many requests had this method and a target containing `part`.
    pub fn count(&self, method: &str, part: &str) -> usize {
        self.seen()
            .iter()
            .filter(|seen| seen.method == method && seen.target.contains(part))
            .count()
    }

    /// Forgets the requests so far.
    pub fn clear_log(&self) {
        self.shared.lock().seen.clear();
    }
}

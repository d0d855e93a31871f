//! Caches in GitHub's cache service, with BuildKit's keys: `buildkit-blob-1-<digest>`, and
//! `index-<scope>-1-<of the branch>#<number>` for the configuration, whose highest number counts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use build::error::BuildError;
use bytes::Bytes;
use futures_util::StreamExt;
use oci::{Descriptor, Digest, media_type};
use registry::{BlobSource, BytesSource};
use reqwest::{StatusCode, Url};
use source::image::fetch::BlobBytes;
use tokio::sync::OnceCell;

use super::attributes::duration;
use super::github::{BLOCKED, BLOCKED_STEP, Entry, Repository, Service, Version};
use super::http::{Http, Limits, ObjectError, Open, display_url};
use super::import::MAX_MANIFEST_BYTES;
use super::token::RuntimeToken;
use super::{Connected, ObjectCache, Variable};

/// Attributes that only this kind has.
pub(super) const ATTRIBUTES: &[&str] = &[
    "ghtoken",
    "repository",
    "scope",
    "timeout",
    "token",
    "url",
    "url_v2",
    "version",
];

const BLOB_PREFIX: &str = "buildkit-blob-1-";
/// Numbers of configurations that others may have reserved without writing them.
const MAX_SKIPPED: u32 = 100;
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);
/// The host of the second protocol, by which clients that do not tell the version are understood.
const SECOND_HOST: &str = "results-receiver.actions.githubusercontent.com";

/// Reads the attributes.
pub(super) fn connect(
    attrs: &BTreeMap<String, String>,
    variable: Variable,
    client: &reqwest::Client,
) -> Result<Connected, BuildError> {
    let token = attrs
        .get("token")
        .ok_or_else(|| BuildError::user("token not set for github actions cache"))?;
    let token = RuntimeToken::parse(token, SystemTime::now())?;
    let (url, version) = url_and_version(attrs)?;
    let url = Url::parse(url)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| BuildError::user("url of github actions cache is not a valid http or https url"))?;
    let timeout = match attrs.get("timeout") {
        Some(text) => duration(text).ok_or_else(|| {
            BuildError::user(format!(
                "failed to parse timeout for github actions cache: {text:?}"
            ))
        })?,
        None => DEFAULT_TIMEOUT,
    };
    let http = Http::new(
        client,
        Limits {
            throttled: timeout,
            ..Limits::default()
        },
    );
    let set = |name: &str| attrs.get(name).filter(|value| !value.is_empty()).cloned();
    let repository = match (set("repository"), set("ghtoken")) {
        (Some(name), Some(token)) => Some(Repository {
            http: Http::new(client, Limits::default()),
            api: variable("GITHUB_API_URL").unwrap_or_else(|| "https://api.github.com".to_owned()),
            name,
            token,
        }),
        _ => None,
    };
    let locator = format!("gha:{}", display_url(&url));
    let cache = GitHubCache {
        service: Service {
            http,
            url,
            token,
            version,
        },
        scope: attrs
            .get("scope")
            .cloned()
            .unwrap_or_else(|| "buildkit".to_owned()),
        repository,
        listed: OnceCell::new(),
    };
    Ok(Connected {
        cache: Arc::new(Shared(Arc::new(cache))),
        locator,
    })
}

fn url_and_version(attrs: &BTreeMap<String, String>) -> Result<(&str, Version), BuildError> {
    let asked = match attrs.get("version") {
        Some(text) => text.parse::<i64>().map_err(|_| {
            BuildError::user(format!(
                "failed to parse api version {text:?}, expected positive integer"
            ))
        })?,
        None => 0,
    };
    if asked != 1
        && let Some(url) = attrs.get("url_v2")
    {
        return Ok((url, Version::Second));
    }
    let url = attrs.get("url").filter(|url| !url.is_empty());
    let url = url.ok_or_else(|| BuildError::user("url not set for github actions cache"))?;
    let version = match asked {
        0 if url.contains(SECOND_HOST) => Version::Second,
        0 | 1 => Version::First,
        _ => Version::Second,
    };
    Ok((url, version))
}

#[derive(Debug)]
struct GitHubCache {
    service: Service,
    scope: String,
    repository: Option<Repository>,
    /// Keys of blobs that are there, if they can be listed.
    listed: OnceCell<Option<BTreeSet<String>>>,
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Repository")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

fn blob_key(blob: &Descriptor) -> String {
    format!("{BLOB_PREFIX}{}", blob.digest)
}

impl GitHubCache {
    fn index_key(&self, scope: &str) -> String {
        let digest = Digest::sha256(scope).to_string();
        let short = digest
            .trim_start_matches("sha256:")
            .get(..8)
            .unwrap_or_default()
            .to_owned();
        format!("index-{}-1-{short}", self.scope)
    }

    /// The entry of a blob. Others, whose keys only start like its, are none.
    async fn blob(&self, blob: &Descriptor) -> Result<Option<Entry>, ObjectError> {
        let key = blob_key(blob);
        Ok(self.service.load(&key).await?.filter(|entry| entry.key == key))
    }

    /// The youngest configuration of a scope, with its number.
    async fn index(&self, key: &str) -> Result<Option<(Entry, u64)>, ObjectError> {
        let prefix = format!("{key}#");
        let Some(entry) = self.service.load(&prefix).await? else {
            return Ok(None);
        };
        let number = entry
            .key
            .strip_prefix(&prefix)
            .and_then(|number| number.parse().ok());
        match number {
            Some(number) => Ok(Some((entry, number))),
            None => Err(ObjectError::InvalidResponse {
                url: display_url(&self.service.url),
                reason: format!("failed to parse {key} index"),
            }),
        }
    }

    /// Whether the list of keys has a blob; `None`: there is no list.
    async fn is_listed(&self, blob: &Descriptor) -> Option<bool> {
        let listed = self.listed.get_or_init(|| async {
            let repository = self.repository.as_ref()?;
            let scopes: Vec<&str> = self
                .service
                .token
                .scopes
                .iter()
                .map(|scope| scope.scope.as_str())
                .collect();
            match repository.keys(&scopes, BLOB_PREFIX).await {
                Ok(keys) => Some(keys),
                Err(error) => {
                    tracing::warn!(%error, "the list of cache entries cannot be had: they are asked for one by one");
                    None
                }
            }
        });
        let listed = listed.await.as_ref()?;
        Some(listed.contains(&blob_key(blob)))
    }
}

/// Streams outlive the call that opens them.
#[derive(Debug)]
struct Shared(Arc<GitHubCache>);

#[async_trait]
impl ObjectCache for Shared {
    async fn manifests(&self) -> Result<Vec<Bytes>, ObjectError> {
        let mut found = Vec::new();
        for scope in &self.0.service.token.scopes {
            let key = self.0.index_key(&scope.scope);
            let Some((entry, _)) = self.0.index(&key).await? else {
                continue;
            };
            let send = || self.0.service.get(&entry, 0);
            found.push(self.0.service.http.document(MAX_MANIFEST_BYTES, send).await?);
        }
        Ok(found)
    }

    async fn has(&self, blob: &Descriptor) -> Result<bool, ObjectError> {
        Ok(self.0.blob(blob).await?.is_some())
    }

    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<BlobBytes, ObjectError> {
        let (this, wanted) = (Arc::clone(&self.0), blob.clone());
        let open: Open = Arc::new(move |offset| {
            let (this, wanted) = (Arc::clone(&this), wanted.clone());
            // The entry's URL is good for a while only: it is asked for whenever it is needed.
            Box::pin(async move {
                match this.blob(&wanted).await? {
                    Some(entry) => this.service.get(&entry, offset).await,
                    None => Err(ObjectError::Status {
                        method: reqwest::Method::GET,
                        url: display_url(&this.service.url),
                        status: StatusCode::NOT_FOUND,
                        code: format!("no entry {}", blob_key(&wanted)),
                        message: String::new(),
                    }),
                }
            })
        });
        self.0.service.http.stream(open, offset, blob.size).await
    }

    async fn put(&self, blob: &Descriptor, source: &dyn BlobSource) -> Result<(), ObjectError> {
        let known = match self.0.is_listed(blob).await {
            Some(listed) => listed,
            None => self.0.blob(blob).await?.is_some(),
        };
        if known {
            return Ok(());
        }
        // A key that is reserved and not written blocks it for all: what cannot be read at all reserves none.
        if let Some(Err(source)) = source.open(0).next().await {
            let digest = blob.digest;
            return Err(ObjectError::Source { digest, source });
        }
        match self.0.service.reserve(&blob_key(blob)).await? {
            Some(reserved) => self.0.service.write(&reserved, blob, source).await,
            // Somebody else writes the same bytes.
            None => Ok(()),
        }
    }

    async fn put_manifest(&self, manifest: Bytes) -> Result<(), ObjectError> {
        let blob = Descriptor::of_bytes(media_type::BUILDKIT_CACHE_CONFIG, &manifest);
        let key = self.0.index_key(self.0.service.token.writable());
        let (mut blocked, mut skipped) = (Duration::ZERO, 0);
        let mut number = self.0.index(&key).await?.map_or(0, |(_, number)| number);
        loop {
            number += 1;
            if let Some(reserved) = self.0.service.reserve(&format!("{key}#{number}")).await? {
                let source = BytesSource(manifest.clone());
                return self.0.service.write(&reserved, &blob, &source).await;
            }
            // Whoever has the number may be writing, and then the next one is ours; or it is gone without having written.
            skipped += 1;
            if skipped > MAX_SKIPPED {
                return Err(ObjectError::InvalidResponse {
                    url: display_url(&self.0.service.url),
                    reason: format!("{key} is reserved {MAX_SKIPPED} times and never written"),
                });
            }
            if blocked < BLOCKED {
                blocked += BLOCKED_STEP;
                tokio::time::sleep(BLOCKED_STEP).await;
                number = self.0.index(&key).await?.map_or(0, |(_, number)| number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version_of(pairs: &[(&str, &str)]) -> Result<(String, Version), String> {
        let attrs = pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        url_and_version(&attrs)
            .map(|(url, version)| (url.to_owned(), version))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_protocol_follows_from_the_attributes() {
        let both = [("url", "http://1"), ("url_v2", "http://2")];
        assert_eq!(version_of(&both), Ok(("http://2".to_owned(), Version::Second)));
        let first = [both[0], both[1], ("version", "1")];
        assert_eq!(version_of(&first), Ok(("http://1".to_owned(), Version::First)));
        assert_eq!(version_of(&both[..1]).unwrap().1, Version::First);
        let second = format!("https://{SECOND_HOST}/");
        assert_eq!(version_of(&[("url", &second)]).unwrap().1, Version::Second);
        assert!(version_of(&[]).unwrap_err().contains("url not set"));
        assert!(
            version_of(&[("version", "x")])
                .unwrap_err()
                .contains("api version")
        );
    }
}

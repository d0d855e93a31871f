//! GitHub's cache service in both of its protocols: entries are found by key, reserved, written and committed; what is
//! committed never changes. The first version takes the bytes itself, the second tells where in Azure's storage to put
//! them.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use oci::{Descriptor, Digest};
use registry::BlobSource;
use reqwest::{Method, StatusCode, Url};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::azure;
use super::http::{Anonymous, Authorize, Http, ObjectError, Request, display_url, encode};
use super::parts::Parts;
use super::token::RuntimeToken;

/// Answers of the service.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Keys a page of the list has, and pages that are read.
const PER_PAGE: usize = 100;
const MAX_PAGES: usize = 100;
/// Parts of an upload in the first protocol.
const MAX_PARTS: u64 = 10_000;
const JSON: &str = "application/json";

/// Which protocol is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// `_apis/artifactcache`.
    First,
    /// `github.actions.results.api.v1.CacheService`.
    Second,
}

/// The service.
pub(super) struct Service {
    pub http: Http,
    pub url: Url,
    pub token: RuntimeToken,
    pub version: Version,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service")
            .field("url", &display_url(&self.url))
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// An entry that was found.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Its whole key.
    pub key: String,
    /// Where its bytes are; a secret, as it needs no further authorization.
    url: Url,
}

/// An entry that is to be written.
pub(super) struct Reserved {
    key: String,
    /// A number, or where to put the bytes.
    place: String,
}

#[derive(Serialize)]
struct Named<'a> {
    key: &'a str,
    version: String,
}

/// What keeps these entries apart from those of other tools that choose the same keys.
fn version() -> String {
    let digest = Digest::sha256("|go-actionscache-1.0").to_string();
    digest.trim_start_matches("sha256:").to_owned()
}

impl Authorize for RuntimeToken {
    fn authorize(&self, request: &mut Request, _: std::time::SystemTime) {
        request.headers.push(("authorization", self.bearer()));
    }
}

impl Service {
    fn at(&self, path: &str) -> Result<Url, ObjectError> {
        let base = self.url.as_str().trim_end_matches('/');
        let root = match self.version {
            Version::First => "_apis/artifactcache",
            Version::Second => "twirp/github.actions.results.api.v1.CacheService",
        };
        Url::parse(&format!("{base}/{root}/{path}"))
            .map_err(|_| self.broken("its URL cannot be put together".to_owned()))
    }

    fn broken(&self, reason: String) -> ObjectError {
        ObjectError::InvalidResponse {
            url: display_url(&self.url),
            reason,
        }
    }

    async fn call(&self, request: Request) -> Result<(StatusCode, Bytes), ObjectError> {
        let request = match self.version {
            Version::First => request.header("accept", "application/json;api-version=6.0-preview.1"),
            Version::Second => request,
        };
        let response = self.http.succeed(&request, &self.token).await?;
        let status = response.status();
        Ok((status, self.http.read(response, MAX_ANSWER_BYTES).await?))
    }

    async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ObjectError> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(error.to_string()))?;
        let request = Request::new(Method::POST, self.at(path)?)
            .header("content-type", JSON)
            .body(body);
        let (_, body) = self.call(request).await?;
        self.parse(&body)
    }

    fn parse<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, ObjectError> {
        // The text may have a signed URL in it: only the kind of trouble is told.
        serde_json::from_slice(body).map_err(|error| {
            self.broken(format!(
                "{:?} error at column {}",
                error.classify(),
                error.column()
            ))
        })
    }

    /// Finds the youngest entry whose key starts with `key`.
    pub async fn load(&self, key: &str) -> Result<Option<Entry>, ObjectError> {
        let found = match self.version {
            Version::First => self.load_first(key).await?,
            Version::Second => self.load_second(key).await?,
        };
        let Some((key, url)) = found.filter(|(key, _)| !key.is_empty()) else {
            return Ok(None);
        };
        let url = Url::parse(&url).map_err(|_| self.broken("no download URL".to_owned()))?;
        Ok(Some(Entry { key, url }))
    }

    async fn load_first(&self, key: &str) -> Result<Option<(String, String)>, ObjectError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        #[derive(Default)]
        struct Found {
            cache_key: String,
            archive_location: String,
        }
        let mut url = self.at("cache")?;
        url.query_pairs_mut()
            .append_pair("keys", key)
            .append_pair("version", &version());
        let (status, body) = self.call(Request::new(Method::GET, url)).await?;
        if status == StatusCode::NO_CONTENT || body.is_empty() {
            return Ok(None);
        }
        let found: Found = self.parse(&body)?;
        Ok(Some((found.cache_key, found.archive_location)))
    }

    async fn load_second(&self, key: &str) -> Result<Option<(String, String)>, ObjectError> {
        #[derive(Serialize)]
        struct Wanted<'a> {
            key: &'a str,
            restore_keys: [&'a str; 1],
            version: String,
        }
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Found {
            ok: bool,
            signed_download_url: String,
            matched_key: String,
        }
        let wanted = Wanted {
            key,
            restore_keys: [key],
            version: version(),
        };
        match self.post::<Found>("GetCacheEntryDownloadURL", &wanted).await {
            Ok(found) if found.ok => Ok(Some((found.matched_key, found.signed_download_url))),
            Ok(_) => Ok(None),
            Err(error) if error.code() == "not_found" => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens an entry from an offset.
    pub async fn get(&self, entry: &Entry, offset: u64) -> Result<reqwest::Response, ObjectError> {
        let mut request = Request::new(Method::GET, entry.url.clone());
        if offset > 0 {
            request = request.header("range", format!("bytes={offset}-"));
        }
        self.http.succeed(&request, &Anonymous).await
    }

    /// Reserves a key; `None`: somebody else has it.
    pub async fn reserve(&self, key: &str) -> Result<Option<Reserved>, ObjectError> {
        let reserved = match self.version {
            Version::First => self.reserve_first(key).await,
            Version::Second => self.reserve_second(key).await,
        };
        match reserved {
            Ok(place) => Ok(Some(Reserved {
                key: key.to_owned(),
                place,
            })),
            Err(error) if already_exists(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn reserve_first(&self, key: &str) -> Result<String, ObjectError> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(rename = "cacheId", alias = "cacheID")]
            id: u64,
        }
        let named = Named {
            key,
            version: version(),
        };
        let answer: Answer = self.post("caches", &named).await?;
        Ok(answer.id.to_string())
    }

    async fn reserve_second(&self, key: &str) -> Result<String, ObjectError> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            ok: bool,
            #[serde(default)]
            signed_upload_url: String,
        }
        let named = Named {
            key,
            version: version(),
        };
        let answer: Answer = self.post("CreateCacheEntry", &named).await?;
        if !answer.ok {
            return Err(self.broken("failed to reserve cache".to_owned()));
        }
        Ok(answer.signed_upload_url)
    }

    /// Writes what was reserved.
    pub async fn write(
        &self,
        reserved: &Reserved,
        blob: &Descriptor,
        source: &dyn BlobSource,
    ) -> Result<(), ObjectError> {
        match self.version {
            Version::First => self.write_first(reserved, blob, source).await,
            Version::Second => {
                let url = Url::parse(&reserved.place).map_err(|_| self.broken("no upload URL".to_owned()))?;
                azure::upload(&self.http, &Anonymous, &url, blob, source, false).await?;
                self.finalize(reserved, blob.size).await
            }
        }
    }

    async fn write_first(
        &self,
        reserved: &Reserved,
        blob: &Descriptor,
        source: &dyn BlobSource,
    ) -> Result<(), ObjectError> {
        #[derive(Serialize)]
        struct Commit {
            size: u64,
        }
        let url = self.at(&format!("caches/{}", reserved.place))?;
        let mut parts = Parts::new(source, blob, MAX_PARTS);
        let mut start = 0_u64;
        loop {
            let body = parts.next().await?;
            if body.is_empty() {
                break;
            }
            let end = start.saturating_add(u64::try_from(body.len()).unwrap_or(u64::MAX));
            let request = Request::new(Method::PATCH, url.clone())
                .header("content-type", "application/octet-stream")
                .header("content-range", format!("bytes {start}-{}/*", end - 1))
                .body(body);
            self.call(request).await?;
            start = end;
        }
        let body =
            serde_json::to_vec(&Commit { size: start }).map_err(|error| self.broken(error.to_string()))?;
        let commit = Request::new(Method::POST, url)
            .header("content-type", JSON)
            .body(body);
        self.call(commit).await.map(drop)
    }

    async fn finalize(&self, reserved: &Reserved, size: u64) -> Result<(), ObjectError> {
        #[derive(Serialize)]
        struct Finalize<'a> {
            key: &'a str,
            size_bytes: u64,
            version: String,
        }
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            ok: bool,
        }
        let finalize = Finalize {
            key: &reserved.key,
            size_bytes: size,
            version: version(),
        };
        let answer: Answer = self.post("FinalizeCacheEntryUpload", &finalize).await?;
        if answer.ok {
            return Ok(());
        }
        Err(self.broken("failed to commit cache".to_owned()))
    }
}

fn already_exists(error: &ObjectError) -> bool {
    let ObjectError::Status { code, message, .. } = error else {
        return false;
    };
    code.contains("AlreadyExists")
        || code == "already_exists"
        || message.to_ascii_lowercase().contains("already exists")
}

/// GitHub's list of a repository's entries, which spares a question for each of them.
pub(super) struct Repository {
    pub http: Http,
    /// Such as `https://api.github.com`.
    pub api: String,
    /// `owner/name`.
    pub name: String,
    pub token: String,
}

struct Bearer<'a>(&'a str);

impl Authorize for Bearer<'_> {
    fn authorize(&self, request: &mut Request, _: std::time::SystemTime) {
        request
            .headers
            .push(("authorization", format!("Bearer {}", self.0)));
    }
}

impl Repository {
    /// Keys that start with `prefix` in any of the scopes.
    pub async fn keys(&self, scopes: &[&str], prefix: &str) -> Result<BTreeSet<String>, ObjectError> {
        #[derive(Deserialize)]
        struct Listed {
            total_count: usize,
            actions_caches: Vec<Key>,
        }
        #[derive(Deserialize)]
        struct Key {
            key: String,
        }
        let mut keys = BTreeSet::new();
        for scope in scopes {
            for page in 1..=MAX_PAGES {
                let response = self.page(scope, prefix, page).await?;
                let url = display_url(response.url());
                let body = self.http.read(response, MAX_ANSWER_BYTES).await?;
                let listed: Listed = serde_json::from_slice(&body).map_err(|error| {
                    let reason = error.to_string();
                    ObjectError::InvalidResponse { url, reason }
                })?;
                keys.extend(listed.actions_caches.into_iter().map(|entry| entry.key));
                if listed.total_count <= page * PER_PAGE {
                    break;
                }
            }
        }
        Ok(keys)
    }

    async fn page(&self, scope: &str, prefix: &str, page: usize) -> Result<reqwest::Response, ObjectError> {
        let text = format!(
            "{}/repos/{}/actions/caches?per_page={PER_PAGE}&page={page}&key={}&ref={}",
            self.api.trim_end_matches('/'),
            encode(&self.name, true),
            encode(prefix, false),
            encode(scope, false),
        );
        let url = Url::parse(&text).map_err(|_| ObjectError::InvalidResponse {
            url: self.api.clone(),
            reason: "no URL".to_owned(),
        })?;
        let request = Request::new(Method::GET, url)
            .header("accept", "application/vnd.github+json")
            .header("x-github-api-version", "2022-11-28");
        self.http.succeed(&request, &Bearer(&self.token)).await
    }
}

/// How long a key may stay reserved before its writer counts as gone, and how often that is looked at.
pub(super) const BLOCKED: Duration = Duration::from_secs(15);
pub(super) const BLOCKED_STEP: Duration = Duration::from_secs(2);

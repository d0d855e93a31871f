//! Caches in Azure Blob Storage, laid out as BuildKit does: `<prefix>/<blobs_prefix>/<digest>` and
//! `<prefix>/<manifests_prefix>/<name>` in one container.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use build::error::BuildError;
use bytes::Bytes;
use oci::{Descriptor, media_type};
use registry::{BlobSource, BytesSource};
use reqwest::header::CONTENT_LENGTH;
use reqwest::{Method, StatusCode, Url};
use source::image::fetch::BlobBytes;

use super::attributes::{attr_or_variable, check_key, names};
use super::azure::{SharedKey, request, upload};
use super::http::{Http, Limits, ObjectError, Open, Request, display_url, encode};
use super::import::MAX_MANIFEST_BYTES;
use super::{Connected, ObjectCache, Variable};

/// Attributes that only this kind has.
pub(super) const ATTRIBUTES: &[&str] = &[
    "account_name",
    "account_url",
    "blobs_prefix",
    "container",
    "manifests_prefix",
    "name",
    "prefix",
    "secret_access_key",
];

/// Reads the attributes.
pub(super) fn connect(
    attrs: &BTreeMap<String, String>,
    variable: Variable,
    client: &reqwest::Client,
) -> Result<Connected, BuildError> {
    let given = |name: &str, fallback: &str| attr_or_variable(attrs, name, variable, fallback);
    let account_url = given("account_url", "BUILDKIT_AZURE_STORAGE_ACCOUNT_URL").ok_or_else(|| {
        BuildError::user(
            "either ${BUILDKIT_AZURE_STORAGE_ACCOUNT_URL} or account_url attribute is required for azblob cache",
        )
    })?;
    let invalid = || BuildError::user("azure storage account url provided is not a valid url");
    let mut base = Url::parse(&account_url).map_err(|_| invalid())?;
    let host = base.host_str().map(ToOwned::to_owned).ok_or_else(invalid)?;
    if !matches!(base.scheme(), "http" | "https") {
        return Err(invalid());
    }
    let account = given("account_name", "BUILDKIT_AZURE_STORAGE_ACCOUNT_NAME")
        .or_else(|| host.split('.').next().map(ToOwned::to_owned))
        .filter(|name| !name.is_empty())
        .ok_or_else(|| {
            BuildError::user(
                "unable to retrieve account name from account url or ${BUILDKIT_AZURE_STORAGE_ACCOUNT_NAME} or \
                 account_name attribute for azblob cache",
            )
        })?;
    let container = given("container", "BUILDKIT_AZURE_STORAGE_CONTAINER");
    let container = container.unwrap_or_else(|| "buildkit-cache".to_owned());
    let prefix = given("prefix", "BUILDKIT_AZURE_STORAGE_PREFIX").unwrap_or_default();
    let key = attrs.get("secret_access_key").filter(|key| !key.is_empty());
    let key = key.ok_or_else(|| {
        BuildError::user(
            "azblob cache requires secret_access_key: other ways to authenticate to Azure are not supported",
        )
    })?;
    let key = SharedKey::new(&account, key)
        .ok_or_else(|| BuildError::user("secret_access_key of azblob cache is not valid base64"))?;
    let attr = |name: &str, default: &str| attrs.get(name).map_or(default, String::as_str).to_owned();
    let (blobs, manifests) = (
        joined(&prefix, &attr("blobs_prefix", "blobs")),
        joined(&prefix, &attr("manifests_prefix", "manifests")),
    );
    base.set_query(None);
    base.set_fragment(None);
    let root = format!(
        "{}/{}",
        base.path().trim_end_matches('/'),
        encode(&container, false)
    );
    base.set_path(&root);
    let names = names(attrs);
    for key in [&container, &blobs, &manifests].into_iter().chain(&names) {
        check_key("azblob", key)?;
    }
    let locator = format!("azblob:{}#{blobs}", display_url(&base));
    let store = AzureBlobs {
        container: base,
        blobs,
        manifests,
        names,
        key,
        http: Http::new(client, Limits::default()),
    };
    Ok(Connected {
        cache: Arc::new(Shared(Arc::new(store))),
        locator,
    })
}

/// Joins the parts of a name; empty ones are left out.
fn joined(before: &str, after: &str) -> String {
    let parts = before.split('/').chain(after.split('/'));
    parts
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("/")
}

struct AzureBlobs {
    container: Url,
    blobs: String,
    manifests: String,
    names: Vec<String>,
    key: SharedKey,
    http: Http,
}

impl fmt::Debug for AzureBlobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AzureBlobs")
            .field("container", &display_url(&self.container))
            .finish_non_exhaustive()
    }
}

/// What is told of a blob.
struct Found {
    /// Bytes, if it is told.
    size: Option<u64>,
}

impl Found {
    fn is_whole(&self, blob: &Descriptor) -> bool {
        self.size.is_none_or(|size| size == blob.size)
    }
}

impl AzureBlobs {
    fn url(&self, key: &str) -> Url {
        let mut url = self.container.clone();
        let path = format!("{}/{}", url.path(), encode(key, true));
        url.set_path(&path);
        url
    }

    fn blob_url(&self, blob: &Descriptor) -> Url {
        self.url(&joined(&self.blobs, &blob.digest.to_string()))
    }

    /// Asks for a blob; `None`: it is not there.
    async fn stat(&self, url: Url) -> Result<Option<Found>, ObjectError> {
        let response = self.http.send(&request(Method::HEAD, url), &self.key).await?;
        let size = response.headers().get(CONTENT_LENGTH);
        match response.status() {
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => Ok(Some(Found {
                size: size.and_then(|size| size.to_str().ok()?.parse().ok()),
            })),
            _ => Err(self.http.refused(Method::HEAD, response).await),
        }
    }

    fn of_container(&self, method: Method) -> Request {
        let mut url = self.container.clone();
        url.set_query(Some("restype=container"));
        request(method, url)
    }
}

/// Streams outlive the call that opens them.
#[derive(Debug)]
struct Shared(Arc<AzureBlobs>);

#[async_trait]
impl ObjectCache for Shared {
    async fn manifests(&self) -> Result<Vec<Bytes>, ObjectError> {
        let mut found = Vec::new();
        for name in &self.0.names {
            let get = request(Method::GET, self.0.url(&joined(&self.0.manifests, name)));
            let send = || self.0.http.succeed(&get, &self.0.key);
            match self.0.http.document(MAX_MANIFEST_BYTES, send).await {
                Ok(manifest) => found.push(manifest),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    async fn has(&self, blob: &Descriptor) -> Result<bool, ObjectError> {
        let found = self.0.stat(self.0.blob_url(blob)).await?;
        Ok(found.is_some_and(|found| found.is_whole(blob)))
    }

    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<BlobBytes, ObjectError> {
        let (this, url) = (Arc::clone(&self.0), self.0.blob_url(blob));
        let open: Open = Arc::new(move |offset| {
            let (this, mut get) = (Arc::clone(&this), request(Method::GET, url.clone()));
            if offset > 0 {
                get = get.header("range", format!("bytes={offset}-"));
            }
            Box::pin(async move { this.http.succeed(&get, &this.key).await })
        });
        self.0.http.stream(open, offset, blob.size).await
    }

    /// Makes the container, unless it is there.
    async fn prepare(&self) -> Result<(), ObjectError> {
        let known = self
            .0
            .http
            .send(&self.0.of_container(Method::HEAD), &self.0.key)
            .await?;
        if known.status() != StatusCode::NOT_FOUND {
            let refused = !known.status().is_success();
            return match refused {
                true => Err(self.0.http.refused(Method::HEAD, known).await),
                false => Ok(()),
            };
        }
        match self
            .0
            .http
            .succeed(&self.0.of_container(Method::PUT), &self.0.key)
            .await
        {
            Err(error) if error.code() != "ContainerAlreadyExists" => Err(error),
            _ => Ok(()),
        }
    }

    async fn put(&self, blob: &Descriptor, source: &dyn BlobSource) -> Result<(), ObjectError> {
        let url = self.0.blob_url(blob);
        let known = self.0.stat(url.clone()).await?;
        if known.as_ref().is_some_and(|known| known.is_whole(blob)) {
            return Ok(());
        }
        match upload(&self.0.http, &self.0.key, &url, blob, source, known.is_none()).await {
            Err(error) if error.code() != "BlobAlreadyExists" => Err(error),
            _ => Ok(()),
        }
    }

    async fn put_manifest(&self, manifest: Bytes) -> Result<(), ObjectError> {
        let blob = Descriptor::of_bytes(media_type::BUILDKIT_CACHE_CONFIG, &manifest);
        for name in &self.0.names {
            let url = self.0.url(&joined(&self.0.manifests, name));
            let source = BytesSource(manifest.clone());
            upload(&self.0.http, &self.0.key, &url, &blob, &source, false).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_checked() {
        let client = registry::web_client("test").unwrap();
        let given = |pairs: &[(&str, &str)]| {
            let attrs: BTreeMap<String, String> = pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect();
            connect(&attrs, |_| None, &client)
        };
        let error = |pairs: &[(&str, &str)]| given(pairs).unwrap_err().to_string();
        assert!(error(&[]).contains("account_url"));
        assert!(error(&[("account_url", "x")]).contains("not a valid url"));
        let url = ("account_url", "https://acc.blob.core.windows.net");
        assert!(error(&[url]).contains("secret_access_key"));
        let wrong = error(&[url, ("secret_access_key", "not base64")]);
        assert!(!wrong.contains("not base64"), "{wrong}");
        let key = ("secret_access_key", "aGlkZGVu");
        let connected = given(&[url, key, ("prefix", "/a//b/")]).unwrap();
        assert_eq!(
            connected.locator,
            "azblob:https://acc.blob.core.windows.net/buildkit-cache#a/b/blobs"
        );
        assert!(!format!("{connected:?}").contains("aGlkZGVu"));
        assert!(error(&[url, key, ("container", "..")]).contains("must not contain"));
    }
}

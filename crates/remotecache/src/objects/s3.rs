//! Caches in Amazon S3 and in stores that speak its protocol, laid out as BuildKit does: `<prefix><blobs_prefix><digest>`
//! and `<prefix><manifests_prefix><name>`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use build::error::BuildError;
use bytes::Bytes;
use oci::{Descriptor, media_type};
use registry::{BlobSource, BytesSource};
use reqwest::header::{CONTENT_LENGTH, ETAG, LAST_MODIFIED};
use reqwest::{Method, StatusCode, Url};
use source::image::fetch::BlobBytes;

use super::attributes::{attr_or_variable, check_key, duration, names};
use super::credentials::CredentialSource;
use super::http::{Authorize, Http, Limits, ObjectError, Open, Request, display_url, element, encode};
use super::import::MAX_MANIFEST_BYTES;
use super::parts::Parts;
use super::sigv4::Signer;
use super::{Connected, ObjectCache, Variable, http_date};

/// Attributes that only this kind has.
pub(super) const ATTRIBUTES: &[&str] = &[
    "access_key_id",
    "blobs_prefix",
    "bucket",
    "disable_accept_encoding",
    "endpoint_url",
    "manifests_prefix",
    "name",
    "prefix",
    "region",
    "retry_max_attempts",
    "retry_mode",
    "secret_access_key",
    "session_token",
    "touch_refresh",
    "upload_parallelism",
    "use_path_style",
];

/// Parts an upload may have.
const MAX_PARTS: u64 = 10_000;
/// Largest object, and part of one, that is copied at once.
const MAX_COPY_BYTES: u64 = 5 << 30;
/// Answers to uploads.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Reads the attributes.
pub(super) fn connect(
    attrs: &BTreeMap<String, String>,
    variable: Variable,
    client: &reqwest::Client,
) -> Result<Connected, BuildError> {
    let required = |name: &str, fallback: &str| {
        attr_or_variable(attrs, name, variable, fallback)
            .filter(|value| !value.is_empty())
            .ok_or_else(|| BuildError::user(format!("{name} (${fallback}) not set for s3 cache")))
    };
    let bucket = required("bucket", "AWS_BUCKET")?;
    let region = required("region", "AWS_REGION")?;
    let attr = |name: &str, default: &str| attrs.get(name).map_or(default, String::as_str).to_owned();
    let prefix = attr("prefix", "");
    let limits = limits(attrs)?;
    let names = names(attrs);
    let store = S3 {
        base: base(attrs, variable, &bucket, &region)?,
        credentials: CredentialSource::new(attrs, variable, client),
        http: Http::new(client, limits),
        blobs: format!("{prefix}{}", attr("blobs_prefix", "blobs/")),
        manifests: format!("{prefix}{}", attr("manifests_prefix", "manifests/")),
        // As BuildKit: what is no duration or truth value counts as absent.
        touch_refresh: attrs
            .get("touch_refresh")
            .and_then(|text| duration(text))
            .unwrap_or(Duration::from_secs(24 * 3600)),
        parallel: positive(attrs, "upload_parallelism")?.unwrap_or(4),
        bucket,
        region,
        names,
    };
    check_key("s3", &store.blobs)?;
    for name in &store.names {
        check_key("s3", &format!("{}{name}", store.manifests))?;
    }
    let locator = format!("s3:{}#{}#{}", display_url(&store.base), store.bucket, store.blobs);
    Ok(Connected {
        cache: Arc::new(Shared(Arc::new(store))),
        locator,
    })
}

fn positive(attrs: &BTreeMap<String, String>, name: &str) -> Result<Option<usize>, BuildError> {
    let Some(text) = attrs.get(name) else {
        return Ok(None);
    };
    let number = text.parse::<usize>().ok().filter(|number| *number > 0);
    let number = number.ok_or_else(|| BuildError::user(format!("{name} must be a positive integer")))?;
    Ok(Some(number.min(64)))
}

fn limits(attrs: &BTreeMap<String, String>) -> Result<Limits, BuildError> {
    let mut limits = Limits::default();
    if let Some(attempts) = positive(attrs, "retry_max_attempts")? {
        limits.attempts = u32::try_from(attempts).unwrap_or(u32::MAX);
    }
    // A store that is overloaded is left alone by all requests at once in either mode.
    if let Some(mode) = attrs.get("retry_mode")
        && mode != "standard"
        && mode != "adaptive"
    {
        return Err(BuildError::user(
            "retry_mode must be \"standard\" or \"adaptive\"",
        ));
    }
    Ok(limits)
}

/// The URL below which the bucket's objects are, with a slash at its end.
fn base(
    attrs: &BTreeMap<String, String>,
    variable: Variable,
    bucket: &str,
    region: &str,
) -> Result<Url, BuildError> {
    let own = attrs.get("endpoint_url").filter(|url| !url.is_empty()).cloned();
    let own = own
        .or_else(|| variable("AWS_ENDPOINT_URL_S3"))
        .or_else(|| variable("AWS_ENDPOINT_URL"))
        .filter(|url| !url.is_empty());
    let wants_path = attrs
        .get("use_path_style")
        .is_some_and(|text| matches!(text.as_str(), "1" | "t" | "T" | "true" | "TRUE" | "True"));
    // Certificates do not cover names with further dots.
    let path_style = if own.is_some() {
        wants_path
    } else {
        bucket.contains('.')
    };
    let endpoint = own.unwrap_or_else(|| {
        let domain = if region.starts_with("cn-") {
            "amazonaws.com.cn"
        } else {
            "amazonaws.com"
        };
        format!("https://s3.{region}.{domain}")
    });
    let invalid = || BuildError::user("endpoint_url of s3 cache is not a valid http or https url");
    let mut url = Url::parse(&endpoint).map_err(|_| invalid())?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(invalid());
    }
    url.set_query(None);
    url.set_fragment(None);
    let mut path = url.path().trim_end_matches('/').to_owned();
    if path_style {
        path = format!("{path}/{}", encode(bucket, false));
    } else {
        let host = format!("{bucket}.{}", url.host_str().unwrap_or_default());
        url.set_host(Some(&host)).map_err(|_| invalid())?;
    }
    url.set_path(&format!("{path}/"));
    Ok(url)
}

struct S3 {
    base: Url,
    credentials: CredentialSource,
    http: Http,
    bucket: String,
    region: String,
    blobs: String,
    manifests: String,
    names: Vec<String>,
    touch_refresh: Duration,
    parallel: usize,
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3")
            .field("base", &display_url(&self.base))
            .finish_non_exhaustive()
    }
}

/// What is known of an object.
struct Head {
    size: Option<u64>,
    modified: Option<SystemTime>,
}

impl S3 {
    fn blob_key(&self, blob: &Descriptor) -> String {
        format!("{}{}", self.blobs, blob.digest)
    }

    /// A request for an object; the query's keys have to be sorted.
    fn request(&self, method: Method, key: &str, query: &[(&str, &str)]) -> Request {
        let mut url = self.base.clone();
        let path = format!("{}{}", url.path(), encode(key, true));
        url.set_path(&path);
        let query: Vec<String> = query
            .iter()
            .map(|(name, value)| format!("{}={}", encode(name, false), encode(value, false)))
            .collect();
        url.set_query(Some(query.join("&")).filter(|query| !query.is_empty()).as_deref());
        Request::new(method, url)
    }

    async fn send(&self, request: &Request) -> Result<reqwest::Response, ObjectError> {
        let credentials = self.credentials.get().await?;
        let signer = Signer {
            credentials: &credentials,
            region: &self.region,
        };
        self.http.send(request, &signer as &dyn Authorize).await
    }

    async fn succeed(&self, request: &Request) -> Result<reqwest::Response, ObjectError> {
        let response = self.send(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(self.http.refused(request.method.clone(), response).await)
    }

    async fn head(&self, key: &str) -> Result<Option<Head>, ObjectError> {
        let request = self.request(Method::HEAD, key, &[]);
        let response = self.send(&request).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !response.status().is_success() {
            return Err(self.http.refused(Method::HEAD, response).await);
        }
        let text = |name| response.headers().get(name)?.to_str().ok();
        Ok(Some(Head {
            size: text(CONTENT_LENGTH).and_then(|size| size.parse().ok()),
            modified: text(LAST_MODIFIED).and_then(http_date::parse),
        }))
    }

    async fn upload(&self, key: &str, blob: &Descriptor, source: &dyn BlobSource) -> Result<(), ObjectError> {
        let mut parts = Parts::new(source, blob, MAX_PARTS);
        if parts.is_single() {
            let body = parts.next().await?;
            self.succeed(&self.request(Method::PUT, key, &[]).body(body))
                .await?;
            return Ok(());
        }
        let upload = self.start(key).await?;
        let mut written = Vec::new();
        let sent = async {
            loop {
                let body = parts.next().await?;
                if body.is_empty() {
                    break;
                }
                let number = (written.len() + 1).to_string();
                let query = [("partNumber", number.as_str()), ("uploadId", upload.as_str())];
                let request = self.request(Method::PUT, key, &query).body(body);
                let response = self.succeed(&request).await?;
                let tag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok());
                written.push(tag.unwrap_or_default().to_owned());
            }
            self.complete(key, &upload, &written).await
        };
        let sent = Box::pin(sent).await;
        if sent.is_err() {
            self.abort(key, &upload).await;
        }
        sent
    }

    async fn start(&self, key: &str) -> Result<String, ObjectError> {
        let request = self.request(Method::POST, key, &[("uploads", "")]);
        let response = self.succeed(&request).await?;
        let body = self.http.read(response, MAX_ANSWER_BYTES).await?;
        element(&String::from_utf8_lossy(&body), "UploadId").ok_or_else(|| ObjectError::InvalidResponse {
            url: display_url(&request.url),
            reason: "no upload id".to_owned(),
        })
    }

    async fn complete(&self, key: &str, upload: &str, tags: &[String]) -> Result<(), ObjectError> {
        let mut body = String::from("<CompleteMultipartUpload>");
        for (index, tag) in tags.iter().enumerate() {
            let tag = tag.replace('&', "&amp;").replace('<', "&lt;");
            body.push_str(&format!(
                "<Part><PartNumber>{}</PartNumber><ETag>{tag}</ETag></Part>",
                index + 1
            ));
        }
        body.push_str("</CompleteMultipartUpload>");
        let request = self
            .request(Method::POST, key, &[("uploadId", upload)])
            .header("content-type", "application/xml")
            .body(body);
        let response = self.succeed(&request).await?;
        let status = response.status();
        let body = self.http.read(response, MAX_ANSWER_BYTES).await?;
        let body = String::from_utf8_lossy(&body);
        // The status is sent before the parts are put together, and the trouble after it.
        if body.contains("<Error>") {
            return Err(ObjectError::Status {
                method: Method::POST,
                url: display_url(&request.url),
                status,
                code: element(&body, "Code").unwrap_or_default(),
                message: element(&body, "Message").unwrap_or_default(),
            });
        }
        Ok(())
    }

    /// Gives up an upload; parts that stay nevertheless are for the bucket's own rules to clear.
    async fn abort(&self, key: &str, upload: &str) {
        let request = self.request(Method::DELETE, key, &[("uploadId", upload)]);
        if let Err(error) = self.succeed(&request).await {
            tracing::debug!(%error, "an upload cannot be given up");
        }
    }

    /// Makes an object young by copying it onto itself, so that the bucket's rules do not expire it.
    async fn touch(&self, key: &str, size: u64) -> Result<(), ObjectError> {
        let from = format!("{}/{}", encode(&self.bucket, false), encode(key, true));
        if size < MAX_COPY_BYTES {
            let request = self
                .request(Method::PUT, key, &[])
                .header("x-amz-copy-source", from)
                .header("x-amz-metadata-directive", "REPLACE")
                .header(
                    "x-amz-meta-updated-at",
                    oci::timestamp::from_system(SystemTime::now()),
                );
            return self.succeed(&request).await.map(drop);
        }
        let upload = self.start(key).await?;
        let copied = Box::pin(self.copy_parts(key, &upload, &from, size)).await;
        if copied.is_err() {
            self.abort(key, &upload).await;
        }
        copied
    }

    async fn copy_parts(&self, key: &str, upload: &str, from: &str, size: u64) -> Result<(), ObjectError> {
        let mut tags = Vec::new();
        let mut start = 0;
        while start < size {
            let end = start.saturating_add(MAX_COPY_BYTES).min(size);
            let number = (tags.len() + 1).to_string();
            let request = self
                .request(
                    Method::PUT,
                    key,
                    &[("partNumber", number.as_str()), ("uploadId", upload)],
                )
                .header("x-amz-copy-source", from)
                .header("x-amz-copy-source-range", format!("bytes={start}-{}", end - 1));
            let response = self.succeed(&request).await?;
            let body = self.http.read(response, MAX_ANSWER_BYTES).await?;
            tags.push(element(&String::from_utf8_lossy(&body), "ETag").unwrap_or_default());
            start = end;
        }
        self.complete(key, upload, &tags).await
    }
}

/// Streams outlive the call that opens them.
#[derive(Debug)]
struct Shared(Arc<S3>);

#[async_trait]
impl ObjectCache for Shared {
    async fn manifests(&self) -> Result<Vec<Bytes>, ObjectError> {
        let Some(name) = self.0.names.first() else {
            return Ok(Vec::new());
        };
        let key = format!("{}{name}", self.0.manifests);
        let get = self.0.request(Method::GET, &key, &[]);
        let read = self.0.http.document(MAX_MANIFEST_BYTES, || self.0.succeed(&get));
        match read.await {
            Ok(manifest) => Ok(vec![manifest]),
            Err(error) if error.is_not_found() && error.code() != "NoSuchBucket" => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    async fn has(&self, blob: &Descriptor) -> Result<bool, ObjectError> {
        let found = self.0.head(&self.0.blob_key(blob)).await?;
        Ok(found.is_some_and(|found| found.size.is_none_or(|size| size == blob.size)))
    }

    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<BlobBytes, ObjectError> {
        let (this, key) = (Arc::clone(&self.0), self.0.blob_key(blob));
        let open: Open = Arc::new(move |offset| {
            let (this, key) = (Arc::clone(&this), key.clone());
            Box::pin(async move {
                let mut request = this.request(Method::GET, &key, &[]);
                if offset > 0 {
                    request = request.header("range", format!("bytes={offset}-"));
                }
                this.succeed(&request).await
            })
        });
        self.0.http.stream(open, offset, blob.size).await
    }

    async fn put(&self, blob: &Descriptor, source: &dyn BlobSource) -> Result<(), ObjectError> {
        let key = self.0.blob_key(blob);
        let known = self.0.head(&key).await?;
        let Some(known) = known.filter(|known| known.size.is_none_or(|size| size == blob.size)) else {
            return self.0.upload(&key, blob, source).await;
        };
        let age = known
            .modified
            .and_then(|modified| SystemTime::now().duration_since(modified).ok());
        if age.is_some_and(|age| age > self.0.touch_refresh) {
            return self.0.touch(&key, blob.size).await;
        }
        Ok(())
    }

    async fn put_manifest(&self, manifest: Bytes) -> Result<(), ObjectError> {
        let blob = Descriptor::of_bytes(media_type::BUILDKIT_CACHE_CONFIG, &manifest);
        for name in &self.0.names {
            let key = format!("{}{name}", self.0.manifests);
            let source = BytesSource(manifest.clone());
            self.0.upload(&key, &blob, &source).await?;
        }
        Ok(())
    }

    fn parallel(&self) -> usize {
        self.0.parallel
    }
}

#[cfg(test)]
mod tests {
    use super::super::blob_of;
    use super::*;

    fn attrs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let pairs = pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let given = [
            ("bucket", "b.c"),
            ("region", "eu-1"),
            ("secret_access_key", "hidden"),
            ("access_key_id", "id"),
        ];
        let given = given.map(|(key, value)| (key.to_owned(), value.to_owned()));
        given.into_iter().chain(pairs).collect()
    }

    fn of(pairs: &[(&str, &str)]) -> Url {
        base(&attrs(pairs), |_| None, &attrs(pairs)["bucket"], "eu-1").unwrap()
    }

    #[test]
    fn buckets_are_in_the_host_or_in_the_path() {
        assert_eq!(
            of(&[("bucket", "b")]).as_str(),
            "https://b.s3.eu-1.amazonaws.com/"
        );
        assert_eq!(of(&[]).as_str(), "https://s3.eu-1.amazonaws.com/b.c/");
        let own = ("endpoint_url", "http://host:9000/x/");
        assert_eq!(
            of(&[own, ("use_path_style", "true")]).as_str(),
            "http://host:9000/x/b.c/"
        );
        assert_eq!(of(&[own, ("bucket", "b")]).as_str(), "http://b.host:9000/x/");
    }

    #[test]
    fn wrong_attributes_are_named_and_secrets_are_not() {
        let client = reqwest_client();
        let error =
            |pairs: &[(&str, &str)]| connect(&attrs(pairs), |_| None, &client).unwrap_err().to_string();
        assert_eq!(
            connect(&BTreeMap::new(), |_| None, &client)
                .unwrap_err()
                .to_string(),
            "bucket ($AWS_BUCKET) not set for s3 cache"
        );
        assert_eq!(
            error(&[("upload_parallelism", "0")]),
            "upload_parallelism must be a positive integer"
        );
        assert_eq!(
            error(&[("retry_mode", "x")]),
            "retry_mode must be \"standard\" or \"adaptive\""
        );
        assert!(error(&[("endpoint_url", "ftp://x")]).contains("endpoint_url"));
        assert!(error(&[("prefix", "../")]).contains("must not contain"));
        let connected = connect(&attrs(&[("prefix", "p/")]), |_| None, &client).unwrap();
        let shown = format!("{connected:?}");
        assert!(
            shown.contains("b.c") && shown.contains("p/blobs/") && !shown.contains("hidden"),
            "{shown}"
        );
    }

    #[test]
    fn keys_are_encoded_once() {
        let client = reqwest_client();
        let given = attrs(&[("bucket", "b")]);
        let store = S3 {
            base: of(&[("bucket", "b")]),
            credentials: CredentialSource::new(&given, |_| None, &client),
            http: Http::new(&client, Limits::default()),
            bucket: "b".to_owned(),
            region: "eu-1".to_owned(),
            blobs: "a b/".to_owned(),
            manifests: String::new(),
            names: Vec::new(),
            touch_refresh: Duration::ZERO,
            parallel: 1,
        };
        let blob = blob_of(b"x");
        let request = store.request(Method::GET, &store.blob_key(&blob), &[("uploadId", "a/b+c")]);
        assert!(
            request.url.path().starts_with("/a%20b/sha256%3A2d71"),
            "{}",
            request.url
        );
        assert_eq!(request.url.query(), Some("uploadId=a%2Fb%2Bc"));
    }

    fn reqwest_client() -> reqwest::Client {
        registry::web_client("test").unwrap()
    }
}

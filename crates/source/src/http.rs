//! The HTTP source: one file from a web server, or from the client in place of one.
//!
//! What a URL holds is asked once per build. A file that was fetched before is kept with the server's `ETag`; the server is
//! asked whether it still holds. With a pinned checksum the server is not asked at all when the solver has the result.

mod ask;
mod attributes;
mod name;
mod signed;
mod store;

use std::sync::Arc;

use async_trait::async_trait;
use build::error::{BuildError, ErrorKind};
use build::job::Job;
use build::meta::{HttpMeta, MetaContext};
use build::op::{CacheMap, Op, OpContext, OpProvenance, ResultRef, VertexSpec};
use build::progress::VertexProgress;
use build::session::{SessionError, SessionGroup};
use bytes::Bytes;
use cache::{ImmutableRef, Store};
use oci::{Algorithm, Digest};
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_DISPOSITION, CONTENT_ENCODING, ETAG, HeaderMap, HeaderName,
    HeaderValue, IF_NONE_MATCH, LAST_MODIFIED,
};
use reqwest::{Method, Response, StatusCode};

use crate::resolution::{self, Asked};
use ask::{AskError, Question};
use attributes::Attributes;
use store::{Body, Kept};

/// Most bytes that are checksummed after a file.
const MAX_SUFFIX_BYTES: usize = 4 << 10;
/// Host that stands for the client itself.
const SESSION_HOST: &str = "buildkit-session";

/// Where files come from: one per engine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct HttpFiles {
    client: reqwest::Client,
    store: Store,
}

/// What a URL holds.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    digest: Digest,
    filename: String,
    last_modified: Option<String>,
    /// The file; `None` when a pinned checksum made asking needless.
    reference: Option<ImmutableRef>,
}

impl Resolved {
    /// Writes it without the file, for [`Self::decode`]: one part a line.
    fn encode(&self) -> Vec<u8> {
        let modified = self.last_modified.as_deref().unwrap_or_default();
        format!("{}\n{modified}\n{}", self.digest, self.filename).into_bytes()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(bytes).ok()?.splitn(3, '\n');
        Some(Self {
            digest: parts.next()?.parse().ok()?,
            last_modified: parts.next().filter(|text| !text.is_empty()).map(str::to_owned),
            filename: parts.next()?.to_owned(),
            reference: None,
        })
    }
}

impl HttpFiles {
    /// Makes files of a web client, which must not follow redirects itself, and the store that keeps them.
    pub fn new(client: reqwest::Client, store: Store) -> Self {
        Self { client, store }
    }

    /// Finds out what a source holds, fetching it when that cannot be told otherwise. `checksum` asks for that of another
    /// algorithm as well, made of the file and of bytes after it.
    ///
    /// # Errors
    /// When the server cannot be asked, refuses, or has something else than the pinned checksum says.
    pub async fn resolve_meta(
        &self,
        ctx: &MetaContext,
        op: &llb::pb::SourceOp,
        checksum: Option<&(Algorithm, Bytes)>,
    ) -> Result<HttpMeta, BuildError> {
        if checksum.is_some_and(|(_, suffix)| suffix.len() > MAX_SUFFIX_BYTES) {
            return Err(BuildError::user(format!(
                "http checksum request suffix exceeds max size {MAX_SUFFIX_BYTES}"
            )));
        }
        let attributes = Attributes::read(op)?;
        let resolved = match attributes.pinned().filter(|_| checksum.is_none()) {
            Some(resolved) => Arc::new(resolved),
            None => {
                // Steps of this build see what the frontend saw.
                let jobs = [Arc::clone(&ctx.job)];
                let asking = self.ask_or_recall(&attributes, &jobs, &ctx.sessions, &ctx.progress);
                let resolved = build::job::memo(&jobs, &memo_key(&attributes)?, asking).await?;
                verified(&attributes, &resolved).await?;
                resolved
            }
        };
        let last_modified = resolved.last_modified.as_deref().and_then(name::parse_http_date);
        let filename = resolved.filename.clone();
        let checksum = match (checksum.cloned(), resolved.reference.clone()) {
            (Some((algorithm, suffix)), Some(reference)) => {
                let made = blocking(move || store::checksum(&reference, algorithm, &suffix));
                Some(made.await?)
            }
            (Some(_), None) => return Err(not_kept(&attributes)),
            _ => None,
        };
        Ok(HttpMeta {
            digest: resolved.digest,
            filename,
            last_modified,
            checksum,
        })
    }

    /// Asks the server, or takes what is remembered of it where the builds allow that.
    async fn ask_or_recall(
        &self,
        attributes: &Attributes,
        jobs: &[Arc<Job>],
        sessions: &SessionGroup,
        progress: &VertexProgress,
    ) -> Result<Resolved, BuildError> {
        if attributes.host() == SESSION_HOST {
            return self.ask(attributes, sessions).await;
        }
        let asked = Asked {
            key: memo_key(attributes)?,
            shown: attributes.shown_url(),
            mode: resolution::mode(jobs),
            progress,
        };
        let ask = Box::pin(self.ask(attributes, sessions));
        let recall = async |bytes: Vec<u8>| {
            let mut resolved = Resolved::decode(&bytes)?;
            let kept = self.kept(attributes).await.ok()?;
            resolved.reference = kept.into_iter().find_map(|kept| kept.holding(&resolved.digest));
            Some(resolved)
        };
        let work = resolution::resolve(&self.store, asked, ask, Resolved::encode, recall);
        Box::pin(work).await
    }

    /// Asks the server, or fetches the file.
    async fn ask(&self, attributes: &Attributes, sessions: &SessionGroup) -> Result<Resolved, BuildError> {
        if attributes.host() == SESSION_HOST {
            return self.fetch_from_client(attributes, sessions).await;
        }
        let kept = self.kept(attributes).await?;
        let question = question(attributes, sessions).await?;
        if !kept.is_empty()
            && let Some(resolved) = self.revalidate(attributes, &question, &kept).await?
        {
            return Ok(resolved);
        }
        let response = self.get(attributes, &question, &kept).await?;
        if response.status() == StatusCode::NOT_MODIFIED {
            let found = matching(&kept, &response);
            return found
                .map(|kept| kept.resolved(attributes, &response))
                .ok_or_else(|| {
                    BuildError::new(
                        ErrorKind::Unavailable,
                        format!("{}: invalid not-modified ETag", attributes.shown_url()),
                    )
                });
        }
        self.fetch(attributes, response).await
    }

    async fn kept(&self, attributes: &Attributes) -> Result<Vec<Kept>, BuildError> {
        let (store, index) = (self.store.clone(), attributes.index()?);
        blocking(move || store::find(&store, &index)).await
    }

    /// Some servers answer `If-None-Match` of a GET badly but have right ETags, so they are compared after a HEAD first.
    async fn revalidate(
        &self,
        attributes: &Attributes,
        question: &Question,
        kept: &[Kept],
    ) -> Result<Option<Resolved>, BuildError> {
        let headers = conditions(attributes, kept)?;
        let Ok(response) = question.ask(&self.client, &Method::HEAD, &headers).await else {
            return Ok(None);
        };
        if !matches!(response.status(), StatusCode::OK | StatusCode::NOT_MODIFIED) {
            return Ok(None);
        }
        Ok(matching(kept, &response).map(|kept| kept.resolved(attributes, &response)))
    }

    async fn get(
        &self,
        attributes: &Attributes,
        question: &Question,
        kept: &[Kept],
    ) -> Result<Response, BuildError> {
        let headers = conditions(attributes, kept)?;
        let response = question.ask(&self.client, &Method::GET, &headers).await;
        let response = response.map_err(|error| no_answer(attributes, error))?;
        let status = response.status();
        if status.is_success() || status.is_redirection() {
            return Ok(response);
        }
        let kind = match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => ErrorKind::NotFound,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ErrorKind::Denied,
            status if status.is_server_error() => ErrorKind::Unavailable,
            _ => ErrorKind::User,
        };
        let text = format!(
            "{}: invalid response status {}",
            attributes.shown_url(),
            status.as_u16()
        );
        Err(BuildError::new(kind, text))
    }

    async fn fetch(&self, attributes: &Attributes, mut response: Response) -> Result<Resolved, BuildError> {
        let header = |name| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        let (etag, last_modified) = (header(ETAG), header(LAST_MODIFIED));
        let filename = attributes.filename(header(CONTENT_DISPOSITION).as_deref());
        let is_gzip = header(CONTENT_ENCODING).is_some_and(|encoding| encoding.eq_ignore_ascii_case("gzip"));
        let of_url = |error: BuildError| error.context(attributes.shown_url());
        let mut body = Body::create(&self.store, attributes, filename.clone(), is_gzip).await?;
        loop {
            let chunk = response
                .chunk()
                .await
                .map_err(|error| unreachable_server(attributes, error))?;
            let Some(chunk) = chunk else { break };
            body.write(chunk).await.map_err(of_url)?;
        }
        let (reference, digest) = body
            .finish(etag.as_deref(), last_modified.as_deref(), attributes.index()?)
            .await
            .map_err(of_url)?;
        attributes.check(digest)?;
        Ok(Resolved {
            digest,
            filename,
            last_modified,
            reference: Some(reference),
        })
    }

    async fn fetch_from_client(
        &self,
        attributes: &Attributes,
        sessions: &SessionGroup,
    ) -> Result<Resolved, BuildError> {
        let path = attributes.url.path().to_owned();
        let stream = sessions.any(|session| {
            let path = path.clone();
            async move { session.pull_upload(&path).await }
        });
        let mut stream = stream.await?;
        let filename = attributes.filename(None);
        let mut body = Body::create(&self.store, attributes, filename.clone(), false).await?;
        while let Some(chunk) = stream.incoming.recv().await {
            body.write(chunk?).await?;
        }
        let (reference, digest) = body.finish(None, None, attributes.index()?).await?;
        Ok(Resolved {
            digest,
            filename,
            last_modified: None,
            reference: Some(reference),
        })
    }
}

fn unreachable_server(attributes: &Attributes, error: reqwest::Error) -> BuildError {
    let error = error.without_url();
    BuildError::from_source(ErrorKind::Unavailable, error).context(attributes.shown_url())
}

fn no_answer(attributes: &Attributes, error: AskError) -> BuildError {
    match error {
        AskError::Http(error) => unreachable_server(attributes, error),
        error => BuildError::from_source(ErrorKind::Unavailable, error).context(attributes.shown_url()),
    }
}

/// A header that says something of what the client wants; its value is not shown, as it may be a secret.
fn header(attributes: &Attributes, name: &HeaderName, value: &[u8]) -> Result<HeaderValue, BuildError> {
    HeaderValue::from_bytes(value).map_err(|_| {
        let name = match name.as_str() {
            "authorization" => "Authorization",
            "accept" => "Accept",
            "user-agent" => "User-Agent",
            other => other,
        };
        let text = format!(
            "{}: invalid header field value for {name:?}",
            attributes.shown_url()
        );
        BuildError::user(text)
    })
}

/// What the server is asked for, whatever is kept already.
async fn question(attributes: &Attributes, sessions: &SessionGroup) -> Result<Question, BuildError> {
    let mut headers = HeaderMap::new();
    for (name, value) in &attributes.headers {
        let name = HeaderName::from_bytes(name.as_bytes())
            .map_err(|error| BuildError::from_source(ErrorKind::User, error))?;
        let value = header(attributes, &name, value.as_bytes())?;
        headers.insert(name, value);
    }
    let authorization = match authorization(attributes, sessions).await? {
        Some(secret) => {
            let mut value = header(attributes, &AUTHORIZATION, &secret)?;
            value.set_sensitive(true);
            Some(value)
        }
        None => None,
    };
    Ok(Question {
        url: attributes.url.clone(),
        headers,
        authorization,
    })
}

fn conditions(attributes: &Attributes, kept: &[Kept]) -> Result<HeaderMap, BuildError> {
    let mut headers = HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("gzip"))]);
    if !kept.is_empty() {
        let value = header(attributes, &IF_NONE_MATCH, etags(kept).as_bytes())?;
        headers.insert(IF_NONE_MATCH, value);
    }
    Ok(headers)
}

/// The value of an `Authorization` header: the secret that the source names, or what the client has for the host.
async fn authorization(
    attributes: &Attributes,
    sessions: &SessionGroup,
) -> Result<Option<Bytes>, BuildError> {
    if let Some(name) = &attributes.auth_secret {
        let secret = secret(sessions, name).await.map_err(|error| {
            BuildError::from(error).context(format!("failed to retrieve HTTP auth secret {name}"))
        })?;
        return Ok(Some(secret));
    }
    let host = attributes.host().trim_start_matches('[').trim_end_matches(']');
    if let Ok(token) = secret(sessions, &format!("HTTP_AUTH_TOKEN_{host}")).await {
        return Ok(Some([b"Bearer ".as_slice(), &token].concat().into()));
    }
    Ok(secret(sessions, &format!("HTTP_AUTH_HEADER_{host}")).await.ok())
}

async fn secret(sessions: &SessionGroup, name: &str) -> Result<Bytes, SessionError> {
    sessions
        .any(|session| {
            let name = name.to_owned();
            async move { session.secret(&name).await }
        })
        .await
}

fn memo_key(attributes: &Attributes) -> Result<String, BuildError> {
    Ok(format!("resolved {}", attributes.index()?))
}

/// ETags are compared without the mark of weak ones.
fn etag_value(etag: &str) -> &str {
    etag.strip_prefix("W/").unwrap_or(etag)
}

fn etags(kept: &[Kept]) -> String {
    kept.iter()
        .map(|kept| kept.etag.as_str())
        .collect::<Vec<_>>()
        .join(", ")
}

/// The kept file that a server's answer is about. A 304 without ETag is about the only one that was asked for.
fn matching<'a>(kept: &'a [Kept], response: &Response) -> Option<&'a Kept> {
    match response.headers().get(ETAG).and_then(|value| value.to_str().ok()) {
        Some(etag) => kept.iter().find(|kept| kept.etag == etag_value(etag)),
        None if kept.len() == 1 && response.status() == StatusCode::NOT_MODIFIED => kept.first(),
        None => None,
    }
}

/// Requires that a file is what the source demands: of the pinned checksum, and signed.
async fn verified(attributes: &Attributes, resolved: &Resolved) -> Result<(), BuildError> {
    attributes.check(resolved.digest)?;
    let Some(demand) = attributes.demand.clone() else {
        return Ok(());
    };
    let reference = resolved.reference.clone().ok_or_else(|| not_kept(attributes))?;
    blocking(move || demand.check(&reference)).await
}

/// What a file is may be remembered when the file is gone.
fn not_kept(attributes: &Attributes) -> BuildError {
    let text = format!(
        "{} is not kept here and could not be fetched",
        attributes.shown_url()
    );
    BuildError::new(ErrorKind::Unavailable, text)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| BuildError::internal(format!("http source: {error}")))?
}

/// One `http://` or `https://` vertex.
#[derive(Debug)]
pub struct HttpOp {
    files: HttpFiles,
    attributes: Attributes,
    pin: std::sync::Mutex<Option<Digest>>,
}

impl HttpOp {
    /// Makes the op of a vertex.
    ///
    /// # Errors
    /// A user error for a URL or attributes that cannot be understood.
    pub fn new(vertex: &VertexSpec, files: HttpFiles) -> Result<Self, BuildError> {
        let Some(llb::pb::op::Op::Source(source)) = &vertex.op.op else {
            return Err(BuildError::internal("not a source op"));
        };
        Ok(Self {
            files,
            attributes: Attributes::read(source)?,
            pin: std::sync::Mutex::default(),
        })
    }

    /// What the URL holds: the same for all steps of a build.
    async fn asked(&self, ctx: &OpContext) -> Result<Arc<Resolved>, BuildError> {
        let key = memo_key(&self.attributes)?;
        let sessions = ctx.sessions();
        let jobs = ctx.jobs();
        let asking = async {
            let ask = self
                .files
                .ask_or_recall(&self.attributes, &jobs, &sessions, ctx.progress());
            let resolved = ctx.memo(&key, ask).await?;
            verified(&self.attributes, &resolved).await?;
            Ok(resolved)
        };
        tokio::select! {
            resolved = asking => resolved,
            () = ctx.cancel().cancelled() => Err(BuildError::canceled()),
        }
    }
}

#[async_trait]
impl Op for HttpOp {
    async fn cache_map(&self, ctx: &OpContext, _: u32) -> Result<CacheMap, BuildError> {
        let resolved = match self.attributes.pinned() {
            Some(resolved) => Arc::new(resolved),
            None => self.asked(ctx).await?,
        };
        *self.pin.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(resolved.digest);
        let key = self.attributes.key(
            &resolved.filename,
            resolved.digest,
            resolved.last_modified.as_deref(),
        )?;
        Ok(CacheMap {
            digests: vec![super::key_digest(&key.to_string())],
            ..CacheMap::default()
        })
    }

    async fn content_digest(
        &self,
        _: &OpContext,
        _: usize,
        _: &ResultRef,
    ) -> Result<Option<Digest>, BuildError> {
        Ok(None)
    }

    async fn exec(&self, ctx: &OpContext, _: &[ResultRef]) -> Result<Vec<Option<ResultRef>>, BuildError> {
        let resolved = self.asked(ctx).await?;
        let reference = resolved
            .reference
            .clone()
            .ok_or_else(|| not_kept(&self.attributes))?;
        Ok(vec![Some(ResultRef::new(reference))])
    }

    fn provenance(&self) -> Option<OpProvenance> {
        let pin = *self.pin.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Some(OpProvenance {
            source: Some(self.attributes.url.to_string()),
            pin: pin.map(|digest| digest.to_string()),
            ..OpProvenance::default()
        })
    }
}

//! An engine with a store in a temporary directory and one client.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use engine::bridge::{
    Bridge, BuildResult, CacheOption, Frontend, FrontendRequest, PolicyAnswer, PolicyQuestion, SourceResolver,
};
use engine::bridge::{MetaContext, MetaRequest, SourceMeta};
use engine::engine::Services;
use engine::op::build::BuildOp;
use engine::op::compose::{DiffOp, MergeOp};
use engine::op::file::FileOp;
use engine::op::{Op, OpFactory, VertexSpec};
use engine::session::{
    ByteStream, ClientBlob, ClientBlobWriter, ClientContent, Credentials, FileStream, Session, SessionError,
    SessionId, Sessions, SyncRequest, Token, TokenRequest,
};
use engine::solve::{Exporter, ExporterRequest, SolveRequest, SolveResponse};
use engine::unlazy::Unlazy;
use engine::{BuildError, Engine};
use export::image::{ImageExporter, LayerExporter};
use export::oci::{ArchiveExporter, Variant};
use export::tar::TarExporter;
use llb::pb;
use llb::{FileActions, MarshalOptions, MkfileOptions, State};
use registry::{Client, ClientOptions, HostsConfig};
use remotecache::{self, ObjectAccess, RemoteCaches};
use source::image::fetch::BlobFetcher;
use source::image::{ImageOp, Images, providers};
use source::image_blob::BlobOp;
use source::oci_layout::{self, LayoutOp};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Everything a build needs.
pub struct World {
    pub engine: Engine,
    pub client: Arc<TestClient>,
    next: AtomicU64,
    _dir: TempDir,
}

impl World {
    /// Starts an engine on an empty store.
    pub fn new() -> Self {
        Self::with_frontend(BTreeMap::new())
    }

    pub fn with_frontend(frontends: BTreeMap<String, Arc<dyn Frontend>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let content = content::Store::open(&path.join("content")).unwrap();
        let snapshotter = Arc::new(snapshot::Native::open(&path.join("snapshots")).unwrap());
        let store = cache::Store::open(path, content, snapshotter, cache::StoreOptions::default()).unwrap();
        let options = ClientOptions {
            backoff: Duration::from_millis(1),
            idle_timeout: Duration::from_secs(5),
            ..ClientOptions::default()
        };
        let images = Images::new(
            Client::with_options(HostsConfig::default(), options),
            store.clone(),
        );
        let mut places = providers(&images);
        let access = ObjectAccess {
            client: registry::web_client("test").unwrap(),
            variable: |_| None,
            connections: Arc::default(),
        };
        places.extend(remotecache::providers(&images, &access.connections));
        let fetcher = BlobFetcher::new(store.clone(), places);
        let layers = LayerExporter::new(store.clone(), fetcher.clone());
        let caches = RemoteCaches::new(&images, &layers, &access);
        let unlazy: Arc<dyn Unlazy> = Arc::new(fetcher);
        let client = Arc::new(TestClient::new());
        let exporters: BTreeMap<String, Arc<dyn Exporter>> = BTreeMap::from([
            (
                "image".to_owned(),
                Arc::new(ImageExporter::new(Arc::clone(&images), layers.clone())) as _,
            ),
            (
                "tar".to_owned(),
                Arc::new(TarExporter::new(Arc::clone(&unlazy))) as _,
            ),
            (
                "oci".to_owned(),
                Arc::new(ArchiveExporter::new(layers.clone(), Variant::Oci)) as _,
            ),
            (
                "docker".to_owned(),
                Arc::new(ArchiveExporter::new(layers, Variant::Docker)) as _,
            ),
        ]);
        let ops = Ops {
            images: Arc::clone(&images),
            store: store.clone(),
            unlazy: Arc::clone(&unlazy),
        };
        let engine = Engine::start(Services {
            store,
            sessions: Arc::clone(&client) as _,
            ops: Arc::new(ops),
            sources: Arc::new(Resolver(images)),
            unlazy,
            frontends,
            exporters,
            cache_importers: caches.importers,
            cache_exporters: caches.exporters,
            processors: Vec::new(),
            allowed_entitlements: Vec::new(),
            max_parallelism: None,
            resolve_cache: engine::job::ResolveCache::default(),
        });
        Self {
            engine,
            client,
            next: AtomicU64::new(0),
            _dir: dir,
        }
    }

    /// The files of the engine's state, blobs and trees apart, that contain a text.
    pub fn files_with(&self, text: &str) -> Vec<std::path::PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self._dir.path().to_owned()];
        while let Some(dir) = open.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                let kind = entry.file_type().unwrap();
                if ["content", "snapshots"]
                    .iter()
                    .any(|name| entry.file_name() == *name)
                {
                    continue;
                }
                if kind.is_dir() {
                    open.push(entry.path());
                } else if kind.is_file() {
                    let bytes = std::fs::read(entry.path()).unwrap();
                    let has = bytes.windows(text.len()).any(|window| window == text.as_bytes());
                    found.extend(has.then(|| entry.path()));
                }
            }
        }
        found
    }

    /// Builds a definition and exports it.
    pub async fn build(
        &self,
        state: &State,
        exporter: &str,
        attrs: &[(&str, &str)],
    ) -> Result<SolveResponse, BuildError> {
        let definition = state.marshal(&MarshalOptions::default()).unwrap();
        self.solve(SolveRequest {
            definition: Some(definition),
            ..request(exporter, attrs)
        })
        .await
    }

    /// Runs a request under a name of its own.
    pub async fn solve(&self, mut request: SolveRequest) -> Result<SolveResponse, BuildError> {
        request.id = format!("build-{}", self.next.fetch_add(1, Ordering::Relaxed));
        request.session = Some(SessionId("client".to_owned()));
        self.engine.solve(request).await
    }

    /// Exports the image of a state that is not changed; the cheapest way to have its source resolved.
    pub async fn resolve(&self, state: &State) -> Result<SolveResponse, BuildError> {
        self.build(state, "image", &[]).await
    }
}

/// A request with one exporter.
pub fn request(exporter: &str, attrs: &[(&str, &str)]) -> SolveRequest {
    let attrs = attrs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    SolveRequest {
        exporters: vec![ExporterRequest {
            kind: exporter.to_owned(),
            attrs,
        }],
        ..SolveRequest::default()
    }
}

/// An image state.
pub fn image(reference: impl std::fmt::Display) -> State {
    State::image(&reference.to_string(), llb::ImageOptions::default())
}

/// Adds a file to a state.
pub fn with_file(state: &State, path: &str, content: &str) -> State {
    let made = MkfileOptions {
        created_ns: Some(1_000_000_000_000),
        ..MkfileOptions::default()
    };
    let actions = FileActions::new().mkfile(path, 0o644, Bytes::copy_from_slice(content.as_bytes()), made);
    state.file(actions, &llb::Constraints::new())
}

#[derive(Debug)]
struct Ops {
    images: Arc<Images>,
    store: cache::Store,
    unlazy: Arc<dyn Unlazy>,
}

impl OpFactory for Ops {
    fn create(&self, vertex: &Arc<VertexSpec>) -> Result<Arc<dyn Op>, BuildError> {
        match &vertex.op.op {
            Some(pb::op::Op::Source(source)) if source.identifier.starts_with("oci-layout://") => {
                Ok(Arc::new(LayoutOp::new(vertex, Arc::clone(&self.images))?))
            }
            Some(pb::op::Op::Source(source)) if source.identifier.contains("+blob://") => {
                Ok(Arc::new(BlobOp::new(vertex, Arc::clone(&self.images))?))
            }
            Some(pb::op::Op::Source(_)) => Ok(Arc::new(ImageOp::new(vertex, Arc::clone(&self.images))?)),
            Some(pb::op::Op::Build(_)) => Ok(Arc::new(BuildOp::new(vertex)?)),
            Some(pb::op::Op::Merge(_)) => Ok(Arc::new(MergeOp::new(vertex, self.store.clone())?)),
            Some(pb::op::Op::Diff(_)) => Ok(Arc::new(DiffOp::new(
                vertex,
                self.store.clone(),
                Arc::clone(&self.unlazy),
            )?)),
            _ => Ok(Arc::new(FileOp::new(
                vertex,
                self.store.clone(),
                Arc::clone(&self.unlazy),
            )?)),
        }
    }
}

#[derive(Debug)]
struct Resolver(Arc<Images>);

#[async_trait]
impl SourceResolver for Resolver {
    async fn resolve_meta(
        &self,
        ctx: &MetaContext,
        op: pb::SourceOp,
        request: &MetaRequest,
    ) -> Result<SourceMeta, BuildError> {
        if op.identifier.starts_with("oci-layout://") {
            return oci_layout::resolve_meta(&self.0, ctx, op, request).await;
        }
        self.0.resolve_meta(ctx, op, request).await
    }
}

/// A frontend that is a closure over nothing but its result's parts: states by platform, metadata, and caches to import.
#[derive(Debug)]
pub struct Platforms(
    pub Vec<(&'static str, State)>,
    pub BTreeMap<String, Bytes>,
    pub Vec<CacheOption>,
);

#[async_trait]
impl Frontend for Platforms {
    async fn solve(&self, bridge: &Bridge, _: FrontendRequest) -> Result<BuildResult, BuildError> {
        let mut result = BuildResult {
            metadata: self.1.clone(),
            ..BuildResult::default()
        };
        let mut platforms = Vec::new();
        for (platform, state) in &self.0 {
            let parsed = oci::Platform::parse(platform).unwrap();
            let options = MarshalOptions {
                platform: parsed.clone(),
                ..MarshalOptions::default()
            };
            let definition = state.marshal(&options).unwrap();
            let request = engine::bridge::BridgeRequest {
                definition: Some(definition),
                cache_imports: self.2.clone(),
                ..Default::default()
            };
            let built = bridge.solve(request).await?;
            result.refs.insert((*platform).to_owned(), built.single);
            platforms.push(format!(
                r#"{{"ID":"{platform}","Platform":{}}}"#,
                serde_json::to_string(&parsed).unwrap()
            ));
        }
        let platforms = format!(r#"{{"Platforms":[{}]}}"#, platforms.join(","));
        result
            .metadata
            .insert("refs.platforms".to_owned(), platforms.into());
        Ok(result)
    }
}

/// A client that offers credentials and a content store, and takes one file. Clones are the same client.
#[derive(Clone, Debug)]
pub struct TestClient(Arc<ClientState>);

#[derive(Debug)]
pub struct ClientState {
    id: SessionId,
    /// Its account at all registries.
    pub account: Mutex<Option<Credentials>>,
    /// The file it was sent last.
    pub file: Mutex<Vec<u8>>,
    /// Its content stores, all in one.
    pub blobs: Arc<Mutex<BTreeMap<oci::Digest, Bytes>>>,
    /// The blobs that were read there.
    pub reads: Arc<Mutex<Vec<oci::Digest>>>,
    /// What it was asked about sources.
    pub questions: Mutex<Vec<PolicyQuestion>>,
    /// What it will answer; nothing is left: it fails.
    pub answers: Mutex<VecDeque<PolicyAnswer>>,
    /// Exporters that it chooses.
    pub chosen: Mutex<Vec<ExporterRequest>>,
    /// The refs that it could choose for, and what it was told of the exports.
    pub exports: Mutex<(Vec<String>, BTreeMap<String, String>)>,
    /// Why it is not content with them.
    pub refusal: Mutex<Option<String>>,
}

impl std::ops::Deref for TestClient {
    type Target = ClientState;

    fn deref(&self) -> &ClientState {
        &self.0
    }
}

impl TestClient {
    fn new() -> Self {
        Self(Arc::new(ClientState {
            id: SessionId("client".to_owned()),
            account: Mutex::default(),
            file: Mutex::default(),
            blobs: Arc::default(),
            reads: Arc::default(),
            questions: Mutex::default(),
            answers: Mutex::default(),
            chosen: Mutex::default(),
            exports: Mutex::default(),
            refusal: Mutex::default(),
        }))
    }

    fn unsupported<T>(&self, method: &'static str) -> Result<T, SessionError> {
        Err(SessionError::Unsupported {
            id: self.id.clone(),
            method,
        })
    }
}

#[async_trait]
impl Sessions for TestClient {
    async fn get(&self, id: &SessionId) -> Result<Arc<dyn Session>, SessionError> {
        self.try_get(id).ok_or_else(|| SessionError::NoSession {
            id: id.to_string(),
            reason: "unknown".into(),
        })
    }

    fn try_get(&self, id: &SessionId) -> Option<Arc<dyn Session>> {
        (*id == self.id).then(|| Arc::new(self.clone()) as _)
    }
}

#[async_trait]
impl Session for TestClient {
    fn id(&self) -> &SessionId {
        &self.id
    }

    fn shared_key(&self) -> &str {
        "key"
    }

    fn supports(&self, _: &str) -> bool {
        true
    }

    fn closed(&self) -> CancellationToken {
        CancellationToken::new()
    }

    async fn sync_dir(&self, _: SyncRequest) -> Result<FileStream, SessionError> {
        self.unsupported("sync_dir")
    }

    async fn send_tree(&self, _: &str, _: &BTreeMap<String, String>) -> Result<FileStream, SessionError> {
        self.unsupported("send_tree")
    }

    async fn send_file(&self, _: &str, _: &BTreeMap<String, String>) -> Result<ByteStream, SessionError> {
        let (outgoing, mut sent) = mpsc::channel::<Bytes>(4);
        let (answer, incoming) = mpsc::channel(1);
        let client = self.clone();
        tokio::spawn(async move {
            let mut file = Vec::new();
            while let Some(piece) = sent.recv().await {
                file.extend_from_slice(&piece);
            }
            *client.file.lock().unwrap() = file;
            drop(answer);
        });
        Ok(ByteStream { incoming, outgoing })
    }

    async fn pull_upload(&self, _: &str) -> Result<ByteStream, SessionError> {
        self.unsupported("pull_upload")
    }

    async fn credentials(&self, _: &str) -> Result<Credentials, SessionError> {
        Ok(self.account.lock().unwrap().clone().unwrap_or_default())
    }

    async fn fetch_token(&self, _: TokenRequest) -> Result<Token, SessionError> {
        self.unsupported("fetch_token")
    }

    async fn token_authority(&self, _: &str, _: &[u8]) -> Result<Bytes, SessionError> {
        self.unsupported("token_authority")
    }

    async fn secret(&self, _: &str) -> Result<Bytes, SessionError> {
        self.unsupported("secret")
    }

    async fn check_agent(&self, _: &str) -> Result<(), SessionError> {
        self.unsupported("check_agent")
    }

    async fn forward_agent(&self, _: &str) -> Result<ByteStream, SessionError> {
        self.unsupported("forward_agent")
    }

    async fn content_store(&self, _: &str) -> Result<Arc<dyn ClientContent>, SessionError> {
        Ok(Arc::new(TestContent {
            blobs: Arc::clone(&self.blobs),
            reads: Arc::clone(&self.reads),
        }))
    }

    async fn check_policy(&self, question: &PolicyQuestion) -> Result<PolicyAnswer, SessionError> {
        self.questions.lock().unwrap().push(question.clone());
        let answer = self.answers.lock().unwrap().pop_front();
        answer.ok_or_else(|| SessionError::Refused {
            message: "asked too often".to_owned(),
        })
    }

    async fn find_exporters(
        &self,
        _: &BTreeMap<String, Bytes>,
        refs: Vec<String>,
    ) -> Result<Vec<ExporterRequest>, SessionError> {
        self.exports.lock().unwrap().0 = refs;
        Ok(self.chosen.lock().unwrap().clone())
    }

    async fn finalize_export(&self, response: &BTreeMap<String, String>) -> Result<(), SessionError> {
        self.exports.lock().unwrap().1 = response.clone();
        let refusal = self.refusal.lock().unwrap().clone();
        refusal.map_or(Ok(()), |message| Err(SessionError::Refused { message }))
    }
}

#[derive(Debug)]
struct TestContent {
    blobs: Arc<Mutex<BTreeMap<oci::Digest, Bytes>>>,
    reads: Arc<Mutex<Vec<oci::Digest>>>,
}

impl TestContent {
    fn find(&self, digest: &oci::Digest) -> Result<Bytes, SessionError> {
        let found = self.blobs.lock().unwrap().get(digest).cloned();
        found.ok_or_else(|| SessionError::NotFound {
            what: digest.to_string(),
        })
    }
}

#[async_trait]
impl ClientContent for TestContent {
    async fn info(&self, digest: &oci::Digest) -> Result<ClientBlob, SessionError> {
        let size_bytes = self.find(digest)?.len() as u64;
        Ok(ClientBlob {
            size_bytes,
            labels: BTreeMap::new(),
        })
    }

    async fn read(
        &self,
        digest: &oci::Digest,
        offset: u64,
    ) -> Result<mpsc::Receiver<Result<Bytes, SessionError>>, SessionError> {
        self.reads.lock().unwrap().push(*digest);
        let bytes = self.find(digest)?.slice(usize::try_from(offset).unwrap()..);
        let (to, from) = mpsc::channel(1);
        to.try_send(Ok(bytes)).unwrap();
        Ok(from)
    }

    async fn write(
        &self,
        _: &str,
        expected: &oci::Descriptor,
    ) -> Result<Box<dyn ClientBlobWriter>, SessionError> {
        Ok(Box::new(TestWriter {
            to: Arc::clone(&self.blobs),
            expected: expected.clone(),
            bytes: Vec::new(),
        }))
    }

    async fn set_labels(&self, _: &oci::Digest, _: &BTreeMap<String, String>) -> Result<(), SessionError> {
        Ok(())
    }
}

#[derive(Debug)]
struct TestWriter {
    to: Arc<Mutex<BTreeMap<oci::Digest, Bytes>>>,
    expected: oci::Descriptor,
    bytes: Vec<u8>,
}

#[async_trait]
impl ClientBlobWriter for TestWriter {
    async fn write(&mut self, bytes: Bytes) -> Result<(), SessionError> {
        self.bytes.extend_from_slice(&bytes);
        Ok(())
    }

    async fn commit(self: Box<Self>) -> Result<(), SessionError> {
        assert_eq!(oci::Digest::sha256(&self.bytes), self.expected.digest);
        assert_eq!(self.bytes.len() as u64, self.expected.size);
        self.to
            .lock()
            .unwrap()
            .insert(self.expected.digest, self.bytes.into());
        Ok(())
    }
}

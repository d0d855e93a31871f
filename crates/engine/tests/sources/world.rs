//! An engine on an empty store, whose exporter looks at the files, and one client.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use engine::bridge::{
    Bridge, BuildResult, Frontend, FrontendRequest, MetaRequest, PolicyAnswer, PolicyQuestion, SourceMeta,
};
use engine::engine::Services;
use engine::session::{
    ByteStream, ClientContent, Credentials, FileStream, Session, SessionError, SessionId, Sessions,
    SyncRequest, Token, TokenRequest,
};
use engine::solve::{
    ExportContext, ExportSource, Exported, Exporter, ExporterInstance, ExporterRequest, SolveRequest,
};
use engine::unlazy::Unlazy;
use engine::worker::{Worker, WorkerParts};
use engine::{BuildError, Engine};
use llb::{MarshalOptions, State, pb};
use registry::{Client, HostsConfig};
use source::http::HttpFiles;
use source::image::fetch::BlobFetcher;
use source::image::{Images, providers};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::local::Sender;

/// One file as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub mode: u32,
    pub inode: u64,
    pub mtime: i64,
    /// User and group.
    pub owner: (u32, u32),
    /// Its bytes, or the target of a link.
    pub content: String,
}

/// A result's files by path; directories end with a slash.
pub type Tree = BTreeMap<String, Found>;

pub struct World {
    pub engine: Engine,
    pub client: TestClient,
    pub store: cache::Store,
    seen: Arc<Mutex<(PathBuf, Tree)>>,
    meta: Arc<Mutex<Option<SourceMeta>>>,
    log: Mutex<String>,
    next: AtomicU64,
    _dir: TempDir,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let content = content::Store::open(&path.join("content")).unwrap();
        let snapshotter = Arc::new(snapshot::Native::open(&path.join("snapshots")).unwrap());
        let store = cache::Store::open(path, content, snapshotter, cache::StoreOptions::default()).unwrap();
        let images = Images::new(Client::new(HostsConfig::default()), store.clone());
        let unlazy: Arc<dyn Unlazy> = Arc::new(BlobFetcher::new(store.clone(), providers(&images)));
        let worker = Arc::new(
            Worker::new(WorkerParts {
                devices: engine::executor::DeviceRegistry::default(),
                emulators: engine::op::exec::Emulators::default(),
                store: store.clone(),
                images,
                http: HttpFiles::new(
                    registry::web_client_without_redirects("buildkit/v0 test").unwrap(),
                    store.clone(),
                ),
                unlazy: Arc::clone(&unlazy),
                executor: None,
                dir: path.join("worker"),
            })
            .unwrap(),
        );
        let client = TestClient::default();
        let (seen, meta) = (Arc::default(), Arc::default());
        let look: Arc<dyn Exporter> = Arc::new(Look(Arc::clone(&seen)));
        let asks: Arc<dyn Frontend> = Arc::new(Asks(Arc::clone(&meta)));
        let engine = Engine::start(Services {
            store: store.clone(),
            sessions: Arc::new(client.clone()),
            ops: Arc::clone(&worker) as _,
            sources: worker,
            unlazy,
            frontends: BTreeMap::from([("asks".to_owned(), asks)]),
            exporters: BTreeMap::from([("look".to_owned(), look)]),
            cache_importers: BTreeMap::new(),
            cache_exporters: BTreeMap::new(),
            processors: Vec::new(),
            allowed_entitlements: Vec::new(),
            max_parallelism: None,
            resolve_cache: engine::job::ResolveCache::default(),
        });
        Self {
            engine,
            client,
            store,
            seen,
            meta,
            log: Mutex::default(),
            next: AtomicU64::new(0),
            _dir: dir,
        }
    }

    /// Builds a state and returns its files.
    pub async fn build(&self, state: &State) -> Result<Tree, BuildError> {
        self.build_under(state, None).await
    }

    /// Builds a state under a policy and returns its files.
    pub async fn build_under(
        &self,
        state: &State,
        source_policy: Option<llb::sourcepolicy::Policy>,
    ) -> Result<Tree, BuildError> {
        self.build_request(
            state,
            SolveRequest {
                source_policy,
                ..SolveRequest::default()
            },
        )
        .await
    }

    /// Builds a state with a resolve cache's mode and returns its files.
    pub async fn build_with_cache(&self, state: &State, mode: &str) -> Result<Tree, BuildError> {
        let opts = [("cooper.resolve-cache".to_owned(), mode.to_owned())];
        self.build_request(
            state,
            SolveRequest {
                frontend_opts: BTreeMap::from(opts),
                ..SolveRequest::default()
            },
        )
        .await
    }

    async fn build_request(&self, state: &State, request: SolveRequest) -> Result<Tree, BuildError> {
        let definition = state.marshal(&MarshalOptions::default()).unwrap();
        let exporters = vec![ExporterRequest {
            kind: "look".to_owned(),
            attrs: BTreeMap::new(),
        }];
        self.run(SolveRequest {
            definition: Some(definition),
            exporters,
            ..request
        })
        .await?;
        Ok(self.seen.lock().unwrap().1.clone())
    }

    /// Asks what the source of a state resolves to.
    pub async fn ask(&self, state: &State) -> Result<SourceMeta, BuildError> {
        self.ask_with(state, BTreeMap::new()).await
    }

    /// Asks also for the SHA-384 checksum with the bytes of the option `suffix` after the file.
    pub async fn ask_with(
        &self,
        state: &State,
        frontend_opts: BTreeMap<String, String>,
    ) -> Result<SourceMeta, BuildError> {
        let definition = state.marshal(&MarshalOptions::default()).unwrap();
        let frontend_inputs = BTreeMap::from([("source".to_owned(), definition)]);
        self.run(SolveRequest {
            frontend: "asks".to_owned(),
            frontend_inputs,
            frontend_opts,
            ..SolveRequest::default()
        })
        .await?;
        Ok(self.meta.lock().unwrap().take().unwrap())
    }

    async fn run(&self, request: SolveRequest) -> Result<(), BuildError> {
        let id = format!("build-{}", self.next.fetch_add(1, Ordering::Relaxed));
        let session = Some(SessionId("client".to_owned()));
        let solved = self
            .engine
            .solve(SolveRequest {
                id: id.clone(),
                session,
                ..request
            })
            .await;
        let progress = self.engine.job_progress(&engine::job::JobId(id));
        if let Some(mut progress) = progress.map(|progress| progress.subscribe()) {
            let mut log = String::new();
            while let Some(batch) = progress.next().await {
                batch
                    .logs
                    .iter()
                    .for_each(|entry| log.push_str(&String::from_utf8_lossy(&entry.data)));
            }
            *self.log.lock().unwrap() = log;
        }
        solved.map(drop)
    }

    /// Where the last build's files are; not to be written to.
    pub fn path(&self) -> PathBuf {
        self.seen.lock().unwrap().0.clone()
    }

    /// What the last build's steps wrote.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }
}

/// An exporter that reads the files.
#[derive(Clone, Debug)]
struct Look(Arc<Mutex<(PathBuf, Tree)>>);

impl Exporter for Look {
    fn resolve(
        &self,
        _: usize,
        _: BTreeMap<String, String>,
    ) -> Result<Arc<dyn ExporterInstance>, BuildError> {
        Ok(Arc::new(self.clone()))
    }
}

#[async_trait]
impl ExporterInstance for Look {
    fn name(&self) -> &str {
        "looking"
    }

    async fn export(&self, _: &ExportContext, source: &ExportSource) -> Result<Exported, BuildError> {
        let mut tree = Tree::new();
        let reference = source
            .single
            .as_ref()
            .and_then(|single| single.get())
            .expect("has files");
        let mounts = reference.mounts().unwrap();
        read(&mounts[0].source, "", &mut tree);
        *self.0.lock().unwrap() = (mounts[0].source.clone(), tree);
        Ok(Exported::default())
    }
}

fn read(dir: &Path, prefix: &str, tree: &mut Tree) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let stat = entry.metadata().unwrap();
        let (name, content) = if stat.is_dir() {
            read(&entry.path(), &format!("{name}/"), tree);
            (format!("{name}/"), String::new())
        } else if stat.is_symlink() {
            (
                name,
                std::fs::read_link(entry.path())
                    .unwrap()
                    .to_string_lossy()
                    .into_owned(),
            )
        } else if stat.is_file() {
            (
                name,
                String::from_utf8_lossy(&std::fs::read(entry.path()).unwrap()).into_owned(),
            )
        } else {
            (name, "special".to_owned())
        };
        let mode = stat.permissions().mode() & 0o7777;
        tree.insert(
            name,
            Found {
                mode,
                inode: stat.ino(),
                mtime: stat.mtime(),
                owner: (stat.uid(), stat.gid()),
                content,
            },
        );
    }
}

/// A frontend that asks what its input's source resolves to.
#[derive(Debug)]
struct Asks(Arc<Mutex<Option<SourceMeta>>>);

#[async_trait]
impl Frontend for Asks {
    async fn solve(&self, bridge: &Bridge, request: FrontendRequest) -> Result<BuildResult, BuildError> {
        let definition = request.inputs.get("source").expect("is given");
        let source = definition.def.iter().find_map(|bytes| {
            let op: pb::Op = prost::Message::decode(bytes.as_ref()).ok()?;
            match op.op {
                Some(pb::op::Op::Source(source)) => Some(source),
                _ => None,
            }
        });
        let options = MetaRequest {
            return_object: true,
            checksum: request
                .opts
                .get("suffix")
                .map(|suffix| (oci::Algorithm::Sha384, Bytes::from(suffix.clone()))),
            ..MetaRequest::default()
        };
        let meta = bridge
            .resolve_source_meta(source.expect("is a source"), &options)
            .await?;
        *self.0.lock().unwrap() = Some(meta);
        Ok(BuildResult::default())
    }
}

/// A client with secrets, uploads and a directory. Clones are the same client.
#[derive(Clone, Debug, Default)]
pub struct TestClient(Arc<ClientState>);

#[derive(Debug)]
pub struct ClientState {
    id: SessionId,
    pub secrets: Mutex<BTreeMap<String, String>>,
    pub uploads: Mutex<BTreeMap<String, &'static [u8]>>,
    pub dir: Mutex<Sender>,
    /// What was asked for of directories.
    pub asked: Mutex<Vec<SyncRequest>>,
}

impl Default for ClientState {
    fn default() -> Self {
        Self {
            id: SessionId("client".to_owned()),
            secrets: Mutex::default(),
            uploads: Mutex::default(),
            dir: Mutex::default(),
            asked: Mutex::default(),
        }
    }
}

impl std::ops::Deref for TestClient {
    type Target = ClientState;

    fn deref(&self) -> &ClientState {
        &self.0
    }
}

impl TestClient {
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

    async fn sync_dir(&self, request: SyncRequest) -> Result<FileStream, SessionError> {
        self.asked.lock().unwrap().push(request);
        Ok(self.dir.lock().unwrap().start())
    }

    async fn send_tree(&self, _: &str, _: &BTreeMap<String, String>) -> Result<FileStream, SessionError> {
        self.unsupported("send_tree")
    }

    async fn send_file(&self, _: &str, _: &BTreeMap<String, String>) -> Result<ByteStream, SessionError> {
        self.unsupported("send_file")
    }

    async fn pull_upload(&self, path: &str) -> Result<ByteStream, SessionError> {
        let found = self.uploads.lock().unwrap().get(path).copied();
        let bytes = found.ok_or_else(|| SessionError::NotFound {
            what: path.to_owned(),
        })?;
        let (to, incoming) = mpsc::channel(32);
        let (outgoing, _) = mpsc::channel(1);
        for piece in bytes.chunks(3) {
            to.try_send(Ok(Bytes::from_static(piece))).unwrap();
        }
        Ok(ByteStream { incoming, outgoing })
    }

    async fn credentials(&self, _: &str) -> Result<Credentials, SessionError> {
        Ok(Credentials::default())
    }

    async fn fetch_token(&self, _: TokenRequest) -> Result<Token, SessionError> {
        self.unsupported("fetch_token")
    }

    async fn token_authority(&self, _: &str, _: &[u8]) -> Result<Bytes, SessionError> {
        self.unsupported("token_authority")
    }

    async fn secret(&self, id: &str) -> Result<Bytes, SessionError> {
        let found = self.secrets.lock().unwrap().get(id).cloned();
        found.map(Bytes::from).ok_or_else(|| SessionError::NotFound {
            what: format!("secret {id}"),
        })
    }

    async fn check_agent(&self, _: &str) -> Result<(), SessionError> {
        self.unsupported("check_agent")
    }

    async fn forward_agent(&self, _: &str) -> Result<ByteStream, SessionError> {
        self.unsupported("forward_agent")
    }

    async fn content_store(&self, _: &str) -> Result<Arc<dyn ClientContent>, SessionError> {
        self.unsupported("content_store")
    }

    async fn check_policy(&self, _: &PolicyQuestion) -> Result<PolicyAnswer, SessionError> {
        self.unsupported("check_policy")
    }

    async fn find_exporters(
        &self,
        _: &BTreeMap<String, Bytes>,
        _: Vec<String>,
    ) -> Result<Vec<ExporterRequest>, SessionError> {
        self.unsupported("find_exporters")
    }

    async fn finalize_export(&self, _: &BTreeMap<String, String>) -> Result<(), SessionError> {
        self.unsupported("finalize_export")
    }
}

//! Jobs, sharing, cancellation, failures, progress and the bridge, with ops that do nothing but what the test says.
#![expect(clippy::unwrap_used, reason = "a failing test says where")]

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use engine::attestation::ProvenanceProcessor;
use engine::bridge::{
    Bridge, BridgeRequest, BuildResult, CacheOption, Frontend, FrontendRequest, SourceResolver,
    StatementContent, WarnOptions,
};
use engine::bridge::{MetaContext, MetaRequest, SourceMeta};
use engine::driver::{CacheImporter, ImportContext, ImportedCache};
use engine::engine::Services;
use engine::job::JobId;
use engine::op::{CacheMap, Dep, Op, OpContext, OpFactory, ResultRef, VertexSpec};
use engine::progress::{LogStream, Vertex};
use engine::session::{Session, SessionError, SessionGroup, SessionId, Sessions};
use engine::solve::{
    ExportContext, ExportSource, Exported, Exporter, ExporterInstance, ExporterRequest, SolveRequest,
    SolveResponse,
};
use engine::unlazy::{FetchContext, LostBlob, Unlazy};
use engine::{BuildError, Engine, ErrorKind};
use llb::{Constraints, FileActions, MkfileOptions, State, pb};
use oci::Digest;
use solver::{FoundKey, MemoryRecords, Query, StoredResult};
use tempfile::TempDir;
use tokio::sync::Semaphore;

/// What ops did, and what lets those that wait go on.
#[derive(Debug)]
struct Script {
    events: Mutex<Vec<String>>,
    gate: Semaphore,
    started: Semaphore,
    running: Mutex<(usize, usize)>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            events: Mutex::default(),
            gate: Semaphore::new(0),
            started: Semaphore::new(0),
            running: Mutex::default(),
        }
    }
}

impl Script {
    fn note(&self, event: impl Into<String>) {
        self.events.lock().unwrap().push(event.into());
    }

    fn count(&self, event: &str) -> usize {
        self.events
            .lock()
            .unwrap()
            .iter()
            .filter(|known| *known == event)
            .count()
    }
}

#[derive(Debug)]
struct ScriptedOp {
    script: Arc<Script>,
    name: String,
    inputs: usize,
}

#[async_trait]
impl Op for ScriptedOp {
    async fn cache_map(&self, _: &OpContext, _: u32) -> Result<CacheMap, BuildError> {
        let digest = Digest::sha256(self.name.as_bytes());
        Ok(CacheMap {
            digests: vec![digest],
            deps: vec![Dep::default(); self.inputs],
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
        self.script.note(format!("exec {}", self.name));
        {
            let mut running = self.script.running.lock().unwrap();
            running.0 += 1;
            running.1 = running.1.max(running.0);
        }
        ctx.progress()
            .log(LogStream::Stdout, format!("running {}\n", self.name));
        let outcome = if self.name.contains("fail") {
            Err(BuildError::user("exit code: 1").with_exit_code(1))
        } else if self.name.contains("lost") && self.script.count(&format!("exec {}", self.name)) == 1 {
            Err(BuildError::new(ErrorKind::NotFound, "blob not found").with_lost_input(0))
        } else if self.name.contains("panic") {
            panic!("{} panics", self.name);
        } else if self.name.contains("wait") {
            self.script.started.add_permits(1);
            tokio::select! {
                biased;
                () = ctx.cancel().cancelled() => {
                    self.script.note(format!("canceled {}", self.name));
                    Err(BuildError::canceled())
                }
                turn = self.script.gate.acquire() => {
                    turn.unwrap().forget();
                    Ok(())
                }
            }
        } else {
            tokio::task::yield_now().await;
            Ok(())
        };
        self.script.running.lock().unwrap().0 -= 1;
        outcome.map(|()| vec![Some(ResultRef::SCRATCH)])
    }
}

#[derive(Debug)]
struct Ops(Arc<Script>);

impl OpFactory for Ops {
    fn create(&self, vertex: &Arc<VertexSpec>) -> Result<Arc<dyn Op>, BuildError> {
        let name = match &vertex.op.op {
            Some(pb::op::Op::Source(source)) => source.identifier.clone(),
            Some(pb::op::Op::File(file)) => match &file.actions[0].action {
                Some(pb::file_action::Action::Mkfile(made)) => made.path.clone(),
                other => format!("{other:?}"),
            },
            other => format!("{other:?}"),
        };
        Ok(Arc::new(ScriptedOp {
            script: Arc::clone(&self.0),
            name,
            inputs: vertex.inputs.len(),
        }))
    }
}

#[derive(Debug)]
struct Nothing;

#[async_trait]
impl Sessions for Nothing {
    async fn get(&self, id: &SessionId) -> Result<Arc<dyn Session>, SessionError> {
        Err(SessionError::NoSession {
            id: id.to_string(),
            reason: "there are none".to_owned(),
        })
    }

    fn try_get(&self, _: &SessionId) -> Option<Arc<dyn Session>> {
        None
    }
}

#[async_trait]
impl SourceResolver for Nothing {
    async fn resolve_meta(
        &self,
        _: &MetaContext,
        op: pb::SourceOp,
        _: &MetaRequest,
    ) -> Result<SourceMeta, BuildError> {
        Ok(SourceMeta {
            op,
            ..SourceMeta::default()
        })
    }
}

#[async_trait]
impl Unlazy for Nothing {
    async fn fetch(&self, _: &FetchContext, _: &cache::ImmutableRef) -> Result<(), BuildError> {
        Ok(())
    }

    async fn unpack(&self, _: &FetchContext, _: &cache::ImmutableRef) -> Result<(), BuildError> {
        Ok(())
    }

    async fn is_reachable(&self, _: &FetchContext, _: &cache::ImmutableRef) -> Result<bool, BuildError> {
        Ok(true)
    }

    fn lost(&self, _: &SessionGroup) -> Vec<LostBlob> {
        Vec::new()
    }
}

/// A frontend that warns, builds a fixed step lazily and adds metadata.
#[derive(Debug)]
struct Fixed;

#[async_trait]
impl Frontend for Fixed {
    async fn solve(&self, bridge: &Bridge, request: FrontendRequest) -> Result<BuildResult, BuildError> {
        if request.opts.contains_key("refuse") {
            return Err(BuildError::user("refused"));
        }
        bridge.warn(Digest::sha256(b"warned"), "careful", WarnOptions::default());
        let definition = Some(definition(&step(&source("base"), "/frontend")));
        let mut result = bridge
            .solve(BridgeRequest {
                definition,
                ..BridgeRequest::default()
            })
            .await?;
        result
            .metadata
            .insert("frontend.answer".to_owned(), Bytes::from_static(b"42"));
        result
            .metadata
            .insert("other".to_owned(), Bytes::from_static(b"hidden"));
        Ok(result)
    }
}

/// An exporter that keeps what it is given.
#[derive(Clone, Debug, Default)]
struct Keep(Arc<Mutex<Option<ExportSource>>>);

impl Exporter for Keep {
    fn resolve(
        &self,
        _: usize,
        _: BTreeMap<String, String>,
    ) -> Result<Arc<dyn ExporterInstance>, BuildError> {
        Ok(Arc::new(self.clone()))
    }
}

#[async_trait]
impl ExporterInstance for Keep {
    fn name(&self) -> &str {
        "keeping the result"
    }

    async fn export(&self, _: &ExportContext, source: &ExportSource) -> Result<Exported, BuildError> {
        let mut source = source.clone();
        // Statements may tell of what exporters make, and are read by them.
        for attestation in source.attestations.values_mut().flatten() {
            if let Some(content) = attestation.content.take() {
                attestation.content = Some(StatementContent::Ready(content.read().await?));
            }
        }
        *self.0.lock().unwrap() = Some(source);
        let response = [("kept".to_owned(), "yes".to_owned())].into();
        Ok(Exported {
            response,
            ..Exported::default()
        })
    }
}

/// An imported cache that knows what it is told.
#[derive(Debug)]
struct Memory(MemoryRecords);

#[async_trait]
impl CacheImporter for Memory {
    fn name(&self, _: &BTreeMap<String, String>) -> String {
        "memory".to_owned()
    }

    async fn import(
        &self,
        _: &ImportContext,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Arc<dyn ImportedCache>, BuildError> {
        if attrs.contains_key("broken") {
            return Err(BuildError::new(ErrorKind::Unavailable, "no such cache"));
        }
        tokio::task::yield_now().await;
        Ok(Arc::new(Self(self.0.clone())))
    }
}

#[async_trait]
impl ImportedCache for Memory {
    fn answer(&self, query: &Query) -> Vec<FoundKey> {
        self.0.answer(query)
    }

    async fn load(&self, _: &ImportContext, _: &StoredResult) -> Result<Option<ResultRef>, BuildError> {
        Ok(Some(ResultRef::SCRATCH))
    }
}

struct Bench {
    engine: Engine,
    script: Arc<Script>,
    kept: Keep,
    _dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::with(None, MemoryRecords::default())
    }

    fn with(max_parallelism: Option<NonZeroUsize>, imported: MemoryRecords) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let content = content::Store::open(&dir.path().join("content")).unwrap();
        let snapshotter = Arc::new(snapshot::Native::open(&dir.path().join("snapshots")).unwrap());
        let store =
            cache::Store::open(dir.path(), content, snapshotter, cache::StoreOptions::default()).unwrap();
        let script = Arc::new(Script::default());
        let kept = Keep::default();
        let engine = Engine::start(Services {
            store,
            sessions: Arc::new(Nothing),
            ops: Arc::new(Ops(Arc::clone(&script))),
            sources: Arc::new(Nothing),
            unlazy: Arc::new(Nothing),
            frontends: [("fixed".to_owned(), Arc::new(Fixed) as Arc<dyn Frontend>)].into(),
            exporters: [("keep".to_owned(), Arc::new(kept.clone()) as Arc<dyn Exporter>)].into(),
            cache_importers: [(
                "memory".to_owned(),
                Arc::new(Memory(imported)) as Arc<dyn CacheImporter>,
            )]
            .into(),
            cache_exporters: BTreeMap::new(),
            processors: vec![Arc::new(ProvenanceProcessor::default())],
            allowed_entitlements: Vec::new(),
            max_parallelism,
            resolve_cache: engine::job::ResolveCache::default(),
        });
        Self {
            engine,
            script,
            kept,
            _dir: dir,
        }
    }

    async fn solve(&self, id: &str, state: &State) -> Result<SolveResponse, BuildError> {
        self.engine.solve(request(id, state)).await
    }

    /// Solves while another task does as well.
    fn start(&self, id: &str, state: &State) -> tokio::task::JoinHandle<Result<SolveResponse, BuildError>> {
        let (engine, request) = (self.engine.clone(), request(id, state));
        tokio::spawn(async move { engine.solve(request).await })
    }

    async fn vertices(&self, id: &str) -> Vec<Vertex> {
        let mut status = self.engine.status(&JobId(id.to_owned())).await.unwrap();
        let mut vertices: BTreeMap<String, Vertex> = BTreeMap::new();
        while let Some(batch) = status.next().await {
            vertices.extend(
                batch
                    .vertices
                    .into_iter()
                    .map(|vertex| (vertex.name.clone(), vertex)),
            );
        }
        vertices.into_values().collect()
    }
}

fn source(name: &str) -> State {
    State::image(name, llb::ImageOptions::default())
}

fn step(state: &State, path: &str) -> State {
    let options = MkfileOptions::default();
    state.file(
        FileActions::new().mkfile(path, 0o644, Bytes::new(), options),
        &Constraints::new(),
    )
}

fn definition(state: &State) -> pb::Definition {
    state.marshal(&llb::MarshalOptions::default()).unwrap()
}

fn request(id: &str, state: &State) -> SolveRequest {
    SolveRequest {
        id: id.to_owned(),
        definition: Some(definition(state)),
        ..SolveRequest::default()
    }
}

#[tokio::test]
async fn a_second_build_executes_nothing_and_shows_everything_as_cached() {
    let bench = Bench::new();
    let state = step(&step(&source("base"), "/one"), "/two");
    bench.solve("first", &state).await.unwrap();
    bench.solve("second", &state).await.unwrap();
    assert_eq!(
        (bench.script.count("exec /one"), bench.script.count("exec /two")),
        (1, 1)
    );
    let vertices = bench.vertices("second").await;
    assert_eq!(vertices.len(), 3);
    for vertex in vertices {
        assert!(
            vertex.completed.is_some() && vertex.error.is_empty(),
            "{vertex:?}"
        );
        // The source was asked for its identity, which is work.
        assert_eq!(vertex.cached, vertex.name.contains("mkfile"), "{vertex:?}");
    }
}

#[tokio::test]
async fn builds_share_work_and_one_may_leave() {
    let bench = Bench::new();
    let state = step(&source("base"), "/wait");
    let first = bench.start("first", &state);
    bench.script.started.acquire().await.unwrap().forget();
    let second = bench.start("second", &state);
    // The second build shows what the first one's step said before it came.
    let mut status = bench.engine.status(&JobId("second".to_owned())).await.unwrap();
    loop {
        let batch = status.next().await.unwrap();
        if batch.logs.iter().any(|log| log.data == "running /wait\n") {
            break;
        }
    }
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    bench.script.gate.add_permits(1);
    second.await.unwrap().unwrap();
    assert_eq!(
        (
            bench.script.count("exec /wait"),
            bench.script.count("canceled /wait")
        ),
        (1, 0)
    );
}

#[tokio::test]
async fn the_last_to_leave_cancels_and_the_engine_drains() {
    let bench = Bench::new();
    let state = step(&source("base"), "/wait");
    let build = bench.start("only", &state);
    bench.script.started.acquire().await.unwrap().forget();
    build.abort();
    assert!(build.await.unwrap_err().is_cancelled());
    bench.engine.drain().await;
    assert_eq!(bench.script.count("canceled /wait"), 1);
    let vertices = bench.vertices("only").await;
    assert!(
        vertices.iter().any(|vertex| vertex.error == "context canceled"),
        "{vertices:?}"
    );
    assert!(bench.engine.job(&JobId("only".to_owned())).is_none());
}

#[tokio::test]
async fn a_failure_names_its_step_and_does_not_poison_others() {
    let bench = Bench::new();
    let state = step(&step(&source("base"), "/fail"), "/after");
    let error = bench.solve("first", &state).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.exit_code(), error.to_string().as_str()),
        (ErrorKind::User, Some(1), "exit code: 1")
    );
    assert!(error.vertex().is_some());
    assert_eq!(error.failed_op().unwrap().inputs.len(), 1);
    let vertices = bench.vertices("first").await;
    let failed: Vec<_> = vertices
        .iter()
        .filter(|vertex| !vertex.error.is_empty())
        .collect();
    assert_eq!((failed.len(), failed[0].error.as_str()), (1, "exit code: 1"));
    bench.solve("second", &state).await.unwrap_err();
    assert_eq!(
        (
            bench.script.count("exec /fail"),
            bench.script.count("exec /after")
        ),
        (2, 0)
    );
    bench
        .solve("third", &step(&source("base"), "/fine"))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_panic_is_an_error_of_its_build_alone() {
    let bench = Bench::new();
    let error = bench
        .solve("first", &step(&source("base"), "/panic"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    bench
        .solve("second", &step(&source("base"), "/fine"))
        .await
        .unwrap();
}

#[tokio::test]
async fn at_most_so_many_steps_run_at_once() {
    let bench = Bench::with(NonZeroUsize::new(2), MemoryRecords::default());
    let builds: Vec<_> = (0..5)
        .map(|index| {
            bench.start(
                &format!("b{index}"),
                &step(&source("base"), &format!("/wait{index}")),
            )
        })
        .collect();
    bench.script.started.acquire_many(2).await.unwrap().forget();
    bench.script.gate.add_permits(5);
    for build in builds {
        build.await.unwrap().unwrap();
    }
    assert_eq!(bench.script.running.lock().unwrap().1, 2);
}

#[tokio::test]
async fn a_name_is_taken_while_its_build_runs() {
    let bench = Bench::new();
    let build = bench.start("name", &step(&source("base"), "/wait"));
    bench.script.started.acquire().await.unwrap().forget();
    let error = bench.solve("name", &source("base")).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::Conflict, "job ID name exists")
    );
    bench.script.gate.add_permits(1);
    build.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_status_may_be_asked_for_before_its_build() {
    let bench = Bench::new();
    let engine = bench.engine.clone();
    let early = tokio::spawn(async move { engine.status(&JobId("late".to_owned())).await.map(drop) });
    tokio::task::yield_now().await;
    bench.solve("late", &source("base")).await.unwrap();
    early.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_frontend_builds_lazily_and_its_metadata_is_told() {
    let bench = Bench::new();
    let frontend = SolveRequest {
        id: "one".to_owned(),
        frontend: "fixed".to_owned(),
        ..SolveRequest::default()
    };
    let response = bench.engine.solve(frontend.clone()).await.unwrap();
    assert_eq!(
        response.exporter_response,
        [("frontend.answer".to_owned(), "42".to_owned())].into()
    );
    assert_eq!(bench.script.count("exec /frontend"), 1);
    let job = bench
        .engine
        .status(&JobId("one".to_owned()))
        .await
        .unwrap()
        .next()
        .await
        .unwrap();
    assert_eq!(job.warnings[0].short, "careful");

    let mut refused = SolveRequest {
        id: "two".to_owned(),
        ..frontend.clone()
    };
    refused.frontend_opts.insert("refuse".to_owned(), String::new());
    let error = bench.engine.solve(refused).await.unwrap_err();
    assert_eq!(
        (error.to_string().as_str(), error.frontend()),
        ("refused", Some(("fixed", "")))
    );

    let unknown = SolveRequest {
        id: "three".to_owned(),
        frontend: "unknown".to_owned(),
        ..frontend
    };
    let error = bench.engine.solve(unknown).await.unwrap_err();
    assert_eq!(error.to_string(), "invalid frontend: unknown");
}

#[tokio::test]
async fn a_client_can_be_its_own_frontend() {
    let bench = Bench::new();
    let engine = bench.engine.clone();
    let client = tokio::spawn(async move {
        let forwarder = engine.bridge(&JobId("own".to_owned())).await?;
        let definition = Some(definition(&step(&source("base"), "/own")));
        let request = BridgeRequest {
            definition,
            evaluate: true,
            ..BridgeRequest::default()
        };
        let mut result = forwarder.bridge().solve(request).await?;
        let reference = result.single.clone().unwrap();
        forwarder.keep(&reference);
        assert!(forwarder.find(reference.id()).is_some());
        // Scratch has no files, but it is a directory.
        assert!(reference.read_dir("/", "").await?.is_empty());
        let missing = reference
            .read_file("/missing", Default::default())
            .await
            .unwrap_err();
        assert_eq!(
            (missing.kind(), missing.to_string().as_str()),
            (ErrorKind::NotFound, "open /missing: no such file or directory")
        );
        result
            .metadata
            .insert("frontend.mine".to_owned(), Bytes::from_static(b"yes"));
        forwarder.return_result(Ok(result));
        Ok::<_, BuildError>(())
    });
    let request = SolveRequest {
        id: "own".to_owned(),
        ..SolveRequest::default()
    };
    let response = bench.engine.solve(request).await.unwrap();
    client.await.unwrap().unwrap();
    assert_eq!(response.exporter_response["frontend.mine"], "yes");
    assert_eq!(bench.script.count("exec /own"), 1);
}

#[tokio::test]
async fn an_empty_definition_is_scratch() {
    let bench = Bench::new();
    let response = bench.solve("empty", &State::scratch()).await.unwrap();
    assert!(response.exporter_response.is_empty());
}

#[tokio::test]
async fn what_a_build_must_not_do_is_refused() {
    let bench = Bench::new();
    let run = source("base")
        .security(pb::SecurityMode::Insecure)
        .run(["true"])
        .done()
        .root();
    let error = bench.solve("one", &run).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(
        error.to_string().contains("security.insecure is not allowed"),
        "{error}"
    );
    let mut wants = request("two", &source("base"));
    wants.entitlements.push("network.host".to_owned());
    assert_eq!(
        bench.engine.solve(wants).await.unwrap_err().kind(),
        ErrorKind::Denied
    );
    let mut exports = request("three", &source("base"));
    exports.exporters.push(ExporterRequest {
        kind: "moby".to_owned(),
        attrs: BTreeMap::new(),
    });
    let error = bench.engine.solve(exports).await.unwrap_err();
    assert_eq!(error.to_string(), "exporter \"moby\" could not be found");
}

#[tokio::test]
async fn an_imported_cache_is_used_and_a_broken_one_is_no_harm() {
    let state = step(&source("base"), "/imported");
    let graph = llb::Graph::load(&definition(&state)).unwrap();
    let base = Digest::sha256(b"docker-image://docker.io/library/base:latest");
    let root = solver::RecordId::root(&base, 0);
    let mut records = MemoryRecords::default();
    let child = solver::RecordId(Digest::sha256(b"child"));
    let op = Digest::sha256(b"/imported");
    records.add(
        child,
        [solver::Link {
            parent: root,
            input: 0,
            op,
            output: 0,
            selector: None,
        }],
    );
    records.add_result(child, "layer", 1);
    let bench = Bench::with(None, records);
    let import = |attr: &str| CacheOption {
        kind: "memory".to_owned(),
        attrs: [(attr.to_owned(), "1".to_owned())].into(),
    };
    let mut with_cache = request("one", &state);
    with_cache.cache_imports = vec![import("broken"), import("fine")];
    bench.engine.solve(with_cache).await.unwrap();
    assert_eq!(
        bench.script.count("exec /imported"),
        0,
        "{:?} {:?}",
        bench.script.events,
        graph.vertices()
    );
    let vertices = bench.vertices("one").await;
    let imports: Vec<_> = vertices
        .iter()
        .filter(|vertex| vertex.name.starts_with("importing cache"))
        .collect();
    assert!(!imports.is_empty());
    // What was imported is known locally now.
    bench.solve("two", &state).await.unwrap();
    assert_eq!(bench.script.count("exec /imported"), 0);
}

#[tokio::test]
async fn many_builds_leave_nothing_behind() {
    let bench = Bench::new();
    for round in 0..200 {
        let state = step(&source("base"), &format!("/step{}", round % 7));
        bench.solve(&format!("build{round}"), &state).await.unwrap();
    }
    bench.engine.drain().await;
    for path in 0..7 {
        assert_eq!(bench.script.count(&format!("exec /step{path}")), 1);
    }
}

#[tokio::test]
async fn a_cached_input_that_is_gone_is_made_again() {
    let bench = Bench::new();
    let one = step(&source("base"), "/one");
    bench.solve("first", &one).await.unwrap();
    bench.solve("second", &step(&one, "/lost")).await.unwrap();
    assert_eq!(
        (bench.script.count("exec /one"), bench.script.count("exec /lost")),
        (2, 2)
    );
    // What was made in this build cannot be made again: then it is an error.
    let made = step(&step(&source("base"), "/two"), "/lost2");
    let error = bench.solve("third", &made).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn provenance_is_attached_where_it_is_wanted() {
    let bench = Bench::new();
    let mut wanted = SolveRequest {
        id: "one".to_owned(),
        frontend: "fixed".to_owned(),
        ..SolveRequest::default()
    };
    wanted.exporters.push(ExporterRequest {
        kind: "keep".to_owned(),
        attrs: BTreeMap::new(),
    });
    wanted.frontend_opts.insert(
        "attest:provenance".to_owned(),
        "mode=max,builder-id=me".to_owned(),
    );
    wanted
        .frontend_opts
        .insert("build-arg:A".to_owned(), "b".to_owned());
    let response = bench.engine.solve(wanted.clone()).await.unwrap();
    assert_eq!(response.exporter_response["kept"], "yes");
    let source = bench.kept.0.lock().unwrap().take().unwrap();
    let attestations: Vec<_> = source.attestations.values().flatten().collect();
    assert_eq!(attestations[0].predicate_type, "https://slsa.dev/provenance/v1");
    let content = attestations[0].content.as_ref().unwrap().read().await.unwrap();
    let predicate: serde_json::Value = serde_json::from_slice(&content).unwrap();
    let definition = &predicate["buildDefinition"];
    assert_eq!(definition["externalParameters"]["request"]["frontend"], "fixed");
    assert_eq!(
        definition["externalParameters"]["request"]["args"]["build-arg:A"],
        "b"
    );
    assert_eq!(
        definition["resolvedDependencies"][0]["uri"]
            .as_str()
            .unwrap()
            .split('?')
            .next()
            .unwrap(),
        "pkg:docker/base@latest"
    );
    assert_eq!(
        definition["internalParameters"]["buildConfig"]["llbDefinition"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    assert_eq!(predicate["runDetails"]["builder"]["id"], "me");

    let mut unknown = SolveRequest {
        id: "two".to_owned(),
        ..wanted
    };
    unknown
        .frontend_opts
        .insert("attest:vibes".to_owned(), String::new());
    assert_eq!(
        bench.engine.solve(unknown).await.unwrap_err().kind(),
        ErrorKind::User
    );
}

#[tokio::test]
async fn the_history_learns_what_was_asked_for_inputs_and_for_the_build() {
    let bench = Bench::new();
    let engine = bench.engine.clone();
    let client = tokio::spawn(async move {
        let forwarder = engine.bridge(&JobId("own".to_owned())).await?;
        let ask = |name: &str, inputs| BridgeRequest {
            frontend: "fixed".to_owned(),
            frontend_opts: [("build-arg:A".to_owned(), name.to_owned())].into(),
            frontend_inputs: inputs,
            ..BridgeRequest::default()
        };
        let made = forwarder.bridge().solve(ask("input", BTreeMap::new())).await?;
        let input = made.single.as_ref().unwrap().definition().clone();
        let inputs = [("in".to_owned(), input)].into();
        let result = forwarder.bridge().solve(ask("result", inputs)).await;
        forwarder.return_result(result);
        Ok::<_, BuildError>(())
    });
    let mut request = SolveRequest {
        id: "own".to_owned(),
        ..SolveRequest::default()
    };
    request
        .frontend_opts
        .insert("of-the-build".to_owned(), "yes".to_owned());
    let response = bench.engine.solve(request.clone()).await.unwrap();
    client.await.unwrap().unwrap();
    let [statement] = response.statements.as_slice() else {
        panic!("{:?}", response.statements)
    };
    assert_eq!(
        (statement.key.as_str(), statement.predicate_type.as_str()),
        ("", "https://slsa.dev/provenance/v1")
    );
    let predicate: serde_json::Value = serde_json::from_slice(&statement.predicate).unwrap();
    let asked = &predicate["buildDefinition"]["externalParameters"]["request"];
    assert_eq!(asked["args"]["build-arg:A"], "result");
    let input = &asked["inputs"]["in"]["request"];
    assert_eq!(
        (&input["frontend"], &input["args"]["build-arg:A"]),
        (&"fixed".into(), &"input".into())
    );
    assert!(input["root"].is_null());
    assert_eq!(asked["root"]["request"]["args"]["of-the-build"], "yes");

    let internal = SolveRequest {
        id: "internal".to_owned(),
        frontend: "fixed".to_owned(),
        is_internal: true,
        ..request
    };
    assert!(bench.engine.solve(internal).await.unwrap().statements.is_empty());
}

/// Builds with the option that explains, and returns what logs say, with the texts of all explanations.
async fn explained(bench: &Bench, id: &str, state: &State) -> (Vec<String>, Vec<String>) {
    let mut asked = request(id, state);
    asked
        .frontend_opts
        .insert("cooper.explain".to_owned(), "1".to_owned());
    bench.engine.solve(asked).await.unwrap();
    let job = JobId(id.to_owned());
    let mut status = bench.engine.status(&job).await.unwrap();
    let mut logs = Vec::new();
    while let Some(batch) = status.next().await {
        let texts = batch
            .logs
            .iter()
            .map(|log| String::from_utf8_lossy(&log.data).into_owned());
        logs.extend(texts.filter(|text| text.starts_with("not cached: ")));
    }
    let mut told = Vec::new();
    let mut explanations = bench.engine.job_progress(&job).unwrap().follow_explanations();
    while let Some(more) = explanations.next().await {
        told.extend(more.iter().map(|explanation| explanation.lines().join("; ")));
    }
    (logs, told)
}

#[tokio::test]
async fn a_step_says_why_it_is_executed() {
    let bench = Bench::new();
    let (logs, told) = explained(&bench, "one", &step(&source("base"), "/same")).await;
    assert_eq!(logs, ["not cached: never built here before\n"; 2]);
    assert_eq!(told, ["never built here before"; 2]);
    let (logs, told) = explained(&bench, "two", &step(&source("base"), "/same")).await;
    assert!(logs.is_empty() && told.is_empty(), "{logs:?} {told:?}");
    let (_, told) = explained(&bench, "three", &step(&source("base"), "/other")).await;
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("\"/same\"→\"/other\""), "{told:?}");
    let (_, told) = explained(&bench, "four", &step(&source("other"), "/same")).await;
    assert_eq!(told.len(), 2, "{told:?}");
    // Reasons are found out side by side: which is told first is open.
    let is_of_step = |reason: &&String| reason.contains("docker.io/library/other");
    assert_eq!(told.iter().filter(is_of_step).count(), 1, "{told:?}");
}

#[tokio::test]
async fn a_step_whose_result_is_gone_says_so() {
    let bench = Bench::new();
    let state = step(&source("base"), "/same");
    explained(&bench, "one", &state).await;
    let records = bench.engine.services().store.records();
    records.release("scratch").unwrap();
    let (_, told) = explained(&bench, "two", &state).await;
    assert_eq!(
        told,
        ["it ran before, but its result is not in the cache any more"; 2]
    );
}

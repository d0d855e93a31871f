//! `Control`: builds, their progress, sessions, the cache.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use api::pb::control as pb;
use api::pb::control::control_server::{Control, ControlServer};
use api::pb::worker;
use api::session::SessionConn;
use api::transport::{MAX_MESSAGE_BYTES, gathered};
use cache::{PruneOptions, Store, StoreError, UsageOptions, UsageRecord};
use engine::bridge::CacheOption;
use engine::job::JobId;
use engine::progress::Subscription;
use engine::session::SessionId;
use engine::solve::{ExporterRequest, SolveRequest, SolveResponse};
use engine::trace::Trace;
use engine::{BuildError, Engine, ErrorKind};
use executor::{DeviceListing, DeviceRegistry};
use futures_util::{StreamExt as _, stream};
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

use super::Answers;
use super::explanations::Explanations;
use super::failure::{failure, lookup_status};
use super::history::{Finished, History};
use super::history_filter::HistoryFilter;
use super::progress::{response, timestamp};
use crate::collector::Collector;
use crate::sessions::SessionTable;

/// The header with the daemon's clock.
const TIMESTAMP_HEADER: &str = "buildkit-current-timestamp";
/// Messages of a session on their way to the client.
const SESSION_QUEUE: usize = 32;
/// The only version of results that is made.
const COMPATIBILITY_VERSION: i64 = 30;

/// What the service works with.
#[derive(Clone, Debug)]
pub struct ControlService {
    /// Builds.
    pub engine: Engine,
    /// The clients.
    pub sessions: SessionTable,
    /// Builds that run and have ended.
    pub history: History,
    /// Why their steps ran.
    pub explanations: Explanations,
    /// The only worker.
    pub worker: worker::WorkerRecord,
    /// Where devices are described that steps may use.
    pub devices: DeviceRegistry,
    /// Whether the steps of every build reach the network by nothing but a proxy.
    pub proxy_network: bool,
    /// Collects garbage after builds.
    pub collector: Collector,
}

fn device(listing: DeviceListing) -> worker::CdiDevice {
    worker::CdiDevice {
        name: listing.name,
        auto_allow: listing.auto_allowed,
        annotations: listing.annotations,
        on_demand: false,
    }
}

type Answer<T> = Result<Response<T>, Status>;

impl ControlService {
    /// Makes the gRPC service.
    pub fn server(self) -> ControlServer<Self> {
        ControlServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Waits for a build to begin; nothing when its request is refused before it does.
    async fn follow(&self, id: &str) -> Result<Option<Subscription>, Status> {
        let (known, mut events) = self.history.listen(id, false);
        let is_end = |event: &pb::BuildHistoryEvent| {
            let is_meant = event.record.as_ref().is_some_and(|record| record.r#ref == id);
            is_meant && event.r#type() == pb::BuildHistoryEventType::Complete
        };
        let refused = async {
            if known.iter().any(is_end) {
                return;
            }
            loop {
                match events.recv().await {
                    Ok(event) if is_end(&event) => return,
                    Err(broadcast::error::RecvError::Closed) => std::future::pending::<()>().await,
                    _ => {}
                }
            }
        };
        let job = JobId(id.to_owned());
        tokio::select! {
            biased;
            found = self.engine.status(&job) => found.map(Some).map_err(|error| lookup_status(&error)),
            () = refused => Ok(None),
        }
    }

    fn store(&self) -> cache::Store {
        self.engine.services().store.clone()
    }
}

/// Runs work on the disk.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Status::internal("the work was aborted"))
}

fn bytes(bytes: i64) -> Result<u64, Status> {
    u64::try_from(bytes).map_err(|_| Status::invalid_argument(format!("negative size {bytes}")))
}

/// Prunes, and forgets what sources were if nothing is to stay of them anyway.
fn prune(
    store: &Store,
    options: PruneOptions,
    removed: &mut dyn FnMut(UsageRecord) -> ControlFlow<()>,
) -> Result<(), StoreError> {
    if options.takes_everything() {
        engine::forget_resolutions(store)?;
    }
    store.prune(&[options], removed)
}

fn size(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn nanoseconds(ns: i64) -> Duration {
    Duration::from_nanos(u64::try_from(ns).unwrap_or(0))
}

fn usage(record: UsageRecord) -> pb::UsageRecord {
    pb::UsageRecord {
        id: record.id.to_string(),
        mutable: record.mutable,
        in_use: record.in_use,
        size: size(record.size_bytes),
        created_at: Some(timestamp(record.created_at)),
        last_used_at: record.last_used_at.map(timestamp),
        usage_count: size(record.usage_count),
        description: record.description,
        record_type: record.record_type.as_str().to_owned(),
        shared: record.shared,
        parents: record.parents.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

/// Turns older spellings of a request into the present ones.
fn modernize(request: &mut pb::SolveRequest) {
    let cache = request.cache.get_or_insert_default();
    if !cache.export_ref_deprecated.is_empty() {
        let mut attrs = std::mem::take(&mut cache.export_attrs_deprecated);
        attrs.insert("ref".to_owned(), std::mem::take(&mut cache.export_ref_deprecated));
        cache.exports.push(pb::CacheOptionsEntry {
            r#type: "registry".to_owned(),
            attrs,
        });
    }
    for reference in std::mem::take(&mut cache.import_refs_deprecated) {
        let attrs = BTreeMap::from([("ref".to_owned(), reference)]);
        cache.imports.push(pb::CacheOptionsEntry {
            r#type: "registry".to_owned(),
            attrs,
        });
    }
    if request.exporters.is_empty() && !request.exporter_deprecated.is_empty() {
        request.exporters.push(pb::Exporter {
            r#type: std::mem::take(&mut request.exporter_deprecated),
            attrs: std::mem::take(&mut request.exporter_attrs_deprecated),
        });
    }
}

fn refuse_unsupported(request: &pb::SolveRequest) -> Result<(), Status> {
    match request.compatibility_version {
        0 | COMPATIBILITY_VERSION => {}
        version if version > COMPATIBILITY_VERSION => {
            return Err(Status::unknown(format!(
                "unsupported compatibility-version {version}: upgrade buildkit (max supported: {COMPATIBILITY_VERSION})"
            )));
        }
        version => {
            let message =
                format!("unsupported compatibility-version {version} (supported: [{COMPATIBILITY_VERSION}])");
            return Err(Status::unknown(message));
        }
    }
    Ok(())
}

fn solve_request(request: pb::SolveRequest) -> SolveRequest {
    let cache = request.cache.unwrap_or_default();
    let options = |entries: Vec<pb::CacheOptionsEntry>| -> Vec<CacheOption> {
        entries
            .into_iter()
            .map(|entry| CacheOption {
                kind: entry.r#type,
                attrs: entry.attrs,
            })
            .collect()
    };
    let session = |id: String| Some(id).filter(|id| !id.is_empty()).map(SessionId);
    let exporters = request.exporters.into_iter();
    SolveRequest {
        id: request.r#ref,
        session: session(request.session),
        definition: request.definition,
        frontend: request.frontend,
        frontend_opts: request.frontend_attrs,
        frontend_inputs: request.frontend_inputs,
        exporters: exporters
            .map(|exporter| ExporterRequest {
                kind: exporter.r#type,
                attrs: exporter.attrs,
            })
            .collect(),
        cache_imports: options(cache.imports),
        cache_exports: options(cache.exports),
        entitlements: request.entitlements,
        source_policy: request.source_policy,
        policy_session: session(request.source_policy_session),
        proxy_network: request.proxy_network,
        is_internal: request.internal,
        trace: None,
        wants_session_exporters: request.enable_session_exporter,
    }
}

fn history_record(request: &pb::SolveRequest) -> pb::BuildHistoryRecord {
    pb::BuildHistoryRecord {
        r#ref: request.r#ref.clone(),
        frontend: request.frontend.clone(),
        frontend_attrs: request.frontend_attrs.clone(),
        exporters: request.exporters.clone(),
        ..Default::default()
    }
}

fn finished(done: SolveResponse) -> Finished {
    let descriptor = |descriptor: &oci::Descriptor| pb::Descriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: size(descriptor.size),
        annotations: descriptor.annotations.clone(),
    };
    let made = done.descriptors.iter().enumerate();
    let results: BTreeMap<i64, pb::Descriptor> = made
        .filter_map(|(index, made)| Some((i64::try_from(index).ok()?, descriptor(made.as_ref()?))))
        .collect();
    Finished {
        response: done.exporter_response,
        results,
        statements: done.statements,
        held: done.held,
    }
}

fn with_timestamp<T>(answer: T) -> Response<T> {
    let mut response = Response::new(answer);
    if let Ok(value) = oci::timestamp::from_system(SystemTime::now()).parse() {
        response.metadata_mut().insert(TIMESTAMP_HEADER, value);
    }
    response
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn disk_usage(&self, request: Request<pb::DiskUsageRequest>) -> Answer<pb::DiskUsageResponse> {
        let request = request.into_inner();
        let options = UsageOptions {
            filter: request.filter,
            age_limit: nanoseconds(request.age_limit),
        };
        let store = self.store();
        let records = blocking(move || store.disk_usage(&options)).await?;
        let records = records.map_err(|error| Status::unknown(engine::error::chain_text(&error)))?;
        Ok(Response::new(pb::DiskUsageResponse {
            record: records.into_iter().map(usage).collect(),
        }))
    }

    type PruneStream = Answers<pb::UsageRecord>;

    async fn prune(&self, request: Request<pb::PruneRequest>) -> Answer<Self::PruneStream> {
        let request = request.into_inner();
        let options = PruneOptions {
            filter: request.filter,
            all: request.all,
            keep_duration: nanoseconds(request.keep_duration),
            reserved_bytes: bytes(request.reserved_space)?,
            max_used_bytes: bytes(request.max_used_space)?,
            min_free_bytes: bytes(request.min_free_space)?,
        };
        let store = self.store();
        let (records, receiver) = mpsc::channel(SESSION_QUEUE);
        let work =
            tokio::task::spawn_blocking(move || {
                let pruned = prune(&store, options, &mut |record| match records
                    .blocking_send(Ok(usage(record)))
                {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                });
                if let Err(error) = pruned {
                    // A client that has gone needs no answer.
                    let _ = records.blocking_send(Err(Status::unknown(engine::error::chain_text(&error))));
                }
            });
        // The work ends by itself when nobody reads its records; until then the answer keeps it in sight.
        let answers = ReceiverStream::new(receiver).map(move |record| {
            let _work = &work;
            record
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn solve(&self, request: Request<pb::SolveRequest>) -> Answer<pb::SolveResponse> {
        let header = request.metadata().get("traceparent");
        let trace = header.and_then(|header| header.to_str().ok());
        let trace = trace.map_or_else(Trace::begin, Trace::continuing);
        let mut request = request.into_inner();
        if request.r#ref.is_empty() {
            return Err(Status::invalid_argument("the request has no ref"));
        }
        modernize(&mut request);
        refuse_unsupported(&request)?;
        let id = JobId(request.r#ref.clone());
        let running =
            (!request.internal).then(|| self.history.start(history_record(&request), trace.clone()));
        let keeping = (!request.internal).then(|| self.explanations.keeping(&self.engine, &request.r#ref));
        let _collected = self.collector.during_build();
        let mut request = solve_request(request);
        request.trace = Some(trace);
        request.proxy_network |= self.proxy_network;
        let (engine, history) = (self.engine.clone(), self.history.clone());
        let work = async {
            let watch = async {
                if engine.status(&id).await.is_ok()
                    && let Some(job) = engine.job(&id)
                {
                    history.attach(&id.0, job.progress().clone());
                }
                std::future::pending::<()>().await
            };
            tokio::select! {
                result = Box::pin(engine.solve(request)) => result,
                () = watch => Err(BuildError::canceled()),
            }
        };
        let ended = work.await;
        if let Some(keeping) = keeping {
            keeping.finish().await;
        }
        match ended {
            Ok(done) => {
                let exporter_response = done.exporter_response.clone();
                if let Some(running) = running {
                    running.finish(Ok(finished(done))).await;
                }
                Ok(Response::new(pb::SolveResponse { exporter_response }))
            }
            Err(error) => {
                tracing::error!(build = %id, "solve returned error: {error}");
                let failed = failure(&error);
                if let Some(running) = running {
                    running.finish(Err(failed.to_rpc())).await;
                }
                Err(failed.to_status())
            }
        }
    }

    type StatusStream = Answers<pb::StatusResponse>;

    async fn status(&self, request: Request<pb::StatusRequest>) -> Answer<Self::StatusStream> {
        let id = request.into_inner().r#ref;
        let (history, ended) = (self.history.clone(), id.clone());
        let kept = blocking(move || history.logs(&ended)).await?;
        if let Some(messages) = kept.map_err(|error| Status::unknown(engine::error::chain_text(&error)))? {
            let answers: Self::StatusStream = Box::pin(stream::iter(messages.into_iter().map(Ok)));
            return Ok(with_timestamp(answers));
        }
        let subscription = match self.history.progress(&id) {
            Some(subscription) => Some(subscription),
            None => self.follow(&id).await?,
        };
        let Some(subscription) = subscription else {
            let nothing: Self::StatusStream = Box::pin(stream::empty());
            return Ok(with_timestamp(nothing));
        };
        let batches = stream::unfold(subscription, |mut subscription: Subscription| async {
            let batch = subscription.next().await?;
            Some((Ok(response(batch)), subscription))
        });
        let answers: Self::StatusStream = Box::pin(batches);
        Ok(with_timestamp(answers))
    }

    type SessionStream = Answers<pb::BytesMessage>;

    async fn session(&self, request: Request<Streaming<pb::BytesMessage>>) -> Answer<Self::SessionStream> {
        let (headers, _, incoming) = request.into_parts();
        let (outgoing, messages) = mpsc::channel(SESSION_QUEUE);
        let sessions = self.sessions.clone();
        // The connection is made of the very stream that is answered with, so it cannot be waited for here.
        let task = tokio::spawn(async move {
            let refused = outgoing.clone();
            let served = match SessionConn::accept(&headers, incoming, outgoing).await {
                Ok(connection) => sessions
                    .serve(connection)
                    .await
                    .map_err(|error| error.to_string()),
                Err(error) => Err(engine::error::chain_text(&error)),
            };
            match served {
                Ok(reason) => tracing::debug!(reason, "session finished"),
                Err(message) => {
                    // A client that has gone needs no answer.
                    let _ = refused.send(Err(Status::unknown(message))).await;
                }
            }
        });
        let task = AbortOnDropHandle::new(task);
        let answers = gathered(messages).map(move |message| {
            // The task lives as long as the stream that it serves.
            let _owned = &task;
            message
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn list_workers(
        &self,
        request: Request<pb::ListWorkersRequest>,
    ) -> Answer<pb::ListWorkersResponse> {
        let filters = request.into_inner().filter;
        let matches = crate::worker::matches(&self.worker, &filters).map_err(Status::invalid_argument)?;
        let registry = self.devices.clone();
        let devices = blocking(move || registry.scan().list()).await?;
        let listed = worker::WorkerRecord {
            cdi_devices: devices.into_iter().map(device).collect(),
            ..self.worker.clone()
        };
        let record = matches.then_some(listed).into_iter().collect();
        Ok(Response::new(pb::ListWorkersResponse { record }))
    }

    async fn info(&self, _: Request<pb::InfoRequest>) -> Answer<pb::InfoResponse> {
        Ok(Response::new(pb::InfoResponse {
            buildkit_version: self.worker.buildkit_version.clone(),
        }))
    }

    type ListenBuildHistoryStream = Answers<pb::BuildHistoryEvent>;

    async fn listen_build_history(
        &self,
        request: Request<pb::BuildHistoryRequest>,
    ) -> Answer<Self::ListenBuildHistoryStream> {
        let request = request.into_inner();
        let filter = HistoryFilter::parse(&request.filter, SystemTime::now())
            .map_err(|error| Status::unknown(error.to_string()))?;
        let (mut known, receiver) = self.history.listen(&request.r#ref, request.active_only);
        known.retain(|event| event.record.as_ref().is_some_and(|record| filter.matches(record)));
        if let Ok(limit) = usize::try_from(request.limit)
            && limit > 0
        {
            known.drain(..known.len().saturating_sub(limit));
        }
        let known = stream::iter(known.into_iter().map(Ok));
        if request.early_exit {
            let answers: Self::ListenBuildHistoryStream = Box::pin(known);
            return Ok(with_timestamp(answers));
        }
        let wanted = Arc::<str>::from(request.r#ref);
        let later = stream::unfold(receiver, |mut receiver| async {
            loop {
                match receiver.recv().await {
                    Ok(event) => return Some((event, receiver)),
                    // A listener that lags misses events, and can ask for the present state.
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        });
        let later = later.filter_map(move |event| {
            let chosen = wanted.is_empty()
                || event
                    .record
                    .as_ref()
                    .is_some_and(|record| *record.r#ref == *wanted);
            std::future::ready(chosen.then_some(Ok(event)))
        });
        let answers: Self::ListenBuildHistoryStream = Box::pin(known.chain(later));
        Ok(with_timestamp(answers))
    }

    async fn update_build_history(
        &self,
        request: Request<pb::UpdateBuildHistoryRequest>,
    ) -> Answer<pb::UpdateBuildHistoryResponse> {
        let request = request.into_inner();
        let (history, id) = (self.history.clone(), request.r#ref.clone());
        let explanations = self.explanations.clone();
        let is_found = if request.delete {
            let is_found = history.delete(&id).await;
            blocking(move || explanations.forget(&id)).await?;
            is_found
        } else if request.finalize {
            history.finalize(&id).await
        } else {
            blocking(move || history.pin(&id, request.pinned)).await?
        };
        if !is_found {
            let missing = BuildError::new(ErrorKind::NotFound, format!("no such ref {}", request.r#ref));
            return Err(lookup_status(&missing));
        }
        Ok(Response::new(pb::UpdateBuildHistoryResponse {}))
    }
}

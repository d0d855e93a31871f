//! `LLBBridge`: what a client that is its own frontend asks of its build.

use api::pb::gateway as pb;
use api::pb::gateway::llb_bridge_server::{LlbBridge, LlbBridgeServer};
use api::pb::{pb as llb_pb, worker};
use api::transport::MAX_MESSAGE_BYTES;
use engine::bridge::{
    BridgeRequest, BuildContainer, BuildRef, CacheOption, ContainerRequest, FileRange, Forwarder,
    MetaRequest, MountRequest, WarnOptions,
};
use engine::job::JobId;
use engine::{BuildError, Engine, ErrorKind};
use oci::Digest;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::failure::{failure_with_refs, from_failure, lookup_status, status};
use super::{Answers, caps, containers, results};
use crate::meta::{meta_request, meta_response, platform};
use crate::sessions::stat_to_wire;

/// The header that names the build.
const BUILD_ID_HEADER: &str = "buildkit-controlapi-buildid";
/// The resolver type of images in a client's store.
const RESOLVER_OCI_LAYOUT: i32 = 1;

/// Whose calls are served.
#[derive(Clone, Debug)]
enum Callers {
    /// Clients', which name their build in a header.
    Clients(Engine),
    /// Those of a frontend that has the connection for itself.
    Frontend(Forwarder),
}

/// Forwards calls to a build.
#[derive(Clone, Debug)]
pub struct BridgeService {
    callers: Callers,
    worker: worker::WorkerRecord,
}

type Answer<T> = Result<Response<T>, Status>;

impl BridgeService {
    /// Makes the service of an engine with one worker, for clients that are their own frontends.
    pub fn new(engine: Engine, worker: worker::WorkerRecord) -> Self {
        let callers = Callers::Clients(engine);
        Self { callers, worker }
    }

    /// Makes the service of one frontend.
    pub(super) fn of(forwarder: Forwarder, worker: worker::WorkerRecord) -> Self {
        let callers = Callers::Frontend(forwarder);
        Self { callers, worker }
    }

    /// Makes the gRPC service.
    pub fn server(self) -> LlbBridgeServer<Self> {
        LlbBridgeServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    async fn forwarder(&self, headers: &MetadataMap, method: &str) -> Result<Forwarder, Status> {
        let engine = match &self.callers {
            Callers::Clients(engine) => engine,
            Callers::Frontend(forwarder) => return Ok(forwarder.clone()),
        };
        let id = headers
            .get(BUILD_ID_HEADER)
            .and_then(|id| id.to_str().ok())
            .unwrap_or_default();
        if id.is_empty() {
            return Err(Status::unknown(format!(
                "forwarding {method}: no buildid found in context"
            )));
        }
        let found = engine.bridge(&JobId(id.to_owned())).await;
        found.map_err(|error| lookup_status(&error.context(format!("forwarding {method}"))))
    }

    async fn reference(
        &self,
        headers: &MetadataMap,
        method: &str,
        id: String,
    ) -> Result<(Forwarder, BuildRef), Status> {
        let forwarder = self.forwarder(headers, method).await?;
        let missing = || Status::unknown(format!("no such ref: {id}"));
        let found = results::find(&forwarder, id.clone())
            .map_err(|_| missing())?
            .ok_or_else(missing)?;
        Ok((forwarder, found))
    }
}

fn path_range(range: Option<pb::FileRange>) -> Result<FileRange, Status> {
    let range = range.unwrap_or_default();
    let part = |value: i64| u64::try_from(value).map_err(|_| Status::invalid_argument("negative file range"));
    Ok(FileRange {
        offset: part(range.offset)?,
        length: part(range.length)?,
    })
}

/// Turns an image's name into the identifier of a source.
fn image_identifier(request: &pb::ResolveImageConfigRequest) -> String {
    let is_layout = request.resolver_type == RESOLVER_OCI_LAYOUT;
    let known = ["docker-image://", "oci-layout://"]
        .iter()
        .any(|scheme| request.r#ref.starts_with(scheme));
    match (known, is_layout) {
        (true, _) => request.r#ref.clone(),
        (false, true) => format!("oci-layout://{}", request.r#ref),
        (false, false) => format!("docker-image://{}", request.r#ref),
    }
}

#[tonic::async_trait]
impl LlbBridge for BridgeService {
    async fn resolve_image_config(
        &self,
        request: Request<pb::ResolveImageConfigRequest>,
    ) -> Answer<pb::ResolveImageConfigResponse> {
        let forwarder = self.forwarder(request.metadata(), "ResolveImageConfig").await?;
        let request = request.into_inner();
        let identifier = image_identifier(&request);
        let op = llb_pb::SourceOp {
            identifier,
            ..Default::default()
        };
        let meta = MetaRequest {
            platform: request.platform.map(platform),
            resolve_mode: request.resolve_mode,
            log_name: request.log_name,
            layout_store: (request.resolver_type == RESOLVER_OCI_LAYOUT)
                .then_some((request.session_id, request.store_id)),
            source_policies: request.source_policies,
            ..MetaRequest::default()
        };
        let found = forwarder
            .bridge()
            .resolve_image_config(op, &meta)
            .await
            .map_err(|error| status(&error))?;
        let identifier = &found.op.identifier;
        let name = identifier
            .split_once("://")
            .map_or(identifier.as_str(), |(_, name)| name)
            .to_owned();
        let image = found
            .image
            .ok_or_else(|| Status::unknown(format!("{identifier} is no image")))?;
        Ok(Response::new(pb::ResolveImageConfigResponse {
            digest: image.digest.to_string(),
            config: image.config,
            r#ref: name,
        }))
    }

    async fn resolve_source_meta(
        &self,
        request: Request<pb::ResolveSourceMetaRequest>,
    ) -> Answer<pb::ResolveSourceMetaResponse> {
        let forwarder = self.forwarder(request.metadata(), "ResolveSourceMeta").await?;
        let (op, meta) = meta_request(request.into_inner()).map_err(|error| status(&error))?;
        let found = forwarder
            .bridge()
            .resolve_source_meta(op, &meta)
            .await
            .map_err(|error| status(&error))?;
        Ok(Response::new(meta_response(found)))
    }

    async fn solve(&self, request: Request<pb::SolveRequest>) -> Answer<pb::SolveResponse> {
        let forwarder = self.forwarder(request.metadata(), "Solve").await?;
        let request = request.into_inner();
        let imports = request.cache_imports.into_iter();
        let solve = BridgeRequest {
            definition: request.definition,
            frontend: request.frontend,
            frontend_opts: request.frontend_opt,
            frontend_inputs: request.frontend_inputs,
            cache_imports: imports
                .map(|entry| CacheOption {
                    kind: entry.r#type,
                    attrs: entry.attrs,
                })
                .collect(),
            source_policies: request.source_policies,
            evaluate: request.evaluate,
        };
        let result = Box::pin(forwarder.bridge().solve(solve))
            .await
            .map_err(|error| named(&forwarder, &error))?;
        if !result.refs.is_empty() && !request.allow_result_return {
            return Err(Status::unknown("solve did not return default result"));
        }
        if request.r#final {
            let mut last = result.clone();
            let attrs: std::collections::BTreeMap<String, String> =
                serde_json::from_slice(&request.exporter_attr).unwrap_or_default();
            for (key, value) in attrs {
                last.metadata.entry(key).or_insert_with(|| value.into());
            }
            forwarder.return_result(Ok(last));
        }
        let (message, first) = results::to_wire(&forwarder, result, request.allow_result_array_ref);
        let r#ref = if request.allow_result_return {
            String::new()
        } else {
            first
        };
        Ok(Response::new(pb::SolveResponse {
            r#ref,
            result: Some(message),
        }))
    }

    async fn read_file(&self, request: Request<pb::ReadFileRequest>) -> Answer<pb::ReadFileResponse> {
        let id = request.get_ref().r#ref.clone();
        let (forwarder, reference) = self.reference(request.metadata(), "ReadFile", id).await?;
        let request = request.into_inner();
        let range = path_range(request.range)?;
        let data = reference
            .read_file(&request.file_path, range)
            .await
            .map_err(|error| named(&forwarder, &error))?;
        Ok(Response::new(pb::ReadFileResponse { data }))
    }

    async fn read_dir(&self, request: Request<pb::ReadDirRequest>) -> Answer<pb::ReadDirResponse> {
        let id = request.get_ref().r#ref.clone();
        let (forwarder, reference) = self.reference(request.metadata(), "ReadDir", id).await?;
        let request = request.into_inner();
        let entries = reference
            .read_dir(&request.dir_path, &request.include_pattern)
            .await;
        let entries = entries.map_err(|error| named(&forwarder, &error))?;
        Ok(Response::new(pb::ReadDirResponse {
            entries: entries.into_iter().map(stat_to_wire).collect(),
        }))
    }

    async fn stat_file(&self, request: Request<pb::StatFileRequest>) -> Answer<pb::StatFileResponse> {
        let id = request.get_ref().r#ref.clone();
        let (forwarder, reference) = self.reference(request.metadata(), "StatFile", id).await?;
        let stat = reference
            .stat_file(&request.into_inner().path)
            .await
            .map_err(|error| named(&forwarder, &error))?;
        Ok(Response::new(pb::StatFileResponse {
            stat: Some(stat_to_wire(stat)),
        }))
    }

    async fn evaluate(&self, request: Request<pb::EvaluateRequest>) -> Answer<pb::EvaluateResponse> {
        let id = request.get_ref().r#ref.clone();
        let (forwarder, reference) = self.reference(request.metadata(), "Evaluate", id).await?;
        reference
            .evaluate()
            .await
            .map_err(|error| named(&forwarder, &error))?;
        Ok(Response::new(pb::EvaluateResponse {}))
    }

    async fn ping(&self, request: Request<pb::PingRequest>) -> Answer<pb::PongResponse> {
        self.forwarder(request.metadata(), "Ping").await?;
        let worker = worker::WorkerRecord {
            id: self.worker.id.clone(),
            labels: self.worker.labels.clone(),
            platforms: self.worker.platforms.clone(),
            ..Default::default()
        };
        Ok(Response::new(pb::PongResponse {
            frontend_api_caps: caps::messages(caps::GATEWAY),
            llb_caps: caps::messages(caps::LLB),
            workers: vec![worker],
        }))
    }

    async fn r#return(&self, request: Request<pb::ReturnRequest>) -> Answer<pb::ReturnResponse> {
        let forwarder = self.forwarder(request.metadata(), "Return").await?;
        let request = request.into_inner();
        if let Some(error) = &request.error {
            let failure = api::errors::Failure::from_rpc(error);
            forwarder.return_result(Err(from_failure(&failure)));
            return Ok(Response::new(pb::ReturnResponse {}));
        }
        let result = request
            .result
            .ok_or_else(|| Status::invalid_argument("neither result nor error"))?;
        let result = results::from_wire(&forwarder, result).map_err(|error| status(&error))?;
        forwarder.return_result(Ok(result));
        Ok(Response::new(pb::ReturnResponse {}))
    }

    async fn inputs(&self, request: Request<pb::InputsRequest>) -> Answer<pb::InputsResponse> {
        let forwarder = self.forwarder(request.metadata(), "Inputs").await?;
        let inputs = forwarder.inputs().iter();
        let definitions = inputs.map(|(name, input)| (name.clone(), results::for_clients(input)));
        Ok(Response::new(pb::InputsResponse {
            definitions: definitions.collect(),
        }))
    }

    async fn new_container(
        &self,
        request: Request<pb::NewContainerRequest>,
    ) -> Answer<pb::NewContainerResponse> {
        let forwarder = self.forwarder(request.metadata(), "NewContainer").await?;
        Box::pin(new_container(&forwarder, request.into_inner()))
            .await
            .map_err(|error| named(&forwarder, &error))?;
        Ok(Response::new(pb::NewContainerResponse {}))
    }

    async fn release_container(
        &self,
        request: Request<pb::ReleaseContainerRequest>,
    ) -> Answer<pb::ReleaseContainerResponse> {
        let forwarder = self.forwarder(request.metadata(), "ReleaseContainer").await?;
        let id = request.into_inner().container_id;
        forwarder
            .release_container(&id)
            .await
            .map_err(|error| status(&error))?;
        Ok(Response::new(pb::ReleaseContainerResponse {}))
    }

    type ExecProcessStream = Answers<pb::ExecMessage>;

    async fn exec_process(
        &self,
        request: Request<Streaming<pb::ExecMessage>>,
    ) -> Answer<Self::ExecProcessStream> {
        let forwarder = self.forwarder(request.metadata(), "ExecProcess").await?;
        Ok(Response::new(containers::serve(forwarder, request.into_inner())))
    }

    async fn read_file_container(
        &self,
        request: Request<pb::ReadFileRequest>,
    ) -> Answer<pb::ReadFileResponse> {
        let forwarder = self.forwarder(request.metadata(), "ReadFileContainer").await?;
        let request = request.into_inner();
        let container = container(&forwarder, &request.r#ref, request.mount_index)?;
        let range = path_range(request.range)?;
        let data = container
            .read_file(request.mount_index, &request.file_path, range)
            .await
            .map_err(|error| status(&error))?;
        Ok(Response::new(pb::ReadFileResponse { data }))
    }

    async fn read_dir_container(&self, request: Request<pb::ReadDirRequest>) -> Answer<pb::ReadDirResponse> {
        let forwarder = self.forwarder(request.metadata(), "ReadDirContainer").await?;
        let request = request.into_inner();
        let container = container(&forwarder, &request.r#ref, request.mount_index)?;
        let entries = container
            .read_dir(request.mount_index, &request.dir_path, &request.include_pattern)
            .await
            .map_err(|error| status(&error))?;
        let entries = entries.into_iter().map(stat_to_wire).collect();
        Ok(Response::new(pb::ReadDirResponse { entries }))
    }

    async fn stat_file_container(
        &self,
        request: Request<pb::StatFileRequest>,
    ) -> Answer<pb::StatFileResponse> {
        let forwarder = self.forwarder(request.metadata(), "StatFileContainer").await?;
        let request = request.into_inner();
        let container = container(&forwarder, &request.r#ref, request.mount_index)?;
        let stat = container
            .stat_file(request.mount_index, &request.path)
            .await
            .map_err(|error| status(&error))?;
        Ok(Response::new(pb::StatFileResponse {
            stat: Some(stat_to_wire(stat)),
        }))
    }

    async fn warn(&self, request: Request<pb::WarnRequest>) -> Answer<pb::WarnResponse> {
        let forwarder = self.forwarder(request.metadata(), "Warn").await?;
        let request = request.into_inner();
        let digest = request.digest.parse::<Digest>();
        let vertex = digest.map_err(|error| status(&BuildError::new(ErrorKind::User, error.to_string())))?;
        let options = WarnOptions {
            level: request.level,
            source: request.info,
            ranges: request.ranges,
            detail: request.detail,
            url: request.url,
        };
        forwarder
            .bridge()
            .warn(vertex, &String::from_utf8_lossy(&request.short), options);
        Ok(Response::new(pb::WarnResponse {}))
    }
}

fn container(forwarder: &Forwarder, id: &str, mount: i32) -> Result<BuildContainer, Status> {
    let found = forwarder.container(id);
    found.map_err(|_| Status::unknown(format!("container details for {id}@{mount} not found")))
}

async fn new_container(forwarder: &Forwarder, request: pb::NewContainerRequest) -> Result<(), BuildError> {
    let mut mounts = Vec::with_capacity(request.mounts.len());
    for mount in request.mounts {
        let found = forwarder.result(&mount.result_id).await;
        let reference = found.map_err(|error| {
            let text = format!(
                "failed to find ref {} for {:?} mount",
                mount.result_id, mount.dest
            );
            error.context(text)
        })?;
        mounts.push(MountRequest { mount, reference });
    }
    let request = ContainerRequest {
        id: request.container_id,
        mounts,
        network: request.network,
        hostname: request.hostname,
        extra_hosts: request.extra_hosts,
        platform: request.platform,
        ..ContainerRequest::default()
    };
    forwarder.new_container(request).await
}

/// Turns an error into a status that names what the client may look at.
fn named(forwarder: &Forwarder, error: &BuildError) -> Status {
    let names = error.failed_op().map(|failed| forwarder.name_failed(failed));
    failure_with_refs(error, names.unwrap_or_default()).to_status()
}

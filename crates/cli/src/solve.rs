//! One build: a session with the services it needs, the request, its progress, and what is left to do afterwards.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use api::pb::control::control_client::ControlClient;
use api::pb::{control, gateway, pb, sourcepolicy};
use api::session::{SessionHost, methods};
use api::transport::MAX_MESSAGE_BYTES;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Code, Request};

use crate::docker_config::DockerConfig;
use crate::failure::Failure;
use crate::progress::event::Status;
use crate::services::accounts::Accounts;
use crate::services::agents::Agents;
use crate::services::directories::Directories;
use crate::services::layouts::{self, Layouts};
use crate::services::secrets::Secrets;
use crate::services::targets::Targets;
use crate::services::tokens::Tokens;
use crate::services::uploads::Uploads;
use crate::spec::{AgentSpec, AuthTls, CacheEntry, Destination, Output, SecretOrigin};
use crate::{explanation, local_cache, oci_index};

/// How long the progress of a build that has ended may be silent before it is given up.
const QUIET_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the reasons of a build that has ended are waited for.
const REASONS_TIMEOUT: Duration = Duration::from_secs(2);
/// The header that names a build to the gateway.
const BUILD_ID_HEADER: &str = "buildkit-controlapi-buildid";

/// What is to be built, and what the client offers for it.
#[derive(Clone, Debug, Default)]
pub struct Build {
    /// The build's name.
    pub id: String,
    /// The frontend; empty: `definition` is built.
    pub frontend: String,
    /// The frontend's options.
    pub options: BTreeMap<String, String>,
    /// What to build without a frontend.
    pub definition: Option<pb::Definition>,
    /// Where results go.
    pub outputs: Vec<Output>,
    /// Caches to export to.
    pub cache_exports: Vec<CacheEntry>,
    /// Caches to import from.
    pub cache_imports: Vec<CacheEntry>,
    /// Directories, by the name under which the frontend asks for them.
    pub directories: BTreeMap<String, PathBuf>,
    /// OCI layouts, by the name under which the frontend asks for them.
    pub layouts: BTreeMap<String, PathBuf>,
    /// Secrets, by id.
    pub secrets: BTreeMap<String, SecretOrigin>,
    /// SSH agents.
    pub agents: Vec<AgentSpec>,
    /// Rights that steps may ask for.
    pub entitlements: Vec<String>,
    /// Rules for sources.
    pub source_policy: Option<sourcepolicy::Policy>,
    /// Whether steps' networks are behind an enforcing proxy.
    pub proxy_network: bool,
    /// Key under which the daemon keeps the directories between builds.
    pub shared_key: String,
    /// Streams that the frontend fetches by address.
    pub uploads: Option<Uploads>,
    /// How to reach the token servers of registries, by the registry's host.
    pub token_servers: BTreeMap<String, AuthTls>,
    /// Whether to ask why steps run.
    pub explain: bool,
}

/// What a build yielded.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What exporters tell, e.g. `containerimage.digest`.
    pub response: BTreeMap<String, String>,
    /// What a frontend answers to a question (`requestid`).
    pub metadata: BTreeMap<String, Vec<u8>>,
}

/// Runs a build to its end; progress goes to `events`.
///
/// When `cancel` fires, the daemon is told, and its last words are waited for.
///
/// # Errors
/// [`Failure`] as it is to be shown.
pub async fn run(
    channel: Channel,
    build: Build,
    events: mpsc::Sender<Status>,
    cancel: CancellationToken,
) -> Result<Outcome, Failure> {
    let control = ControlClient::new(channel.clone())
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let caches = local_cache::prepare(&build.cache_exports, &build.cache_imports)?;
    let session_id = crate::ids::new_id();
    let (host, layouts_to_index) = host(&build, &session_id, &caches, &events).await?;
    let request = request(&build, &session_id, &caches);

    let explained = build.explain.then(|| {
        let follow = explanation::follow(channel.clone(), build.id.clone(), events.clone());
        AbortOnDropHandle::new(tokio::spawn(follow))
    });
    let (ended, has_ended) = oneshot::channel();
    let mut progress = std::pin::pin!(follow(control.clone(), build.id.clone(), events, has_ended));
    let mut session = std::pin::pin!(host.run(control.clone()));
    let question = build
        .options
        .contains_key("requestid")
        .then(|| Question::of(&build));
    let mut work = std::pin::pin!(solve(control, channel, request, question, cancel));

    let mut session_open = true;
    let mut progress_result = None;
    let result = loop {
        tokio::select! {
            result = &mut work => break result,
            ended = &mut session, if session_open => {
                session_open = false;
                if let Err(error) = ended {
                    return Err(Failure::new(error.to_string()));
                }
            }
            result = &mut progress, if progress_result.is_none() => progress_result = Some(result),
        }
    };
    // The progress task may have ended on its own already.
    let _ = ended.send(());
    let followed = match progress_result {
        Some(result) => result,
        None => progress.await,
    };
    if let Some(explained) = explained {
        wait_for_reasons(explained).await;
    }
    let outcome = result?;
    followed?;
    finish(&outcome, &caches, &layouts_to_index)?;
    Ok(outcome)
}

/// Waits for the last explanations of a build that has ended; a build does not fail for want of them.
async fn wait_for_reasons(explained: AbortOnDropHandle<Result<(), Failure>>) {
    match tokio::time::timeout(REASONS_TIMEOUT, explained).await {
        Ok(Ok(Err(failure))) => tracing::warn!("{failure}"),
        Ok(Err(error)) => tracing::warn!(%error, "why steps ran is not known"),
        Ok(Ok(Ok(()))) | Err(_) => {}
    }
}

/// A question to a frontend, asked through the gateway.
struct Question {
    id: String,
    frontend: String,
    options: BTreeMap<String, String>,
    imports: Vec<CacheEntry>,
}

impl Question {
    fn of(build: &Build) -> Self {
        let mut options = build.options.clone();
        options
            .entry("frontend.caps".to_owned())
            .or_insert_with(|| "moby.buildkit.frontend.subrequests".to_owned());
        Self {
            id: build.id.clone(),
            frontend: build.frontend.clone(),
            options,
            imports: build.cache_imports.clone(),
        }
    }
}

async fn solve(
    mut control: ControlClient<Channel>,
    channel: Channel,
    request: control::SolveRequest,
    question: Option<Question>,
    cancel: CancellationToken,
) -> Result<Outcome, Failure> {
    let failed = |status: tonic::Status| Failure::of_call("failed to solve", &status);
    let canceled = || failed(tonic::Status::cancelled("context canceled"));
    let work = async {
        let Some(question) = question else {
            let response = control.solve(request).await.map_err(failed)?.into_inner();
            return Ok(Outcome {
                response: response.exporter_response,
                metadata: BTreeMap::new(),
            });
        };
        let request = control::SolveRequest {
            frontend: String::new(),
            definition: None,
            ..request
        };
        let build = async { control.solve(request).await.map_err(failed) };
        let ask = async { ask(channel, question).await.map_err(failed) };
        let (answer, metadata) = tokio::join!(build, ask);
        let response = answer?.into_inner().exporter_response;
        Ok(Outcome {
            response,
            metadata: metadata?,
        })
    };
    tokio::select! {
        result = work => result,
        () = cancel.cancelled() => Err(canceled()),
    }
}

/// Asks a frontend through the gateway of a running build, and ends that build with the answer.
async fn ask(channel: Channel, question: Question) -> Result<BTreeMap<String, Vec<u8>>, tonic::Status> {
    let mut bridge = gateway::llb_bridge_client::LlbBridgeClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let id = question
        .id
        .parse::<tonic::metadata::MetadataValue<_>>()
        .map_err(|_| tonic::Status::invalid_argument("the build's name cannot be sent"))?;
    let imports = question.imports.into_iter();
    let solve = gateway::SolveRequest {
        frontend: question.frontend,
        frontend_opt: question.options,
        allow_result_return: true,
        allow_result_array_ref: true,
        cache_imports: imports
            .map(|entry| gateway::CacheOptionsEntry {
                r#type: entry.kind,
                attrs: entry.attrs,
            })
            .collect(),
        ..Default::default()
    };
    let mut request = Request::new(solve);
    request.metadata_mut().insert(BUILD_ID_HEADER, id.clone());
    let answer = bridge.solve(request).await;
    let returned = match &answer {
        Ok(answer) => gateway::ReturnRequest {
            result: Some(answer.get_ref().result.clone().unwrap_or_default()),
            error: None,
        },
        Err(status) => gateway::ReturnRequest {
            result: None,
            error: Some(api::errors::Failure::from_status(status).to_rpc()),
        },
    };
    let mut request = Request::new(returned);
    request.metadata_mut().insert(BUILD_ID_HEADER, id);
    bridge.r#return(request).await?;
    let result = answer?.into_inner().result.unwrap_or_default();
    Ok(result
        .metadata
        .into_iter()
        .map(|(key, value)| (key, value.to_vec()))
        .collect())
}

/// Passes on a build's progress until it ends, or is silent for some time after the build has ended.
async fn follow(
    mut control: ControlClient<Channel>,
    id: String,
    events: mpsc::Sender<Status>,
    mut has_ended: oneshot::Receiver<()>,
) -> Result<(), Failure> {
    let failed = |status: tonic::Status| Failure::of_call("failed to get status", &status);
    let mut build_runs = true;
    let mut deadline = Instant::now() + QUIET_TIMEOUT;
    let opening = control.status(control::StatusRequest { r#ref: id });
    let mut opening = std::pin::pin!(opening);
    let mut stream = loop {
        tokio::select! {
            stream = &mut opening => break stream.map_err(failed)?.into_inner(),
            _ = &mut has_ended, if build_runs => {
                build_runs = false;
                deadline = Instant::now() + QUIET_TIMEOUT;
            }
            () = tokio::time::sleep_until(deadline), if !build_runs => return Ok(()),
        }
    };
    loop {
        tokio::select! {
            message = stream.message() => match message {
                Ok(Some(response)) => {
                    deadline = Instant::now() + QUIET_TIMEOUT;
                    // Without a display nobody wants to know.
                    let _ = events.send(response.into()).await;
                }
                Ok(None) => return Ok(()),
                Err(status) if status.code() == Code::Cancelled || !build_runs => return Ok(()),
                Err(status) => return Err(Failure::of_call("failed to receive status", &status)),
            },
            _ = &mut has_ended, if build_runs => {
                build_runs = false;
                deadline = Instant::now() + QUIET_TIMEOUT;
            }
            () = tokio::time::sleep_until(deadline), if !build_runs => return Ok(()),
        }
    }
}

/// Makes the session: the services, and the directories whose index is to be written in the end.
async fn host(
    build: &Build,
    session_id: &str,
    caches: &local_cache::LocalCaches,
    events: &mpsc::Sender<Status>,
) -> Result<(SessionHost, Vec<PathBuf>), Failure> {
    let mut services = Routes::builder();
    let mut offered: Vec<&'static str> = Vec::new();
    let tokens = Tokens::new(build.token_servers.clone());
    let accounts = Accounts::new(DockerConfig::load()?, tokens, events);
    services.add_service(api::pb::filesync::auth_server::AuthServer::new(accounts));
    offered.extend(methods::AUTH);
    let secrets = Secrets::new(build.secrets.clone());
    services.add_service(api::pb::secrets::secrets_server::SecretsServer::new(secrets));
    offered.extend(methods::SECRETS);
    if !build.agents.is_empty() {
        let agents = Agents::new(build.agents.clone(), std::env::var("SSH_AUTH_SOCK").ok()).await?;
        services.add_service(api::pb::ssh::ssh_server::SshServer::new(agents));
        offered.extend(methods::SSH);
    }
    let directories = Directories::new(wanted_directories(build)?)?;
    if !directories.is_empty() {
        services.add_service(directories.server());
        offered.extend(methods::FILE_SYNC);
    }
    if let Some(uploads) = &build.uploads {
        services.add_service(api::pb::upload::upload_server::UploadServer::new(uploads.clone()));
        offered.extend(methods::UPLOAD);
    }
    let mut stores = caches.stores.clone();
    stores.extend(
        build
            .layouts
            .iter()
            .map(|(name, path)| (format!("oci:{name}"), path.clone())),
    );
    let mut to_index = Vec::new();
    for output in &build.outputs {
        if let (true, Destination::Directory(dir)) = (output.kind != "local", &output.destination) {
            std::fs::create_dir_all(dir)?;
            if stores.insert("export".to_owned(), dir.clone()).is_some() {
                return Err(Failure::new("oci store key \"export\" already exists"));
            }
            to_index.push(dir.clone());
        }
    }
    if !stores.is_empty() {
        services.add_service(layouts::server(Layouts::new(stores)));
        offered.extend(methods::CONTENT);
    }
    let targets = Targets::new(&build.outputs)?;
    if !targets.is_empty() {
        services.add_service(targets.server());
        offered.extend(methods::FILE_SEND);
    }
    let host = SessionHost {
        id: session_id.to_owned(),
        name: String::new(),
        shared_key: build.shared_key.clone(),
        methods: offered,
        services,
    };
    Ok((host, to_index))
}

/// Returns the directories that the build may ask for; of a definition, those it names, which must all be there.
fn wanted_directories(build: &Build) -> Result<BTreeMap<String, PathBuf>, Failure> {
    let Some(definition) = &build.definition else {
        return Ok(build.directories.clone());
    };
    let mut wanted = BTreeMap::new();
    for bytes in &definition.def {
        let op = pb::Op::decode(bytes.clone())
            .map_err(|error| Failure::new(format!("failed to parse llb proto op: {error}")))?;
        let Some(pb::op::Op::Source(source)) = op.op else {
            continue;
        };
        let Some(name) = source.identifier.strip_prefix("local://") else {
            continue;
        };
        let dir = build.directories.get(name);
        let dir = dir.ok_or_else(|| Failure::new(format!("local directory {name} not enabled")))?;
        wanted.insert(name.to_owned(), dir.clone());
    }
    Ok(wanted)
}

fn request(build: &Build, session_id: &str, caches: &local_cache::LocalCaches) -> control::SolveRequest {
    let entry = |entry: &CacheEntry| control::CacheOptionsEntry {
        r#type: entry.kind.clone(),
        attrs: entry.attrs.clone(),
    };
    let mut options = build.options.clone();
    let asks = build.definition.is_none();
    if asks && !caches.imports.is_empty() {
        let imports: Vec<serde_json::Value> = caches
            .imports
            .iter()
            .map(|entry| serde_json::json!({"Type": entry.kind, "Attrs": entry.attrs}))
            .collect();
        options.insert(
            "cache-imports".to_owned(),
            serde_json::Value::from(imports).to_string(),
        );
    }
    let exporters = build.outputs.iter();
    let exporters: Vec<control::Exporter> = exporters
        .map(|output| control::Exporter {
            r#type: output.kind.clone(),
            attrs: output.attrs.clone(),
        })
        .collect();
    let first = exporters.first().cloned().unwrap_or_default();
    control::SolveRequest {
        r#ref: build.id.clone(),
        definition: build.definition.clone(),
        exporter_deprecated: first.r#type,
        exporter_attrs_deprecated: first.attrs,
        session: session_id.to_owned(),
        frontend: build.frontend.clone(),
        frontend_attrs: options,
        cache: Some(control::CacheOptions {
            exports: caches.exports.iter().map(entry).collect(),
            imports: caches.imports.iter().map(entry).collect(),
            ..Default::default()
        }),
        entitlements: build.entitlements.clone(),
        source_policy: build.source_policy.clone(),
        proxy_network: build.proxy_network,
        exporters,
        ..Default::default()
    }
}

/// Writes the indices of directories that the daemon has put blobs into.
fn finish(outcome: &Outcome, caches: &local_cache::LocalCaches, layouts: &[PathBuf]) -> Result<(), Failure> {
    caches.finish(&outcome.response)?;
    let Some(descriptor) = outcome.response.get("containerimage.descriptor") else {
        return Ok(());
    };
    if layouts.is_empty() {
        return Ok(());
    }
    let manifest = local_cache::decode_descriptor(descriptor)?;
    let names: Vec<oci_index::Name> = match outcome.response.get("image.name") {
        Some(names) => names
            .split(',')
            .map(|name| oci_index::Name::Image(name.to_owned()))
            .collect(),
        None => vec![oci_index::Name::Tag("latest".to_owned())],
    };
    for layout in layouts {
        oci_index::put(layout, &manifest, &names).map_err(|error| Failure::new(error.to_string()))?;
    }
    Ok(())
}

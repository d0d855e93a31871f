//! How a `Solve` runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use build::cache_export::OMITTED_KEY;
use build::trace::Trace;
use llb::pb;
use llb::sourcepolicy::Policy;
use oci::Descriptor;

use crate::bridge::{
    Asked, Bridge, BridgeRequest, BuildRef, BuildResult, CacheOption, Forwarder, evaluate_all,
};
use crate::driver::Driver;
use crate::engine::{Engine, OpenJob};
use crate::error::{BuildError, ErrorKind};
use crate::job::{DeviceGrant, Entitlement, Job, JobId, JobSettings};
use crate::op::ResultRef;
use crate::progress::{VertexProgress, VertexWarning};
use crate::session::{SessionGroup, SessionId};
use crate::solve::exports::Exports;
use crate::solve::renewal::Renewal;
use crate::solve::{
    CacheEntry, CacheExportSource, CacheExporter, CacheGraph, CacheLink, CacheLinkSource, ExportSource,
    ExporterInstance, ExporterRequest, HeldBlobs, InlineCache, Statement, StoredResults, verify,
};

/// The attribute by which the frontend's build argument reaches exporters.
const EPOCH_ATTR: &str = "source-date-epoch";
/// The option with which steps say why they are executed.
const EXPLAIN_OPT: &str = "cooper.explain";
/// How long a build that has ended waits until it is known why its last steps ran.
const EXPLAIN_WAIT: Duration = Duration::from_secs(2);
/// The option that says whether sources must be asked, see [`crate::job::ResolveCache`].
const RESOLVE_CACHE_OPT: &str = "cooper.resolve-cache";
const EPOCH_ARG: &str = "build-arg:SOURCE_DATE_EPOCH";

/// A client's wish for a build.
#[derive(Clone, Debug, Default)]
pub struct SolveRequest {
    /// The client's name for the build.
    pub id: String,
    /// The client's session.
    pub session: Option<SessionId>,
    /// What to build. Without definition and frontend the client itself is the frontend, see [`Engine::bridge`].
    pub definition: Option<pb::Definition>,
    /// The frontend; empty: none.
    pub frontend: String,
    /// The frontend's options.
    pub frontend_opts: BTreeMap<String, String>,
    /// The frontend's inputs.
    pub frontend_inputs: BTreeMap<String, pb::Definition>,
    /// What to do with the result.
    pub exporters: Vec<ExporterRequest>,
    /// Caches to import from.
    pub cache_imports: Vec<CacheOption>,
    /// Caches to export to.
    pub cache_exports: Vec<CacheOption>,
    /// Rights asked for, e.g. `network.host`.
    pub entitlements: Vec<String>,
    /// The client's source policy.
    pub source_policy: Option<Policy>,
    /// The session that is asked for policy decisions.
    pub policy_session: Option<SessionId>,
    /// Whether steps reach the network by nothing but a proxy that policies decide for.
    pub proxy_network: bool,
    /// Not shown in the build history.
    pub is_internal: bool,
    /// The trace that the build belongs to; `None`: none is kept.
    pub trace: Option<Trace>,
    /// The client chooses further exporters once it knows the result.
    pub wants_session_exporters: bool,
}

/// What came of a build.
#[derive(Clone, Debug, Default)]
pub struct SolveResponse {
    /// Entries for the client, e.g. `containerimage.digest`.
    pub exporter_response: BTreeMap<String, String>,
    /// What each exporter made.
    pub descriptors: Vec<Option<Descriptor>>,
    /// The result's metadata.
    pub metadata: BTreeMap<String, bytes::Bytes>,
    /// What is to be remembered of the result.
    pub statements: Vec<Statement>,
    /// Holds the blobs of what was exported.
    pub held: Vec<HeldBlobs>,
}

/// What is known before anything runs.
pub(super) struct Plan {
    pub exporters: Vec<Arc<dyn ExporterInstance>>,
    pub cache_exporters: Vec<Arc<dyn CacheExporter>>,
    settings: JobSettings,
    /// What is to be told about the result, known when there is one.
    pub warnings: Vec<String>,
}

impl Engine {
    /// Builds, exports, and returns what is to be told to the client. Dropping the future cancels the build.
    ///
    /// # Errors
    /// Those of the request, of any step, exporter or cache exporter.
    pub async fn solve(&self, mut request: SolveRequest) -> Result<SolveResponse, BuildError> {
        adjust(&mut request);
        let plan = Box::pin(self.plan(&request)).await?;
        let open = self
            .0
            .open_job(JobId(request.id.clone()), plan.settings.clone())
            .await?;
        let solved = Box::pin(self.run(&open, plan, request)).await;
        if let Ok(driver) = self.0.driver() {
            let explained = driver.explained(Arc::clone(&open.job));
            // A build does not wait long for the reasons of its steps.
            let _ = tokio::time::timeout(EXPLAIN_WAIT, explained).await;
        }
        solved
    }

    async fn run(
        &self,
        open: &OpenJob,
        mut plan: Plan,
        request: SolveRequest,
    ) -> Result<SolveResponse, BuildError> {
        let known = self.0.asked.find_all(&request.frontend_inputs);
        let root = Asked::new(&request.frontend, request.frontend_opts.clone(), known, None);
        let bridge = Bridge::of_job(Arc::clone(&self.0), Arc::clone(&open.job), root);
        let mut result = Box::pin(self.build(&bridge, open, &request)).await?;
        Box::pin(evaluate_all(&result)).await?;
        for processor in &self.0.services.processors {
            result = processor.process(&bridge, &request, result).await?;
        }
        Box::pin(evaluate_all(&result)).await?;
        plan.warnings = verify::check_platforms(&request.frontend_opts, &result)?;
        if request.wants_session_exporters {
            let chosen = Box::pin(self.chosen_exporters(&open.job, &bridge, &result)).await?;
            plan.exporters
                .extend(self.exporters(plan.exporters.len(), &chosen)?);
        }
        let mut response = Box::pin(self.export(&open.job, &plan, &result)).await?;
        // What is stated may tell of the layers that exporters made.
        response.statements = Box::pin(self.remember(&bridge, &request, &result)).await;
        if request.wants_session_exporters {
            self.tell_exported(&open.job, &response.exporter_response).await?;
        }
        Ok(response)
    }

    /// Collects what is to be remembered of a result. A build does not fail for want of it.
    async fn remember(
        &self,
        bridge: &Bridge,
        request: &SolveRequest,
        result: &BuildResult,
    ) -> Vec<Statement> {
        let mut statements = Vec::new();
        for processor in self.0.services.processors.iter().filter(|_| !request.is_internal) {
            match processor.remember(bridge, request, result).await {
                Ok(more) => statements.extend(more),
                Err(error) => {
                    tracing::warn!(%error, build = %request.id, "a statement about the result is not remembered");
                }
            }
        }
        statements
    }

    async fn plan(&self, request: &SolveRequest) -> Result<Plan, BuildError> {
        crate::attestation::wanted(&request.frontend_opts)?;
        let services = self.services();
        let exporters = self.exporters(0, &request.exporters)?;
        let ids: Vec<SessionId> = request.session.iter().cloned().collect();
        let sessions = SessionGroup::new(Arc::clone(&services.sessions), ids);
        let mut cache_exporters = Vec::new();
        for option in unique_cache_exports(&request.cache_exports)? {
            let factory = services.cache_exporters.get(&option.kind);
            let factory = factory
                .ok_or_else(|| BuildError::user(format!("unknown cache exporter: {:?}", option.kind)))?;
            let exporter = factory.resolve(&sessions, &option.attrs).await;
            let context = || format!("failed to configure {} cache exporter", option.kind);
            cache_exporters.extend(exporter.map_err(|error| error.context(context()))?);
        }
        let settings = JobSettings {
            session: request.session.clone(),
            entitlements: granted(&request.entitlements, &services.allowed_entitlements)?,
            source_policies: request.source_policy.iter().cloned().collect(),
            policy_session: request.policy_session.clone(),
            proxy_network: request.proxy_network,
            is_internal: request.is_internal,
            trace: request.trace.clone(),
            explain: request
                .frontend_opts
                .get(EXPLAIN_OPT)
                .is_some_and(|value| value != "0" && value != "false"),
            resolve_cache: match request.frontend_opts.get(RESOLVE_CACHE_OPT) {
                Some(mode) => mode
                    .parse()
                    .map_err(|error| BuildError::from_source(ErrorKind::User, error))?,
                None => services.resolve_cache,
            },
        };
        Ok(Plan {
            exporters,
            cache_exporters,
            settings,
            warnings: Vec::new(),
        })
    }

    async fn build(
        &self,
        bridge: &Bridge,
        open: &OpenJob,
        request: &SolveRequest,
    ) -> Result<BuildResult, BuildError> {
        // An empty definition is scratch; only an absent one says that the client is the frontend.
        if request.definition.is_none() && request.frontend.is_empty() {
            let forwarder = Forwarder::new(bridge.clone(), request.frontend_inputs.clone());
            let _forwarding = self.0.forward(open.job.id().clone(), forwarder.clone());
            let returned = forwarder.returned().await;
            forwarder.release().await;
            return returned;
        }
        let request = BridgeRequest {
            definition: request.definition.clone(),
            frontend: request.frontend.clone(),
            frontend_opts: request.frontend_opts.clone(),
            frontend_inputs: request.frontend_inputs.clone(),
            cache_imports: request.cache_imports.clone(),
            source_policies: Vec::new(),
            evaluate: false,
        };
        bridge.solve(request).await
    }

    async fn export(
        &self,
        job: &Arc<Job>,
        plan: &Plan,
        result: &BuildResult,
    ) -> Result<SolveResponse, BuildError> {
        let ids: Vec<SessionId> = job.session().cloned().into_iter().collect();
        let sessions = SessionGroup::new(Arc::clone(&self.services().sessions), ids);
        let exports = Exports {
            job,
            plan,
            renewal: Renewal::start(self, job, plan, result, sessions.clone()).await?,
            sessions,
            prefix: job.session().map(|session| session.0.clone()).unwrap_or_default(),
        };
        exports.show_warnings().await?;
        let begun = exports.begin().await?;
        // The exporters made the layers; pushing them and exporting caches of them can go side by side.
        let both = futures_util::future::try_join(exports.finish(begun), exports.caches());
        let (finished, cached) = Box::pin(both).await?;
        let mut response = BTreeMap::new();
        let mut descriptors = Vec::new();
        let mut held = Vec::new();
        for export in finished {
            response.extend(export.exported.response);
            descriptors.push(export.exported.descriptor);
            held.extend(export.exported.held);
        }
        let current = exports.renewal.current().await;
        let inline = current.inline.as_ref();
        let inline = inline.map_or_else(|| Ok(Vec::new()), |inline| inline.responses())?;
        for told in inline.into_iter().chain(cached) {
            extend_response(&mut response, told);
        }
        let metadata = current.export.metadata.clone();
        for (key, value) in &metadata {
            if key.starts_with("frontend.") {
                response.insert(key.clone(), String::from_utf8_lossy(value).into_owned());
            }
        }
        Ok(SolveResponse {
            exporter_response: response,
            descriptors,
            metadata,
            statements: Vec::new(),
            held,
        })
    }
}

/// Collects the steps behind a result for cache exporters.
pub(super) async fn cache_source(
    engine: &Engine,
    job: &Arc<Job>,
    result: &BuildResult,
) -> Result<CacheExportSource, BuildError> {
    let driver = engine.0.driver()?;
    let single = result.single.iter().map(|reference| (String::new(), reference));
    let keyed = result
        .refs
        .iter()
        .filter_map(|(key, reference)| Some((key.clone(), reference.as_ref()?)));
    let mut results = Vec::new();
    for (key, reference) in single.chain(keyed) {
        results.push((key, reference.evaluate().await?));
    }
    let edges = results.iter().map(|(_, evaluated)| evaluated.edge).collect();
    let exported = driver.export(edges).await?;
    let roots = exported.graph.roots.clone();
    let located = results.into_iter().zip(&roots);
    let results = located.filter_map(|((key, evaluated), root)| Some((key, (evaluated.result, (*root)?))));
    Ok(CacheExportSource {
        job: Arc::clone(job),
        results: results.collect(),
        renewable: true,
        graph: Arc::new(cache_graph(exported)),
        stored: Arc::new(JobResults {
            driver: driver.clone(),
            job: Arc::clone(job),
        }),
    })
}

/// Adds what a cache exporter tells. The lists of what several left out become one.
fn extend_response(response: &mut BTreeMap<String, String>, told: BTreeMap<String, String>) {
    for (key, value) in told {
        let joined = match response.get(&key).and_then(|known| known.strip_suffix(']')) {
            Some(known) if key == OMITTED_KEY => {
                format!("{known},{}", value.trim_start_matches('['))
            }
            _ if key == OMITTED_KEY || key.starts_with("cache.") => value,
            _ => continue,
        };
        response.insert(key, joined);
    }
}

/// Shows warnings of one line on a vertex.
pub(super) fn warn(progress: &VertexProgress, warnings: &[String]) {
    for warning in warnings {
        progress.warn(VertexWarning::short(progress.digest(), warning.clone()));
    }
}

/// Loads what one build's caches know.
#[derive(Debug)]
struct JobResults {
    driver: Driver,
    job: Arc<Job>,
}

#[async_trait::async_trait]
impl StoredResults for JobResults {
    async fn load(&self, stored: &solver::StoredResult) -> Result<Option<ResultRef>, BuildError> {
        self.driver
            .load_stored(stored.clone(), vec![Arc::clone(&self.job)])
            .await
    }
}

/// The same request in the form in which the engine knows it.
fn adjust(request: &mut SolveRequest) {
    let named = |key: &String| key == "context:dockerfile.v0" || key.starts_with("context:dockerfile.v0::");
    let builtin = request
        .frontend_opts
        .get("source")
        .is_some_and(|source| source == "dockerfile.v0");
    if request.frontend == "gateway.v0" && builtin && !request.frontend_opts.keys().any(named) {
        request.frontend_opts.remove("source");
        "dockerfile.v0".clone_into(&mut request.frontend);
    }
    if let Some(epoch) = request
        .frontend_opts
        .get(EPOCH_ARG)
        .filter(|epoch| epoch.parse::<i64>().is_ok())
    {
        for exporter in &mut request.exporters {
            exporter
                .attrs
                .entry(EPOCH_ATTR.to_owned())
                .or_insert_with(|| epoch.clone());
        }
    }
}

/// Cache exports without repetition; the second `inline` is ignored, any other repetition refused.
fn unique_cache_exports(options: &[CacheOption]) -> Result<Vec<&CacheOption>, BuildError> {
    let mut seen: BTreeSet<CacheOption> = BTreeSet::new();
    let mut unique = Vec::new();
    let mut has_inline = false;
    for option in options {
        if option.kind == "inline" && std::mem::replace(&mut has_inline, true) {
            continue;
        }
        let reference = option.attrs.get("ref").filter(|_| option.kind == "registry");
        let identity = match reference {
            Some(reference) => CacheOption {
                kind: reference.clone(),
                attrs: BTreeMap::new(),
            },
            None => option.clone(),
        };
        if !seen.insert(identity) {
            return Err(BuildError::user(format!(
                "duplicate cache exports [{}]",
                option.kind
            )));
        }
        unique.push(option);
    }
    Ok(unique)
}

/// Reads an entitlement as clients and the daemon's configuration write it.
///
/// # Errors
/// [`ErrorKind::User`] for what is not known.
pub fn parse_entitlement(text: &str) -> Result<Entitlement, BuildError> {
    let (name, value) = text
        .split_once('=')
        .map_or((text, None), |(name, value)| (name, Some(value)));
    match (name, value) {
        ("network.host", None) => Ok(Entitlement::NetworkHost),
        ("security.insecure", None) => Ok(Entitlement::SecurityInsecure),
        ("device", None | Some("")) => Ok(Entitlement::Device(None)),
        ("device", Some(device)) => device_grant(device).map(|grant| Entitlement::Device(Some(grant))),
        _ => Err(BuildError::user(format!("unknown entitlement {text}"))),
    }
}

fn device_grant(text: &str) -> Result<DeviceGrant, BuildError> {
    let mut fields = text.split(',');
    let device = fields.next().unwrap_or_default().to_owned();
    let mut alias = None;
    for field in fields {
        match field.split_once('=') {
            Some(("alias", name)) => alias = Some(name.to_owned()).filter(|name| !name.is_empty()),
            Some((key, _)) => return Err(BuildError::user(format!("unknown device config key {key:?}"))),
            None => return Err(BuildError::user(format!("invalid device config {field:?}"))),
        }
    }
    Ok(DeviceGrant { device, alias })
}

fn granted(wanted: &[String], allowed: &[Entitlement]) -> Result<Vec<Entitlement>, BuildError> {
    let mut granted = Vec::new();
    for text in wanted {
        let entitlement = parse_entitlement(text)?;
        let is_allowed = allowed.iter().any(|allowed| match (allowed, &entitlement) {
            (Entitlement::Device(None), Entitlement::Device(_)) => true,
            (allowed, wanted) => allowed == wanted,
        });
        if !is_allowed {
            let text = format!("granting entitlement {text} is not allowed by build daemon configuration");
            return Err(BuildError::new(ErrorKind::Denied, text));
        }
        granted.push(entitlement);
    }
    Ok(granted)
}

async fn result_of(reference: Option<BuildRef>) -> Result<Option<ResultRef>, BuildError> {
    match reference {
        Some(reference) => reference.result().await.map(Some),
        None => Ok(None),
    }
}

/// Turns a build's result into what exporters take: refs that are there.
pub(super) async fn export_source(result: BuildResult) -> Result<ExportSource, BuildError> {
    let mut source = ExportSource {
        single: result_of(result.single).await?,
        ..ExportSource::default()
    };
    for (key, reference) in result.refs {
        source.refs.insert(key, result_of(reference).await?);
    }
    for (key, attestations) in result.attestations {
        let mut evaluated = Vec::with_capacity(attestations.len());
        for mut attestation in attestations {
            let reference = result_of(attestation.reference.take()).await?;
            evaluated.push(attestation.map(reference));
        }
        source.attestations.insert(key, evaluated);
    }
    source.metadata = result.metadata;
    Ok(source)
}

pub(super) type Split = (Option<Arc<dyn InlineCache>>, Vec<Arc<dyn CacheExporter>>);

/// Separates the exporter that writes into the image from those that export on their own.
pub(super) fn split_inline(plan: &Plan, source: Option<&CacheExportSource>) -> Split {
    let mut inline = None;
    let mut rest = Vec::new();
    for exporter in &plan.cache_exporters {
        match source.and_then(|source| exporter.inline(source)) {
            Some(records) => inline = Some(records),
            None => rest.push(Arc::clone(exporter)),
        }
    }
    (inline, rest)
}

fn cache_graph(exported: crate::driver::Exported) -> CacheGraph {
    let roots = exported.graph.roots.iter().copied().flatten().collect();
    let entries = exported
        .graph
        .entries
        .into_iter()
        .zip(exported.results)
        .map(|(entry, result)| {
            let link = |link: solver::ExportLink| CacheLink {
                source: match link.source {
                    solver::ExportSource::Entry(index) => CacheLinkSource::Entry(index),
                    solver::ExportSource::Content(record) => CacheLinkSource::Content(record.0),
                },
                selector: link.selector,
            };
            let (result, created_at) =
                result.map_or((None, SystemTime::UNIX_EPOCH), |(result, at)| (Some(result), at));
            CacheEntry {
                vertex: entry.vertex,
                output: entry.output,
                digests: entry.digests.iter().map(|record| record.0).collect(),
                inputs: entry
                    .inputs
                    .into_iter()
                    .map(|links| links.into_iter().map(link).collect())
                    .collect(),
                result,
                stored: entry.stored,
                records: entry.records,
                created_at,
                export: entry.export,
            }
        });
    CacheGraph {
        entries: entries.collect(),
        roots,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_exports_do_not_repeat() {
        let option = |kind: &str, reference: &str| CacheOption {
            kind: kind.to_owned(),
            attrs: [("ref".to_owned(), reference.to_owned())].into(),
        };
        let both = [
            option("registry", "a"),
            option("registry", "b"),
            option("inline", ""),
            option("inline", "x"),
        ];
        assert_eq!(unique_cache_exports(&both).unwrap().len(), 3);
        assert!(unique_cache_exports(&[option("registry", "a"), option("registry", "a")]).is_err());
    }

    #[test]
    fn rights_are_granted_only_if_allowed() {
        let wanted = ["network.host".to_owned(), "device=vendor.com/gpu".to_owned()];
        let allowed = [Entitlement::NetworkHost, Entitlement::Device(None)];
        assert_eq!(granted(&wanted, &allowed).unwrap().len(), 2);
        assert_eq!(
            granted(&wanted, &allowed[..1]).unwrap_err().kind(),
            ErrorKind::Denied
        );
        let error = parse_entitlement("security.everything").unwrap_err();
        assert_eq!(error.to_string(), "unknown entitlement security.everything");
    }

    #[test]
    fn what_several_exports_left_out_is_one_list() {
        let told = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        let mut response = BTreeMap::new();
        extend_response(&mut response, told(OMITTED_KEY, r#"[{"reason":"a"}]"#));
        extend_response(
            &mut response,
            told(OMITTED_KEY, r#"[{"reason":"b"},{"reason":"c"}]"#),
        );
        extend_response(&mut response, told("cache.manifest", "{}"));
        extend_response(&mut response, told("containerimage.digest", "x"));
        let expected = BTreeMap::from([
            ("cache.manifest".to_owned(), "{}".to_owned()),
            (
                OMITTED_KEY.to_owned(),
                r#"[{"reason":"a"},{"reason":"b"},{"reason":"c"}]"#.to_owned(),
            ),
        ]);
        assert_eq!(response, expected);
    }
}

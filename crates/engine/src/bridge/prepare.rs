//! From a client's definition to a graph that the solver takes: checks, policies, rights, names.

use std::collections::BTreeMap;
use std::sync::Arc;

use executor::DeviceRegistry;
use llb::pb;
use llb::sourcepolicy::Policy;
use oci::Digest;
use solver::VertexDef;

use crate::bridge::{Bridge, CacheOption, devices};
use crate::driver::PreparedGraph;
use crate::error::{BuildError, ErrorKind};
use crate::job::{Entitlement, Job};
use crate::op::VertexSpec;

/// A definition that passed all checks.
pub(super) struct Prepared {
    pub graph: PreparedGraph,
    /// Knows where in the frontend's text a vertex comes from.
    pub checked: Arc<llb::Graph>,
}

/// The op's name in a definition's metadata.
const CUSTOM_NAME: &str = "llb.customname";

/// Tells steps behind a proxy from the same steps without: they may see something else, so they are not shared.
const PROXY_MARK: &[u8] = b"\0buildkit.proxy-network.v0";

/// Whether a vertex is a step that may use the network.
fn has_network(vertex: &llb::Vertex) -> bool {
    matches!(&vertex.op.op, Some(pb::op::Op::Exec(exec)) if exec.network != i32::from(pb::NetMode::None))
}

/// What steps get for the devices that they ask for.
type Devices = BTreeMap<Digest, Vec<pb::CdiDevice>>;

impl Bridge {
    pub(super) async fn prepare(
        &self,
        definition: &pb::Definition,
        cache_imports: &[CacheOption],
        policies: &[Policy],
    ) -> Result<Prepared, BuildError> {
        let policies = self.policies(policies)?;
        let failed = |error: BuildError| error.context("failed to load LLB");
        let checked = self.load(definition).await.map_err(failed)?;
        let decided = Box::pin(self.decide_on_graph(&policies, &checked)).await;
        let is_proxied = self.is_proxied();
        let checked = self.check(checked, decided.map_err(failed)?, is_proxied).await;
        let (checked, devices) = checked.map_err(failed)?;
        let checked = Arc::new(checked);
        let mut stores = Vec::with_capacity(cache_imports.len());
        for option in cache_imports {
            stores.push(self.import(option).await?);
        }
        let pruned = pruned_cache_mounts(&checked);
        if !pruned.is_empty() {
            self.engine().services.ops.prune_cache_mounts(&pruned).await?;
        }
        let defs = checked.vertices().iter().map(|vertex| VertexDef {
            digest: vertex.digest,
            inputs: vertex
                .inputs
                .iter()
                .map(|edge| (edge.vertex, edge.output))
                .collect(),
            ignore_cache: vertex.metadata.ignore_cache,
            export: vertex.metadata.export_cache.as_ref().map(|export| export.value),
            stores: stores.clone(),
        });
        let defs = defs.collect();
        let specs = checked
            .vertices()
            .iter()
            .map(|vertex| {
                let mut spec = spec(&checked, vertex, devices.get(&vertex.digest));
                spec.is_proxied = is_proxied && has_network(vertex);
                Arc::new(spec)
            })
            .collect();
        let target = (checked.root().vertex, checked.root().output);
        Ok(Prepared {
            graph: PreparedGraph { defs, specs, target },
            checked,
        })
    }

    async fn load(&self, definition: &pb::Definition) -> Result<llb::Graph, BuildError> {
        let definition = definition.clone();
        let loaded = tokio::task::spawn_blocking(move || llb::Graph::load(&definition));
        loaded
            .await
            .map_err(|error| BuildError::internal(error.to_string()))?
            .map_err(|error| BuildError::from_source(ErrorKind::User, error))
    }

    /// Puts in place what policies changed, then checks that the builds may do what is asked. Returns the devices of
    /// steps as well.
    async fn check(
        &self,
        mut graph: llb::Graph,
        mut changed: BTreeMap<Digest, pb::Op>,
        is_proxied: bool,
    ) -> Result<(llb::Graph, Devices), BuildError> {
        let jobs = self.jobs();
        let registry = self.engine().services.ops.devices();
        let checked = tokio::task::spawn_blocking(move || {
            if !changed.is_empty() {
                graph
                    .rewrite(|vertex| Ok::<_, llb::OpError>(changed.remove(&vertex.digest)))
                    .map_err(|error| BuildError::from_source(ErrorKind::User, error))?;
            }
            if is_proxied {
                graph.mark(PROXY_MARK, has_network);
            }
            for vertex in graph.vertices() {
                check_vertex(&jobs, vertex)?;
            }
            let devices = allowed_devices(&jobs, &registry, &graph)?;
            Ok((graph, devices))
        });
        checked
            .await
            .map_err(|error| BuildError::internal(error.to_string()))?
    }
}

fn spec(graph: &llb::Graph, vertex: &llb::Vertex, devices: Option<&Vec<pb::CdiDevice>>) -> VertexSpec {
    let mut op = vertex.op.clone();
    if let (Some(pb::op::Op::Exec(exec)), Some(devices)) = (&mut op.op, devices) {
        exec.cdi_devices.clone_from(devices);
    }
    let platform = vertex.platform().unwrap_or_else(oci::Platform::host).normalized();
    op.platform = Some(pb::Platform::from(&platform));
    VertexSpec {
        digest: Some(vertex.digest),
        op: Arc::new(op),
        raw: vertex.raw.clone(),
        name: shown_name(vertex).to_owned(),
        metadata: vertex.metadata.clone(),
        inputs: vertex
            .inputs
            .iter()
            .map(|edge| (graph.vertex(*edge).digest, edge.output))
            .collect(),
        input_names: vertex
            .inputs
            .iter()
            .map(|edge| shown_name(graph.vertex(*edge)).to_owned())
            .collect(),
        is_proxied: false,
    }
}

/// The client's name for a vertex, or one made of its op.
fn shown_name(vertex: &llb::Vertex) -> &str {
    let named = vertex.metadata.description.get(CUSTOM_NAME);
    named.unwrap_or(&vertex.name)
}

fn check_vertex(jobs: &[Arc<Job>], vertex: &llb::Vertex) -> Result<(), BuildError> {
    for cap in vertex.metadata.caps.keys() {
        if !llb::caps::ALL.contains(&cap.as_str()) {
            let text = format!("requested LLB feature {cap:?} is not supported by this build server");
            return Err(BuildError::user(text));
        }
    }
    let Some(pb::op::Op::Exec(exec)) = &vertex.op.op else {
        return Ok(());
    };
    let network_host = exec.network == pb::NetMode::Host as i32;
    let insecure = exec.security == pb::SecurityMode::Insecure as i32;
    check_entitlements(jobs, network_host, insecure)?;
    Ok(())
}

/// The devices that steps get for those they ask for, by vertex. Blocking.
fn allowed_devices(
    jobs: &[Arc<Job>],
    registry: &DeviceRegistry,
    graph: &llb::Graph,
) -> Result<Devices, BuildError> {
    let mut known = None;
    let mut allowed = BTreeMap::new();
    for vertex in graph.vertices() {
        let Some(pb::op::Op::Exec(exec)) = &vertex.op.op else {
            continue;
        };
        if exec.cdi_devices.is_empty() {
            continue;
        }
        let known = known.get_or_insert_with(|| registry.scan());
        for job in jobs {
            let rights = &job.settings().entitlements;
            let devices = devices::allowed(known, rights, &exec.cdi_devices)?;
            // Every build must have the right; what the first gets all get.
            allowed.entry(vertex.digest).or_insert(devices);
        }
    }
    Ok(allowed)
}

pub(super) fn check_entitlements(
    jobs: &[Arc<Job>],
    network_host: bool,
    insecure: bool,
) -> Result<(), BuildError> {
    let granted = |wanted: Entitlement| {
        jobs.iter()
            .all(|job| job.settings().entitlements.contains(&wanted))
    };
    if network_host && !granted(Entitlement::NetworkHost) {
        return Err(BuildError::new(ErrorKind::Denied, "network.host is not allowed"));
    }
    if insecure && !granted(Entitlement::SecurityInsecure) {
        return Err(BuildError::new(
            ErrorKind::Denied,
            "security.insecure is not allowed",
        ));
    }
    Ok(())
}

/// Cache mounts of steps that ignore the cache begin empty: their ids, and whether they lie on a ref.
fn pruned_cache_mounts(graph: &llb::Graph) -> BTreeMap<String, bool> {
    let mut ids = BTreeMap::new();
    for vertex in graph
        .vertices()
        .iter()
        .filter(|vertex| vertex.metadata.ignore_cache)
    {
        let Some(pb::op::Op::Exec(exec)) = &vertex.op.op else {
            continue;
        };
        for mount in exec
            .mounts
            .iter()
            .filter(|mount| mount.mount_type == pb::MountType::Cache as i32)
        {
            let Some(options) = &mount.cache_opt else { continue };
            let id = if options.id.is_empty() {
                &mount.dest
            } else {
                &options.id
            };
            ids.insert(id.clone(), mount.input != pb::EMPTY);
        }
    }
    ids
}

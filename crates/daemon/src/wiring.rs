//! From a configuration to a running engine and its services.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::pb::trace::trace_service_server::TraceServiceServer;
use cache::{DiskSpace, DiskStat, GcLimits, PruneOptions, default_policies};
use engine::job::{Entitlement, ResolveCache};
use engine::op::exec::Emulators;
use engine::setup::{EngineConfig, Ready, SnapshotterChoice, setup};
use engine::{BuildError, Engine};
use executor::{
    DeviceRegistry, DnsConfig, ExecutorConfig, LabelConfig, NetworkChoice, RuntimeChoice, TraceSocket,
};
use oci::Platform;
use registry::{HostConfig, HostsConfig};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::collector::Collector;
use crate::config::{ConfigError, ConfigFile, DiskSize, GcRule, OciTable};
use crate::network::step_network;
use crate::services::bridge::BridgeService;
use crate::services::caps;
use crate::services::content::ContentService;
use crate::services::control::ControlService;
use crate::services::explain::ExplainService;
use crate::services::explanations::Explanations;
use crate::services::frontends::FrontendServer;
use crate::services::history::{History, HistoryLimits};
use crate::sessions::SessionTable;
use crate::worker::{self, WorkerFacts};

/// Where devices are described unless the configuration says otherwise; later ones win.
const DEVICE_DIRS: &[&str] = &["/etc/cdi", "/var/run/cdi", "/etc/buildkit/cdi"];

/// Why the daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The state directory or something else that the engine needs.
    #[error("{0}")]
    Engine(BuildError),
    /// The worker's id.
    #[error("failed to read the worker's id below {root}")]
    WorkerId {
        /// The state directory.
        root: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The system refuses something.
    #[error("{action}")]
    System {
        /// What was done.
        action: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Serving failed.
    #[error("server failed")]
    Serve(#[from] tonic::transport::Error),
}

/// A running engine with its services.
#[derive(Debug)]
pub struct Wired {
    /// The engine.
    pub engine: Engine,
    /// The clients.
    pub sessions: SessionTable,
    /// The builds.
    pub history: History,
    /// Why their steps ran.
    pub explanations: Explanations,
    /// The gRPC services.
    pub routes: Routes,
    /// The socket that steps are given for their spans, once there is one.
    pub trace_socket: TraceSocket,
    /// Stops what runs beside builds.
    pub stop: CancellationToken,
}

/// Starts the engine on a state directory. Called on a tokio runtime; blocks for as long as opening takes.
///
/// # Errors
/// [`StartError`] for settings that make no sense, and for a state directory that cannot be used.
pub fn wire(file: &ConfigFile, root: PathBuf, lock_timeout: Option<Duration>) -> Result<Wired, StartError> {
    let oci = &file.worker.oci;
    let network = step_network(oci, |name| std::env::var(name).ok())?;
    let platforms = platforms(&oci.platforms)?;
    let sessions = SessionTable::default();
    let devices = devices(file);
    let frontends = FrontendServer::default();
    let trace_socket = TraceSocket::default();
    let config = EngineConfig {
        root: root.clone(),
        lock_timeout,
        snapshotter: snapshotter(&oci.snapshotter),
        executor: executor_config(file, network.choice, &trace_socket),
        devices: devices.clone(),
        emulators: Emulators::new(&worker::platforms(), std::env::var_os("PATH")),
        registries: registries(file),
        web_user_agent: worker::user_agent(),
        sessions: Arc::new(sessions.clone()),
        platforms: platforms.clone(),
        capabilities: caps::llb_names(),
        allowed_entitlements: entitlements(file)?,
        max_parallelism: max_parallelism(oci),
        resolve_cache: resolve_cache(file)?,
        disabled_frontends: disabled_frontends(file),
        frontend_host: Arc::new(frontends.clone()),
        allowed_frontends: file.frontend.gateway.allowed_repositories.clone(),
        provenance_environment: provenance_env(file.provenance_env_dir.as_deref())?,
    };
    let Ready {
        engine,
        snapshotter,
        without_containers,
    } = setup(config).map_err(StartError::Engine)?;
    if let Some(reason) = without_containers {
        tracing::warn!(reason, "RUN steps cannot be run by this process");
    }
    let policies = policies(oci, disk_stat(&engine));
    let facts = WorkerFacts {
        network: network.label.to_owned(),
        platforms,
        ..facts(oci, snapshotter, &policies)
    };
    let id = worker::worker_id(&root).map_err(|source| StartError::WorkerId { root, source })?;
    let record = worker::record(id, facts);
    frontends.set_worker(record.clone());
    tracing::info!(id = record.id, labels = ?record.labels, "found worker");
    let stop = CancellationToken::new();
    let history = History::open(history_limits(file), engine.services().store.clone());
    let explain = explain_service(&engine, &history);
    let collector = Collector::start(engine.services().store.clone(), policies, stop.clone());
    let control = ControlService {
        engine: engine.clone(),
        sessions: sessions.clone(),
        history: history.clone(),
        explanations: explain.explanations.clone(),
        worker: record.clone(),
        devices,
        proxy_network: file.proxy_network,
        collector,
    };
    let bridge = BridgeService::new(engine.clone(), record);
    let routes = routes(control, bridge, explain.clone());
    Ok(Wired {
        engine,
        sessions,
        history,
        explanations: explain.explanations,
        routes,
        trace_socket,
        stop,
    })
}

fn max_parallelism(oci: &OciTable) -> Option<NonZeroUsize> {
    usize::try_from(oci.max_parallelism)
        .ok()
        .and_then(NonZeroUsize::new)
}

fn facts(oci: &OciTable, snapshotter: &str, policies: &[PruneOptions]) -> WorkerFacts {
    WorkerFacts {
        snapshotter: snapshotter.to_owned(),
        process_mode: "sandbox".to_owned(),
        labels: oci.labels.clone(),
        selinux: oci.selinux,
        apparmor_profile: oci.apparmor_profile.clone(),
        policies: policies.to_vec(),
        ..WorkerFacts::default()
    }
}

fn explain_service(engine: &Engine, history: &History) -> ExplainService {
    ExplainService {
        engine: engine.clone(),
        history: history.clone(),
        explanations: Explanations::open(engine.services().store.clone()),
    }
}

/// All services that clients may call.
fn routes(control: ControlService, bridge: BridgeService, explain: ExplainService) -> Routes {
    let content = ContentService::new(&control.engine);
    let traces = control.history.traces();
    let (_, health) = tonic_health::server::health_reporter();
    let mut routes = Routes::builder();
    routes
        .add_service(control.server())
        .add_service(bridge.server())
        .add_service(content.server())
        .add_service(explain.server())
        .add_service(TraceServiceServer::new(traces))
        .add_service(health);
    routes.routes()
}

/// Where devices are described; nowhere when they are switched off. Files that cannot be used are named in the log.
fn devices(file: &ConfigFile) -> DeviceRegistry {
    if file.cdi.disabled == Some(true) {
        return DeviceRegistry::default();
    }
    let mut dirs = file.cdi.spec_dirs.clone();
    if dirs.is_empty() {
        dirs.extend(DEVICE_DIRS.iter().map(PathBuf::from));
    }
    let registry = DeviceRegistry::new(dirs, file.cdi.auto_allowed.iter().cloned());
    for problem in registry.scan().problems() {
        tracing::warn!(%problem, "a device specification is left out");
    }
    registry
}

pub(crate) fn snapshotter(name: &str) -> SnapshotterChoice {
    match name {
        "overlayfs" | "overlay" => SnapshotterChoice::Overlay,
        "native" => SnapshotterChoice::Native,
        _ => SnapshotterChoice::Auto,
    }
}

fn platforms(wanted: &[String]) -> Result<Vec<Platform>, ConfigError> {
    if wanted.is_empty() {
        return Ok(worker::platforms());
    }
    let parse = |text: &String| {
        let parsed = text.parse::<Platform>();
        parsed.map_err(|error| ConfigError::invalid(format!("invalid platforms: {text:?}: {error}")))
    };
    wanted.iter().map(parse).collect()
}

fn executor_config(file: &ConfigFile, network: NetworkChoice, trace_socket: &TraceSocket) -> ExecutorConfig {
    let oci = &file.worker.oci;
    let runtime = match oci.binary.as_str() {
        "" => RuntimeChoice::Embedded,
        program => RuntimeChoice::Binary(PathBuf::from(program)),
    };
    let dns = file.dns.clone().unwrap_or_default();
    ExecutorConfig {
        runtime,
        network,
        dns: DnsConfig {
            nameservers: dns.nameservers,
            options: dns.options,
            search_domains: dns.search_domains,
        },
        cgroup_parent: oci.default_cgroup_parent.clone(),
        labels: LabelConfig {
            apparmor_profile: oci.apparmor_profile.clone(),
            selinux: oci.selinux,
        },
        trace_socket: trace_socket.clone(),
        ..ExecutorConfig::default()
    }
}

fn registries(file: &ConfigFile) -> HostsConfig {
    let hosts = file.registry.iter().map(|(domain, table)| {
        let keypair = table.keypair.iter();
        let host = HostConfig {
            mirrors: table.mirrors.clone(),
            plain_http: table.http,
            insecure: table.insecure,
            ca: table.ca.clone(),
            keypair: keypair
                .map(|pair| registry::KeyPair {
                    key: pair.key.clone(),
                    cert: pair.cert.clone(),
                })
                .collect(),
            tlsconfigdir: table.tlsconfigdir.clone(),
        };
        (domain.clone(), host)
    });
    HostsConfig {
        hosts: hosts.collect(),
    }
}

/// Rights that builds may ask for. Devices need none of the daemon's, as long as they are not switched off.
fn entitlements(file: &ConfigFile) -> Result<Vec<Entitlement>, ConfigError> {
    let mut entitlements = Vec::new();
    for name in &file.insecure_entitlements {
        entitlements.push(match name.as_str() {
            "network.host" => Entitlement::NetworkHost,
            "security.insecure" => Entitlement::SecurityInsecure,
            "device" => Entitlement::Device(None),
            _ => return Err(ConfigError::invalid(format!("invalid entitlement : {name}"))),
        });
    }
    if file.cdi.disabled != Some(true) && !entitlements.contains(&Entitlement::Device(None)) {
        entitlements.push(Entitlement::Device(None));
    }
    Ok(entitlements)
}

fn resolve_cache(file: &ConfigFile) -> Result<ResolveCache, ConfigError> {
    match file.resolve_cache.as_str() {
        "" => Ok(ResolveCache::default()),
        mode => mode
            .parse()
            .map_err(|error| ConfigError::invalid(format!("resolveCache: {error}"))),
    }
}

fn disabled_frontends(file: &ConfigFile) -> BTreeSet<String> {
    let tables = [
        ("dockerfile.v0", &file.frontend.dockerfile),
        ("gateway.v0", &file.frontend.gateway),
    ];
    let disabled = tables
        .into_iter()
        .filter(|(_, table)| table.enabled == Some(false));
    disabled.map(|(name, _)| name.to_owned()).collect()
}

fn history_limits(file: &ConfigFile) -> HistoryLimits {
    let defaults = HistoryLimits::default();
    let table = &file.history;
    HistoryLimits {
        max_entries: usize::try_from(table.max_entries)
            .ok()
            .filter(|max| *max > 0)
            .unwrap_or(defaults.max_entries),
        max_age: match table.max_age.0 {
            0 => defaults.max_age,
            seconds => Duration::from_secs(seconds),
        },
    }
}

fn disk_stat(engine: &Engine) -> DiskStat {
    let root = engine.services().store.root().to_owned();
    match rustix::fs::statvfs(&root) {
        Ok(stat) => {
            let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
            DiskStat {
                total_bytes: bytes(stat.f_blocks),
                free_bytes: bytes(stat.f_bfree),
                available_bytes: bytes(stat.f_bavail),
            }
        }
        Err(_) => DiskStat::default(),
    }
}

fn space(size: DiskSize) -> Option<DiskSpace> {
    let amount = |amount: i64| u64::try_from(amount).unwrap_or(0);
    match size {
        DiskSize::Bytes(0) | DiskSize::Percent(0) => None,
        DiskSize::Bytes(bytes) => Some(DiskSpace::Bytes(amount(bytes))),
        DiskSize::Percent(percent) => Some(DiskSpace::Percentage(amount(percent))),
    }
}

/// Makes the policies of garbage collection; none when it is switched off.
fn policies(oci: &OciTable, disk: DiskStat) -> Vec<PruneOptions> {
    if oci.gc == Some(false) {
        return Vec::new();
    }
    if !oci.gcpolicy.is_empty() {
        return oci.gcpolicy.iter().map(|rule| policy(rule, disk)).collect();
    }
    let is_set = oci.reserved_space.is_set() || oci.max_used_space.is_set() || oci.min_free_space.is_set();
    let reserved = if is_set {
        oci.reserved_space
    } else {
        oci.gckeepstorage
    };
    let limits = GcLimits {
        reserved: space(reserved),
        max_used: space(oci.max_used_space),
        min_free: space(oci.min_free_space),
    };
    default_policies(limits, disk)
}

fn policy(rule: &GcRule, disk: DiskStat) -> PruneOptions {
    let reserved = if rule.reserved_space.is_set() {
        rule.reserved_space
    } else {
        rule.keep_bytes
    };
    let bytes = |size| space(size).map_or(0, |space: DiskSpace| space.to_bytes(disk));
    PruneOptions {
        filter: rule.filters.clone(),
        all: rule.all,
        keep_duration: Duration::from_secs(rule.keep_duration.0),
        reserved_bytes: bytes(reserved),
        max_used_bytes: bytes(rule.max_used_space),
        min_free_bytes: bytes(rule.min_free_space),
    }
}

/// Where the files are whose contents are added to the provenance of builds, if the configuration names no directory.
const PROVENANCE_DIR: &str = "/etc/buildkit/provenance.d";
/// Keys that these files may not change.
const PROVENANCE_KEYS: [&str; 3] = ["buildConfig", "builderPlatform", "platform"];

/// Reads the files whose contents are added to the provenance of builds. Blocking.
///
/// # Errors
/// For a directory or file that cannot be read, a file that is no JSON object, and a key that is not theirs.
fn provenance_env(dir: Option<&Path>) -> Result<BTreeMap<String, serde_json::Value>, ConfigError> {
    let dir = dir.unwrap_or(Path::new(PROVENANCE_DIR));
    let mut env = BTreeMap::new();
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(env),
        Err(source) => {
            return Err(ConfigError::Read {
                path: dir.to_owned(),
                source,
            });
        }
    };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json") && path.is_file());
    paths.sort();
    for path in paths {
        let text = std::fs::read(&path).map_err(|source| ConfigError::Read {
            path: path.clone(),
            source,
        })?;
        let part: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&text)
            .map_err(|error| ConfigError::invalid(format!("failed to parse {}: {error}", path.display())))?;
        env.extend(part);
    }
    if let Some(key) = PROVENANCE_KEYS.into_iter().find(|key| env.contains_key(*key)) {
        let message = format!("key {key:?} is builtin and not allowed to be modified in provenance config");
        return Err(ConfigError::invalid(message));
    }
    Ok(env)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_is_collected_as_configured() {
        let disk = DiskStat {
            total_bytes: 100 << 30,
            ..DiskStat::default()
        };
        let off = OciTable {
            gc: Some(false),
            ..OciTable::default()
        };
        assert!(policies(&off, disk).is_empty());
        assert_eq!(policies(&OciTable::default(), disk).len(), 4);
        let kept = OciTable {
            gckeepstorage: DiskSize::Bytes(7),
            ..OciTable::default()
        };
        assert_eq!(policies(&kept, disk)[1].reserved_bytes, 7);
        let rule = GcRule {
            all: true,
            keep_bytes: DiskSize::Bytes(5),
            max_used_space: DiskSize::Percent(10),
            ..GcRule::default()
        };
        let custom = OciTable {
            gcpolicy: vec![rule],
            ..OciTable::default()
        };
        let policies = policies(&custom, disk);
        assert_eq!(
            (policies[0].reserved_bytes, policies[0].max_used_bytes),
            (5, 11_000_000_000)
        );
    }

    #[test]
    fn labels_reach_the_executor_and_the_worker() {
        let mut file = ConfigFile::default();
        file.worker.oci.apparmor_profile = "steps".to_owned();
        file.worker.oci.selinux = true;
        let config = executor_config(&file, NetworkChoice::Host, &TraceSocket::default()).labels;
        assert_eq!(
            (config.apparmor_profile.as_str(), config.selinux),
            ("steps", true)
        );
        let facts = facts(&file.worker.oci, "overlayfs", &[]);
        assert_eq!((facts.apparmor_profile.as_str(), facts.selinux), ("steps", true));
    }

    #[test]
    fn rights_are_known_by_name() {
        let mut file = ConfigFile::default();
        assert_eq!(entitlements(&file).unwrap(), [Entitlement::Device(None)]);
        file.insecure_entitlements = vec!["network.host".to_owned()];
        file.cdi.disabled = Some(true);
        assert_eq!(entitlements(&file).unwrap(), [Entitlement::NetworkHost]);
        file.insecure_entitlements = vec!["root".to_owned()];
        assert!(entitlements(&file).is_err());
    }

    #[test]
    fn provenance_is_read_from_objects() {
        let dir = tempfile::tempdir().unwrap();
        assert!(
            provenance_env(Some(&dir.path().join("missing")))
                .unwrap()
                .is_empty()
        );
        std::fs::write(dir.path().join("a.json"), r#"{"x":1}"#).unwrap();
        std::fs::write(dir.path().join("b.txt"), "no").unwrap();
        assert_eq!(provenance_env(Some(dir.path())).unwrap().len(), 1);
        std::fs::write(dir.path().join("c.json"), "[]").unwrap();
        assert!(provenance_env(Some(dir.path())).is_err());
    }
}

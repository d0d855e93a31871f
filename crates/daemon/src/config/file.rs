//! The tables of `buildkitd.toml`, key by key.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::size::{DiskSize, Seconds};

/// The whole file. What is not set has no effect.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ConfigFile {
    /// Old spelling of `log.level = "debug"`.
    pub debug: bool,
    /// Old spelling of `log.level = "trace"`.
    pub trace: bool,
    /// Directory of the daemon's state.
    pub root: Option<PathBuf>,
    /// Rights that builds may ask for.
    #[serde(rename = "insecure-entitlements")]
    pub insecure_entitlements: Vec<String>,
    /// Whether every build's network goes through a proxy that enforces policies.
    #[serde(rename = "proxyNetwork")]
    pub proxy_network: bool,
    /// Logging.
    pub log: LogTable,
    /// Listening.
    pub grpc: GrpcTable,
    /// Traces of steps.
    pub otel: OtelTable,
    /// Devices.
    pub cdi: CdiTable,
    /// Workers.
    pub worker: WorkerTables,
    /// How registries are reached, by domain.
    pub registry: BTreeMap<String, RegistryTable>,
    /// Name resolution inside of steps.
    pub dns: Option<DnsTable>,
    /// How long finished builds are kept.
    pub history: HistoryTable,
    /// Frontends.
    pub frontend: FrontendTables,
    /// Limits of the machine.
    pub system: SystemTable,
    /// Directory of JSON files that are added to the provenance.
    #[serde(rename = "provenanceEnvDir")]
    pub provenance_env_dir: Option<PathBuf>,
    /// Remote caches.
    pub cache: CacheTable,
    /// Whether builds must ask sources that they name by tag, branch or URL: `required`, `fallback` or `offline`.
    #[serde(rename = "resolveCache")]
    pub resolve_cache: String,
}

/// `[log]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct LogTable {
    /// `text` or `json`.
    pub format: String,
    /// `trace`, `debug`, `info`, `warn`, `error`, `fatal` or `panic`.
    pub level: String,
}

/// `[grpc]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct GrpcTable {
    /// Where to listen.
    pub address: Vec<String>,
    /// Where to serve the state of the process.
    #[serde(rename = "debugAddress")]
    pub debug_address: String,
    /// Owner of unix sockets.
    pub uid: Option<u32>,
    /// Group of unix sockets.
    pub gid: Option<u32>,
    /// For Windows' pipes.
    #[serde(rename = "securityDescriptor")]
    pub security_descriptor: String,
    /// Certificates of TCP listeners.
    pub tls: TlsTable,
}

/// `[grpc.tls]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TlsTable {
    /// File of the certificate.
    pub cert: String,
    /// File of its key.
    pub key: String,
    /// File of the authorities that clients' certificates must come from.
    pub ca: String,
}

/// `[otel]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct OtelTable {
    /// Where the socket is that steps are given for their spans.
    #[serde(rename = "socketPath")]
    pub socket_path: Option<PathBuf>,
}

/// `[cdi]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CdiTable {
    /// Whether devices are not offered.
    pub disabled: Option<bool>,
    /// Directories of device specifications.
    #[serde(rename = "specDirs")]
    pub spec_dirs: Vec<PathBuf>,
    /// Devices that need no right.
    #[serde(rename = "autoAllowed")]
    pub auto_allowed: Vec<String>,
}

/// `[worker.*]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct WorkerTables {
    /// The built-in worker.
    pub oci: OciTable,
    /// Containerd's worker, which is not offered.
    pub containerd: ContainerdTable,
}

/// `[worker.oci]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct OciTable {
    /// Whether the worker is used.
    pub enabled: Option<bool>,
    /// Labels of the worker.
    pub labels: BTreeMap<String, String>,
    /// Platforms that steps are run for, instead of those found.
    pub platforms: Vec<String>,
    /// `overlayfs`, `native` or `auto`.
    pub snapshotter: String,
    /// Whether the daemon runs in a user namespace.
    pub rootless: bool,
    /// Whether steps share the daemon's process namespace.
    #[serde(rename = "noProcessSandbox")]
    pub no_process_sandbox: bool,
    /// Whether garbage is collected.
    pub gc: Option<bool>,
    /// Old spelling of `reservedSpace`.
    pub gckeepstorage: DiskSize,
    /// See [`GcRule::reserved_space`].
    #[serde(rename = "reservedSpace")]
    pub reserved_space: DiskSize,
    /// See [`GcRule::max_used_space`].
    #[serde(rename = "maxUsedSpace")]
    pub max_used_space: DiskSize,
    /// See [`GcRule::min_free_space`].
    #[serde(rename = "minFreeSpace")]
    pub min_free_space: DiskSize,
    /// Rules instead of the usual ones.
    pub gcpolicy: Vec<GcRule>,
    /// `auto`, `host`, `cni` or `bridge`.
    #[serde(rename = "networkMode")]
    pub network_mode: String,
    /// File of the CNI network.
    #[serde(rename = "cniConfigPath")]
    pub cni_config_path: String,
    /// Directory of the CNI plugins.
    #[serde(rename = "cniBinaryPath")]
    pub cni_binary_path: String,
    /// Network namespaces kept ready.
    #[serde(rename = "cniPoolSize")]
    pub cni_pool_size: i64,
    /// Name of the built-in bridge.
    #[serde(rename = "bridgeName")]
    pub bridge_name: String,
    /// Addresses of the built-in bridge.
    #[serde(rename = "bridgeSubnet")]
    pub bridge_subnet: String,
    /// User whose subordinate ids steps run under.
    #[serde(rename = "userRemapUnsupported")]
    pub user_remap: String,
    /// An OCI runtime to be used instead of the built-in one.
    pub binary: String,
    /// Socket of a snapshotter of its own.
    #[serde(rename = "proxySnapshotterPath")]
    pub proxy_snapshotter_path: String,
    /// Parent of steps' control groups that name none.
    #[serde(rename = "defaultCgroupParent")]
    pub default_cgroup_parent: String,
    /// Settings of the stargz snapshotter.
    #[serde(rename = "stargzSnapshotter")]
    pub stargz_snapshotter: BTreeMap<String, toml::Value>,
    /// AppArmor profile of steps.
    #[serde(rename = "apparmor-profile")]
    pub apparmor_profile: String,
    /// Whether steps get SELinux labels.
    pub selinux: bool,
    /// Steps that run at once; 0: any number.
    #[serde(rename = "max-parallelism")]
    pub max_parallelism: i64,
}

/// `[worker.containerd]`; all of its keys are read, so that a file for both workers is accepted.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ContainerdTable {
    /// Whether the worker is used.
    pub enabled: Option<bool>,
    /// Containerd's socket.
    pub address: String,
    /// See [`OciTable::labels`].
    pub labels: BTreeMap<String, String>,
    /// See [`OciTable::platforms`].
    pub platforms: Vec<String>,
    /// Containerd's namespace.
    pub namespace: String,
    /// The runtime.
    pub runtime: BTreeMap<String, toml::Value>,
    /// See [`OciTable::gc`].
    pub gc: Option<bool>,
    /// See [`OciTable::gckeepstorage`].
    pub gckeepstorage: DiskSize,
    /// See [`GcRule::reserved_space`].
    #[serde(rename = "reservedSpace")]
    pub reserved_space: DiskSize,
    /// See [`GcRule::max_used_space`].
    #[serde(rename = "maxUsedSpace")]
    pub max_used_space: DiskSize,
    /// See [`GcRule::min_free_space`].
    #[serde(rename = "minFreeSpace")]
    pub min_free_space: DiskSize,
    /// See [`OciTable::gcpolicy`].
    pub gcpolicy: Vec<GcRule>,
    /// See [`OciTable::network_mode`].
    #[serde(rename = "networkMode")]
    pub network_mode: String,
    /// See [`OciTable::cni_config_path`].
    #[serde(rename = "cniConfigPath")]
    pub cni_config_path: String,
    /// See [`OciTable::cni_binary_path`].
    #[serde(rename = "cniBinaryPath")]
    pub cni_binary_path: String,
    /// See [`OciTable::cni_pool_size`].
    #[serde(rename = "cniPoolSize")]
    pub cni_pool_size: i64,
    /// See [`OciTable::bridge_name`].
    #[serde(rename = "bridgeName")]
    pub bridge_name: String,
    /// See [`OciTable::bridge_subnet`].
    #[serde(rename = "bridgeSubnet")]
    pub bridge_subnet: String,
    /// See [`OciTable::snapshotter`].
    pub snapshotter: String,
    /// See [`OciTable::apparmor_profile`].
    #[serde(rename = "apparmor-profile")]
    pub apparmor_profile: String,
    /// See [`OciTable::selinux`].
    pub selinux: bool,
    /// See [`OciTable::max_parallelism`].
    #[serde(rename = "max-parallelism")]
    pub max_parallelism: i64,
    /// See [`OciTable::default_cgroup_parent`].
    #[serde(rename = "defaultCgroupParent")]
    pub default_cgroup_parent: String,
    /// See [`OciTable::rootless`].
    pub rootless: bool,
}

/// `[[worker.*.gcpolicy]]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct GcRule {
    /// Whether internal records go too.
    pub all: bool,
    /// Which records the rule is about.
    pub filters: Vec<String>,
    /// Records used since are kept.
    #[serde(rename = "keepDuration")]
    pub keep_duration: Seconds,
    /// Old spelling of `reservedSpace`.
    #[serde(rename = "keepBytes")]
    pub keep_bytes: DiskSize,
    /// What the cache may always take.
    #[serde(rename = "reservedSpace")]
    pub reserved_space: DiskSize,
    /// What the cache may take at most.
    #[serde(rename = "maxUsedSpace")]
    pub max_used_space: DiskSize,
    /// What is to be left free on the disk, where the reserved space allows.
    #[serde(rename = "minFreeSpace")]
    pub min_free_space: DiskSize,
}

/// `[registry."host"]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RegistryTable {
    /// Hosts that are asked first.
    pub mirrors: Vec<String>,
    /// Whether to speak plain HTTP.
    pub http: Option<bool>,
    /// Whether any certificate is accepted.
    pub insecure: Option<bool>,
    /// Files of further authorities.
    pub ca: Vec<PathBuf>,
    /// Client certificates.
    pub keypair: Vec<KeyPair>,
    /// Directories of certificates in Docker's layout.
    pub tlsconfigdir: Vec<PathBuf>,
}

/// `[[registry."host".keypair]]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct KeyPair {
    /// File of the key.
    pub key: PathBuf,
    /// File of the certificate.
    pub cert: PathBuf,
}

/// `[dns]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct DnsTable {
    /// Servers.
    pub nameservers: Vec<String>,
    /// Options of the resolver.
    pub options: Vec<String>,
    /// Domains that are tried.
    #[serde(rename = "searchDomains")]
    pub search_domains: Vec<String>,
}

/// `[history]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct HistoryTable {
    /// How long a record is kept; 0: 48 hours.
    #[serde(rename = "maxAge")]
    pub max_age: Seconds,
    /// How many are kept; 0: 50.
    #[serde(rename = "maxEntries")]
    pub max_entries: i64,
}

/// `[frontend.*]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct FrontendTables {
    /// The built-in Dockerfile frontend.
    #[serde(rename = "dockerfile.v0")]
    pub dockerfile: FrontendTable,
    /// Frontends from images.
    #[serde(rename = "gateway.v0")]
    pub gateway: FrontendTable,
}

/// `[frontend."name"]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct FrontendTable {
    /// Whether it may be used.
    pub enabled: Option<bool>,
    /// Images that may be used; empty: all.
    #[serde(rename = "allowedRepositories")]
    pub allowed_repositories: Vec<String>,
}

/// `[system]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct SystemTable {
    /// How long found platforms are believed.
    #[serde(rename = "platformsCacheMaxAge")]
    pub platforms_cache_max_age: Option<Seconds>,
    /// Connections a registry.
    #[serde(rename = "maxRegistryConcurrency")]
    pub max_registry_concurrency: Option<i64>,
}

/// `[cache]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CacheTable {
    /// GitHub's cache.
    pub gha: Option<GhaTable>,
}

/// `[cache.gha]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct GhaTable {
    /// How caches are signed.
    pub sign: BTreeMap<String, toml::Value>,
    /// What signatures are asked for.
    pub verify: BTreeMap<String, toml::Value>,
}

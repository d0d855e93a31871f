//! The daemon's flags: BuildKit's, by name and by effect.

use std::path::PathBuf;

use clap::{ArgAction, Parser};

use crate::config::{ConfigError, ConfigFile, DiskSize};

/// A boolean flag that may be written `--flag`, `--flag=true` and `--flag=false`.
const BARE_BOOL: &str = "true";

/// The flags. A flag that is given replaces what the configuration file says.
#[derive(Clone, Debug, Default, Parser)]
#[command(disable_version_flag = true, args_override_self = true)]
pub struct Flags {
    /// Path to config file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Enable debug output in logs
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    pub debug: Option<bool>,
    /// Enable trace output in logs (highly verbose, could affect performance)
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    pub trace: Option<bool>,
    /// Path to state directory
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Listening address (socket or tcp)
    #[arg(long, action = ArgAction::Append)]
    pub addr: Vec<String>,
    /// Log formatter: json or text
    #[arg(long)]
    pub log_format: Option<String>,
    /// Set the log level
    #[arg(long)]
    pub log_level: Option<String>,
    /// Group (name or gid) which will own all Unix socket listening addresses
    #[arg(long)]
    pub group: Option<String>,
    /// Debugging address (eg. 0.0.0.0:6060)
    #[arg(long)]
    pub debugaddr: Option<String>,
    /// Certificate file to use
    #[arg(long)]
    pub tlscert: Option<String>,
    /// Key file to use
    #[arg(long)]
    pub tlskey: Option<String>,
    /// CA certificate to verify clients
    #[arg(long)]
    pub tlscacert: Option<String>,
    /// Allows insecure entitlements e.g. network.host, security.insecure, device
    #[arg(long, action = ArgAction::Append)]
    pub allow_insecure_entitlement: Vec<String>,
    /// Enable proxy network enforcement for all builds
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    pub proxy_network: Option<bool>,
    /// OTEL collector trace socket path
    #[arg(long)]
    pub otel_socket_path: Option<PathBuf>,
    /// Disables support of the Container Device Interface (CDI)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    pub cdi_disabled: Option<bool>,
    /// List of directories to scan for CDI spec files
    #[arg(long, action = ArgAction::Append)]
    pub cdi_spec_dir: Vec<PathBuf>,
    /// Enable saving cache debug info
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    pub save_cache_debug: Option<bool>,
    /// Write the process id to a file
    #[arg(long)]
    pub pidfile: Option<PathBuf>,
    /// Set all the default options to be compatible with rootless containers
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    pub rootless: Option<bool>,
    /// Whether builds must ask for what sources are: required, fallback (to what they last were) or offline
    #[arg(long, value_name = "MODE")]
    pub resolve_cache: Option<String>,
    /// Check everything in the state directory of a stopped daemon, tell what is wrong, and exit
    #[arg(long)]
    pub verify: bool,
    /// Print the version
    #[arg(long, short = 'v')]
    pub version: bool,
    /// The built-in worker
    #[command(flatten)]
    pub oci: OciFlags,
    /// Containerd's worker
    #[command(flatten)]
    pub containerd: ContainerdFlags,
}

/// Flags of the built-in worker.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct OciFlags {
    /// Enable oci workers (true/false/auto)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL)]
    pub oci_worker: Option<String>,
    /// User-specific annotation labels (com.example.foo=bar)
    #[arg(long, action = ArgAction::Append)]
    pub oci_worker_labels: Vec<String>,
    /// Name of snapshotter (overlayfs, native, etc.)
    #[arg(long)]
    pub oci_worker_snapshotter: Option<String>,
    /// Address of proxy snapshotter socket (do not include 'unix://' prefix)
    #[arg(long)]
    pub oci_worker_proxy_snapshotter_path: Option<String>,
    /// Override supported platforms for worker
    #[arg(long, action = ArgAction::Append)]
    pub oci_worker_platform: Vec<String>,
    /// Worker network type (auto, bridge, cni or host)
    #[arg(long)]
    pub oci_worker_net: Option<String>,
    /// Path of cni config file
    #[arg(long)]
    pub oci_cni_config_path: Option<String>,
    /// Path of cni binary files
    #[arg(long)]
    pub oci_cni_binary_dir: Option<String>,
    /// Size of cni network namespace pool
    #[arg(long)]
    pub oci_cni_pool_size: Option<i64>,
    /// Name of specified oci worker binary
    #[arg(long)]
    pub oci_worker_binary: Option<String>,
    /// Set the name of the apparmor profile applied to containers
    #[arg(long)]
    pub oci_worker_apparmor_profile: Option<String>,
    /// Apply SELinux labels
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    pub oci_worker_selinux: Option<bool>,
    /// Limit the number of parallel build steps that can run at the same time
    #[arg(long)]
    pub oci_max_parallelism: Option<i64>,
    /// Enable rootless mode
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    pub oci_worker_rootless: Option<bool>,
    /// Use the host PID namespace and procfs
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    pub oci_worker_no_process_sandbox: Option<bool>,
    /// Enable automatic garbage collection on worker
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    pub oci_worker_gc: Option<bool>,
    /// Amount of storage GC keep locally, format "Reserved[,Free[,Maximum]]" (MB)
    #[arg(long)]
    pub oci_worker_gc_keepstorage: Option<String>,
}

/// Flags of containerd's worker. They are known so that a command line for both workers is accepted; enabling it is not.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ContainerdFlags {
    /// Enable containerd workers (true/false/auto)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL)]
    pub containerd_worker: Option<String>,
    #[arg(long, hide = true)]
    containerd_worker_addr: Option<String>,
    #[arg(long, hide = true, action = ArgAction::Append)]
    containerd_worker_labels: Vec<String>,
    #[arg(long, hide = true, action = ArgAction::Append)]
    containerd_worker_platform: Vec<String>,
    #[arg(long, hide = true)]
    containerd_worker_namespace: Option<String>,
    #[arg(long, hide = true)]
    containerd_worker_net: Option<String>,
    #[arg(long, hide = true)]
    containerd_cni_config_path: Option<String>,
    #[arg(long, hide = true)]
    containerd_cni_binary_dir: Option<String>,
    #[arg(long, hide = true)]
    containerd_cni_pool_size: Option<i64>,
    #[arg(long, hide = true)]
    containerd_worker_snapshotter: Option<String>,
    #[arg(long, hide = true)]
    containerd_worker_apparmor_profile: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    containerd_worker_selinux: Option<bool>,
    #[arg(long, hide = true)]
    containerd_max_parallelism: Option<i64>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    containerd_worker_rootless: Option<bool>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = BARE_BOOL, value_parser = parse_bool)]
    containerd_worker_gc: Option<bool>,
    #[arg(long, hide = true)]
    containerd_worker_gc_keepstorage: Option<String>,
}

fn parse_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("parsing {text:?}: invalid syntax")),
    }
}

/// Reads `true`, `false` or `auto`.
fn parse_bool_or_auto(text: &str) -> Result<Option<bool>, ConfigError> {
    if text.is_empty() || text.eq_ignore_ascii_case("auto") {
        return Ok(None);
    }
    parse_bool(text).map(Some).map_err(ConfigError::invalid)
}

impl Flags {
    /// Fills in flags that were not given from `$BUILDKITD_LOG_LEVEL` and `$BUILDKITD_DEBUGADDR`.
    #[must_use]
    pub fn with_env(mut self, env: impl Fn(&str) -> Option<String>) -> Self {
        self.log_level = self.log_level.or_else(|| env("BUILDKITD_LOG_LEVEL"));
        self.debugaddr = self.debugaddr.or_else(|| env("BUILDKITD_DEBUGADDR"));
        self
    }

    /// Puts the flags that are given on top of the file's settings.
    ///
    /// # Errors
    /// For values that make no sense.
    pub fn apply(&self, file: &mut ConfigFile) -> Result<(), ConfigError> {
        if self.debug == Some(true) || (file.debug && file.log.level.is_empty()) {
            file.log.level = "debug".to_owned();
        }
        if self.trace == Some(true) || (file.trace && file.log.level.is_empty()) {
            file.log.level = "trace".to_owned();
        }
        set(&mut file.root, self.root.clone().map(Some));
        set(&mut file.log.format, self.log_format.clone());
        set(&mut file.log.level, self.log_level.clone());
        set_list(&mut file.grpc.address, &self.addr);
        set_list(&mut file.insecure_entitlements, &self.allow_insecure_entitlement);
        set(&mut file.proxy_network, self.proxy_network);
        set(&mut file.grpc.debug_address, self.debugaddr.clone());
        set(&mut file.grpc.tls.cert, self.tlscert.clone());
        set(&mut file.grpc.tls.key, self.tlskey.clone());
        set(&mut file.grpc.tls.ca, self.tlscacert.clone());
        set(
            &mut file.otel.socket_path,
            self.otel_socket_path.clone().map(Some),
        );
        set(&mut file.resolve_cache, self.resolve_cache.clone());
        set(&mut file.cdi.disabled, self.cdi_disabled.map(Some));
        set_list(&mut file.cdi.spec_dirs, &self.cdi_spec_dir);
        if let Some(group) = self.group.as_deref().filter(|group| !group.is_empty()) {
            file.grpc.gid = Some(group_id(group)?);
        }
        if let Some(enabled) = &self.containerd.containerd_worker {
            file.worker.containerd.enabled = parse_bool_or_auto(enabled)?;
        }
        self.oci.apply(self.rootless, file)
    }
}

impl OciFlags {
    fn apply(&self, rootless: Option<bool>, file: &mut ConfigFile) -> Result<(), ConfigError> {
        let oci = &mut file.worker.oci;
        if let Some(enabled) = &self.oci_worker {
            oci.enabled = parse_bool_or_auto(enabled)?;
        }
        for label in &self.oci_worker_labels {
            let (name, value) = label
                .split_once('=')
                .ok_or_else(|| ConfigError::invalid(format!("invalid value {label}")))?;
            oci.labels.insert(name.to_owned(), value.to_owned());
        }
        set(&mut oci.snapshotter, self.oci_worker_snapshotter.clone());
        set(
            &mut oci.proxy_snapshotter_path,
            self.oci_worker_proxy_snapshotter_path.clone(),
        );
        set_list(&mut oci.platforms, &self.oci_worker_platform);
        set(&mut oci.network_mode, self.oci_worker_net.clone());
        set(&mut oci.cni_config_path, self.oci_cni_config_path.clone());
        set(&mut oci.cni_binary_path, self.oci_cni_binary_dir.clone());
        set(&mut oci.cni_pool_size, self.oci_cni_pool_size);
        set(&mut oci.binary, self.oci_worker_binary.clone());
        set(
            &mut oci.apparmor_profile,
            self.oci_worker_apparmor_profile.clone(),
        );
        set(&mut oci.selinux, self.oci_worker_selinux);
        set(&mut oci.max_parallelism, self.oci_max_parallelism);
        set(&mut oci.rootless, rootless);
        set(&mut oci.rootless, self.oci_worker_rootless);
        set(&mut oci.no_process_sandbox, self.oci_worker_no_process_sandbox);
        set(&mut oci.gc, self.oci_worker_gc.map(Some));
        if let Some(keep) = self
            .oci_worker_gc_keepstorage
            .as_deref()
            .filter(|keep| !keep.is_empty())
        {
            [oci.reserved_space, oci.min_free_space, oci.max_used_space] = keep_storage(keep)?;
        }
        Ok(())
    }
}

/// Reads `reserved[,free[,maximum]]` in megabytes.
fn keep_storage(text: &str) -> Result<[DiskSize; 3], ConfigError> {
    let mut sizes = [DiskSize::default(); 3];
    for (size, part) in sizes.iter_mut().zip(text.splitn(3, ',')) {
        let megabytes: i64 = part
            .parse()
            .map_err(|_| ConfigError::invalid(format!("failed to parse storage {text:?}")))?;
        *size = DiskSize::Bytes(megabytes.saturating_mul(1_000_000));
    }
    Ok(sizes)
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

fn set_list<T: Clone>(target: &mut Vec<T>, values: &[T]) {
    if !values.is_empty() {
        *target = values.to_vec();
    }
}

/// Finds a group's number, by number or by name in `/etc/group`.
fn group_id(group: &str) -> Result<u32, ConfigError> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    let unknown = || ConfigError::invalid(format!("group: unknown group {group}"));
    let text = std::fs::read_to_string("/etc/group").map_err(|_| unknown())?;
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(group)).then(|| fields.nth(1)).flatten()
        })
        .find_map(|id| id.parse().ok())
        .ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(args: &[&str]) -> ConfigFile {
        let flags = Flags::try_parse_from([&["buildkitd"], args].concat()).unwrap();
        let mut file = ConfigFile::default();
        flags.apply(&mut file).unwrap();
        file
    }

    #[test]
    fn reads_the_flags_that_test_harnesses_pass() {
        let file = applied(&[
            "--oci-worker=true",
            "--containerd-worker=false",
            "--oci-worker-gc=false",
            "--oci-worker-labels=org.mobyproject.buildkit.worker.sandbox=true",
            "--config=/nonexistent",
            "--root",
            "/r",
            "--addr",
            "unix:///r/x.sock",
            "--debug",
        ]);
        assert_eq!(file.worker.oci.enabled, Some(true));
        assert_eq!(file.worker.oci.gc, Some(false));
        assert_eq!(
            file.worker.oci.labels["org.mobyproject.buildkit.worker.sandbox"],
            "true"
        );
        assert_eq!(file.grpc.address, ["unix:///r/x.sock"]);
        assert_eq!(file.log.level, "debug");
        assert!(crate::config::refuse_unsupported(&file).is_ok());
    }

    #[test]
    fn keep_storage_has_three_parts() {
        let file = applied(&["--oci-worker-gc-keepstorage", "10,20,30"]);
        assert_eq!(file.worker.oci.reserved_space, DiskSize::Bytes(10_000_000));
        assert_eq!(file.worker.oci.min_free_space, DiskSize::Bytes(20_000_000));
        assert_eq!(file.worker.oci.max_used_space, DiskSize::Bytes(30_000_000));
        let mut file = ConfigFile::default();
        let flags = Flags::try_parse_from(["buildkitd", "--oci-worker-gc-keepstorage", "x"]).unwrap();
        assert!(flags.apply(&mut file).is_err());
    }

    #[test]
    fn groups_are_found() {
        assert_eq!(group_id("12").unwrap(), 12);
        assert_eq!(group_id("root").unwrap(), 0);
        assert!(group_id("of-no-kind").is_err());
    }

    #[test]
    fn containerd_flags_are_known() {
        let file = applied(&[
            "--containerd-worker-snapshotter=overlayfs",
            "--containerd-worker-gc=false",
        ]);
        assert_eq!(file.worker.containerd.enabled, None);
        assert!(Flags::try_parse_from(["buildkitd", "--no-such-flag"]).is_err());
    }
}

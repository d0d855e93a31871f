//! The flags of `buildctl`.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

/// `buildctl` and what goes before its command.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "buildctl",
    about = "build utility",
    disable_version_flag = true,
    args_override_self = true
)]
pub struct Buildctl {
    /// Enable debug output in logs
    #[arg(long)]
    pub debug: bool,
    /// Which daemon, and how it is reached
    #[command(flatten)]
    pub connection: ConnectionArgs,
    /// Log formatter: json or text
    #[arg(long, default_value = "text")]
    pub log_format: String,
    /// Print the version
    #[arg(long, short = 'v')]
    pub version: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// How a daemon is reached.
#[derive(Clone, Debug, Default, Args)]
pub struct ConnectionArgs {
    /// Buildkitd address [default: $BUILDKIT_HOST, or unix:///run/buildkit/buildkitd.sock]
    #[arg(long)]
    pub addr: Option<String>,
    /// Buildkitd server name for certificate validation
    #[arg(long)]
    pub tlsservername: Option<String>,
    /// CA certificate for validation
    #[arg(long)]
    pub tlscacert: Option<PathBuf>,
    /// Client certificate
    #[arg(long)]
    pub tlscert: Option<PathBuf>,
    /// Client key
    #[arg(long)]
    pub tlskey: Option<PathBuf>,
    /// Directory containing CA certificate, client certificate, and client key. Supported file names are (ca.pem,
    /// cert.pem, key.pem) or (ca.crt, tls.crt, tls.key)
    #[arg(long)]
    pub tlsdir: Option<PathBuf>,
    /// Timeout backend connection after value seconds
    #[arg(long, default_value_t = 5)]
    pub timeout: u64,
    /// Block RPCs until the connection becomes available
    #[arg(long)]
    pub wait: bool,
}

/// A command.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// disk usage
    Du(DuArgs),
    /// clean up build cache
    Prune(PruneArgs),
    /// clean up build histories
    PruneHistories(FormatArgs),
    /// build
    #[command(visible_alias = "b")]
    Build(Box<BuildArgs>),
    /// debug utilities
    Debug {
        /// What to do
        #[command(subcommand)]
        command: DebugCommand,
    },
    /// Proxy the stdio stream to the daemon connection. Should not be invoked manually.
    #[command(hide = true)]
    DialStdio,
}

/// A command below `debug`.
#[derive(Clone, Debug, Subcommand)]
pub enum DebugCommand {
    /// list workers
    Workers(WorkersArgs),
    /// display internal information
    Info(FormatArgs),
    /// display build logs
    Logs(LogsArgs),
    /// list build records
    Histories(FormatArgs),
    /// display build events
    Monitor(MonitorArgs),
    /// control build records
    Ctl(CtlArgs),
    /// retrieve a blob from contentstore
    Get {
        /// Digest of the blob
        digest: Option<String>,
    },
    /// dump LLB in human-readable format
    DumpLlb(DumpLlbArgs),
    /// dump the meta in human-readable format. This command requires the daemon NOT to be running
    DumpMetadata {
        /// Path to state directory
        #[arg(long, default_value = "/var/lib/buildkit")]
        root: std::path::PathBuf,
    },
}

/// `--format`
#[derive(Clone, Debug, Default, Args)]
pub struct FormatArgs {
    /// Format the output using the given Go template, e.g, '{{json .}}'
    #[arg(long)]
    pub format: Option<String>,
}

/// `du`
#[derive(Clone, Debug, Default, Args)]
pub struct DuArgs {
    /// Filter records
    #[arg(long, short = 'f', action = ArgAction::Append)]
    pub filter: Vec<String>,
    /// Verbose output
    #[arg(long, short = 'v')]
    pub verbose: bool,
    /// How to print
    #[command(flatten)]
    pub format: FormatArgs,
}

/// `prune`
#[derive(Clone, Debug, Default, Args)]
pub struct PruneArgs {
    /// Keep data newer than this limit
    #[arg(long)]
    pub keep_duration: Option<String>,
    /// Keep data below this limit (in MB)
    #[arg(long, default_value_t = 0.0)]
    pub keep_storage: f64,
    /// Always allow data above this limit (in MB)
    #[arg(long, default_value_t = 0.0)]
    pub keep_storage_min: f64,
    /// Keep free data below this limit (in MB)
    #[arg(long, default_value_t = 0.0)]
    pub free_storage: f64,
    /// Filter records
    #[arg(long, short = 'f', action = ArgAction::Append)]
    pub filter: Vec<String>,
    /// Include internal/frontend references
    #[arg(long)]
    pub all: bool,
    /// Verbose output
    #[arg(long, short = 'v')]
    pub verbose: bool,
    /// How to print
    #[command(flatten)]
    pub format: FormatArgs,
}

/// `build`
#[derive(Clone, Debug, Default, Args)]
pub struct BuildArgs {
    /// Define exports for build result, e.g. --output type=image,name=docker.io/username/image,push=true
    #[arg(long, short = 'o', action = ArgAction::Append)]
    pub output: Vec<String>,
    /// Set type of progress (auto, plain, tty, rawjson). Use plain to show container output
    #[arg(long, default_value = "auto")]
    pub progress: String,
    /// Path to trace file. Defaults to no tracing.
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// Allow build access to the local directory
    #[arg(long, action = ArgAction::Append)]
    pub local: Vec<String>,
    /// Allow build access to the local OCI layout
    #[arg(long, action = ArgAction::Append)]
    pub oci_layout: Vec<String>,
    /// Define frontend used for build
    #[arg(long)]
    pub frontend: Option<String>,
    /// Define custom options for frontend, e.g. --opt target=foo --opt build-arg:foo=bar
    #[arg(long, action = ArgAction::Append)]
    pub opt: Vec<String>,
    /// Disable cache for all the vertices
    #[arg(long)]
    pub no_cache: bool,
    /// Export build cache, e.g. --export-cache type=registry,ref=example.com/foo/bar
    #[arg(long, action = ArgAction::Append)]
    pub export_cache: Vec<String>,
    /// Import build cache, e.g. --import-cache type=registry,ref=example.com/foo/bar
    #[arg(long, action = ArgAction::Append)]
    pub import_cache: Vec<String>,
    /// Secret value exposed to the build. Format id=secretname,src=filepath
    #[arg(long, action = ArgAction::Append)]
    pub secret: Vec<String>,
    /// Allow extra privileged entitlement, e.g. network.host, security.insecure, device
    #[arg(long, action = ArgAction::Append)]
    pub allow: Vec<String>,
    /// Allow forwarding SSH agent or a raw Unix socket to the builder. Format
    /// default|<id>[=<socket>[,raw=false]|<key>[,<key>]]
    #[arg(long, action = ArgAction::Append)]
    pub ssh: Vec<String>,
    /// Output build metadata (e.g., image digest) to a file as JSON
    #[arg(long)]
    pub metadata_file: Option<PathBuf>,
    /// Read source policy file from a JSON file
    #[arg(long)]
    pub source_policy_file: Option<PathBuf>,
    /// Run build with proxy network enforcement
    #[arg(long)]
    pub proxy_network: bool,
    /// Write build ref to a file
    #[arg(long)]
    pub ref_file: Option<PathBuf>,
    /// Overwrite TLS configuration when authenticating with registries
    #[arg(long, action = ArgAction::Append)]
    pub registry_auth_tlscontext: Vec<String>,
    /// Where to output json cache metrics, use 'stdout' or 'stderr' for standard (error) output.
    #[arg(long)]
    pub debug_json_cache_metrics: Option<String>,
}

/// `debug workers`
#[derive(Clone, Debug, Default, Args)]
pub struct WorkersArgs {
    /// Containerd-style filter string slice
    #[arg(long, short = 'f', action = ArgAction::Append)]
    pub filter: Vec<String>,
    /// Verbose output
    #[arg(long, short = 'v')]
    pub verbose: bool,
    /// How to print
    #[command(flatten)]
    pub format: FormatArgs,
}

/// `debug logs`
#[derive(Clone, Debug, Default, Args)]
pub struct LogsArgs {
    /// Progress output type
    #[arg(long, default_value = "auto")]
    pub progress: String,
    /// The build
    pub r#ref: String,
}

/// `debug monitor`
#[derive(Clone, Debug, Default, Args)]
pub struct MonitorArgs {
    /// Show completed builds
    #[arg(long)]
    pub completed: bool,
    /// Show events for a specific build
    #[arg(long)]
    pub r#ref: Option<String>,
}

/// `debug ctl`
#[derive(Clone, Debug, Default, Args)]
pub struct CtlArgs {
    /// Pin build so it will not be garbage collected
    #[arg(long)]
    pub pin: bool,
    /// Unpin build so it will be garbage collected
    #[arg(long)]
    pub unpin: bool,
    /// Delete build record
    #[arg(long)]
    pub delete: bool,
    /// The build
    pub r#ref: Option<String>,
}

/// `debug dump-llb`
#[derive(Clone, Debug, Default, Args)]
pub struct DumpLlbArgs {
    /// Output dot format
    #[arg(long)]
    pub dot: bool,
    /// The file; standard input without
    pub file: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn flags_are_consistent() {
        Buildctl::command().debug_assert();
    }

    #[test]
    fn reads_a_full_build() {
        let args = Buildctl::parse_from([
            "buildctl",
            "--addr",
            "unix:///x",
            "build",
            "--frontend=dockerfile.v0",
            "--opt",
            "a=b,c",
            "--opt",
            "d=e",
            "--local",
            "context=.",
            "--output",
            "type=local,dest=x",
            "--progress=plain",
            "--no-cache",
        ]);
        assert_eq!(args.connection.addr.as_deref(), Some("unix:///x"));
        let Some(Command::Build(build)) = args.command else {
            panic!("not a build")
        };
        assert_eq!(build.opt, ["a=b,c", "d=e"]);
        assert_eq!(build.output, ["type=local,dest=x"]);
        assert!(build.no_cache);
    }
}

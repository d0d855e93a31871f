//! The flags of `cooper`.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::buildctl::args::{ConnectionArgs, DuArgs, DumpLlbArgs, FormatArgs, PruneArgs, WorkersArgs};

/// Builds container images.
#[derive(Clone, Debug, Parser)]
#[command(name = "cooper", disable_version_flag = true, args_override_self = true)]
pub struct Cooper {
    /// Print the version
    #[arg(long, short = 'V')]
    pub version: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// A command.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Build an image from a Dockerfile
    #[command(visible_alias = "b")]
    Build(Box<BuildArgs>),
    /// Show and clean up the cache
    Cache {
        /// What to do
        #[command(subcommand)]
        command: CacheCommand,
    },
    /// Show why the steps of a build ran instead of being taken from the cache
    Explain {
        /// Which engine
        #[command(flatten)]
        engine: EngineArgs,
        /// Which build
        #[command(flatten)]
        args: ExplainArgs,
    },
    /// Show how much disk space the cache takes
    Du {
        /// Which engine
        #[command(flatten)]
        engine: EngineArgs,
        /// What to show
        #[command(flatten)]
        args: DuArgs,
    },
    /// Remove what builds left in the cache
    Prune {
        /// Which engine
        #[command(flatten)]
        engine: EngineArgs,
        /// What to remove
        #[command(flatten)]
        args: PruneArgs,
    },
    /// Show the daemon's workers
    Workers {
        /// Which engine
        #[command(flatten)]
        engine: EngineArgs,
        /// What to show
        #[command(flatten)]
        args: WorkersArgs,
    },
    /// Look at LLB definitions; needs no daemon
    Debug {
        /// What to do
        #[command(subcommand)]
        command: DebugCommand,
    },
    /// Show the version
    Version,
    /// Run the daemon, as `cooperd` does
    #[command(disable_help_flag = true)]
    Daemon {
        /// The daemon's flags
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
}

/// Which engine: a daemon's, or one in this process.
#[derive(Clone, Debug, Default, Args)]
#[command(mut_arg("addr", |arg| arg.help(
    "Address of the daemon [default: $COOPER_HOST, $BUILDKIT_HOST, or else none: the engine runs in this process]"
)))]
pub struct EngineArgs {
    /// Which daemon
    #[command(flatten)]
    pub connection: ConnectionArgs,
    /// State directory of the engine in this process [default: $COOPER_STATE, or the user's data directory]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
}

/// A command below `debug`.
#[derive(Clone, Debug, Subcommand)]
pub enum DebugCommand {
    /// Print a definition, one operation a line of JSON or as a graph
    DumpLlb(DumpLlbArgs),
    /// Show what differs between two definitions
    DiffLlb(DiffLlbArgs),
}

/// `explain`
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    /// The build's ref, as `cache history` shows it; "latest" is the build that was started last
    #[arg(value_name = "REF", default_value = "latest")]
    pub build: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `debug diff-llb`
#[derive(Clone, Debug, Args)]
pub struct DiffLlbArgs {
    /// File with the first definition; "-" for standard input
    pub before: PathBuf,
    /// File with the second definition; "-" for standard input
    pub after: PathBuf,
}

/// A command below `cache`.
#[derive(Clone, Debug, Subcommand)]
pub enum CacheCommand {
    /// Show how much disk space the cache takes
    #[command(visible_alias = "ls")]
    Du {
        /// Which engine
        #[command(flatten)]
        engine: EngineArgs,
        /// What to show
        #[command(flatten)]
        args: DuArgs,
    },
    /// Remove what builds left in the cache
    Prune {
        /// Which engine
        #[command(flatten)]
        engine: EngineArgs,
        /// What to remove
        #[command(flatten)]
        args: PruneArgs,
    },
    /// Show what a cache holds, and what of it cannot be restored
    Inspect {
        /// The cache: a directory it was exported to, or its name in a registry, which may be that of an image
        cache: String,
        /// Which of a directory's caches
        #[arg(long, default_value = "latest")]
        tag: String,
        /// Allow plain HTTP and certificates that nobody vouches for
        #[arg(long)]
        insecure: bool,
    },
    /// Show the builds that the daemon remembers
    History {
        /// Which engine
        #[command(flatten)]
        engine: EngineArgs,
        /// How to print
        #[command(flatten)]
        format: FormatArgs,
    },
}

/// `build`
#[derive(Clone, Debug, Default, Args)]
#[expect(clippy::struct_excessive_bools, reason = "one a flag")]
pub struct BuildArgs {
    /// Directory, git or http address of the context; "-" reads a Dockerfile or a tarball from standard input
    #[arg(default_value = ".")]
    pub context: String,
    /// Which engine
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Name of the Dockerfile [default: CONTEXT/Dockerfile]
    #[arg(long, short = 'f', value_name = "FILE")]
    pub file: Option<String>,
    /// Name and optionally tag of the image
    #[arg(long, short = 't', action = ArgAction::Append, value_name = "NAME")]
    pub tag: Vec<String>,
    /// Stage to build
    #[arg(long)]
    pub target: Option<String>,
    /// Value of a build argument; without a value, that of the environment
    #[arg(long, action = ArgAction::Append, value_name = "NAME[=VALUE]")]
    pub build_arg: Vec<String>,
    /// Further named contexts
    #[arg(long, action = ArgAction::Append, value_name = "NAME=CONTEXT")]
    pub build_context: Vec<String>,
    /// Platforms to build for
    #[arg(long, action = ArgAction::Append)]
    pub platform: Vec<String>,
    /// Run every step again
    #[arg(long)]
    pub no_cache: bool,
    /// Run the steps of these stages again
    #[arg(long, action = ArgAction::Append, value_name = "STAGE")]
    pub no_cache_filter: Vec<String>,
    /// Ask the registry for all images anew
    #[arg(long)]
    pub pull: bool,
    /// Whether sources must be asked what they are: required, fallback (to what they last were) or offline
    #[arg(long, value_name = "MODE")]
    pub resolve_cache: Option<String>,
    /// Secret for steps that ask for it (id=mysecret[,src=/local/secret][,env=VAR])
    #[arg(long, action = ArgAction::Append)]
    pub secret: Vec<String>,
    /// SSH agent, socket or keys for steps that ask for them (default|<id>[=<socket>|<key>[,<key>]])
    #[arg(long, action = ArgAction::Append)]
    pub ssh: Vec<String>,
    /// Label of the image
    #[arg(long, action = ArgAction::Append, value_name = "NAME=VALUE")]
    pub label: Vec<String>,
    /// Annotation of the image
    #[arg(long, action = ArgAction::Append, value_name = "NAME=VALUE")]
    pub annotation: Vec<String>,
    /// Where the result goes (type=local,dest=path)
    #[arg(long, short = 'o', action = ArgAction::Append)]
    pub output: Vec<String>,
    /// Push the image; short for --output=type=image,push=true
    #[arg(long)]
    pub push: bool,
    /// Write the build's metadata to a file
    #[arg(long, value_name = "FILE")]
    pub metadata_file: Option<PathBuf>,
    /// Write the image's id to a file
    #[arg(long, value_name = "FILE")]
    pub iidfile: Option<PathBuf>,
    /// How progress is shown: auto, plain, tty, quiet, rawjson
    #[arg(long)]
    pub progress: Option<String>,
    /// Say in the end why steps ran instead of being taken from the cache
    #[arg(long)]
    pub explain: bool,
    /// Show no progress and print the image's id
    #[arg(long, short = 'q')]
    pub quiet: bool,
    /// Cache to export to (user/app:cache, type=local,dest=path)
    #[arg(long, action = ArgAction::Append)]
    pub cache_to: Vec<String>,
    /// Cache to import from (user/app:cache, type=local,src=path)
    #[arg(long, action = ArgAction::Append)]
    pub cache_from: Vec<String>,
    /// Entry of steps' /etc/hosts
    #[arg(long, action = ArgAction::Append, value_name = "HOST:IP")]
    pub add_host: Vec<String>,
    /// Size of steps' /dev/shm
    #[arg(long)]
    pub shm_size: Option<String>,
    /// Limits of steps
    #[arg(long, action = ArgAction::Append)]
    pub ulimit: Vec<String>,
    /// Network of RUN steps: default, none or host
    #[arg(long)]
    pub network: Option<String>,
    /// Parent of steps' control groups
    #[arg(long)]
    pub cgroup_parent: Option<String>,
    /// Rights that steps may ask for (network.host, security.insecure)
    #[arg(long, action = ArgAction::Append)]
    pub allow: Vec<String>,
    /// Attestation (type=sbom,generator=image)
    #[arg(long, action = ArgAction::Append)]
    pub attest: Vec<String>,
    /// Short for --attest=type=sbom
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub sbom: Option<String>,
    /// Short for --attest=type=provenance
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub provenance: Option<String>,
    /// Ask the frontend instead of building: check, outline, targets
    #[arg(long)]
    pub call: Option<String>,
    /// Short for --call=check
    #[arg(long)]
    pub check: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn flags_are_consistent() {
        Cooper::command().debug_assert();
    }

    #[test]
    fn reads_a_build() {
        let args = Cooper::parse_from([
            "cooper",
            "build",
            "-t",
            "x",
            "-f",
            "D",
            "--build-arg",
            "A=1",
            ".",
            "-q",
        ]);
        let Some(Command::Build(build)) = args.command else {
            panic!("not a build")
        };
        assert_eq!((build.context.as_str(), build.file.as_deref()), (".", Some("D")));
        assert!(build.quiet);
        let args = Cooper::parse_from(["cooper", "daemon", "--root", "/x", "--debug"]);
        let Some(Command::Daemon { args }) = args.command else {
            panic!("not a daemon")
        };
        assert_eq!(args, ["--root", "/x", "--debug"]);
    }

    #[test]
    fn reads_debug_commands() {
        let args = Cooper::parse_from(["cooper", "debug", "dump-llb", "--dot", "x"]);
        let Some(Command::Debug {
            command: DebugCommand::DumpLlb(args),
        }) = args.command
        else {
            panic!("not a dump")
        };
        assert_eq!((args.dot, args.file), (true, Some(PathBuf::from("x"))));
        let args = Cooper::parse_from(["cooper", "debug", "diff-llb", "a", "-"]);
        let Some(Command::Debug {
            command: DebugCommand::DiffLlb(args),
        }) = args.command
        else {
            panic!("not a diff")
        };
        assert_eq!(
            (args.before, args.after),
            (PathBuf::from("a"), PathBuf::from("-"))
        );
        assert!(Cooper::try_parse_from(["cooper", "debug", "diff-llb", "a"]).is_err());
    }
}

//! `cooper`: builds from Dockerfiles, in this process or with a daemon.

pub mod args;
mod build;
mod context;
mod explain;
mod hints;
mod inspect;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use tonic::transport::Channel;

use crate::buildctl::args::ConnectionArgs;
use crate::buildctl::{du, histories, prune, workers};
use crate::connect::connect;
use crate::definition;
use crate::docker_config::DockerConfig;
use crate::failure::Failure;
use crate::version::Version;
use args::{CacheCommand, Command, Cooper, DebugCommand, EngineArgs};

/// Starts an engine for commands that name no daemon.
pub trait LocalEngine {
    /// Starts the engine, or finds the one that another process runs on the same state.
    ///
    /// # Errors
    /// When neither is possible.
    fn start(
        &self,
        root: Option<PathBuf>,
    ) -> Pin<Box<dyn Future<Output = Result<LocalEndpoint, Failure>> + Send + '_>>;
}

/// What the program that this is part of can do besides.
#[derive(Clone, Copy)]
pub struct Program<'a> {
    /// Starts engines.
    pub engine: &'a dyn LocalEngine,
    /// Reads registries.
    pub registries: &'a dyn Registries,
}

/// Something that will be there.
pub type Later<'a, T> = Pin<Box<dyn Future<Output = Result<T, Failure>> + Send + 'a>>;

/// Reads from registries, for commands that need no engine.
pub trait Registries: Sync {
    /// Resolves a name, with the accounts of a configuration.
    ///
    /// # Errors
    /// When the name is none, or the registry does not have it.
    fn open<'a>(
        &'a self,
        name: &'a str,
        insecure: bool,
        accounts: DockerConfig,
    ) -> Later<'a, Box<dyn RemoteCache>>;
}

/// A name in a registry that was resolved. Documents are verified.
pub trait RemoteCache: Send + Sync {
    /// The digest that the name stands for.
    fn root(&self) -> String;
    /// Reads a manifest or an index.
    fn manifest<'a>(&'a self, digest: &'a str) -> Later<'a, Vec<u8>>;
    /// Reads a small blob.
    fn blob<'a>(&'a self, digest: &'a str, size_bytes: u64) -> Later<'a, Vec<u8>>;
    /// Asks how many bytes a blob has; `None`: it is not there.
    fn size<'a>(&'a self, digest: &'a str) -> Later<'a, Option<u64>>;
}

/// A running engine.
pub struct LocalEndpoint {
    /// Where it listens.
    pub address: String,
    /// Ends it, if it is this process' own; waits until its state is safe.
    pub stop: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// Runs `cooper`; `args` start with the program's name. The daemon's command is not run here but returned with its flags.
pub fn run(args: Vec<OsString>, version: &Version, program: Program<'_>) -> Result<ExitCode, Vec<OsString>> {
    let parsed = match Cooper::try_parse_from(args) {
        Ok(parsed) => parsed,
        Err(error) => return Ok(crate::usage_error(&error, 2)),
    };
    let command = match parsed.command {
        _ if parsed.version => return Ok(crate::print(&format!("cooper {version}\n"))),
        Some(Command::Version) => return Ok(crate::print(&format!("cooper {version}\n"))),
        Some(Command::Daemon { args }) => return Err(args),
        Some(command) => command,
        None => return Ok(crate::print(&Cooper::command().render_help().to_string())),
    };
    if let Err(failure) = crate::log::start("text", std::env::var_os("COOPER_DEBUG").is_some()) {
        return Ok(fail(&failure));
    }
    let runtime = match crate::runtime() {
        Ok(runtime) => runtime,
        Err(error) => return Ok(fail(&error.into())),
    };
    let ended = runtime.block_on(dispatch(command, program));
    Ok(ended.unwrap_or_else(|failure| fail(&failure)))
}

/// Shows a failure; a build that the user cancelled has an exit code of its own.
fn fail(failure: &Failure) -> ExitCode {
    let mut stderr = std::io::stderr();
    for excerpt in failure.excerpts() {
        // Without a standard error there is nobody to tell.
        let _ = stderr.write_all(excerpt.as_bytes());
    }
    for message in failure.deny_messages() {
        let _ = writeln!(stderr, "policy deny: {message}");
    }
    let _ = writeln!(stderr, "ERROR: {failure}");
    if let Some(hint) = hints::hint(&failure.to_string()) {
        let _ = writeln!(stderr, "HINT: {hint}");
    }
    if failure.is_canceled() {
        ExitCode::from(130)
    } else {
        ExitCode::FAILURE
    }
}

/// Returns the daemon that is meant, if one is.
fn named_address(connection: &ConnectionArgs) -> Option<String> {
    let env = |name: &str| std::env::var(name).ok().filter(|address| !address.is_empty());
    connection
        .addr
        .clone()
        .or_else(|| env("COOPER_HOST"))
        .or_else(|| env("BUILDKIT_HOST"))
}

/// A connection, and how it is ended.
struct Open {
    channel: Channel,
    stop: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

async fn open(
    EngineArgs { connection, root }: &EngineArgs,
    local: &dyn LocalEngine,
) -> Result<Open, Failure> {
    if let Some(address) = named_address(connection) {
        return Ok(Open {
            channel: connect(&address, connection).await?,
            stop: None,
        });
    }
    let endpoint = local.start(root.clone()).await?;
    match connect(&endpoint.address, connection).await {
        Ok(channel) => Ok(Open {
            channel,
            stop: Some(endpoint.stop),
        }),
        Err(error) => {
            endpoint.stop.await;
            Err(error.into())
        }
    }
}

async fn dispatch(command: Command, program: Program<'_>) -> Result<ExitCode, Failure> {
    let local = program.engine;
    let Command::Build(args) = command else {
        return manage(command, program).await.map(|()| ExitCode::SUCCESS);
    };
    let prepared = build::prepare(&args)?;
    let Open { channel, stop } = open(&args.engine, local).await?;
    let built = build::build(channel, &args, prepared).await;
    end(stop).await;
    built
        .map(ExitCode::from)
        .map_err(|failure| failure.context("failed to build"))
}

async fn manage(command: Command, program: Program<'_>) -> Result<(), Failure> {
    let local = program.engine;
    match command {
        Command::Du { engine, args }
        | Command::Cache {
            command: CacheCommand::Du { engine, args },
        } => {
            let Open { channel, stop } = open(&engine, local).await?;
            let result = du(channel, args).await;
            end(stop).await;
            result
        }
        Command::Prune { engine, args }
        | Command::Cache {
            command: CacheCommand::Prune { engine, args },
        } => {
            let Open { channel, stop } = open(&engine, local).await?;
            let result = prune(channel, args).await;
            end(stop).await;
            result
        }
        Command::Explain { engine, args } => {
            let Open { channel, stop } = open(&engine, local).await?;
            let result = explain::explain(channel, args).await;
            end(stop).await;
            result
        }
        Command::Workers { engine, args } => {
            let Open { channel, stop } = open(&engine, local).await?;
            let result = workers(channel, args).await;
            end(stop).await;
            result
        }
        Command::Cache {
            command: CacheCommand::History { engine, format },
        } => {
            let Open { channel, stop } = open(&engine, local).await?;
            let result = histories(channel, format).await;
            end(stop).await;
            result
        }
        Command::Debug {
            command: DebugCommand::DumpLlb(args),
        } => definition::dump(&args),
        Command::Debug {
            command: DebugCommand::DiffLlb(args),
        } => definition::diff(&args.before, &args.after),
        Command::Cache {
            command: CacheCommand::Inspect { cache, tag, insecure },
        } => {
            let text = inspect::inspect(&cache, &tag, insecure, program.registries).await?;
            crate::print(&text);
            Ok(())
        }
        Command::Build(_) | Command::Version | Command::Daemon { .. } => Ok(()),
    }
}

async fn end(stop: Option<Pin<Box<dyn Future<Output = ()> + Send>>>) {
    if let Some(stop) = stop {
        stop.await;
    }
}

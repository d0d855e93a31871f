//! `buildctl`: BuildKit's own client, by flags, output and exit codes.

pub mod args;
mod build;
mod cache;
mod debug;
mod dial;
mod metrics;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser as _};
use tonic::transport::Channel;

use crate::connect::{DEFAULT_ADDRESS, connect};
use crate::failure::Failure;
use crate::version::Version;
use args::{Buildctl, Command, ConnectionArgs, DebugCommand};

pub use cache::{du, prune};
pub use debug::{histories, workers};

/// Exit code for a command that there is not.
const UNKNOWN_COMMAND: u8 = 3;

/// Writes what the metadata of a state directory says, for `debug dump-metadata`.
pub type DumpMetadata = dyn Fn(&Path, &mut dyn std::io::Write) -> Result<(), Failure>;

/// Runs `buildctl`; `args` start with the program's name.
pub fn run(args: Vec<OsString>, version: &Version, dump_metadata: &DumpMetadata) -> ExitCode {
    let parsed = match Buildctl::try_parse_from(args) {
        Ok(parsed) => parsed,
        Err(error) if error.kind() == ErrorKind::InvalidSubcommand => {
            return crate::usage_error(&error, UNKNOWN_COMMAND);
        }
        Err(error) => return crate::usage_error(&error, 1),
    };
    if let Err(failure) = crate::log::start(&parsed.log_format, parsed.debug) {
        return fail(&failure);
    }
    if parsed.version {
        return crate::print(&format!("buildctl {version}\n"));
    }
    let Some(command) = parsed.command else {
        return crate::print(&Buildctl::command().render_help().to_string());
    };
    if let Command::Debug {
        command: DebugCommand::DumpMetadata { root },
    } = &command
    {
        return match dump_metadata(root, &mut std::io::stdout().lock()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => fail(&failure),
        };
    }
    let runtime = match crate::runtime() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    match runtime.block_on(dispatch(command, &parsed.connection)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(&failure),
    }
}

fn fail(failure: &Failure) -> ExitCode {
    let mut stderr = std::io::stderr();
    for excerpt in failure.excerpts() {
        // Without a standard error there is nobody to tell.
        let _ = stderr.write_all(excerpt.as_bytes());
    }
    for message in failure.deny_messages() {
        let _ = writeln!(stderr, "policy deny: {message}");
    }
    let _ = writeln!(stderr, "error: {failure}");
    ExitCode::FAILURE
}

/// Returns the address that is meant: the flag, the environment, or the system's daemon.
pub fn address(args: &ConnectionArgs) -> String {
    let from_env = || {
        std::env::var("BUILDKIT_HOST")
            .ok()
            .filter(|address| !address.is_empty())
    };
    args.addr
        .clone()
        .or_else(from_env)
        .unwrap_or_else(|| DEFAULT_ADDRESS.to_owned())
}

async fn open(args: &ConnectionArgs) -> Result<Channel, Failure> {
    Ok(connect(&address(args), args).await?)
}

async fn dispatch(command: Command, connection: &ConnectionArgs) -> Result<(), Failure> {
    match command {
        Command::Build(args) => build::build(*args, connection).await,
        Command::Du(args) => du(open(connection).await?, args).await,
        Command::Prune(args) => prune(open(connection).await?, args).await,
        Command::PruneHistories(format) => debug::prune_histories(open(connection).await?, format).await,
        Command::DialStdio => dial::dial_stdio(&address(connection), connection.timeout).await,
        Command::Debug { command } => match command {
            DebugCommand::Workers(args) => workers(open(connection).await?, args).await,
            DebugCommand::Info(format) => debug::info(open(connection).await?, format).await,
            DebugCommand::Logs(args) => debug::logs(open(connection).await?, args).await,
            DebugCommand::Histories(format) => histories(open(connection).await?, format).await,
            DebugCommand::Monitor(args) => debug::monitor(open(connection).await?, args).await,
            DebugCommand::Ctl(args) => debug::ctl(connection, args).await,
            DebugCommand::Get { digest } => debug::get(connection, digest).await,
            // Needs no daemon, and was run before.
            DebugCommand::DumpMetadata { .. } => Ok(()),
            DebugCommand::DumpLlb(args) => crate::definition::dump(&args),
        },
    }
}

/// Writes to standard output; a reader that has gone is no error.
pub(crate) fn write_stdout(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

//! The daemon as a program: arguments, configuration, runtime, exit code.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser as _;

use crate::config::{ConfigError, ConfigFile, load, refuse_unsupported};
use crate::flags::Flags;
use crate::serve::{Settings, run};
use crate::trace_socket::TraceSocketChoice;
use crate::verify::verify;
use crate::wiring::{StartError, snapshotter};
use crate::{log, worker};

/// Threads that run builds' bookkeeping; everything heavy has threads of its own.
const MAX_THREADS: usize = 4;

/// Under which name the daemon runs, and what follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Personality {
    /// The program's name.
    pub name: &'static str,
    /// The configuration file.
    pub config: &'static str,
    /// The state directory.
    pub root: &'static str,
    /// Where to listen.
    pub address: &'static str,
    /// Where sockets are.
    pub runtime_dir: &'static str,
}

/// BuildKit's own paths.
pub const BUILDKITD: Personality = Personality {
    name: "buildkitd",
    config: "/etc/buildkit/buildkitd.toml",
    root: "/var/lib/buildkit",
    address: "unix:///run/buildkit/buildkitd.sock",
    runtime_dir: "/run/buildkit",
};

/// Paths beside those of BuildKit.
pub const COOPERD: Personality = Personality {
    name: "cooperd",
    config: "/etc/cooper/cooperd.toml",
    root: "/var/lib/cooper",
    address: "unix:///run/cooper/cooperd.sock",
    runtime_dir: "/run/cooper",
};

/// Runs the daemon; `args` start with the program's name.
pub fn program(args: Vec<OsString>, personality: &Personality) -> ExitCode {
    let flags = match Flags::try_parse_from(args) {
        Ok(flags) => flags.with_env(|name| std::env::var(name).ok()),
        Err(error) => return usage(&error),
    };
    if flags.version {
        let text = format!(
            "{} {} {} {}\n",
            personality.name,
            worker::PACKAGE,
            worker::VERSION,
            worker::revision()
        );
        return match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    match start(&flags, personality) {
        Ok(code) => code,
        Err(error) => {
            // Without a standard error there is nobody to tell.
            let _ = writeln!(
                std::io::stderr(),
                "{}: {}",
                personality.name,
                engine::error::chain_text(&error)
            );
            ExitCode::FAILURE
        }
    }
}

fn usage(error: &clap::Error) -> ExitCode {
    let text = error.render().to_string();
    let (written, code) = if error.use_stderr() {
        (std::io::stderr().write_all(text.as_bytes()), ExitCode::FAILURE)
    } else {
        (std::io::stdout().write_all(text.as_bytes()), ExitCode::SUCCESS)
    };
    if written.is_ok() { code } else { ExitCode::FAILURE }
}

fn start(flags: &Flags, personality: &Personality) -> Result<ExitCode, StartError> {
    let path = flags
        .config
        .clone()
        .unwrap_or_else(|| PathBuf::from(personality.config));
    let (mut file, unknown) = load(&path)?;
    flags.apply(&mut file)?;
    refuse_unsupported(&file).map_err(ConfigError::from)?;
    log::start(&file.log)?;
    for key in unknown {
        tracing::warn!(key, path = %path.display(), "unknown key in the configuration");
    }
    // Modes are set where files are made; a mask would change those that images ask for.
    rustix::process::umask(rustix::fs::Mode::empty());
    let root = file
        .root
        .clone()
        .unwrap_or_else(|| PathBuf::from(personality.root));
    let root = std::path::absolute(&root).map_err(|source| StartError::System {
        action: format!("failed to find {}", root.display()),
        source,
    })?;
    if flags.verify {
        let choice = snapshotter(&file.worker.oci.snapshotter);
        let is_sound = verify(&root, choice, &mut std::io::stdout().lock())?;
        return Ok(if is_sound {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let mut addresses = file.grpc.address.clone();
    if addresses.is_empty() {
        addresses.push(personality.address.to_owned());
    }
    let trace_socket = trace_socket(&file, personality).map_err(|source| StartError::System {
        action: "failed to find the working directory".to_owned(),
        source,
    })?;
    let settings = Settings {
        file,
        root,
        addresses,
        trace_socket,
        pidfile: flags.pidfile.clone(),
    };
    let runtime = runtime().map_err(|source| StartError::System {
        action: "failed to start threads".to_owned(),
        source,
    })?;
    let ended = runtime.block_on(run(settings));
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    ended.map(|()| ExitCode::SUCCESS)
}

fn trace_socket(file: &ConfigFile, personality: &Personality) -> std::io::Result<TraceSocketChoice> {
    let user_dir = std::env::var("XDG_RUNTIME_DIR").ok();
    let user_dir = user_dir.filter(|_| file.worker.oci.rootless);
    TraceSocketChoice::new(
        &file.otel,
        Path::new(personality.runtime_dir),
        user_dir.as_deref(),
    )
}

/// Makes the runtime of daemons and of engines in a client's process.
///
/// # Errors
/// When threads cannot be made.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    // Before there are threads, each of which would begin with a heap of its own.
    engine::executor::limit_heaps();
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(MAX_THREADS);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
}

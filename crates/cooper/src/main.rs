//! The binary: `cooper`, and by its name `cooperd`, `buildkitd` and `buildctl`.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;

use cli::cooper::{LocalEndpoint, LocalEngine};
use cli::failure::{Failure, chain};
use cli::version::Version;
use daemon::program::{BUILDKITD, COOPERD, program};
use daemon::{embedded, worker};

/// Starts engines within this process.
struct Embedded;

impl LocalEngine for Embedded {
    fn start(
        &self,
        root: Option<PathBuf>,
    ) -> Pin<Box<dyn Future<Output = Result<LocalEndpoint, Failure>> + Send + '_>> {
        Box::pin(async move {
            let root = root.unwrap_or_else(embedded::default_root);
            let root = std::path::absolute(&root)?;
            let started = embedded::start(&root)
                .await
                .map_err(|error| Failure::new(chain(&error)))?;
            Ok(LocalEndpoint {
                address: started.address,
                stop: started.stop,
            })
        })
    }
}

fn dump_metadata(root: &Path, out: &mut dyn std::io::Write) -> Result<(), Failure> {
    daemon::debug::dump_metadata(root, out).map_err(|error| Failure::new(chain(&error)))
}

fn version() -> Version {
    Version {
        package: worker::PACKAGE.to_owned(),
        version: worker::VERSION.to_owned(),
        revision: worker::revision().to_owned(),
    }
}

fn main() -> ExitCode {
    // Containers are made by a process that must not have threads: this returns in all others.
    daemon::supervisor_main();
    let args: Vec<OsString> = std::env::args_os().collect();
    let name = args
        .first()
        .map(Path::new)
        .and_then(Path::file_name)
        .unwrap_or_default();
    match name.to_str() {
        Some("buildkitd") => program(args, &BUILDKITD),
        Some("cooperd") => program(args, &COOPERD),
        Some("buildctl") => cli::buildctl::run(args, &version(), &dump_metadata),
        _ => match cli::cooper::run(args, &version(), &Embedded) {
            Ok(code) => code,
            Err(flags) => {
                let named = std::iter::once(OsString::from(COOPERD.name)).chain(flags);
                program(named.collect(), &COOPERD)
            }
        },
    }
}

//! The binary: `cooper`, and by its name `cooperd`, `buildkitd` and `buildctl`.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;

use cli::cooper::{Later, LocalEndpoint, LocalEngine, Program, Registries, RemoteCache};
use cli::docker_config::DockerConfig;
use cli::failure::{Failure, chain};
use cli::version::Version;
use daemon::caches::{self, AskAccount};
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

/// Reads registries with the client of the daemon.
struct Reader;

impl Registries for Reader {
    fn open<'a>(
        &'a self,
        name: &'a str,
        insecure: bool,
        accounts: DockerConfig,
    ) -> Later<'a, Box<dyn RemoteCache>> {
        let ask: AskAccount = Arc::new(move |host| {
            let accounts = accounts.clone();
            Box::pin(async move {
                match accounts.account(&host).await {
                    Ok(account) => Ok((account.username, account.secret)),
                    Err(error) => Err(error.to_string()),
                }
            })
        });
        Box::pin(async move {
            let opened = caches::RemoteCache::open(name, insecure, ask).await;
            let opened = opened.map_err(|error| Failure::new(chain(&error)))?;
            Ok(Box::new(Opened(opened)) as Box<dyn RemoteCache>)
        })
    }
}

struct Opened(caches::RemoteCache);

/// Waits for what the registry says.
fn told<'a, T>(asked: impl Future<Output = Result<T, caches::CacheError>> + Send + 'a) -> Later<'a, T> {
    Box::pin(async move { asked.await.map_err(|error| Failure::new(chain(&error))) })
}

impl RemoteCache for Opened {
    fn root(&self) -> String {
        self.0.root()
    }

    fn manifest<'a>(&'a self, digest: &'a str) -> Later<'a, Vec<u8>> {
        told(self.0.manifest(digest))
    }

    fn blob<'a>(&'a self, digest: &'a str, size_bytes: u64) -> Later<'a, Vec<u8>> {
        told(self.0.blob(digest, size_bytes))
    }

    fn size<'a>(&'a self, digest: &'a str) -> Later<'a, Option<u64>> {
        told(self.0.size(digest))
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

const PROGRAM: Program<'static> = Program {
    engine: &Embedded,
    registries: &Reader,
};

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
        _ => match cli::cooper::run(args, &version(), PROGRAM) {
            Ok(code) => code,
            Err(flags) => {
                let named = std::iter::once(OsString::from(COOPERD.name)).chain(flags);
                program(named.collect(), &COOPERD)
            }
        },
    }
}

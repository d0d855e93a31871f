//! The contract of the runtime port, asserted from inside containers, on every runtime this machine has.
//!
//! Its own harness, because the supervisor is this program executed again: it has to be recognised before anything else.

#![expect(clippy::print_stderr, reason = "a test harness talks to people")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod confinement;
mod fixture;
mod labels;
mod lifecycle;
mod mounts;
mod network;

use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use fixture::Lab;

/// A test: its name, and what it does.
pub type Test = (
    &'static str,
    fn(Arc<Lab>) -> Pin<Box<dyn Future<Output = ()> + Send>>,
);

/// Lists async functions as [`Test`]s.
#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        &[$((concat!(module_path!(), "::", stringify!($name)), |lab| Box::pin($name(lab)))),*]
    };
}

fn main() -> ExitCode {
    executor::supervisor_main();
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    if std::env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    if let Some(reason) = fixture::cannot_run() {
        eprintln!("skipped: {reason}");
        return ExitCode::SUCCESS;
    }
    network::into_a_namespace();
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let mut failed = Vec::new();
    for runtime in fixture::runtimes() {
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(reason) => {
                eprintln!("skipped: {reason}");
                continue;
            }
        };
        let lab = Arc::new(tokio.block_on(async { Lab::new(&runtime) }));
        for tests in [
            confinement::TESTS,
            labels::TESTS,
            mounts::TESTS,
            lifecycle::TESTS,
            network::TESTS,
        ] {
            for (name, test) in tests {
                let name = format!("{}::{}", lab.name(), name.trim_start_matches("suite::"));
                if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
                    continue;
                }
                let begin = Instant::now();
                let result = tokio.block_on(tokio.spawn(test(Arc::clone(&lab))));
                let verdict = if result.is_ok() { "ok" } else { "FAILED" };
                eprintln!("test {name} ... {verdict} ({} ms)", begin.elapsed().as_millis());
                if result.is_err() {
                    failed.push(name);
                }
            }
        }
        let lab = Arc::into_inner(lab).unwrap();
        tokio.block_on(async move { drop(lab) });
    }
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("failed: {failed:?}");
    ExitCode::FAILURE
}

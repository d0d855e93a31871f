//! The command line: `cooper` and, under its own name, `buildctl`.
//!
//! Purpose: turn arguments into requests, host the session services a build needs from its client, and show progress.
//!
//! Non-goals: nothing is built here; all work is asked of a daemon through [`api`].
//!
//! Invariants: secrets are read when a build asks for them and never printed; only this crate decides on exit codes.
//!
//! Start at [`cooper::run`] and [`buildctl::run`].
#![forbid(unsafe_code)]

pub mod buildctl;
pub mod connect;
pub mod cooper;
pub mod definition;
pub mod docker_config;
pub mod explanation;
pub mod failure;
pub mod format;
pub mod ids;
pub mod local_cache;
mod log;
pub mod metadata;
pub mod oci_index;
pub mod progress;
pub mod records;
pub mod services;
pub mod solve;
pub mod spec;
pub mod version;

use std::io::Write as _;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;

use failure::Failure;
use progress::Display;
use progress::event::VertexWarning;

/// A build that has ended well.
#[derive(Debug)]
struct Ended {
    outcome: solve::Outcome,
    warnings: Vec<VertexWarning>,
}

/// Runs a build and shows it; signals cancel it. With `tells`, what is known of why steps ran is told in the end.
async fn run_build(
    channel: Channel,
    build: solve::Build,
    display: Box<dyn Display>,
    tells: bool,
) -> Result<Ended, Failure> {
    let cancel = CancellationToken::new();
    let _signals = AbortOnDropHandle::new(tokio::spawn(cancel_on_signals(cancel.clone())?));
    let (events, messages) = mpsc::channel(64);
    let show = tokio::spawn(progress::show(display, messages));
    let explains = build.explain && tells;
    let outcome = Box::pin(solve::run(channel, build, events, cancel)).await;
    let shown = match show.await {
        Ok(shown) => shown,
        Err(error) => return Err(Failure::new(format!("progress ended early: {error}"))),
    };
    if let (true, Ok(shown)) = (explains, &shown) {
        let text = explanation::to_text(&shown.explanations);
        std::io::stderr().write_all(format!("\nWhy steps ran:\n{text}").as_bytes())?;
    }
    Ok(Ended {
        outcome: outcome?,
        warnings: shown?.warnings,
    })
}

/// Cancels at the first signal, and ends the process at the third: a user who insists is obeyed.
fn cancel_on_signals(cancel: CancellationToken) -> Result<impl Future<Output = ()> + Send, Failure> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        for _ in 0..3 {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            cancel.cancel();
        }
        std::process::exit(1);
    })
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
}

/// Writes to standard output and turns the result into an exit code.
fn print(text: &str) -> ExitCode {
    match buildctl::write_stdout(text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Prints what is wrong with arguments, or the help that was asked for.
fn usage_error(error: &clap::Error, code: u8) -> ExitCode {
    if error.use_stderr() {
        // Without a standard error there is nobody to tell.
        let _ = std::io::stderr().write_all(error.render().to_string().as_bytes());
        ExitCode::from(code)
    } else {
        print(&error.render().to_string())
    }
}

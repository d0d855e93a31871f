//! Messages of this program itself, on standard error.

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::failure::Failure;

/// Starts logging; a second start has no effect.
///
/// # Errors
/// For a format of another name than `text` and `json`.
pub fn start(format: &str, debug: bool) -> Result<(), Failure> {
    let level = if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::WARN
    };
    // What a daemon in this process answers its clients with is shown as the command's own failure.
    let services = if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::OFF
    };
    let filter = Targets::new()
        .with_default(level)
        .with_target("daemon::services", services);
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(false);
    // The process may log already when it runs an engine, too.
    let _ = match format {
        "json" => registry.with(layer.json()).try_init(),
        "text" | "" => registry.with(layer.with_ansi(false)).try_init(),
        _ => return Err(Failure::new(format!("unsupported log type {format:?}"))),
    };
    Ok(())
}

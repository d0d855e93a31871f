//! The daemon's own log, on standard error.

use tracing_subscriber::filter::LevelFilter;

use crate::config::{ConfigError, LogTable};

/// Starts logging. A process that logs already goes on as before.
///
/// # Errors
/// For a format or level of another name.
pub fn start(table: &LogTable) -> Result<(), ConfigError> {
    let level = match table.level.to_lowercase().as_str() {
        "trace" => LevelFilter::TRACE,
        "debug" => LevelFilter::DEBUG,
        "" | "info" => LevelFilter::INFO,
        "warn" | "warning" => LevelFilter::WARN,
        "error" | "fatal" | "panic" => LevelFilter::ERROR,
        other => {
            return Err(ConfigError::invalid(format!(
                "unsupported log level: not a valid logrus Level: {other:?}"
            )));
        }
    };
    // What libraries say about every frame is of no use to anybody.
    let filter = tracing_subscriber::filter::Targets::new()
        .with_default(level)
        .with_target("h2", level.min(LevelFilter::INFO))
        .with_target("hyper", level.min(LevelFilter::INFO))
        .with_target("tower", level.min(LevelFilter::INFO));
    use tracing_subscriber::layer::SubscriberExt as _;
    use tracing_subscriber::util::SubscriberInitExt as _;
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(false);
    // The process may log already when a client runs this in itself.
    let _ = match table.format.as_str() {
        "json" => registry.with(layer.json()).try_init(),
        "text" | "" => registry.with(layer.with_ansi(false)).try_init(),
        other => return Err(ConfigError::invalid(format!("unsupported log type {other:?}"))),
    };
    Ok(())
}

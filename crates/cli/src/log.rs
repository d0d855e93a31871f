//! Messages of this program itself, on standard error.

use tracing_subscriber::filter::LevelFilter;

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
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(level)
        .with_target(false);
    // The process may log already when it runs an engine, too.
    let _ = match format {
        "json" => builder.json().try_init(),
        "text" | "" => builder.try_init(),
        _ => return Err(Failure::new(format!("unsupported log type {format:?}"))),
    };
    Ok(())
}

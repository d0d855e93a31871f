//! Shows a build while it runs: live on a terminal, as plain lines, as JSON, or not at all.
//!
//! Displays read [`event::Status`] messages. Plain and terminal output share [`trace::Trace`], which knows the state
//! of every vertex.

pub mod event;
pub mod interval;
pub mod plain;
pub mod rawjson;
pub mod screen;
pub mod trace;
pub mod tty;

use std::io::{self, IsTerminal as _, Write};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use crate::explanation::Explanation;
use event::{Status, VertexWarning};

/// How a build is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Live on a terminal, else plain.
    Auto,
    /// Live; an error without a terminal.
    Tty,
    /// Lines.
    Plain,
    /// One JSON object a message.
    RawJson,
    /// Nothing.
    Quiet,
}

/// Why a display cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ProgressError {
    /// A mode of another name.
    #[error("invalid progress mode {mode}")]
    Mode {
        /// The name.
        mode: String,
    },
    /// Live output was asked for without a terminal.
    #[error("failed to get console: provided file is not a console")]
    NoTerminal,
    /// The output cannot be written.
    #[error("failed to write progress")]
    Write {
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl std::str::FromStr for Mode {
    type Err = ProgressError;

    fn from_str(text: &str) -> Result<Self, ProgressError> {
        match text {
            "" | "auto" => Ok(Self::Auto),
            "tty" => Ok(Self::Tty),
            "plain" => Ok(Self::Plain),
            "rawjson" => Ok(Self::RawJson),
            "quiet" | "none" => Ok(Self::Quiet),
            _ => Err(ProgressError::Mode {
                mode: text.to_owned(),
            }),
        }
    }
}

/// One way to show a build.
pub trait Display: Send {
    /// Takes in a message.
    ///
    /// # Errors
    /// When the output cannot be written.
    fn update(&mut self, status: Status) -> io::Result<()>;

    /// Writes what has changed.
    ///
    /// # Errors
    /// When the output cannot be written.
    fn refresh(&mut self) -> io::Result<()>;

    /// Writes the rest: the final state, and the logs of steps that failed.
    ///
    /// # Errors
    /// When the output cannot be written.
    fn finish(&mut self) -> io::Result<()>;
}

/// Shows nothing.
#[derive(Debug)]
pub struct Quiet;

impl Display for Quiet {
    fn update(&mut self, _: Status) -> io::Result<()> {
        Ok(())
    }

    fn refresh(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Shows a build in several ways at once.
pub struct Tee(pub Vec<Box<dyn Display>>);

impl Display for Tee {
    fn update(&mut self, status: Status) -> io::Result<()> {
        let Some((last, others)) = self.0.split_last_mut() else {
            return Ok(());
        };
        for display in others {
            display.update(status.clone())?;
        }
        last.update(status)
    }

    fn refresh(&mut self) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|display| display.refresh())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|display| display.finish())
    }
}

/// Makes the display of a mode on standard error.
///
/// # Errors
/// [`ProgressError::NoTerminal`] for [`Mode::Tty`] without a terminal.
pub fn on_stderr(mode: Mode) -> Result<Box<dyn Display>, ProgressError> {
    let stderr = io::stderr();
    let terminal = stderr.is_terminal();
    Ok(match mode {
        Mode::Tty if !terminal => return Err(ProgressError::NoTerminal),
        Mode::Auto | Mode::Tty if terminal => Box::new(tty::TtyDisplay::new(stderr, tty::Look::from_env())),
        Mode::Auto | Mode::Tty | Mode::Plain => Box::new(plain::PlainDisplay::new(stderr)),
        Mode::RawJson => Box::new(rawjson::RawJsonDisplay::new(stderr)),
        Mode::Quiet => Box::new(Quiet),
    })
}

/// Makes the display of a mode on standard output, for logs that are asked for.
///
/// # Errors
/// [`ProgressError::NoTerminal`] for [`Mode::Tty`] without a terminal.
pub fn on_stdout(mode: Mode) -> Result<Box<dyn Display>, ProgressError> {
    let stdout = io::stdout();
    let terminal = stdout.is_terminal();
    Ok(match mode {
        Mode::Tty if !terminal => return Err(ProgressError::NoTerminal),
        Mode::Auto | Mode::Tty if terminal => Box::new(tty::TtyDisplay::new(stdout, tty::Look::from_env())),
        Mode::Auto | Mode::Tty | Mode::Plain => Box::new(plain::PlainDisplay::new(stdout)),
        Mode::RawJson => Box::new(rawjson::RawJsonDisplay::new(stdout)),
        Mode::Quiet => Box::new(Quiet),
    })
}

/// What was among the messages of a build.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// Warnings.
    pub warnings: Vec<VertexWarning>,
    /// Why vertices ran.
    pub explanations: Vec<Explanation>,
}

/// Shows messages until their sender is dropped; returns the warnings and explanations among them.
///
/// Cancel safe in that nothing but output is lost.
///
/// # Errors
/// When the output cannot be written.
pub async fn show(
    mut display: Box<dyn Display>,
    mut messages: mpsc::Receiver<Status>,
) -> Result<Shown, ProgressError> {
    let (tick, least) = match std::env::var("TTY_DISPLAY_RATE")
        .ok()
        .and_then(|rate| rate.parse().ok())
    {
        Some(rate) => (Duration::from_millis(rate), Duration::from_millis(rate)),
        None => (Duration::from_millis(150), Duration::from_millis(100)),
    };
    let mut ticker = tokio::time::interval(tick.max(Duration::from_millis(1)));
    ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut refreshed: Option<Instant> = None;
    let mut shown = Shown::default();
    let write = |source| ProgressError::Write { source };
    loop {
        tokio::select! {
            message = messages.recv() => {
                let Some(status) = message else { break };
                shown.warnings.extend(status.warnings.iter().cloned());
                shown.explanations.extend(status.explanations.iter().cloned());
                display.update(status).map_err(write)?;
                if refreshed.is_none_or(|at| at.elapsed() >= least) {
                    display.refresh().map_err(write)?;
                    refreshed = Some(Instant::now());
                }
                ticker.reset();
            }
            _ = ticker.tick() => display.refresh().map_err(write)?,
        }
    }
    display.finish().map_err(write)?;
    Ok(shown)
}

/// Writes and flushes in one go.
fn write_out(out: &mut impl Write, text: &str) -> io::Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    out.write_all(text.as_bytes())?;
    out.flush()
}

//! Handles on what runs.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::process::Signal;
use rustix::termios::Winsize;
use tokio::io::unix::AsyncFd;

use crate::error::RunError;
use crate::label::ProcessLabels;
use crate::request::{ContainerId, ExitStatus, Process, Security, Stdio, Ulimit};
use crate::runtime::{Running, Runtime};
use crate::spec;

/// A running container. Dropping it kills it without waiting.
#[derive(Debug)]
pub struct Container {
    pub(crate) id: ContainerId,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) first: ContainerProcess,
    /// What a further process leaves out.
    pub(crate) defaults: Process,
    pub(crate) security: Security,
    pub(crate) ulimits: Vec<Ulimit>,
    pub(crate) capabilities: u64,
    /// Of all its processes.
    pub(crate) labels: ProcessLabels,
}

impl Container {
    /// Returns its id.
    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    /// Returns its first process.
    pub fn process(&self) -> &ContainerProcess {
        &self.first
    }

    /// Puts a further process into it. What `process` leaves empty (`env`, `cwd`, `user`) is as for the first process.
    /// Returns once its program is executed. Dropping the future before kills it.
    ///
    /// # Errors
    /// [`RunError::Start`] if the container has ended or the program cannot be executed.
    pub async fn exec(&self, mut process: Process, stdio: Stdio) -> Result<ContainerProcess, RunError> {
        if process.env.is_empty() {
            process.env.clone_from(&self.defaults.env);
        }
        if process.cwd.is_empty() {
            process.cwd.clone_from(&self.defaults.cwd);
        }
        if process.user.is_empty() {
            process.user.clone_from(&self.defaults.user);
        }
        let mut spec = spec::process_spec(&process, self.security, &self.ulimits, self.capabilities)?;
        spec.labels.clone_from(&self.labels);
        let running = self.runtime.join(&self.first.running, spec, stdio).await?;
        let mut guard = KillGuard {
            runtime: &*self.runtime,
            running: &running,
            armed: true,
        };
        running.started().await?;
        guard.armed = false;
        drop(guard);
        Ok(ContainerProcess { running })
    }

    /// Waits until the container is gone, with all its processes, mounts and mount points. Can be called again.
    ///
    /// # Errors
    /// [`RunError::SupervisorLost`] if nobody can tell any more.
    pub async fn wait(&self) -> Result<ExitStatus, RunError> {
        self.first.wait().await
    }

    /// Kills everything in it.
    pub fn kill(&self) {
        kill(&*self.runtime, &self.first.running);
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Kills what is begun or runs.
pub(crate) fn kill(runtime: &dyn Runtime, running: &Running) {
    if !running.is_over() && !matches!(running.signal(Signal::KILL), Ok(true)) {
        runtime.kill(running.number);
    }
}

/// Kills a process that nobody waits for any more.
#[derive(Debug)]
pub(crate) struct KillGuard<'a> {
    pub(crate) runtime: &'a dyn Runtime,
    pub(crate) running: &'a Running,
    pub(crate) armed: bool,
}

impl Drop for KillGuard<'_> {
    fn drop(&mut self) {
        if self.armed {
            kill(self.runtime, self.running);
        }
    }
}

/// A process in a container. Dropping it lets it run.
#[derive(Debug)]
pub struct ContainerProcess {
    pub(crate) running: Arc<Running>,
}

impl ContainerProcess {
    /// Sends a signal by number. A process that has ended already is no error.
    ///
    /// # Errors
    /// [`RunError::Invalid`] for a number that is no signal.
    pub fn signal(&self, signal: i32) -> Result<(), RunError> {
        let signal = Signal::from_named_raw(signal).ok_or_else(|| RunError::Invalid {
            message: format!("{signal} is no signal"),
        })?;
        self.running.signal(signal).map(drop)
    }

    /// Takes the terminal, if the process was given one. Its first call returns it, later ones do not.
    pub fn take_pty(&self) -> Option<Pty> {
        self.running.take_pty()
    }

    /// Waits for its end. Can be called again.
    ///
    /// # Errors
    /// [`RunError::SupervisorLost`] if nobody can tell any more.
    pub async fn wait(&self) -> Result<ExitStatus, RunError> {
        self.running.ended().await
    }
}

/// Our side of a process' terminal.
#[derive(Debug)]
pub struct Pty {
    master: AsyncFd<OwnedFd>,
}

impl Pty {
    pub(crate) fn new(master: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&master, true)?;
        Ok(Self {
            master: crate::sys::register(master)?,
        })
    }

    /// Reads what the process writes; 0 at its end. Safe to cancel.
    ///
    /// # Errors
    /// As `read(2)`.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.master.readable().await?;
            match ready.try_io(|master| Ok(rustix::io::read(master, &mut *buffer)?)) {
                // The last process that had the terminal open is gone.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(0),
                Ok(result) => return result,
                Err(_) => {}
            }
        }
    }

    /// Writes all of `bytes` as the process' input.
    ///
    /// # Errors
    /// As `write(2)`.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.master.writable().await?;
            if let Ok(result) = ready.try_io(|master| Ok(rustix::io::write(master, bytes)?)) {
                bytes = bytes.get(result?..).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// Changes the terminal's size.
    ///
    /// # Errors
    /// As `ioctl(2)`.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(rustix::termios::tcsetwinsize(self.master.get_ref(), size)?)
    }
}

//! Handles on what runs.

use std::os::fd::OwnedFd;

use crate::error::RunError;
use crate::request::{ContainerId, ExitStatus, Process, Stdio};

/// A running container. Dropping it kills it without waiting.
#[derive(Debug)]
pub struct Container {}

impl Container {
    /// Returns its id.
    pub fn id(&self) -> &ContainerId {
        todo!()
    }

    /// Returns its first process.
    pub fn process(&self) -> &ContainerProcess {
        todo!()
    }

    /// Puts a further process into it. What `process` leaves empty (`env`, `cwd`, `user`) is as for the first process.
    pub async fn exec(&self, process: Process, stdio: Stdio) -> Result<ContainerProcess, RunError> {
        todo!()
    }

    /// Waits until the container is gone, then removes what was made for it. Can be called again.
    pub async fn wait(&self) -> Result<ExitStatus, RunError> {
        todo!()
    }

    /// Kills everything in it.
    pub fn kill(&self) {
        todo!()
    }
}

/// A process in a container. Dropping it lets it run.
#[derive(Debug)]
pub struct ContainerProcess {}

impl ContainerProcess {
    /// Sends a signal by number.
    pub fn signal(&self, signal: i32) -> Result<(), RunError> {
        todo!()
    }

    /// Takes the terminal, if the process was given one. Its first call returns it, later ones do not.
    pub fn take_pty(&self) -> Option<Pty> {
        todo!()
    }

    /// Waits for its end. Can be called again.
    pub async fn wait(&self) -> Result<ExitStatus, RunError> {
        todo!()
    }
}

/// Our side of a process' terminal.
#[derive(Debug)]
pub struct Pty {
    master: tokio::io::unix::AsyncFd<OwnedFd>,
}

impl Pty {
    /// Reads what the process writes; 0 at its end. Safe to cancel.
    pub async fn read(&self, buffer: &mut [u8]) -> std::io::Result<usize> {
        todo!()
    }

    /// Writes all of `bytes` as the process' input.
    pub async fn write_all(&self, bytes: &[u8]) -> std::io::Result<()> {
        todo!()
    }

    /// Changes the terminal's size.
    pub fn resize(&self, rows: u16, columns: u16) -> std::io::Result<()> {
        todo!()
    }
}

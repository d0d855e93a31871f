//! The port to whatever carries out container specifications, and the state of what runs.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use rustix::process::Signal;
use tokio::sync::watch;

use crate::container::Pty;
use crate::error::RunError;
use crate::label::LevelLease;
use crate::network::Hold;
use crate::request::{ExitStatus, Stdio};
use crate::spec::{ContainerSpec, ProcessSpec};

/// Carries out specifications. The contract suite in `tests` runs against every implementation.
#[async_trait]
pub(crate) trait Runtime: Send + Sync + fmt::Debug {
    /// Begins to start a container. Its end is told after all its processes and mounts are gone and the mount points
    /// made for it are removed. `network` is the namespace of a container whose specification says that it is given; it is
    /// held until then.
    async fn launch(
        &self,
        spec: ContainerSpec,
        attachment: Vec<u8>,
        stdio: Stdio,
        network: Option<Hold>,
    ) -> Result<Arc<Running>, RunError>;

    /// Begins to start a further process in a container.
    async fn join(
        &self,
        container: &Running,
        process: ProcessSpec,
        stdio: Stdio,
    ) -> Result<Arc<Running>, RunError>;

    /// Kills what was begun but has not said that it runs.
    fn kill(&self, number: u64);
}

/// How far a process is.
#[derive(Clone, Debug)]
pub(crate) enum Phase {
    /// It is being set up.
    Starting,
    /// Its program is executed.
    Running,
    /// It did not start; nothing is left of it.
    Failed(String),
    /// It ended, and everything that was made for it is gone.
    Exited(ExitStatus),
    /// Nobody knows: the runtime is gone.
    Lost(String),
}

/// A process that was begun.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) number: u64,
    phase: watch::Sender<Phase>,
    process: Mutex<Option<OwnedFd>>,
    pty: Mutex<Option<Pty>>,
    /// Given back when it is gone.
    network: Mutex<Option<Hold>>,
    /// Free for others when it is gone.
    level: Mutex<Option<Arc<LevelLease>>>,
}

impl Running {
    /// Describes a process that starts.
    pub(crate) fn new(number: u64) -> Self {
        Self {
            number,
            phase: watch::Sender::new(Phase::Starting),
            process: Mutex::new(None),
            pty: Mutex::new(None),
            network: Mutex::new(None),
            level: Mutex::new(None),
        }
    }

    /// Lets it hold its network until it is gone.
    pub(crate) fn hold(&self, network: Option<Hold>) {
        *self.network.lock().unwrap_or_else(PoisonError::into_inner) = network;
    }

    /// Lets it have its SELinux level alone until it is gone.
    pub(crate) fn keep_level(&self, level: Option<Arc<LevelLease>>) {
        *self.level.lock().unwrap_or_else(PoisonError::into_inner) = level;
        if self.is_over() {
            self.free_level();
        }
    }

    fn free_level(&self) {
        *self.level.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Records that it runs.
    pub(crate) fn set_started(&self, process: OwnedFd, pty: Option<Pty>) {
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
        *self.pty.lock().unwrap_or_else(PoisonError::into_inner) = pty;
        self.phase.send_replace(Phase::Running);
    }

    /// Records how it ended.
    pub(crate) fn set_phase(&self, phase: Phase) {
        self.hold(None);
        self.phase.send_replace(phase);
        self.free_level();
    }

    /// Waits until it runs.
    pub(crate) async fn started(&self) -> Result<(), RunError> {
        let mut phases = self.phase.subscribe();
        let phase = phases.wait_for(|phase| !matches!(phase, Phase::Starting)).await;
        match phase.as_deref() {
            Ok(Phase::Failed(message)) => Err(RunError::Start {
                message: message.clone(),
            }),
            Ok(Phase::Lost(reason)) => Err(RunError::SupervisorLost {
                reason: reason.clone(),
            }),
            // The sender is ours.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Waits until it is gone.
    pub(crate) async fn ended(&self) -> Result<ExitStatus, RunError> {
        let mut phases = self.phase.subscribe();
        let phase = phases
            .wait_for(|phase| !matches!(phase, Phase::Starting | Phase::Running))
            .await;
        match phase.as_deref() {
            Ok(Phase::Exited(status)) => Ok(*status),
            Ok(Phase::Failed(message)) => Err(RunError::Start {
                message: message.clone(),
            }),
            Ok(Phase::Lost(reason)) => Err(RunError::SupervisorLost {
                reason: reason.clone(),
            }),
            Ok(_) | Err(_) => Err(RunError::SupervisorLost {
                reason: "its state was dropped".to_owned(),
            }),
        }
    }

    /// Whether it is gone.
    pub(crate) fn is_over(&self) -> bool {
        !matches!(*self.phase.borrow(), Phase::Starting | Phase::Running)
    }

    /// Sends a signal; `false` if it does not run yet.
    pub(crate) fn signal(&self, signal: Signal) -> Result<bool, RunError> {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(process) = process.as_ref() else {
            return Ok(false);
        };
        match rustix::process::pidfd_send_signal(process.as_fd(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(true),
            Err(error) => Err(RunError::Io {
                what: "send a signal".to_owned(),
                source: error.into(),
            }),
        }
    }

    /// Takes the terminal.
    pub(crate) fn take_pty(&self) -> Option<Pty> {
        self.pty.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

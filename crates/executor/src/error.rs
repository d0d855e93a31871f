//! Why nothing could run.

use std::io;
use std::path::PathBuf;

use crate::network::NetworkError;

/// Why an executor could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// Containers need rights that this process lacks.
    #[error("running containers needs root: {reason}")]
    Unprivileged {
        /// What is missing.
        reason: String,
    },
    /// The runtime's program was not found.
    #[error("failed to find {program} binary")]
    NoRuntime {
        /// What was looked for.
        program: String,
    },
    /// A directory could not be prepared.
    #[error("cannot prepare {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The network of containers could not be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The supervisor could not be started.
    #[error("cannot start the container supervisor")]
    Supervisor {
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Why a process did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The request contradicts itself or names something impossible.
    #[error("{message}")]
    Invalid {
        /// What is wrong.
        message: String,
    },
    /// The container could not be set up, or its program not executed: the request or the image is at fault.
    #[error("{message}")]
    Start {
        /// What failed, with the reason.
        message: String,
    },
    /// No container of this id runs.
    #[error("container {id} not found")]
    NotRunning {
        /// The id.
        id: String,
    },
    /// This process may not run containers.
    #[error("running containers needs root: {reason}")]
    Unprivileged {
        /// What is missing.
        reason: String,
    },
    /// The container's network could not be had.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The run was cancelled; everything it started is gone.
    #[error("context canceled")]
    Canceled,
    /// The supervisor is gone, and with it all containers.
    #[error("the container supervisor ended: {reason}")]
    SupervisorLost {
        /// What is known.
        reason: String,
    },
    /// Something of the host failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

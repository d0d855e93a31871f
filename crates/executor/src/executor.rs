//! The executor: prepares what a container needs of the host and hands it to a runtime.

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use crate::container::Container;
use crate::error::{ExecutorError, RunError};
use crate::request::{ExitStatus, RunRequest, Stdio};

/// Which runtime carries out containers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RuntimeChoice {
    /// Our own, in a supervisor process.
    #[default]
    Embedded,
    /// An OCI runtime such as runc or crun: a program's name or path.
    Binary(PathBuf),
}

/// What replaces parts of the host's `resolv.conf` in containers. Empty parts keep the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsConfig {
    /// Addresses of name servers.
    pub nameservers: Vec<String>,
    /// Options, such as `ndots:2`.
    pub options: Vec<String>,
    /// Domains that are searched.
    pub search_domains: Vec<String>,
}

/// How to set up an executor.
#[derive(Clone, Debug)]
pub struct ExecutorConfig {
    /// A directory of the executor's own, e.g. `<root>/executor`; made if it is missing.
    pub state_dir: PathBuf,
    /// The runtime.
    pub runtime: RuntimeChoice,
    /// What replaces the host's DNS configuration.
    pub dns: DnsConfig,
    /// Cgroup below which containers are that do not ask for one; empty: `/buildkit/<id>`.
    pub cgroup_parent: String,
    /// Written to `oom_score_adj` of containers.
    pub oom_score_adj: Option<i32>,
}

/// Runs containers. Cheap to clone; the last clone ends the supervisor and whatever still runs.
#[derive(Clone, Debug)]
pub struct Executor {}

impl Executor {
    /// Prepares the directory and starts the supervisor. Called on a tokio runtime. Fails when not root.
    pub fn new(config: ExecutorConfig) -> Result<Self, ExecutorError> {
        todo!()
    }

    /// Runs a container to its end and removes what was made for it.
    ///
    /// `cancel` kills it (`SIGKILL`, as BuildKit does) and yields [`RunError::Canceled`], again after all is gone.
    /// Dropping the future kills it too, but does not wait.
    pub async fn run(
        &self,
        request: RunRequest,
        stdio: Stdio,
        cancel: &CancellationToken,
    ) -> Result<ExitStatus, RunError> {
        todo!()
    }

    /// Starts a container. Returns once its program is executed.
    pub async fn start(&self, request: RunRequest, stdio: Stdio) -> Result<Container, RunError> {
        todo!()
    }
}

//! The executor: prepares what a container needs of the host and hands it to a runtime.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::binary::Binary;
use crate::container::{Container, ContainerProcess, KillGuard, kill};
use crate::embedded::Embedded;
use crate::error::{ExecutorError, RunError};
use crate::hosts;
use crate::label::{LabelConfig, Labeler, ProcessLabels};
use crate::network::{Hold, NetworkChoice, Networks, ProxyNetwork};
use crate::request::{ExitStatus, Network, Process, RunRequest, Security, Stdio};
use crate::resolv_conf;
use crate::runtime::{Running, Runtime};
use crate::spec::{self, HostFacts, NetworkSpec};
use crate::supervisor::{device, rootfs};
use crate::telemetry::TraceSocket;

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
#[derive(Clone, Debug, Default)]
pub struct ExecutorConfig {
    /// A directory of the executor's own, e.g. `<root>/executor`; made if it is missing. Absolute.
    pub state_dir: PathBuf,
    /// The runtime.
    pub runtime: RuntimeChoice,
    /// What replaces the host's DNS configuration.
    pub dns: DnsConfig,
    /// Cgroup below which containers are that do not ask for one; empty: `/buildkit/<id>`.
    pub cgroup_parent: String,
    /// The network of containers that ask for none in particular.
    pub network: NetworkChoice,
    /// Written to `oom_score_adj` of containers.
    pub oom_score_adj: Option<i32>,
    /// What security modules are told of containers.
    pub labels: LabelConfig,
    /// Where containers leave their spans.
    pub trace_socket: TraceSocket,
}

/// Runs containers. Cheap to clone; the last clone ends the supervisor and whatever still runs.
#[derive(Clone, Debug)]
pub struct Executor {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: ExecutorConfig,
    runtime: Arc<dyn Runtime>,
    /// After the runtime, so that containers are gone before their network.
    networks: Networks,
    capabilities: u64,
    labeler: Labeler,
    /// The `resolv.conf` as last written, with and without the host's network.
    resolv_conf: Mutex<[Option<String>; 2]>,
}

impl Executor {
    /// Prepares the directory and starts the supervisor. Called on a tokio runtime.
    ///
    /// # Errors
    /// [`ExecutorError::Unprivileged`] when this process may not make containers, and what else can go wrong.
    pub fn new(config: ExecutorConfig) -> Result<Self, ExecutorError> {
        let capabilities = capabilities()?;
        for directory in ["staging/root", "staging/tree", "bundles"] {
            make_directory(&config.state_dir.join(directory))?;
        }
        let text = hosts::hosts_file("", &[]).unwrap_or_default();
        write_file(&config.state_dir.join("hosts"), &text).map_err(|source| ExecutorError::Directory {
            path: config.state_dir.join("hosts"),
            source,
        })?;
        debug_assert!(rootfs::STAGED_ROOT == "root" && rootfs::STAGED_TREE == "tree");
        let runtime: Arc<dyn Runtime> = match &config.runtime {
            RuntimeChoice::Embedded => Arc::new(Embedded::start()?),
            RuntimeChoice::Binary(program) => {
                Arc::new(Binary::new(program, &config.state_dir.join("bundles"))?)
            }
        };
        let networks = Networks::start(&config.network, &config.state_dir.join("cni"))?;
        let labeler = Labeler::new(config.labels.clone(), PathBuf::from("/"));
        let inner = Inner {
            config,
            runtime,
            networks,
            capabilities,
            labeler,
            resolv_conf: Mutex::default(),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Runs a container to its end and removes what was made for it.
    ///
    /// `cancel` kills it (`SIGKILL`, as BuildKit does) and yields [`RunError::Canceled`], again after all is gone.
    /// Dropping the future kills it too, but does not wait.
    ///
    /// # Errors
    /// [`RunError::Start`] if its program was not executed; an exit code other than 0 is no error.
    pub async fn run(
        &self,
        request: RunRequest,
        stdio: Stdio,
        cancel: &CancellationToken,
    ) -> Result<ExitStatus, RunError> {
        if cancel.is_cancelled() {
            return Err(RunError::Canceled);
        }
        // Plugins may take their time.
        let network = tokio::select! {
            network = self.network(&request) => network?,
            () = cancel.cancelled() => return Err(RunError::Canceled),
        };
        let (running, _) = self.launch(&request, stdio, network).await?;
        let runtime = &*self.inner.runtime;
        let mut guard = KillGuard {
            runtime,
            running: &running,
            armed: true,
        };
        let mut was_canceled = false;
        let ended = running.ended();
        tokio::pin!(ended);
        let result = loop {
            tokio::select! {
                result = &mut ended => break result,
                () = cancel.cancelled(), if !was_canceled => {
                    was_canceled = true;
                    kill(runtime, &running);
                }
            }
        };
        guard.armed = false;
        if was_canceled {
            Err(RunError::Canceled)
        } else {
            result
        }
    }

    /// Removes what was made ahead of time for containers that will not come, and waits until that is done: the end of the
    /// process would not. Waits for running containers, too; whoever asks for one with a network afterwards gets an error.
    pub async fn close(&self) {
        self.inner.networks.close().await;
    }

    /// Makes a network of which a container reaches nothing but a proxy, and from which the proxy connects to what `network`
    /// lets it reach. Dropping the future leaves nothing behind.
    ///
    /// # Errors
    /// [`RunError::Network`].
    pub async fn proxy_network(&self, network: Network) -> Result<ProxyNetwork, RunError> {
        let egress = match network {
            Network::Sandbox => self.inner.networks.take("").await?,
            Network::Host => None,
            Network::None => {
                let message = "a proxy without a network".to_owned();
                return Err(RunError::Invalid { message });
            }
        };
        Ok(ProxyNetwork::new(egress).await?)
    }

    /// Starts a container. Returns once its program is executed. Dropping the future before kills it.
    ///
    /// # Errors
    /// [`RunError::Start`] if its program was not executed.
    pub async fn start(&self, request: RunRequest, stdio: Stdio) -> Result<Container, RunError> {
        let network = self.network(&request).await?;
        let (running, labels) = self.launch(&request, stdio, network).await?;
        let mut guard = KillGuard {
            runtime: &*self.inner.runtime,
            running: &running,
            armed: true,
        };
        running.started().await?;
        guard.armed = false;
        drop(guard);
        Ok(Container {
            id: request.id,
            runtime: Arc::clone(&self.inner.runtime),
            first: ContainerProcess { running },
            defaults: Process {
                args: Vec::new(),
                ..request.process
            },
            security: request.security,
            ulimits: request.ulimits,
            capabilities: self.inner.capabilities,
            labels,
        })
    }

    /// Begins to start a container; returns the labels of its processes, too.
    async fn launch(
        &self,
        request: &RunRequest,
        stdio: Stdio,
        network: Option<Hold>,
    ) -> Result<(Arc<Running>, ProcessLabels), RunError> {
        let facts = self.inner.host_facts(request)?;
        let (mut spec, attachment) = spec::container_spec(request, &facts)?;
        if network.is_some() {
            spec.network = NetworkSpec::Given;
        }
        let labels = spec.process.labels.clone();
        let running = self
            .inner
            .runtime
            .launch(spec, attachment, stdio, network)
            .await?;
        running.keep_level(facts.labels.lease);
        Ok((running, labels))
    }

    /// Takes the namespace that a container gets, if it is neither the host's nor an empty one.
    async fn network(&self, request: &RunRequest) -> Result<Option<Hold>, RunError> {
        if let Some(namespace) = &request.namespace {
            return Ok(Some(Hold::Own(Arc::clone(namespace))));
        }
        match request.network {
            Network::Sandbox => Ok(self.inner.networks.take(&request.hostname).await?),
            Network::Host | Network::None => Ok(None),
        }
    }
}

impl Inner {
    fn host_facts(&self, request: &RunRequest) -> Result<HostFacts, RunError> {
        let state_dir = &self.config.state_dir;
        let is_default = hosts::is_default(&request.hostname, &request.extra_hosts);
        Ok(HostFacts {
            capabilities: self.capabilities,
            resolv_conf: self.resolv_conf(request.network == Network::Host)?,
            hosts: is_default.then(|| state_dir.join("hosts")),
            staging: state_dir.join("staging"),
            cgroup_parent: self.config.cgroup_parent.clone(),
            oom_score_adj: self.config.oom_score_adj,
            trace_socket: self.config.trace_socket.path(),
            labels: self.labeler.labels(request.security)?,
            insecure_devices: match request.security {
                Security::Insecure => device::insecure_devices(),
                Security::Sandbox => Vec::new(),
            },
        })
    }

    /// Writes the containers' `resolv.conf` if the host's changed.
    fn resolv_conf(&self, host_network: bool) -> Result<PathBuf, RunError> {
        let read = |path: &str| match std::fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            result => result.map_err(|source| RunError::Io {
                what: format!("read {path}"),
                source,
            }),
        };
        let mut host = read("/etc/resolv.conf")?;
        if !host_network && resolv_conf::is_resolved_stub(&host) {
            host = read("/run/systemd/resolve/resolv.conf")?;
        }
        let text = resolv_conf::resolv_conf(&host, &self.config.dns, host_network);
        let name = if host_network {
            "resolv-host.conf"
        } else {
            "resolv.conf"
        };
        let path = self.config.state_dir.join(name);
        let mut written = self.resolv_conf.lock().unwrap_or_else(PoisonError::into_inner);
        let written = &mut written[usize::from(host_network)];
        if written.as_ref() != Some(&text) {
            write_file(&path, &text).map_err(|source| RunError::Io {
                what: format!("write {}", path.display()),
                source,
            })?;
            *written = Some(text);
        }
        Ok(path)
    }
}

/// The capabilities that containers can be given.
fn capabilities() -> Result<u64, ExecutorError> {
    let unprivileged = |reason: &str| ExecutorError::Unprivileged {
        reason: reason.to_owned(),
    };
    if !rustix::process::geteuid().is_root() {
        return Err(unprivileged(
            "start the daemon as root, or in a user namespace in which it is root",
        ));
    }
    let own =
        rustix::thread::capabilities(None).map_err(|_| unprivileged("the capabilities cannot be read"))?;
    if !own.effective.contains(rustix::thread::CapabilitySet::SYS_ADMIN) {
        return Err(unprivileged("CAP_SYS_ADMIN is missing"));
    }
    Ok(own.effective.bits())
}

fn make_directory(path: &Path) -> Result<(), ExecutorError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(path);
    made.map_err(|source| ExecutorError::Directory {
        path: path.to_owned(),
        source,
    })
}

/// Replaces a file at once: containers that have the old one keep it.
fn write_file(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(new, path)
}

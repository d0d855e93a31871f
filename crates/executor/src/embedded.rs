//! The embedded runtime: the daemon's side of the supervisor.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use rustix::fs::{Mode, OFlags};
use rustix::net::{RecvFlags, SendFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::container::Pty;
use crate::error::{ExecutorError, RunError};
use crate::network::Hold;
use crate::request::{ExitStatus, Stdio};
use crate::runtime::{Phase, Running, Runtime};
use crate::spec::{ContainerSpec, ProcessSpec, ResourceSpec};
use crate::supervisor::ARGUMENT_ZERO;
use crate::supervisor::wire::{
    self, Answer, Blueprint, ContainerTraits, Failure, Frame, OutgoingFrame, Prepared, Request,
};
use crate::sys;
use crate::tree::{self, Stub};
use crate::trust::{self, Trusted};

/// The embedded runtime. Dropping it ends the supervisor and all containers. A supervisor that was killed is replaced
/// when the next container is asked for.
#[derive(Debug)]
pub(crate) struct Embedded {
    connection: Mutex<Arc<Connection>>,
    next: AtomicU64,
}

/// A supervisor and the line to it.
#[derive(Debug)]
struct Connection {
    shared: Arc<Shared>,
    reader: tokio::task::JoinHandle<()>,
    supervisor: Option<Child>,
}

#[derive(Debug)]
struct Shared {
    socket: AsyncFd<OwnedFd>,
    jobs: Mutex<BTreeMap<u64, Arc<Running>>>,
    /// Numbers to kill as soon as the socket takes it; each at most once.
    kills: Mutex<Vec<u64>>,
    has_kills: Notify,
    lost: Mutex<Option<String>>,
}

/// What is to be cleaned up after a container.
#[derive(Debug)]
struct Leftovers {
    root: OwnedFd,
    stubs: Vec<Stub>,
    trusted: Option<Trusted>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Embedded {
    /// Starts the supervisor.
    pub(crate) fn start() -> Result<Self, ExecutorError> {
        let connection = Mutex::new(Arc::new(Connection::start()?));
        Ok(Self {
            connection,
            next: AtomicU64::new(1),
        })
    }

    /// Returns the line to a supervisor that was alive when last heard of.
    fn connection(&self) -> Result<Arc<Connection>, RunError> {
        let mut connection = lock(&self.connection);
        let lost = lock(&connection.shared.lost).clone();
        if let Some(reason) = lost {
            let new = Connection::start().map_err(|error| RunError::SupervisorLost {
                reason: format!("{reason}; another cannot be started: {error}"),
            })?;
            *connection = Arc::new(new);
        }
        Ok(Arc::clone(&connection))
    }

    async fn begin(
        &self,
        request: impl FnOnce(u64) -> Request,
        body: Vec<u8>,
        stdio: Stdio,
        network: Option<Hold>,
    ) -> Result<Arc<Running>, RunError> {
        let failed = |source| RunError::Io {
            what: "describe the container".to_owned(),
            source,
        };
        let connection = self.connection()?;
        let shared = &*connection.shared;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let frame = OutgoingFrame::new(&request(number), &body).map_err(failed)?;
        let streams = three_streams(stdio).map_err(failed)?;
        let namespace = network.as_ref().and_then(Hold::namespace);
        let namespace = namespace
            .map(|namespace| namespace.try_clone_to_owned())
            .transpose();
        let namespace = namespace.map_err(failed)?;
        let running = Arc::new(Running::new(number));
        running.hold(network);
        lock(&shared.jobs).insert(number, Arc::clone(&running));
        let mut undo = Undo {
            shared,
            number: Some(number),
        };
        if let Some(reason) = lock(&shared.lost).clone() {
            return Err(RunError::SupervisorLost { reason });
        }
        let fds = streams.iter().chain(&namespace).map(AsFd::as_fd);
        let fds: Vec<BorrowedFd<'_>> = fds.collect();
        shared
            .send(&frame, &fds)
            .await
            .map_err(|error| RunError::SupervisorLost {
                reason: error.to_string(),
            })?;
        undo.number = None;
        Ok(running)
    }
}

impl Connection {
    fn start() -> Result<Self, ExecutorError> {
        let failed = |source| ExecutorError::Supervisor { source };
        let (ours, theirs) = wire::socket_pair().map_err(failed)?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(|error| failed(error.into()))?;
        let supervisor = Command::new("/proc/self/exe")
            .arg0(ARGUMENT_ZERO)
            .env_clear()
            .current_dir("/")
            .stdin(theirs)
            .stdout(std::process::Stdio::null())
            .spawn()
            .map_err(failed)?;
        let socket = sys::register(ours).map_err(failed)?;
        let shared = Arc::new(Shared {
            socket,
            jobs: Mutex::default(),
            kills: Mutex::default(),
            has_kills: Notify::new(),
            lost: Mutex::default(),
        });
        let reader = tokio::spawn(serve(Arc::clone(&shared)));
        Ok(Self {
            shared,
            reader,
            supervisor: Some(supervisor),
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
        // It ends when it sees this.
        let _ = rustix::net::shutdown(self.shared.socket.get_ref(), rustix::net::Shutdown::Both);
        if let Some(mut supervisor) = self.supervisor.take() {
            let _ = supervisor.wait();
        }
        self.shared.lose("the executor was closed");
    }
}

/// Forgets a job that was never sent.
struct Undo<'a> {
    shared: &'a Shared,
    number: Option<u64>,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            lock(&self.shared.jobs).remove(&number);
        }
    }
}

#[async_trait]
impl Runtime for Embedded {
    async fn launch(
        &self,
        spec: ContainerSpec,
        attachment: Vec<u8>,
        stdio: Stdio,
        network: Option<Hold>,
    ) -> Result<Arc<Running>, RunError> {
        if let Some(hook) = spec.hooks.first() {
            return Err(RunError::Invalid {
                message: format!(
                    "a device asks for the {} hook {}, which only an OCI runtime such as runc runs",
                    hook.point, hook.path
                ),
            });
        }
        let traits = ContainerTraits {
            id: spec.id.clone(),
            network: spec.network,
            cgroup_parent: spec.cgroup_parent.clone(),
            special_cgroup: spec.all_devices
                || spec.cgroup_parent != "/"
                || !spec.devices.is_empty()
                || spec.resources != ResourceSpec::default(),
            all_devices: spec.all_devices,
            devices: spec.devices.clone(),
        };
        let blueprint = Blueprint::Container(Box::new(spec));
        let body = wire::encode_body(&blueprint, &attachment).map_err(|source| RunError::Io {
            what: "describe the container".to_owned(),
            source,
        })?;
        drop(attachment);
        self.begin(|seq| Request::Start { seq, traits }, body, stdio, network)
            .await
    }

    async fn join(
        &self,
        container: &Running,
        process: ProcessSpec,
        stdio: Stdio,
    ) -> Result<Arc<Running>, RunError> {
        let body = wire::encode_body(&Blueprint::Process(Box::new(process)), &[]).map_err(|source| {
            RunError::Io {
                what: "describe the process".to_owned(),
                source,
            }
        })?;
        let container = container.number;
        self.begin(|seq| Request::Exec { seq, container }, body, stdio, None)
            .await
    }

    fn kill(&self, number: u64) {
        // A process of an earlier supervisor is gone with it.
        let connection = lock(&self.connection);
        lock(&connection.shared.kills).push(number);
        connection.shared.has_kills.notify_one();
    }
}

fn three_streams(stdio: Stdio) -> io::Result<[OwnedFd; 3]> {
    let or_null = |stream: Option<OwnedFd>| -> io::Result<OwnedFd> {
        match stream {
            Some(stream) => Ok(stream),
            None => Ok(rustix::fs::open(
                c"/dev/null",
                OFlags::RDWR | OFlags::CLOEXEC,
                Mode::empty(),
            )?),
        }
    };
    Ok([
        or_null(stdio.stdin)?,
        or_null(stdio.stdout)?,
        or_null(stdio.stderr)?,
    ])
}

impl Shared {
    async fn send(&self, frame: &OutgoingFrame, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                frame.send(socket.as_fd(), fds, SendFlags::DONTWAIT)
            })
            .await
    }

    async fn receive(&self) -> io::Result<Option<Frame<Answer>>> {
        self.socket
            .async_io(Interest::READABLE, |socket| {
                wire::receive(socket.as_fd(), RecvFlags::DONTWAIT)
            })
            .await
    }

    fn lose(&self, reason: &str) {
        lock(&self.lost).get_or_insert_with(|| reason.to_owned());
        for running in std::mem::take(&mut *lock(&self.jobs)).into_values() {
            running.set_phase(Phase::Lost(reason.to_owned()));
        }
    }
}

/// Takes in what the supervisor says, until it is gone.
async fn serve(shared: Arc<Shared>) {
    let mut leftovers = BTreeMap::new();
    let mut cleanups = JoinSet::new();
    let reason = loop {
        tokio::select! {
            frame = shared.receive() => match frame {
                Ok(Some(frame)) => take_in(&shared, frame, &mut leftovers, &mut cleanups),
                Ok(None) => break "it closed its socket".to_owned(),
                Err(error) => break error.to_string(),
            },
            () = shared.has_kills.notified() => {
                let kills = std::mem::take(&mut *lock(&shared.kills));
                for seq in kills {
                    let Ok(frame) = OutgoingFrame::new(&Request::Kill { seq }, &[]) else { continue };
                    // If it cannot be reached, the next receive says so.
                    let _ = shared.send(&frame, &[]).await;
                }
            }
            Some(_) = cleanups.join_next() => {}
        }
    };
    tracing::error!(reason, "the container supervisor ended");
    shared.lose(&reason);
}

fn take_in(
    shared: &Shared,
    frame: Frame<Answer>,
    leftovers: &mut BTreeMap<u64, Leftovers>,
    cleanups: &mut JoinSet<()>,
) {
    match frame.header {
        Answer::Started { seq } => {
            let Some(running) = lock(&shared.jobs).get(&seq).cloned() else {
                return;
            };
            match started(&running, &frame.body, frame.fds) {
                Ok(Some(left)) => drop(leftovers.insert(seq, left)),
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "malformed answer of the container supervisor"),
            }
        }
        Answer::Failed { seq } => {
            let Some(running) = lock(&shared.jobs).remove(&seq) else {
                return;
            };
            let message = wire::decode_body::<Failure>(&frame.body)
                .map_or_else(|error| error.to_string(), |(failure, _)| failure.message);
            running.set_phase(Phase::Failed(message));
        }
        Answer::Exited {
            seq,
            code,
            signal,
            oom_killed,
        } => {
            let Some(running) = lock(&shared.jobs).remove(&seq) else {
                return;
            };
            let phase = Phase::Exited(ExitStatus {
                code,
                signal,
                oom_killed,
            });
            let Some(left) = leftovers.remove(&seq) else {
                running.set_phase(phase);
                return;
            };
            // Also ends the root's mount, which may write.
            cleanups.spawn_blocking(move || {
                if let Some(trusted) = &left.trusted
                    && let Err(error) = trust::remove(left.root.as_fd(), trusted)
                {
                    tracing::warn!(%error, "cannot take a certificate out of a step's bundle");
                }
                tree::remove_stubs(left.root.as_fd(), &left.stubs);
                drop(left.root);
                running.set_phase(phase);
            });
        }
    }
}

fn started(running: &Running, body: &[u8], fds: Vec<OwnedFd>) -> io::Result<Option<Leftovers>> {
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "a descriptor is missing");
    let (prepared, _) = wire::decode_body::<Prepared>(body)?;
    let mut fds = fds.into_iter();
    let process = fds.next().ok_or_else(missing)?;
    let root = if prepared.has_root {
        Some(fds.next().ok_or_else(missing)?)
    } else {
        None
    };
    let pty = if prepared.has_pty {
        Some(Pty::new(fds.next().ok_or_else(missing)?)?)
    } else {
        None
    };
    running.set_started(process, pty);
    Ok(root.map(|root| Leftovers {
        root,
        stubs: prepared.stubs,
        trusted: prepared.trusted,
    }))
}

//! Containers that a client starts within its build: to look at a result, or at what a failed step left.
//!
//! A [`BuildContainer`] is a set of mounts; its first process makes it a container, further ones join it, and when the
//! first ends, so do all. It is released by its client, or at the end of its build.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::BytesMut;
use executor::{
    Container, ContainerMount, ContainerProcess, ExitStatus, FileSource, MountSource, Network, Process, Pty,
    RunError, RunRequest, Security, Stdio,
};
use futures_util::FutureExt as _;
use llb::pb;
use oci::Digest;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::sync::{OnceCell, SetOnce};
use tokio_util::sync::CancellationToken;

use crate::bridge::{Bridge, FileRange, FileReader, lock};
use crate::error::{BuildError, ErrorKind};
use crate::op::ResultRef;
use crate::op::exec::mounts::{MountContext, Mounts, Prepared};
use crate::op::exec::proxied::Serving;
use crate::op::exec::{self, ExecParts};
use crate::progress::VertexProgress;
use crate::session::FileStat;
use crate::unlazy::{FetchContext, unpack_all};

/// `PATH` of a process in a container of that platform.
const WINDOWS_PATH: &str = "c:\\Windows\\System32;c:\\Windows;C:\\Windows\\System32\\WindowsPowerShell\\v1.0";
/// Exit code of a process whose program could not be executed, as an OCI runtime ends then.
const NOT_EXECUTED: u32 = 1;

/// What is mounted into a container.
#[derive(Clone, Debug)]
pub struct MountRequest {
    /// How and where. Its input is not looked at.
    pub mount: pb::Mount,
    /// What, for mounts of a result.
    pub reference: Option<ResultRef>,
}

/// A file that exists in a container only.
#[derive(Clone, Debug)]
pub struct ContainerFile {
    /// Its absolute path.
    pub target: String,
    /// What is in it; it can be read only.
    pub content: FileSource,
}

/// A container to be.
#[derive(Clone, Debug, Default)]
pub struct ContainerRequest {
    /// The client's name of it.
    pub id: String,
    /// The mounts; one of them is the root.
    pub mounts: Vec<MountRequest>,
    /// Files that are mounted over them.
    pub files: Vec<ContainerFile>,
    /// The network as in an exec op.
    pub network: i32,
    /// Host name; empty: as for exec ops.
    pub hostname: String,
    /// Further lines of `/etc/hosts`.
    pub extra_hosts: Vec<pb::HostIp>,
    /// The platform whose default `PATH` is used.
    pub platform: Option<pb::Platform>,
}

/// A process to be.
#[derive(Clone, Debug, Default)]
pub struct ProcessRequest {
    /// Program and arguments.
    pub args: Vec<String>,
    /// Variables; `PATH` has a default.
    pub env: Vec<String>,
    /// Secrets that become variables.
    pub secret_env: Vec<pb::SecretEnv>,
    /// As in an exec op.
    pub user: String,
    /// Working directory; empty: `/`.
    pub cwd: String,
    /// Whether it gets a terminal.
    pub tty: bool,
    /// The security mode as in an exec op.
    pub security: i32,
    /// Whether directories that were made to hold a mount point are removed too.
    pub remove_stubs_recursive: bool,
    /// Which of its streams are wanted: input, output, errors. A terminal has all of them.
    pub streams: [bool; 3],
}

/// A client's container. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BuildContainer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    id: String,
    bridge: Bridge,
    parts: ExecParts,
    network: Network,
    hostname: String,
    extra_hosts: Vec<executor::HostAddress>,
    default_path: &'static str,
    mount_count: usize,
    /// Gone after the release.
    prepared: Mutex<Option<Prepared>>,
    /// Whether it reaches the network by nothing but a proxy.
    is_proxied: bool,
    /// That proxy, once it is needed.
    proxy: OnceCell<Serving>,
    /// Whether a process took the turn to be the first.
    claimed: AtomicBool,
    /// The first process' container, or why there is none.
    first: SetOnce<Result<Container, BuildError>>,
    /// Fires when it is released.
    released: CancellationToken,
    /// Why the first process that failed did.
    failure: Mutex<Option<BuildError>>,
}

impl Bridge {
    /// Prepares a container's mounts, fetching what is lazy. Nothing runs before [`BuildContainer::start`].
    ///
    /// # Errors
    /// For mounts that make no sense or cannot be had.
    pub async fn new_container(&self, request: ContainerRequest) -> Result<BuildContainer, BuildError> {
        let parts = self.engine().services.ops.exec_parts()?;
        let network = exec::network(request.network)?;
        let (exec, inputs) = exec_of(&request)?;
        let released = CancellationToken::new();
        let cancel_on_drop = released.clone().drop_guard();
        let id = Digest::sha256(request.id.as_bytes());
        let fetch = FetchContext::new(
            VertexProgress::new(id, "unpack".to_owned(), Vec::new(), None),
            self.sessions(),
            released.clone(),
        );
        unpack_all(&*parts.unlazy, &fetch, &inputs).await?;
        let ctx = MountContext {
            sessions: self.sessions(),
            cancel: released.clone(),
            purpose: format!("container {}", request.id),
        };
        let mut prepared = Mounts::new(ctx, &parts, &exec, &inputs).prepare().await?;
        for file in request.files {
            prepared.mounts.push(ContainerMount {
                target: file.target,
                source: MountSource::File(file.content),
                selector: String::new(),
                read_only: true,
            });
        }
        cancel_on_drop.disarm();
        let is_windows = request.platform.is_some_and(|platform| platform.os == "windows");
        Ok(BuildContainer(Arc::new(Inner {
            id: request.id,
            bridge: self.clone(),
            parts,
            network,
            hostname: request.hostname,
            extra_hosts: exec::extra_hosts(&request.extra_hosts)?,
            default_path: if is_windows {
                WINDOWS_PATH
            } else {
                exec::DEFAULT_PATH
            },
            mount_count: exec.mounts.len(),
            prepared: Mutex::new(Some(prepared)),
            is_proxied: self.is_proxied() && network != Network::None,
            proxy: OnceCell::new(),
            claimed: AtomicBool::new(false),
            first: SetOnce::new(),
            released,
            failure: Mutex::default(),
        })))
    }
}

/// Describes the mounts as those of an exec op, with the refs as its inputs.
fn exec_of(request: &ContainerRequest) -> Result<(pb::ExecOp, Vec<ResultRef>), BuildError> {
    let mut exec = pb::ExecOp::default();
    let mut inputs = Vec::new();
    for MountRequest { mount, reference } in &request.mounts {
        let mut mount = mount.clone();
        mount.input = match reference {
            Some(reference) => {
                inputs.push(reference.clone());
                i64::try_from(inputs.len() - 1).unwrap_or(pb::EMPTY)
            }
            None => pb::EMPTY,
        };
        exec.mounts.push(mount);
    }
    if !exec.mounts.iter().any(|mount| mount.dest == "/") {
        return Err(BuildError::user("invalid container with no rootfs"));
    }
    Ok((exec, inputs))
}

impl BuildContainer {
    /// Returns the client's name of it.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Starts a process. The first that is asked for makes the container; the others wait for it and join. The order is
    /// that of the calls, not of polling.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] without the right to a network or security mode; with an exit code when the program
    /// cannot be executed.
    pub fn start(
        &self,
        request: ProcessRequest,
    ) -> impl Future<Output = Result<BuildProcess, BuildError>> + Send + use<> {
        let is_first = !self.0.claimed.swap(true, Ordering::AcqRel);
        let turn = is_first.then(|| FirstTurn(Arc::clone(&self.0)));
        let container = self.clone();
        async move {
            let inner = &container.0;
            let text = || format!("container {} was released", inner.id);
            let started = tokio::select! {
                biased;
                () = inner.released.cancelled() => Err(BuildError::canceled().context(text())),
                started = container.start_in_turn(request, turn) => started,
            };
            started.inspect_err(|error| inner.note_failure(error))
        }
    }

    async fn start_in_turn(
        &self,
        request: ProcessRequest,
        turn: Option<FirstTurn>,
    ) -> Result<BuildProcess, BuildError> {
        let inner = &self.0;
        let security = exec::security(request.security)?;
        let (network_host, insecure) = (inner.network == Network::Host, security == Security::Insecure);
        inner.bridge.check_entitlements(network_host, insecure)?;
        let process = Process {
            env: inner.environment(&request).await?,
            args: request.args,
            cwd: if request.cwd.is_empty() {
                "/".to_owned()
            } else {
                request.cwd
            },
            user: request.user,
            tty: request.tty,
        };
        let (stdio, pipes) = streams(request.streams, request.tty)?;
        let further = match turn {
            Some(turn) => {
                let mut run = inner.run_request(process)?;
                if let Some(proxy) = inner.proxy().await? {
                    proxy.apply(&mut run);
                }
                run.security = security;
                run.remove_stubs_recursive = request.remove_stubs_recursive;
                turn.settle(inner.parts.executor.start(run, stdio).await.map_err(start_error));
                None
            }
            None => {
                let first = inner.first.wait().await.as_ref().map_err(Clone::clone)?;
                let mut process = process;
                if let Some(proxy) = inner.proxy().await? {
                    process.env.extend(proxy.env.iter().cloned());
                }
                Some(first.exec(process, stdio).await.map_err(start_error)?)
            }
        };
        let first = inner.first.wait().await.as_ref().map_err(Clone::clone)?;
        let running = further.as_ref().unwrap_or_else(|| first.process());
        let terminal = running.take_pty().map(Arc::new);
        let [stdin, stdout, stderr] = pipes.into_streams(terminal.as_ref(), request.streams);
        Ok(BuildProcess {
            container: self.clone(),
            further,
            terminal,
            stdin: stdin.map(ProcessInput),
            stdout: stdout.map(ProcessOutput),
            stderr: stderr.map(ProcessOutput),
        })
    }

    /// Kills what runs in it; what it holds is let go of later.
    pub(super) fn stop(&self) {
        self.0.stop();
    }

    /// Kills what runs in it, waits until it is gone and lets go of its mounts.
    ///
    /// # Errors
    /// Why a process of it failed, if one did; that one was killed just now counts.
    pub async fn release(&self) -> Result<(), BuildError> {
        let inner = &self.0;
        let outcome = match inner.container() {
            None => Ok(()),
            Some(container) => match container.wait().now_or_never() {
                Some(ended) => inner.judge(ended),
                None => {
                    inner.stop();
                    inner.judge(container.wait().await)
                }
            },
        };
        inner.stop();
        let prepared = lock(&inner.prepared).take();
        exec::blocking(move || {
            drop(prepared);
            Ok(())
        })
        .await?;
        let failure = lock(&inner.failure).clone();
        failure.map_or(outcome, Err)
    }

    async fn reader(&self, mount: i32) -> Result<FileReader, BuildError> {
        let count = self.0.mount_count;
        let index = usize::try_from(mount).ok().filter(|index| *index < count);
        let index = index.ok_or_else(|| {
            BuildError::user(format!(
                "mount index {mount} is out of bounds ({count} available)"
            ))
        })?;
        let inner = Arc::clone(&self.0);
        exec::blocking(move || {
            let prepared = lock(&inner.prepared);
            let prepared = prepared
                .as_ref()
                .ok_or_else(|| BuildError::user(format!("container {} was released", inner.id)))?;
            match prepared.view(index)? {
                Some(MountSource::Snapshot(mounts)) => FileReader::of_mounts(&mounts),
                Some(MountSource::Host(path)) => FileReader::of_directory(&path),
                Some(MountSource::Tmpfs { .. } | MountSource::File(_)) | None => Err(BuildError::user(
                    format!("mount {index} can only be read by processes of the container"),
                )),
            }
        })
        .await
    }

    /// Reads a file of the mount of that index, as [`crate::bridge::BuildRef::read_file`] does.
    ///
    /// # Errors
    /// For a mount that is no tree on disk, and those of the file.
    pub async fn read_file(
        &self,
        mount: i32,
        path: &str,
        range: FileRange,
    ) -> Result<bytes::Bytes, BuildError> {
        self.reader(mount).await?.read_file(path, range).await
    }

    /// Lists a directory of the mount of that index; `include` is a pattern of names, empty for all.
    ///
    /// # Errors
    /// As [`Self::read_file`].
    pub async fn read_dir(&self, mount: i32, path: &str, include: &str) -> Result<Vec<FileStat>, BuildError> {
        self.reader(mount).await?.read_dir(path, include).await
    }

    /// Returns the attributes of a file of the mount of that index.
    ///
    /// # Errors
    /// As [`Self::read_file`].
    pub async fn stat_file(&self, mount: i32, path: &str) -> Result<FileStat, BuildError> {
        self.reader(mount).await?.stat_file(path).await
    }
}

/// The turn to make the container. Dropped without it, the others learn that there will be none.
#[derive(Debug)]
struct FirstTurn(Arc<Inner>);

impl FirstTurn {
    fn settle(self, started: Result<Container, BuildError>) {
        // Nobody else has the turn.
        let _ = self.0.first.set(started);
    }
}

impl Drop for FirstTurn {
    fn drop(&mut self) {
        if self.0.first.get().is_none() {
            let missing = BuildError::user(format!("container {} has no first process", self.0.id));
            let _ = self.0.first.set(Err(missing));
        }
    }
}

impl Inner {
    /// Returns the container, if it was made.
    fn container(&self) -> Option<&Container> {
        self.first.get().and_then(|first| first.as_ref().ok())
    }

    fn note_failure(&self, error: &BuildError) {
        lock(&self.failure).get_or_insert_with(|| error.clone());
    }

    fn stop(&self) {
        self.released.cancel();
        if let Some(container) = self.container() {
            container.kill();
        }
    }

    /// The container's proxy, started when its first process is.
    async fn proxy(&self) -> Result<Option<&Serving>, BuildError> {
        if !self.is_proxied {
            return Ok(None);
        }
        let start = || async {
            let policy = self.bridge.requests_policy()?;
            Serving::start(&self.parts, policy, self.network).await
        };
        self.proxy.get_or_try_init(start).await.map(Some)
    }

    async fn environment(&self, request: &ProcessRequest) -> Result<Vec<String>, BuildError> {
        let mut env = request.env.clone();
        let mut add_default = |name: &str, value: &str| {
            let is_set = env
                .iter()
                .any(|pair| pair.split_once('=').is_some_and(|(known, _)| known == name));
            if !is_set {
                env.push(format!("{name}={value}"));
            }
        };
        add_default("PATH", self.default_path);
        if request.tty {
            add_default("TERM", "xterm");
        }
        let sessions = self.bridge.sessions();
        env.extend(exec::secret_environment(&sessions, &request.secret_env).await?);
        Ok(env)
    }

    fn run_request(&self, process: Process) -> Result<RunRequest, BuildError> {
        let prepared = lock(&self.prepared);
        let prepared = prepared.as_ref().ok_or_else(BuildError::canceled)?;
        let mut request = RunRequest::new(prepared.root.clone(), process);
        request.mounts.clone_from(&prepared.mounts);
        request.network = self.network;
        request.hostname.clone_from(&self.hostname);
        request.extra_hosts.clone_from(&self.extra_hosts);
        let jobs = self.bridge.jobs();
        request.trace_parent = jobs.iter().find_map(|job| Some(job.trace()?.request_parent()));
        Ok(request)
    }

    /// Whether a process' end is a success; the first failure is kept for the release.
    fn judge(&self, ended: Result<ExitStatus, RunError>) -> Result<(), BuildError> {
        let error = match ended {
            Ok(status) if status.success() => return Ok(()),
            Ok(status) => {
                let mut reason = format!("exit code: {}", status.code);
                if status.oom_killed {
                    reason.push_str(": cannot allocate memory");
                }
                let error = if self.released.is_cancelled() {
                    BuildError::canceled().context(reason)
                } else {
                    BuildError::user(reason)
                };
                error.with_exit_code(status.code)
            }
            Err(error) => start_error(error),
        };
        self.note_failure(&error);
        Err(error)
    }
}

impl Drop for Inner {
    /// The container of a client that went away: its mounts are let go of when it is gone.
    fn drop(&mut self) {
        let prepared = lock(&self.prepared).take();
        if prepared.is_none() {
            return;
        }
        self.released.cancel();
        let container = std::mem::take(&mut self.first).into_inner().and_then(Result::ok);
        if let Some(container) = &container {
            container.kill();
        }
        // Without a runtime there is nothing left to wait with: dropping it has to do.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let ending = async move {
                if let Some(container) = container {
                    // Gone one way or the other.
                    let _ = container.wait().await;
                }
                // Only the end of the process takes the thread away.
                let _ = tokio::task::spawn_blocking(move || drop(prepared)).await;
            };
            self.bridge.engine().tasks.spawn_on(ending, &runtime);
        }
    }
}

fn start_error(error: RunError) -> BuildError {
    let never_ran = matches!(error, RunError::Start { .. });
    let error = exec::container_error(error);
    if never_ran && error.exit_code().is_none() {
        error.with_exit_code(NOT_EXECUTED)
    } else {
        error
    }
}

/// Our ends of a process' pipes.
#[derive(Default)]
struct Pipes {
    stdin: Option<pipe::Sender>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
}

/// Makes the pipes that are wanted. A terminal needs none.
fn streams(wanted: [bool; 3], tty: bool) -> Result<(Stdio, Pipes), BuildError> {
    let (mut stdio, mut pipes) = (Stdio::default(), Pipes::default());
    if tty {
        return Ok((stdio, pipes));
    }
    let failed = |error: io::Error| {
        BuildError::from_source(ErrorKind::Internal, error).context("failed to make a pipe for a process")
    };
    let [stdin, stdout, stderr] = wanted;
    if stdin {
        let (end, writer) = input_pipe().map_err(failed)?;
        (stdio.stdin, pipes.stdin) = (Some(end), Some(writer));
    }
    if stdout {
        let (reader, end) = exec::log_pipe().map_err(failed)?;
        (stdio.stdout, pipes.stdout) = (Some(end), Some(reader));
    }
    if stderr {
        let (reader, end) = exec::log_pipe().map_err(failed)?;
        (stdio.stderr, pipes.stderr) = (Some(end), Some(reader));
    }
    Ok((stdio, pipes))
}

fn input_pipe() -> io::Result<(OwnedFd, pipe::Sender)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&write, true)?;
    Ok((read, pipe::Sender::from_owned_fd(write)?))
}

impl Pipes {
    /// Says what each stream is: a terminal's errors come with its output.
    fn into_streams(self, terminal: Option<&Arc<Pty>>, wanted: [bool; 3]) -> [Option<Stream>; 3] {
        let shared = |wanted: bool| terminal.filter(|_| wanted).cloned().map(Stream::Terminal);
        [
            self.stdin.map(Stream::Input).or_else(|| shared(wanted[0])),
            self.stdout.map(Stream::Output).or_else(|| shared(wanted[1])),
            self.stderr.map(Stream::Output),
        ]
    }
}

#[derive(Debug)]
enum Stream {
    Input(pipe::Sender),
    Output(pipe::Receiver),
    Terminal(Arc<Pty>),
}

/// A process' input. Dropping it ends it, but for a terminal, whose input does not end.
#[derive(Debug)]
pub struct ProcessInput(Stream);

impl ProcessInput {
    /// Returns the pipe; `None` for a terminal.
    pub(crate) fn into_pipe(self) -> Option<pipe::Sender> {
        match self.0 {
            Stream::Input(pipe) => Some(pipe),
            Stream::Output(_) | Stream::Terminal(_) => None,
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// When the process does not read any more.
    pub async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.0 {
            Stream::Input(pipe) => pipe.write_all(bytes).await,
            Stream::Terminal(terminal) => terminal.write_all(bytes).await,
            Stream::Output(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// What a process writes.
#[derive(Debug)]
pub struct ProcessOutput(Stream);

impl ProcessOutput {
    /// Returns the pipe; `None` for a terminal.
    pub(crate) fn into_pipe(self) -> Option<pipe::Receiver> {
        match self.0 {
            Stream::Output(pipe) => Some(pipe),
            Stream::Input(_) | Stream::Terminal(_) => None,
        }
    }

    /// Reads up to `limit` bytes; none at the end. Safe to cancel.
    ///
    /// # Errors
    /// As `read(2)`.
    pub async fn read(&mut self, limit: usize) -> io::Result<bytes::Bytes> {
        let mut buffer = BytesMut::zeroed(limit);
        let count = match &mut self.0 {
            Stream::Output(pipe) => pipe.read(&mut buffer).await?,
            Stream::Terminal(terminal) => terminal.read(&mut buffer).await?,
            Stream::Input(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        buffer.truncate(count);
        Ok(buffer.freeze())
    }
}

/// A process of a client's container. Dropping it lets it run until the container is released.
#[derive(Debug)]
pub struct BuildProcess {
    container: BuildContainer,
    /// `None` for the container's first process.
    further: Option<ContainerProcess>,
    terminal: Option<Arc<Pty>>,
    /// Its input, if it was wanted.
    pub stdin: Option<ProcessInput>,
    /// Its output, if it was wanted; a terminal's too.
    pub stdout: Option<ProcessOutput>,
    /// Its errors, if they were wanted and are no terminal's.
    pub stderr: Option<ProcessOutput>,
}

impl BuildProcess {
    fn process(&self) -> Option<&ContainerProcess> {
        let first = || self.container.0.container().map(Container::process);
        self.further.as_ref().or_else(first)
    }

    /// Sends a signal by number. A process that has ended already is no error.
    ///
    /// # Errors
    /// For a number that is no signal.
    pub fn signal(&self, signal: i32) -> Result<(), BuildError> {
        let sent = self.process().map_or(Ok(()), |process| process.signal(signal));
        sent.map_err(exec::container_error)
    }

    /// Changes its terminal's size, if it has one.
    ///
    /// # Errors
    /// As `ioctl(2)`.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        self.terminal
            .as_ref()
            .map_or(Ok(()), |terminal| terminal.resize(rows, columns))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// With the exit code, if it is not 0; [`ErrorKind::Canceled`] when the container was released meanwhile.
    pub async fn wait(&self) -> Result<(), BuildError> {
        match self.process() {
            Some(process) => {
                let ended = process.wait().await;
                self.container.0.judge(ended)
            }
            None => Err(BuildError::internal("a process lost its container")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_become_inputs() {
        let mount = |dest: &str, reference| MountRequest {
            mount: pb::Mount {
                dest: dest.to_owned(),
                input: 7,
                ..Default::default()
            },
            reference,
        };
        let mut request = ContainerRequest {
            mounts: vec![
                mount("/tmp", None),
                mount("/", Some(ResultRef::SCRATCH)),
                mount("/a", Some(ResultRef::SCRATCH)),
            ],
            ..ContainerRequest::default()
        };
        let (exec, inputs) = exec_of(&request).unwrap();
        assert_eq!(inputs.len(), 2);
        let indexes: Vec<i64> = exec.mounts.iter().map(|mount| mount.input).collect();
        assert_eq!(indexes, [-1, 0, 1]);
        request.mounts.remove(1);
        assert!(exec_of(&request).is_err());
    }

    #[tokio::test]
    async fn streams_are_piped_unless_a_terminal_has_them() {
        let (stdio, pipes) = streams([true, false, true], false).unwrap();
        assert!(stdio.stdin.is_some() && stdio.stdout.is_none() && stdio.stderr.is_some());
        let [stdin, stdout, stderr] = pipes.into_streams(None, [true, false, true]);
        assert!(stdin.is_some() && stdout.is_none());
        let mut errors = ProcessOutput(stderr.unwrap());
        drop(stdio);
        assert!(errors.read(16).await.unwrap().is_empty());
        let mut input = ProcessInput(stdin.unwrap());
        assert!(input.write_all(b"x").await.is_err());
        let (stdio, _) = streams([true; 3], true).unwrap();
        assert!(stdio.stdin.is_none() && stdio.stdout.is_none());
    }
}

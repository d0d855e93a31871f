//! The exec op: a process in a container.

mod cache_dir;
pub(crate) mod devices;
mod emulation;
mod key;
pub(crate) mod mounts;
pub(crate) mod proxied;

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use cache::Store;
use executor::{
    DeviceRegistry, Executor, ExitStatus, HostAddress, Network, Process, Resources, RunError, RunRequest,
    Security, Stdio, Ulimit,
};
use layer::checksum::Selector;
use llb::pb;
use oci::Digest;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::checksum;
use crate::error::{BuildError, ErrorKind, FailedOp};
use crate::op::{CacheMap, Fetched, Op, OpContext, OpProvenance, ResultRef, VertexSpec};
use crate::progress::{LogStream, VertexProgress};
use crate::session::{SessionError, SessionGroup};
use crate::unlazy::{FetchContext, Unlazy, unpack_all};

pub use cache_dir::CacheDirs;
pub use emulation::Emulators;
use emulation::Means;
use mounts::{MountContext, Mounts, Prepared};
pub use proxied::Proxies;
use proxied::Serving;

/// `PATH` of a process whose image names none.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How much of a process' output is read at once.
const LOG_PIECE: usize = 32 << 10;

/// What exec ops work with: one per engine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ExecParts {
    /// Runs containers.
    pub executor: Executor,
    /// Where refs are kept.
    pub store: Store,
    /// Makes lazy inputs real.
    pub unlazy: Arc<dyn Unlazy>,
    /// Where devices are described.
    pub devices: DeviceRegistry,
    /// Runs programs of other platforms.
    pub emulators: Emulators,
    /// The cache mounts in use.
    pub cache_dirs: CacheDirs,
    /// Makes proxies that steps trust.
    pub proxies: Proxies,
    /// A directory of this op's own for sockets and mounts; must exist.
    pub socket_dir: PathBuf,
}

/// One exec op. Made by [`ExecOp::new`].
#[derive(Debug)]
pub struct ExecOp {
    op: Arc<pb::Op>,
    parts: ExecParts,
    key: key::Key,
    resources: Resources,
    is_proxied: bool,
    /// What it was seen to fetch when it ran.
    fetched: Mutex<Option<Fetched>>,
}

impl ExecOp {
    /// Makes the op of a vertex.
    ///
    /// # Errors
    /// A user error for an op that makes no sense.
    pub fn new(vertex: &VertexSpec, parts: ExecParts) -> Result<Self, BuildError> {
        let exec = exec_op(&vertex.op)?;
        validate(exec)?;
        let key = key::key(exec, vertex.op.platform.as_ref(), vertex.inputs.len())?;
        let resources = resources(vertex.metadata.linux_resources.as_ref());
        Ok(Self {
            op: Arc::clone(&vertex.op),
            parts,
            key,
            resources,
            is_proxied: vertex.is_proxied,
            fetched: Mutex::default(),
        })
    }

    fn exec_op(&self) -> Result<&pb::ExecOp, BuildError> {
        exec_op(&self.op)
    }
}

fn exec_op(op: &pb::Op) -> Result<&pb::ExecOp, BuildError> {
    match &op.op {
        Some(pb::op::Op::Exec(exec)) => Ok(exec),
        _ => Err(BuildError::internal("not an exec op")),
    }
}

fn validate(exec: &pb::ExecOp) -> Result<(), BuildError> {
    let Some(meta) = &exec.meta else {
        return Err(BuildError::user("invalid exec op with no meta"));
    };
    if meta.args.is_empty() {
        return Err(BuildError::user("invalid exec op with no args"));
    }
    if exec.mounts.is_empty() {
        return Err(BuildError::user("invalid exec op with no mounts"));
    }
    if !exec.mounts.iter().any(|mount| mount.dest == "/") {
        return Err(BuildError::user("invalid exec op with no rootfs"));
    }
    Ok(())
}

fn resources(limits: Option<&pb::LinuxResources>) -> Resources {
    limits.map_or_else(Resources::default, |limits| Resources {
        memory_bytes: limits.memory,
        memory_swap_bytes: limits.memory_swap,
        cpu_shares: limits.cpu_shares,
        cpu_quota_us: limits.cpu_quota,
        cpu_period_us: limits.cpu_period,
        cpuset_cpus: limits.cpuset_cpus.clone(),
        cpuset_mems: limits.cpuset_mems.clone(),
    })
}

#[async_trait]
impl Op for ExecOp {
    async fn cache_map(&self, _: &OpContext, _: u32) -> Result<CacheMap, BuildError> {
        Ok(self.key.map.clone())
    }

    async fn content_digest(
        &self,
        ctx: &OpContext,
        input: usize,
        reference: &ResultRef,
    ) -> Result<Option<Digest>, BuildError> {
        let Some(selectors) = self.content_selectors(input) else {
            return Ok(None);
        };
        unpack_all(
            &*self.parts.unlazy,
            &FetchContext::for_input(ctx, input),
            std::slice::from_ref(reference),
        )
        .await?;
        checksum::of(reference, selectors.to_vec(), ctx.cancel())
            .await
            .map(Some)
    }

    fn content_selectors(&self, input: usize) -> Option<&[Selector]> {
        self.key.selectors.get(input)?.as_deref()
    }

    async fn exec(
        &self,
        ctx: &OpContext,
        inputs: &[ResultRef],
    ) -> Result<Vec<Option<ResultRef>>, BuildError> {
        let exec = self.exec_op()?;
        unpack_all(&*self.parts.unlazy, &FetchContext::from(ctx), inputs).await?;
        let devices = devices::edits(&self.parts.devices, &exec.cdi_devices).await?;
        let means = self.means().await?;
        let env = environment(&ctx.sessions(), exec).await?;
        let args = exec
            .meta
            .as_ref()
            .map(|meta| meta.args.join(" "))
            .unwrap_or_default();
        let mount_ctx = MountContext {
            sessions: ctx.sessions(),
            cancel: ctx.cancel().clone(),
            purpose: format!("exec {args}"),
        };
        let prepared = Mounts::new(mount_ctx, &self.parts, exec, inputs)
            .prepare()
            .await?;
        let mut request = self.request(exec, env, &prepared)?;
        request.devices = devices;
        means.apply(&mut request);
        // Builds that share a step share its process: it belongs to the trace of one of them.
        request.trace_parent = ctx
            .jobs()
            .iter()
            .find_map(|job| Some(job.trace()?.step_parent(ctx.progress().digest())));
        let ran = match self.is_proxied {
            true => Box::pin(self.run_proxied(ctx, request)).await?,
            false => run(&self.parts.executor, ctx, request).await,
        };
        let ran = ran.map_err(|error| means.explain(error));
        if let Err(error @ RunError::Start { .. }) = &ran {
            ctx.progress().log(LogStream::Stderr, format!("{error}\n"));
        }
        let outcome = match ran {
            Ok(status) => judge(exec, status).inspect_err(|_| means.tell(ctx.progress())),
            Err(error) => Err(run_error(exec, error)),
        };
        let failed = outcome.is_err();
        let finished = blocking(move || prepared.finish(failed)).await?;
        match outcome {
            Ok(()) => Ok(finished.outputs),
            Err(error) if error.is_canceled() => Err(error),
            Err(error) => Err(error.with_failed_op(FailedOp {
                op: Some(Arc::clone(&self.op)),
                description: ctx.vertex().metadata.description.clone(),
                subject: None,
                inputs: mounts::inputs_by_mount(exec, inputs),
                mounts: finished.mounts,
            })),
        }
    }

    fn provenance(&self) -> Option<OpProvenance> {
        let exec = self.exec_op().ok()?;
        let secret_files = exec.mounts.iter().filter_map(|mount| mount.secret_opt.as_ref());
        let secrets = secret_files
            .map(|secret| (secret.id.clone(), secret.optional))
            .chain(
                exec.secretenv
                    .iter()
                    .map(|secret| (secret.id.clone(), secret.optional)),
            )
            .collect();
        let agents = exec.mounts.iter().filter_map(|mount| mount.ssh_opt.as_ref());
        Some(OpProvenance {
            secrets,
            agents: agents.map(|agent| (agent.id.clone(), agent.optional)).collect(),
            fetched: self
                .fetched
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            incomplete: exec.network != i32::from(pb::NetMode::None),
            ..OpProvenance::default()
        })
    }
}

impl ExecOp {
    /// Finds out how the programs of the op's platform are run.
    async fn means(&self) -> Result<Means, BuildError> {
        let (emulators, platform) = (self.parts.emulators.clone(), self.op.platform.clone());
        blocking(move || emulators.means(platform.as_ref())).await
    }

    /// Runs the container behind a proxy, and shows and keeps what it fetched.
    async fn run_proxied(
        &self,
        ctx: &OpContext,
        mut request: RunRequest,
    ) -> Result<Result<ExitStatus, RunError>, BuildError> {
        let serving = Serving::start(&self.parts, ctx.bridge().url_policy()?, request.network).await?;
        serving.apply(&mut request);
        let ran = run(&self.parts.executor, ctx, request).await;
        let record = serving.finish().await;
        let summary = proxied::summary(&record);
        if !summary.is_empty() {
            ctx.progress().log(LogStream::Stderr, summary);
        }
        let fetched = Some(proxied::fetched(&record));
        *self.fetched.lock().unwrap_or_else(PoisonError::into_inner) = fetched;
        Ok(ran)
    }

    fn request(
        &self,
        exec: &pb::ExecOp,
        env: Vec<String>,
        prepared: &Prepared,
    ) -> Result<RunRequest, BuildError> {
        let meta = exec
            .meta
            .as_ref()
            .ok_or_else(|| BuildError::internal("an exec op lost its meta"))?;
        let process = Process {
            args: meta.args.clone(),
            env,
            cwd: meta.cwd.clone(),
            user: meta.user.clone(),
            tty: false,
        };
        let mut request = RunRequest::new(prepared.root.clone(), process);
        request.mounts.clone_from(&prepared.mounts);
        request.network = network(exec.network)?;
        request.security = security(exec.security)?;
        request.hostname.clone_from(&meta.hostname);
        request.extra_hosts = extra_hosts(&meta.extra_hosts)?;
        request.ulimits = meta
            .ulimit
            .iter()
            .map(|limit| Ulimit {
                name: limit.name.clone(),
                soft: limit.soft,
                hard: limit.hard,
            })
            .collect();
        request.cgroup_parent.clone_from(&meta.cgroup_parent);
        request.resources = self.resources.clone();
        request.remove_stubs_recursive = meta.remove_mount_stubs_recursive;
        Ok(request)
    }
}

/// Reads a network mode; one that is not known is refused.
pub(crate) fn network(mode: i32) -> Result<Network, BuildError> {
    match pb::NetMode::try_from(mode) {
        Ok(pb::NetMode::Unset) => Ok(Network::Sandbox),
        Ok(pb::NetMode::Host) => Ok(Network::Host),
        Ok(pb::NetMode::None) => Ok(Network::None),
        Err(_) => Err(BuildError::user(format!("unknown network mode {mode}"))),
    }
}

/// Reads a security mode; one that is not known is refused.
pub(crate) fn security(mode: i32) -> Result<Security, BuildError> {
    match pb::SecurityMode::try_from(mode) {
        Ok(pb::SecurityMode::Sandbox) => Ok(Security::Sandbox),
        Ok(pb::SecurityMode::Insecure) => Ok(Security::Insecure),
        Err(_) => Err(BuildError::user(format!("invalid security mode {mode}"))),
    }
}

/// Reads further lines of `/etc/hosts`.
pub(crate) fn extra_hosts(hosts: &[pb::HostIp]) -> Result<Vec<HostAddress>, BuildError> {
    let read = |entry: &pb::HostIp| match entry.ip.parse::<IpAddr>() {
        Ok(address) => Ok(HostAddress {
            host: entry.host.clone(),
            address,
        }),
        Err(_) => Err(BuildError::user(format!("failed to parse IP {}", entry.ip))),
    };
    hosts.iter().map(read).collect()
}

/// The process' environment: the op's, proxies, a default `PATH`, secrets.
async fn environment(sessions: &SessionGroup, exec: &pb::ExecOp) -> Result<Vec<String>, BuildError> {
    let meta = exec.meta.as_ref();
    let mut env = meta.map(|meta| meta.env.clone()).unwrap_or_default();
    if let Some(proxy) = meta.and_then(|meta| meta.proxy_env.as_ref()) {
        let values = [
            ("http_proxy", &proxy.http_proxy),
            ("https_proxy", &proxy.https_proxy),
            ("ftp_proxy", &proxy.ftp_proxy),
            ("no_proxy", &proxy.no_proxy),
            ("all_proxy", &proxy.all_proxy),
        ];
        for (name, value) in values.into_iter().filter(|(_, value)| !value.is_empty()) {
            env.push(format!("{}={value}", name.to_ascii_uppercase()));
            env.push(format!("{name}={value}"));
        }
    }
    if !env.iter().any(|pair| pair.starts_with("PATH=")) {
        env.push(format!("PATH={DEFAULT_PATH}"));
    }
    env.extend(secret_environment(sessions, &exec.secretenv).await?);
    Ok(env)
}

/// Fetches secrets that are given to a process as variables.
pub(crate) async fn secret_environment(
    sessions: &SessionGroup,
    secrets: &[pb::SecretEnv],
) -> Result<Vec<String>, BuildError> {
    let mut env = Vec::with_capacity(secrets.len());
    for secret in secrets {
        if secret.id.is_empty() {
            return Err(BuildError::user(format!(
                "secret ID missing for {:?} environment variable",
                secret.name
            )));
        }
        let value = match mounts::secret(sessions, &secret.id).await {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(SessionError::NotFound { .. }) if secret.optional => String::new(),
            Err(error) => return Err(error.into()),
        };
        env.push(format!("{}={value}", secret.name));
    }
    Ok(env)
}

/// Runs a container and shows what it writes.
async fn run(executor: &Executor, ctx: &OpContext, request: RunRequest) -> Result<ExitStatus, RunError> {
    let failure = |source| RunError::Io {
        what: "pipe for the process' output".to_owned(),
        source,
    };
    let (stdout, stdout_end) = log_pipe().map_err(failure)?;
    let (stderr, stderr_end) = log_pipe().map_err(failure)?;
    let stdio = Stdio {
        stdin: None,
        stdout: Some(stdout_end),
        stderr: Some(stderr_end),
    };
    let progress = ctx.progress();
    let (status, (), ()) = tokio::join!(
        executor.run(request, stdio, ctx.cancel()),
        show(stdout, LogStream::Stdout, progress),
        show(stderr, LogStream::Stderr, progress),
    );
    status
}

/// Makes a pipe whose reading end is ours.
pub(crate) fn log_pipe() -> std::io::Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&read, true)?;
    Ok((pipe::Receiver::from_owned_fd(read)?, write))
}

/// Reads a stream to its end, which comes when every process of the container is gone.
async fn show(mut from: pipe::Receiver, stream: LogStream, progress: &VertexProgress) {
    let mut buffer = vec![0; LOG_PIECE];
    while let Some(piece) = read_piece(&mut from, &mut buffer).await {
        progress.log(stream, piece);
    }
}

/// Reads what is there, at least a byte; `None` at the end. The piece is a copy: it is kept as long as the build runs, and
/// a part of the buffer would keep all of it, for every line of a step.
async fn read_piece(from: &mut pipe::Receiver, buffer: &mut [u8]) -> Option<Bytes> {
    match from.read(buffer).await {
        Ok(0) | Err(_) => None,
        Ok(length) => Some(Bytes::copy_from_slice(&buffer[..length])),
    }
}

/// Whether a process' end is a success, as the op defines it.
fn judge(exec: &pb::ExecOp, status: ExitStatus) -> Result<(), BuildError> {
    let Some(meta) = &exec.meta else { return Ok(()) };
    let is_valid = if meta.valid_exit_codes.is_empty() {
        status.success()
    } else {
        meta.valid_exit_codes
            .iter()
            .any(|code| u32::try_from(*code) == Ok(status.code))
    };
    if is_valid {
        return Ok(());
    }
    let mut reason = format!("exit code: {}", status.code);
    if status.oom_killed {
        reason.push_str(": cannot allocate memory");
    }
    Err(BuildError::user(reason)
        .context(subject(exec))
        .with_exit_code(status.code))
}

/// What a failure is about.
fn subject(exec: &pb::ExecOp) -> String {
    let process = exec
        .meta
        .as_ref()
        .map(|meta| meta.args.join(" "))
        .unwrap_or_default();
    format!("process {process:?} did not complete successfully")
}

fn run_error(exec: &pb::ExecOp, error: RunError) -> BuildError {
    match container_error(error) {
        error if error.is_canceled() => error,
        error => error.context(subject(exec)),
    }
}

/// What an executor's refusal means for a build.
pub(crate) fn container_error(error: RunError) -> BuildError {
    match error {
        RunError::Canceled => BuildError::canceled(),
        // As an OCI runtime ends when it cannot start its program.
        RunError::Start { .. } => BuildError::from_source(ErrorKind::User, error).with_exit_code(1),
        RunError::Invalid { .. } => BuildError::from_source(ErrorKind::User, error),
        RunError::Unprivileged { .. } => BuildError::from_source(ErrorKind::Denied, error),
        RunError::SupervisorLost { .. } => BuildError::from_source(ErrorKind::Unavailable, error),
        RunError::NotRunning { .. } | RunError::Io { .. } | RunError::Network(_) => {
            BuildError::from_source(ErrorKind::Internal, error)
        }
    }
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| BuildError::internal(format!("exec op: {error}")))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec(valid_exit_codes: Vec<i32>) -> pb::ExecOp {
        let args = vec!["/bin/sh".to_owned(), "-c".to_owned(), "false".to_owned()];
        pb::ExecOp {
            meta: Some(pb::Meta {
                args,
                valid_exit_codes,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn status(code: u32) -> ExitStatus {
        ExitStatus {
            code,
            signal: None,
            oom_killed: false,
        }
    }

    #[test]
    fn words_failures_as_clients_know_them() {
        let error = judge(&exec(Vec::new()), status(1)).expect_err("is a failure");
        assert_eq!(
            error.to_string(),
            r#"process "/bin/sh -c false" did not complete successfully: exit code: 1"#
        );
        assert_eq!(error.exit_code(), Some(1));
    }

    #[test]
    fn takes_the_exit_codes_that_the_op_names() {
        assert!(judge(&exec(vec![3, 4]), status(4)).is_ok());
        assert!(judge(&exec(vec![3, 4]), status(0)).is_err());
        assert!(judge(&exec(Vec::new()), status(0)).is_ok());
    }

    #[tokio::test]
    async fn a_line_takes_no_more_memory_than_it_is_long() {
        let (mut from, to) = log_pipe().expect("a pipe");
        rustix::io::write(&to, b"short\n").expect("is read");
        let mut buffer = vec![0; LOG_PIECE];
        let piece = read_piece(&mut from, &mut buffer).await.expect("a line");
        assert_eq!(piece, "short\n");
        let own = piece.try_into_mut().expect("nobody else has it");
        assert!(own.capacity() < 64, "{}", own.capacity());
        drop(to);
        assert_eq!(read_piece(&mut from, &mut buffer).await, None);
    }

    #[test]
    fn refuses_modes_that_are_not_known() {
        assert!(network(7).is_err());
        assert!(security(7).is_err());
    }
}

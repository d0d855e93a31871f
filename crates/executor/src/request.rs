//! What can be asked of an executor, and what it answers.

use std::fmt;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use crate::cdi::DeviceEdits;

/// Names a container: 1 to 128 ASCII letters and digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(String);

/// A text that cannot name a container.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid container id {text:?}: only letters and numbers are allowed")]
pub struct ContainerIdError {
    /// What was offered.
    pub text: String,
}

impl ContainerId {
    /// Makes a new id: 25 random letters and digits.
    pub fn random() -> Self {
        const ALPHABET: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";
        let mut bytes = [0_u8; 25];
        // A failure leaves zeros, and the container's directory then exists already.
        let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
        Self(
            bytes
                .iter()
                .map(|byte| char::from(ALPHABET[usize::from(byte % 32)]))
                .collect(),
        )
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ContainerId {
    type Err = ContainerIdError;

    fn from_str(text: &str) -> Result<Self, ContainerIdError> {
        if text.is_empty() || text.len() > 128 || !text.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(ContainerIdError {
                text: text.to_owned(),
            });
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A container to run.
#[derive(Clone, Debug)]
pub struct RunRequest {
    /// Names the container; no two that run at the same time may have the same.
    pub id: ContainerId,
    /// The root file system.
    pub root: Root,
    /// What is mounted into it, parents before children.
    pub mounts: Vec<ContainerMount>,
    /// Its first process.
    pub process: Process,
    /// Its network.
    pub network: Network,
    /// A network namespace that it gets in place of that of `network`: [`crate::ProxyNetwork::namespace`].
    pub namespace: Option<Arc<OwnedFd>>,
    /// A certificate in PEM that its programs trust, as far as they use the image's usual bundle of authorities; it is taken
    /// out of the bundle after the run.
    pub trusted_authority: Option<String>,
    /// Host name; empty: `buildkitsandbox`.
    pub hostname: String,
    /// Further lines of `/etc/hosts`.
    pub extra_hosts: Vec<HostAddress>,
    /// Process limits; those not named are the daemon's own.
    pub ulimits: Vec<Ulimit>,
    /// Cgroup below which the container's is made; empty: the executor's default.
    pub cgroup_parent: String,
    /// Limits of the whole container.
    pub resources: Resources,
    /// How it is confined.
    pub security: Security,
    /// The parent of its spans, a `traceparent` of W3C Trace Context; it is told to containers that have the
    /// [`crate::TraceSocket`].
    pub trace_parent: Option<String>,
    /// What it gets with devices of the host.
    pub devices: DeviceEdits,
    /// Whether directories that were made to hold a mount point are removed too, not only the mount point itself.
    pub remove_stubs_recursive: bool,
}

impl RunRequest {
    /// Describes a container that runs `process` in `root` and nothing special.
    pub fn new(root: Root, process: Process) -> Self {
        Self {
            id: ContainerId::random(),
            root,
            mounts: Vec::new(),
            process,
            network: Network::Sandbox,
            namespace: None,
            trusted_authority: None,
            hostname: String::new(),
            extra_hosts: Vec::new(),
            ulimits: Vec::new(),
            cgroup_parent: String::new(),
            resources: Resources::default(),
            security: Security::Sandbox,
            trace_parent: None,
            devices: DeviceEdits::default(),
            remove_stubs_recursive: false,
        }
    }
}

/// A root file system as a snapshotter describes it. It must not be mounted elsewhere for writing at the same time.
#[derive(Clone, Debug, Default)]
pub struct Root {
    /// How to mount it: one overlay or bind mount.
    pub mounts: Vec<snapshot::Mount>,
    /// Whether the container's processes see it read-only. The mounts themselves must be writable nevertheless: mount
    /// points are made in it.
    pub read_only: bool,
}

/// Something mounted into a container.
#[derive(Clone, Debug)]
pub struct ContainerMount {
    /// Where: an absolute path, resolved inside the root. `/` and anything at or below `/proc` is refused.
    pub target: String,
    /// What.
    pub source: MountSource,
    /// The part of the source that is mounted, resolved inside it; empty or `/`: all of it.
    pub selector: String,
    /// Whether it is read-only, with all that is mounted below it.
    pub read_only: bool,
}

/// What is mounted.
#[derive(Clone, Debug)]
pub enum MountSource {
    /// A snapshot's tree.
    Snapshot(Vec<snapshot::Mount>),
    /// A directory, file or socket of the host, with whatever is mounted below it.
    Host(PathBuf),
    /// An empty directory in memory.
    Tmpfs {
        /// Most bytes it may hold; `None`: half of the memory.
        size_bytes: Option<u64>,
    },
    /// A file in memory that exists for this container only.
    File(FileSource),
}

/// A file in memory.
#[derive(Clone, PartialEq, Eq)]
pub struct FileSource {
    /// The content.
    pub bytes: Vec<u8>,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits. Without any `x` bit the mount is `noexec`.
    pub mode: u32,
}

impl fmt::Debug for FileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The content may be a secret.
        f.debug_struct("FileSource")
            .field("len", &self.bytes.len())
            .field("uid", &self.uid)
            .field("gid", &self.gid)
            .field("mode", &self.mode)
            .finish()
    }
}

/// A process.
#[derive(Clone, PartialEq, Eq)]
pub struct Process {
    /// Program and arguments. A program without `/` is looked up in `PATH` of `env`, inside the container.
    pub args: Vec<String>,
    /// `NAME=value` pairs; the last of a name counts.
    pub env: Vec<String>,
    /// Working directory; made if it is missing. Empty: `/`.
    pub cwd: String,
    /// `user`, `user:group`, names or numbers, looked up in the container's own `/etc/passwd` and `/etc/group`;
    /// empty: root.
    pub user: String,
    /// Whether it gets a terminal as its stdio.
    pub tty: bool,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values of variables may be secrets.
        f.debug_struct("Process")
            .field("args", &self.args)
            .field("cwd", &self.cwd)
            .field("user", &self.user)
            .field("tty", &self.tty)
            .finish_non_exhaustive()
    }
}

/// A container's network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// What the executor is configured to give to builds; without a configured bridge this is the host's, as in BuildKit.
    #[default]
    Sandbox,
    /// The host's.
    Host,
    /// Nothing but a loopback device.
    None,
}

/// How a container is confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Security {
    /// Few capabilities, a seccomp filter, masked paths, device rules.
    #[default]
    Sandbox,
    /// All capabilities the daemon has, and all devices. Only for builds that were granted `security.insecure`.
    Insecure,
}

/// A line of `/etc/hosts`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostAddress {
    /// The name.
    pub host: String,
    /// Its address.
    pub address: IpAddr,
}

/// A process limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ulimit {
    /// `nofile`, `nproc`, …: the name of a `RLIMIT_` in small letters.
    pub name: String,
    /// The limit in force; -1: none.
    pub soft: i64,
    /// The limit up to which the process may raise it; -1: none.
    pub hard: i64,
}

/// Limits of a container. Zero or empty: none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Most bytes of memory.
    pub memory_bytes: i64,
    /// Most bytes of memory and swap; -1: unlimited.
    pub memory_swap_bytes: i64,
    /// Relative weight of CPU time, 2 to 262144.
    pub cpu_shares: u64,
    /// Microseconds of CPU time within each period.
    pub cpu_quota_us: i64,
    /// The period in microseconds.
    pub cpu_period_us: u64,
    /// CPUs, such as `0-3,5`.
    pub cpuset_cpus: String,
    /// Memory nodes, such as `0-1`.
    pub cpuset_mems: String,
}

/// A process' standard streams. What is `None` is `/dev/null`. Ignored for a process with a terminal.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Standard input.
    pub stdin: Option<OwnedFd>,
    /// Standard output.
    pub stdout: Option<OwnedFd>,
    /// Standard error.
    pub stderr: Option<OwnedFd>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus {
    /// Its exit code; 128 + n if signal n ended it.
    pub code: u32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether the kernel killed something in the container for lack of memory.
    pub oom_killed: bool,
}

impl ExitStatus {
    /// Returns whether the exit code is 0.
    pub fn success(self) -> bool {
        self.code == 0
    }
}

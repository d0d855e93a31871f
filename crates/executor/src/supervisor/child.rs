//! What a new process does between being made and becoming the container's program.
//!
//! It is a copy of the supervisor with one thread, so ordinary code may run here; whatever fails is reported on the
//! setup socket, and then the process ends.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::net::RecvFlags;
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType};

use super::cgroup::Cgroup;
use super::credentials;
use super::rootfs::Builder;
use super::terminal::Terminal;
use super::wire::{self, Blueprint, Failure, Prepared, Report};
use crate::label::set::{self, Writer};
use crate::spec::{ContainerSpec, NetworkSpec, ProcessSpec};
use crate::sys::{self, NewProcess};
use crate::trust::{self, Trusted};
use crate::user::{self, Identity};

/// Where a process sees itself.
const PROC: &str = "/proc";

/// Why a container could not be set up, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SetupError {
    message: String,
}

impl SetupError {
    /// Makes an error of a text.
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
        }
    }
}

/// Says what was being done when something failed.
pub(super) trait Fallible<T> {
    fn or_fail(self, what: impl fmt::Display) -> Result<T, SetupError>;
}

impl<T, E: Into<io::Error>> Fallible<T> for Result<T, E> {
    fn or_fail(self, what: impl fmt::Display) -> Result<T, SetupError> {
        self.map_err(|error| SetupError::new(format!("{what}: {}", plain(&error.into()))))
    }
}

/// An error's text as C libraries and Go print it: small letters, no number.
pub(crate) fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    if error.raw_os_error().is_none() {
        return text;
    }
    let text = text
        .split_once(" (os error")
        .map_or(text.as_str(), |(text, _)| text);
    let mut letters = text.chars();
    letters
        .next()
        .map(|first| first.to_lowercase().chain(letters).collect())
        .unwrap_or_default()
}

/// What a container's first process knows before it is told what to build.
#[derive(Debug)]
pub(super) struct Cradle<'a> {
    pub(super) socket: BorrowedFd<'a>,
    pub(super) cgroup: &'a Cgroup,
    /// Whether the device rules let everything through.
    pub(super) all_devices: bool,
}

/// The container that a further process joins.
#[derive(Debug)]
pub(super) struct Home<'a> {
    pub(super) socket: BorrowedFd<'a>,
    pub(super) cgroup: &'a Cgroup,
    /// Refers to the container's first process.
    pub(super) first: BorrowedFd<'a>,
    /// Whether it has a network namespace of its own.
    pub(super) own_network: bool,
}

/// Runs as a container's first process.
pub(super) fn container_main(proof: NewProcess, cradle: &Cradle<'_>) -> ! {
    let Err(error) = begin(proof, &[cradle.socket]).and_then(|()| run_container(cradle));
    fail(cradle.socket, &error)
}

/// Runs as a further process of a container.
pub(super) fn process_main(proof: NewProcess, home: &Home<'_>) -> ! {
    let Err(error) = begin(proof, &[home.socket, home.first]).and_then(|()| run_process(home));
    fail(home.socket, &error)
}

fn fail(socket: BorrowedFd<'_>, error: &SetupError) -> ! {
    if let Ok(body) = wire::encode_body(
        &Failure {
            message: error.message.clone(),
        },
        &[],
    ) {
        // Without a supervisor nobody is left to tell.
        let _ = wire::send(socket, &Report::Failed, &body, &[]);
    }
    std::process::exit(1)
}

/// Ties this process' life to the supervisor's and lets go of what is not its own.
fn begin(proof: NewProcess, keep: &[BorrowedFd<'_>]) -> Result<(), SetupError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).or_fail("tie to the supervisor")?;
    sys::reset_signals();
    rustix::process::umask(Mode::empty());
    proof.close_all_but(keep).or_fail("close descriptors")
}

fn run_container(cradle: &Cradle<'_>) -> Result<Infallible, SetupError> {
    cradle.cgroup.join().or_fail("join the cgroup")?;
    let has_rules = !cradle.cgroup.is_unified() && !cradle.all_devices;
    if has_rules {
        cradle.cgroup.restrict_devices().or_fail("restrict devices")?;
    }
    let (blueprint, attachment, mut stdio) = receive_blueprint(cradle.socket)?;
    let Blueprint::Container(spec) = blueprint else {
        return Err(SetupError::new("expected a container"));
    };
    if has_rules {
        let allowed = cradle.cgroup.allow_devices(&spec.devices);
        allowed.or_fail("allow devices")?;
    }
    cradle.cgroup.limit(&spec.resources).or_fail("limit resources")?;
    if spec.network == NetworkSpec::Given {
        enter_network(stdio.pop())?;
    }
    let writer = open_labels(&spec.process)?;
    isolate(&spec, cradle.cgroup)?;

    let mut builder = Builder::new(&spec, &attachment, Some(cradle.cgroup))?;
    let identity = look_up(builder.root(), &spec.process)?;
    builder.make_working_directory(&spec.process.cwd, identity.uid, identity.gid)?;
    let trusted = trust_authority(builder.root(), &spec)?;
    builder.mount_all()?;
    let terminal = open_terminal(builder.root(), &spec.process, &identity)?;
    if let Some(terminal) = &terminal {
        terminal.put_on_console(builder.root())?;
    }
    let built = builder.finish()?;
    let prepared = Prepared {
        stubs: built.stubs,
        has_root: true,
        has_pty: terminal.is_some(),
        trusted,
    };
    report(cradle.socket, &prepared, Some(&built.root), terminal.as_ref())?;
    drop(built.root);
    connect_stdio(stdio, terminal, &identity)?;
    credentials::become_program(&spec.process, &identity, writer)
}

/// Opens what the labels are written to, while the host's `/proc` is in sight.
fn open_labels(process: &ProcessSpec) -> Result<Writer, SetupError> {
    Writer::open(&process.labels, Path::new(PROC)).or_fail("set the labels of the program")
}

/// Makes a keyring of its own. A kernel without keyrings, or one whose quota is used up, still runs containers.
fn make_keyring(process: &ProcessSpec) -> Result<(), SetupError> {
    let context = &process.labels.selinux;
    if !context.is_empty() {
        set::label_keys(context, Path::new(PROC)).or_fail("set the label of keys")?;
    }
    let _ = sys::join_new_session_keyring();
    Ok(())
}

/// Enters the network namespace that came with the description.
fn enter_network(namespace: Option<OwnedFd>) -> Result<(), SetupError> {
    let namespace = namespace.ok_or_else(|| SetupError::new("the network namespace is missing"))?;
    let kind = Some(LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(namespace.as_fd(), kind).or_fail("enter the network namespace")
}

fn trust_authority(root: BorrowedFd<'_>, spec: &ContainerSpec) -> Result<Option<Trusted>, SetupError> {
    let Some(certificate) = &spec.trusted_authority else {
        return Ok(None);
    };
    trust::add(root, certificate).or_fail("add a certificate to the image's bundle")
}

/// Leaves what is shared with the host.
fn isolate(spec: &ContainerSpec, cgroup: &Cgroup) -> Result<(), SetupError> {
    if let Some(adjustment) = spec.oom_score_adj {
        std::fs::write("/proc/self/oom_score_adj", adjustment.to_string()).or_fail("set oom_score_adj")?;
    }
    let mut namespaces = libc::CLONE_NEWNS;
    if cgroup.is_unified() {
        // On version 1 this would show the host's paths nevertheless, and mounting would fail.
        namespaces |= libc::CLONE_NEWCGROUP;
    }
    sys::unshare(namespaces).or_fail("make namespaces")?;
    rustix::process::setsid().or_fail("make a session")?;
    if spec.network == NetworkSpec::Loopback {
        sys::bring_loopback_up().or_fail("bring the loopback device up")?;
    }
    rustix::system::sethostname(spec.hostname.as_bytes()).or_fail("set the host name")?;
    make_keyring(&spec.process)
}

fn run_process(home: &Home<'_>) -> Result<Infallible, SetupError> {
    let (blueprint, _, stdio) = receive_blueprint(home.socket)?;
    let Blueprint::Process(spec) = blueprint else {
        return Err(SetupError::new("expected a process"));
    };
    home.cgroup.enter().or_fail("join the cgroup")?;
    let writer = open_labels(&spec)?;
    make_keyring(&spec)?;
    let mut namespaces = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
    if home.own_network {
        namespaces |= ThreadNameSpaceType::NETWORK;
    }
    if home.cgroup.is_unified() {
        namespaces |= ThreadNameSpaceType::CONTROL_GROUP;
    }
    rustix::thread::move_into_thread_name_spaces(home.first, namespaces).or_fail("join the container")?;
    rustix::process::setsid().or_fail("make a session")?;

    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(c"/", flags, Mode::empty()).or_fail("open the root")?;
    let identity = look_up(root.as_fd(), &spec)?;
    let terminal = open_terminal(root.as_fd(), &spec, &identity)?;
    drop(root);
    let prepared = Prepared {
        stubs: Vec::new(),
        has_root: false,
        has_pty: terminal.is_some(),
        trusted: None,
    };
    report(home.socket, &prepared, None, terminal.as_ref())?;
    connect_stdio(stdio, terminal, &identity)?;
    credentials::become_program(&spec, &identity, writer)
}

fn receive_blueprint(socket: BorrowedFd<'_>) -> Result<(Blueprint, Vec<u8>, Vec<OwnedFd>), SetupError> {
    let frame = wire::receive::<()>(socket, RecvFlags::empty()).or_fail("learn what to run")?;
    let frame = frame.ok_or_else(|| SetupError::new("the supervisor is gone"))?;
    let (blueprint, attachment) = wire::decode_body(&frame.body).or_fail("learn what to run")?;
    let attachment = attachment.to_vec();
    Ok((blueprint, attachment, frame.fds))
}

fn look_up(root: BorrowedFd<'_>, process: &ProcessSpec) -> Result<Identity, SetupError> {
    user::look_up(root, &process.user, &process.extra_groups).map_err(SetupError::new)
}

fn open_terminal(
    root: BorrowedFd<'_>,
    process: &ProcessSpec,
    identity: &Identity,
) -> Result<Option<Terminal>, SetupError> {
    if process.tty {
        Terminal::open(root, identity.uid).map(Some)
    } else {
        Ok(None)
    }
}

fn report(
    socket: BorrowedFd<'_>,
    prepared: &Prepared,
    root: Option<&OwnedFd>,
    terminal: Option<&Terminal>,
) -> Result<(), SetupError> {
    let body = wire::encode_body(prepared, &[]).or_fail("report")?;
    let fds: Vec<BorrowedFd<'_>> = root
        .map(AsFd::as_fd)
        .into_iter()
        .chain(terminal.map(Terminal::master))
        .collect();
    wire::send(socket, &Report::Prepared, &body, &fds).or_fail("report")
}

/// Puts the three streams where they belong. The user must be able to open them again by name (`/dev/stderr`), so they
/// are given to it.
fn connect_stdio(
    stdio: Vec<OwnedFd>,
    terminal: Option<Terminal>,
    identity: &Identity,
) -> Result<(), SetupError> {
    let what = "connect stdio";
    if let Some(terminal) = terminal {
        return terminal.take_control();
    }
    let [stdin, stdout, stderr] = <[OwnedFd; 3]>::try_from(stdio).map_err(|_| SetupError::new(what))?;
    rustix::stdio::dup2_stdin(&stdin).or_fail(what)?;
    rustix::stdio::dup2_stdout(&stdout).or_fail(what)?;
    rustix::stdio::dup2_stderr(&stderr).or_fail(what)?;
    for stream in [&stdin, &stdout, &stderr] {
        let stat = rustix::fs::fstat(stream).or_fail(what)?;
        let is_device =
            rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice;
        if !is_device && stat.st_uid != identity.uid {
            // Whoever handed in something that cannot be given away has its reasons.
            let _ = rustix::fs::fchown(stream, Some(rustix::fs::Uid::from_raw(identity.uid)), None);
        }
    }
    Ok(())
}

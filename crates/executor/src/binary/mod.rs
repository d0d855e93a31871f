//! An OCI runtime such as runc or crun, fed with bundles.
//!
//! A container is a child process `<program> run`, a further process in it `<program> exec`; their ends are the
//! children's ends. The root and other overlays are mounted on the host meanwhile, as such programs take paths.

mod bundle;
mod config;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio as ChildStdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::pty::OpenptFlags;
use serde::Deserialize;
use tokio::process::Command;
use tokio_util::task::TaskTracker;

use self::bundle::Bundle;
use crate::container::Pty;
use crate::error::{ExecutorError, RunError};
use crate::network::Hold;
use crate::request::{ExitStatus, Stdio};
use crate::runtime::{Phase, Running, Runtime};
use crate::spec::{ContainerSpec, ProcessSpec};
use crate::sys;
use crate::user;

/// How often the program is asked whether its container runs, until it does.
const POLL: Duration = Duration::from_millis(2);
/// Most of a program's log that is read.
const MAX_LOG_BYTES: u64 = 1 << 20;

/// Calls the program for each container.
#[derive(Debug)]
pub(crate) struct Binary {
    shared: Arc<Shared>,
    next: AtomicU64,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct Shared {
    program: PathBuf,
    /// Whether the program can be told to keep a container that has ended: its control group says what ended it.
    keeps: bool,
    bundles: PathBuf,
    jobs: Mutex<BTreeMap<u64, Job>>,
}

/// What is known of a process while it runs.
#[derive(Clone, Debug)]
struct Job {
    running: Arc<Running>,
    container: Arc<Bundle>,
    id: String,
    is_killed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Binary {
    /// Finds the program and clears what an earlier daemon left in `bundles`.
    pub(crate) fn new(program: &Path, bundles: &Path) -> Result<Self, ExecutorError> {
        let program = find(program).ok_or_else(|| ExecutorError::NoRuntime {
            program: program.display().to_string(),
        })?;
        let failed = |source| ExecutorError::Directory {
            path: bundles.to_owned(),
            source,
        };
        delete_leftovers(&program, bundles).map_err(failed)?;
        snapshot::unmount_below(bundles).map_err(|error| failed(error.source))?;
        for entry in std::fs::read_dir(bundles).map_err(failed)? {
            let bundle = entry.map_err(failed)?.path();
            std::fs::remove_dir_all(&bundle).map_err(failed)?;
        }
        let shared = Shared {
            keeps: has_keep(&program),
            program,
            bundles: bundles.to_owned(),
            jobs: Mutex::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            next: AtomicU64::new(1),
            tasks: TaskTracker::new(),
        })
    }
}

/// Ends containers that outlived a killed daemon: they would keep their mounts and networks.
fn delete_leftovers(program: &Path, bundles: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(bundles)? {
        let id = entry?.file_name();
        tracing::info!(id = %id.display(), "deleting a container that an earlier daemon left");
        // One that is not known to the program is gone.
        let deleted = std::process::Command::new(program)
            .args(["delete", "--force"])
            .arg(id)
            .stdin(ChildStdio::null())
            .stdout(ChildStdio::null())
            .stderr(ChildStdio::null())
            .status();
        deleted?;
    }
    Ok(())
}

fn find(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Asks the program whether `run` knows `--keep`; older releases of crun do not.
fn has_keep(program: &Path) -> bool {
    let asked = std::process::Command::new(program)
        .args(["run", "--help"])
        .stdin(ChildStdio::null())
        .output();
    asked.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("--keep"))
}

/// What a child is started with.
struct Call {
    arguments: Vec<OsString>,
    files: PathBuf,
    tty: bool,
    stdio: Stdio,
}

#[async_trait]
impl Runtime for Binary {
    async fn launch(
        &self,
        spec: ContainerSpec,
        attachment: Vec<u8>,
        stdio: Stdio,
        network: Option<Hold>,
    ) -> Result<Arc<Running>, RunError> {
        let (id, tty) = (spec.id.clone(), spec.process.tty);
        let shared = Arc::clone(&self.shared);
        // The program opens it while we hold it.
        let path = network.as_ref().and_then(Hold::namespace).map(|namespace| {
            let (process, number) = (std::process::id(), namespace.as_raw_fd());
            format!("/proc/{process}/fd/{number}")
        });
        let bundle = tokio::task::spawn_blocking(move || {
            Bundle::new(&shared.bundles, &spec, &attachment, path.as_deref())
        });
        let bundle = bundle.await.map_err(|error| RunError::Start {
            message: error.to_string(),
        })??;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let running = Arc::new(Running::new(number));
        running.hold(network);
        let files = bundle.path.clone();
        let mut arguments = vec![OsString::from("run")];
        arguments.extend(self.shared.keeps.then(|| "--keep".into()));
        arguments.extend(["--bundle".into(), files.clone().into()]);
        let job = Job {
            running: Arc::clone(&running),
            container: Arc::new(bundle),
            id,
            is_killed: false,
        };
        let call = Call {
            arguments,
            files,
            tty,
            stdio,
        };
        lock(&self.shared.jobs).insert(number, job.clone());
        self.tasks
            .spawn(run_container(Arc::clone(&self.shared), job, call));
        Ok(running)
    }

    async fn join(
        &self,
        container: &Running,
        process: ProcessSpec,
        stdio: Stdio,
    ) -> Result<Arc<Running>, RunError> {
        let stopped = || RunError::Start {
            message: "the container has stopped".to_owned(),
        };
        let job = lock(&self.shared.jobs)
            .get(&container.number)
            .cloned()
            .ok_or_else(stopped)?;
        self.shared.until_running(&job.id).await?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let root = job.container.root().map_err(|source| RunError::Io {
            what: "open the root".to_owned(),
            source,
        })?;
        let identity = user::look_up(root.as_fd(), &process.user, &process.extra_groups)
            .map_err(|message| RunError::Start { message })?;
        let files = job.container.path.join(format!("exec{number}"));
        let failed = |source| RunError::Io {
            what: "describe the process".to_owned(),
            source,
        };
        std::fs::create_dir(&files).map_err(failed)?;
        let description = files.join("process.json");
        std::fs::write(&description, config::process(&process, &identity).to_string()).map_err(failed)?;
        let running = Arc::new(Running::new(number));
        let job = Job {
            running: Arc::clone(&running),
            is_killed: false,
            ..job
        };
        let arguments = vec!["exec".into(), "--process".into(), description.into()];
        let call = Call {
            arguments,
            files,
            tty: process.tty,
            stdio,
        };
        lock(&self.shared.jobs).insert(number, job.clone());
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let phase = shared
                .run(&job, call)
                .await
                .unwrap_or_else(|error| Phase::Failed(error.to_string()));
            shared.end(job, phase);
        });
        Ok(running)
    }

    fn kill(&self, number: u64) {
        if let Some(job) = lock(&self.shared.jobs).get_mut(&number) {
            job.is_killed = true;
        }
    }
}

impl Drop for Binary {
    fn drop(&mut self) {
        // Their tasks clean up as far as the daemon lives on.
        for job in lock(&self.shared.jobs).values_mut() {
            job.is_killed = true;
            let _ = job.running.signal(Signal::KILL);
        }
        self.tasks.close();
    }
}

async fn run_container(shared: Arc<Shared>, job: Job, call: Call) {
    let phase = shared
        .run(&job, call)
        .await
        .unwrap_or_else(|error| Phase::Failed(error.to_string()));
    let oom_killed = job.container.cgroup.was_oom_killed();
    let deleted = Command::new(&shared.program)
        .args(["delete", "--force", &job.id])
        .stdin(ChildStdio::null())
        .stdout(ChildStdio::null())
        .stderr(ChildStdio::null())
        .status();
    if let Err(error) = deleted.await {
        tracing::warn!(%error, id = job.id, "cannot delete a container");
    }
    let phase = match phase {
        Phase::Exited(status) => Phase::Exited(ExitStatus { oom_killed, ..status }),
        other => other,
    };
    // Unmounts.
    let cleanup = tokio::task::spawn_blocking(move || shared.end(job, phase));
    if let Err(error) = cleanup.await {
        tracing::warn!(%error, "cannot clean up a container");
    }
}

impl Shared {
    fn end(&self, job: Job, phase: Phase) {
        lock(&self.jobs).remove(&job.running.number);
        let Job {
            running, container, ..
        } = job;
        drop(container);
        running.set_phase(phase);
    }

    /// Waits until a container's program is executed: only then others can join.
    async fn until_running(&self, id: &str) -> Result<(), RunError> {
        loop {
            let asked = Command::new(&self.program)
                .args(["state", id])
                .stdin(ChildStdio::null())
                .output()
                .await;
            let output = asked.map_err(|source| RunError::Io {
                what: "ask for a container's state".to_owned(),
                source,
            })?;
            let state = serde_json::from_slice::<State>(&output.stdout).map(|state| state.status);
            match state.as_deref() {
                Ok("running") => return Ok(()),
                Ok("creating" | "created") => tokio::time::sleep(POLL).await,
                _ => {
                    return Err(RunError::Start {
                        message: "the container has stopped".to_owned(),
                    });
                }
            }
        }
    }

    /// Starts the child and waits for its end.
    async fn run(&self, job: &Job, call: Call) -> io::Result<Phase> {
        let (log, pid_file) = (call.files.join("log.json"), call.files.join("pid"));
        let mut command = Command::new(&self.program);
        command.arg("--log").arg(&log).args(["--log-format", "json"]);
        let mut arguments = call.arguments.into_iter();
        command.args(arguments.next());
        command
            .arg("--pid-file")
            .arg(&pid_file)
            .args(arguments)
            .arg(&job.id);
        command.kill_on_drop(true);
        let pty = connect(&mut command, call.tty, call.stdio)?;
        let mut child = command.spawn()?;
        // The command holds our copies of the streams.
        drop(command);
        let status = tokio::select! {
            status = child.wait() => status?,
            started = self.watch(job, &pid_file, pty) => {
                started?;
                child.wait().await?
            }
        };
        if let Some(message) = logged_error(&log).filter(|_| !status.success()) {
            return Ok(Phase::Failed(message));
        }
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        let code = status.code().map_or(255, i32::unsigned_abs);
        let signal = signal.or_else(|| {
            (128..=192)
                .contains(&code)
                .then(|| i32::try_from(code - 128).unwrap_or(0))
        });
        Ok(Phase::Exited(ExitStatus {
            code,
            signal: signal.filter(|&signal| signal > 0),
            oom_killed: false,
        }))
    }

    /// Waits until the container's process exists, and lets others signal it.
    async fn watch(&self, job: &Job, pid_file: &Path, pty: Option<Pty>) -> io::Result<()> {
        loop {
            tokio::time::sleep(POLL).await;
            let Ok(text) = std::fs::read_to_string(pid_file) else {
                continue;
            };
            let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else {
                continue;
            };
            match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
                Ok(process) => job.running.set_started(process, pty),
                // It ended already.
                Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
            break;
        }
        let is_killed = lock(&self.jobs)
            .get(&job.running.number)
            .is_some_and(|job| job.is_killed);
        if is_killed {
            job.running.signal(Signal::KILL).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

/// Connects a child's streams; the other side of its terminal, if it gets one, is returned.
fn connect(command: &mut Command, tty: bool, stdio: Stdio) -> io::Result<Option<Pty>> {
    let child = |stream: Option<OwnedFd>| stream.map_or_else(ChildStdio::null, ChildStdio::from);
    if !tty {
        command
            .stdin(child(stdio.stdin))
            .stdout(child(stdio.stdout))
            .stderr(child(stdio.stderr));
        return Ok(None);
    }
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    command
        .stdin(slave.try_clone()?)
        .stdout(slave.try_clone()?)
        .stderr(slave);
    sys::give_terminal(command);
    Ok(Some(Pty::new(master)?))
}

#[derive(Deserialize)]
struct State {
    status: String,
}

#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

/// What the program says went wrong.
fn logged_error(log: &Path) -> Option<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(log)
        .ok()?
        .take(MAX_LOG_BYTES)
        .read_to_string(&mut text)
        .ok()?;
    text.lines()
        .filter_map(|line| serde_json::from_str::<LogLine>(line).ok())
        .rfind(|line| line.level == "error" || line.level == "fatal")
        .map(|line| line.msg)
}

impl Bundle {
    /// Opens the root with what is mounted in it as the host sees it: nothing of the container's own.
    fn root(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(
            self.path.join("rootfs"),
            flags,
            rustix::fs::Mode::empty(),
        )?)
    }
}

//! Running Git, apart from the daemon's environment, configuration and terminal.
//!
//! What is secret reaches Git through its environment, never through arguments, and is taken out of all output.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use build::error::{BuildError, ErrorKind};
use build::progress::{LogStream, VertexProgress};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use super::access::Access;

/// Most output of one command.
const MAX_OUTPUT_BYTES: usize = 32 << 20;
/// Most text of a failure, and of one line of log.
const MAX_TEXT_BYTES: usize = 64 << 10;
/// How long a command may take to end after it was asked to.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// The protocols that a client's repositories and their submodules may name.
const REMOTE_PROTOCOLS: &str = "git:http:https:ssh";

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum GitError {
    /// It could not be started.
    #[error("failed to find git binary")]
    Missing,
    /// The system failed.
    #[error("run git")]
    Io(#[from] std::io::Error),
    /// It ended with a failure.
    #[error("git stderr:\n{stderr}: {status}")]
    Failed {
        /// What it said, without secrets.
        stderr: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// It wrote more than any answer can be.
    #[error("git wrote more than {MAX_OUTPUT_BYTES} bytes")]
    TooLong,
    /// Nobody needs the answer any more.
    #[error("context canceled")]
    Canceled,
}

impl GitError {
    /// What the command said of its failure.
    pub fn stderr(&self) -> &str {
        match self {
            Self::Failed { stderr, .. } => stderr,
            _ => "",
        }
    }
}

impl From<GitError> for BuildError {
    fn from(error: GitError) -> Self {
        let said = |texts: &[&str]| texts.iter().any(|text| error.stderr().contains(text));
        let kind = match &error {
            GitError::Canceled => return Self::canceled(),
            GitError::Missing | GitError::Io(_) => ErrorKind::Internal,
            GitError::TooLong => ErrorKind::User,
            GitError::Failed { .. }
                if said(&[
                    "Authentication failed",
                    "could not read Username",
                    "Permission denied",
                ]) =>
            {
                ErrorKind::Denied
            }
            GitError::Failed { .. }
                if said(&[
                    "Could not resolve host",
                    "emporary failure in name resolution",
                    "onnection refused",
                    "ailed to connect to",
                    "etwork is unreachable",
                    "o route to host",
                    "timed out",
                ]) =>
            {
                ErrorKind::Unavailable
            }
            GitError::Failed { .. } => ErrorKind::User,
        };
        Self::from_source(kind, error)
    }
}

/// How Git is run for one source: where, with what access, and who watches. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Git {
    access: Arc<Access>,
    progress: VertexProgress,
    cancel: CancellationToken,
    git_dir: Option<PathBuf>,
    work_tree: Option<PathBuf>,
    origin: Option<String>,
    template: Option<PathBuf>,
    protocols: &'static str,
}

impl Git {
    /// Runs with `access`, outside any repository.
    pub fn new(access: Access, progress: VertexProgress, cancel: CancellationToken) -> Self {
        let (git_dir, work_tree, origin) = (None, None, None);
        Self {
            access: Arc::new(access),
            progress,
            cancel,
            git_dir,
            work_tree,
            origin,
            template: None,
            protocols: REMOTE_PROTOCOLS,
        }
    }

    /// Works in a repository.
    pub fn at(&self, git_dir: &Path) -> Self {
        Self {
            git_dir: Some(git_dir.to_owned()),
            work_tree: None,
            ..self.clone()
        }
    }

    /// Works on files.
    pub fn on(&self, work_tree: &Path) -> Self {
        Self {
            work_tree: Some(work_tree.to_owned()),
            ..self.clone()
        }
    }

    /// Works outside any repository.
    pub fn without_repository(&self) -> Self {
        Self {
            git_dir: None,
            work_tree: None,
            ..self.clone()
        }
    }

    /// Knows the remote as `origin`.
    pub fn with_origin(&self, url: &str) -> Self {
        Self {
            origin: Some(url.to_owned()),
            ..self.clone()
        }
    }

    /// Knows no remote.
    pub fn without_origin(&self) -> Self {
        Self {
            origin: None,
            ..self.clone()
        }
    }

    /// Begins repositories, also those of submodules, with what is in a directory.
    pub fn with_template(&self, dir: &Path) -> Self {
        Self {
            template: Some(dir.to_owned()),
            ..self.clone()
        }
    }

    /// Fetches from this machine's file system and from nowhere else.
    pub fn local(&self) -> Self {
        Self {
            protocols: "file",
            ..self.clone()
        }
    }

    /// Runs a command and returns its standard output. Where a server cannot give the newest commit alone, the command
    /// runs again without `--depth`. Dropping the future ends it.
    pub async fn run(&self, args: &[&str]) -> Result<String, GitError> {
        Ok(String::from_utf8_lossy(&self.bytes(args).await?).into_owned())
    }

    /// Runs a command like [`Git::run`] and returns its standard output as it is.
    pub async fn bytes(&self, args: &[&str]) -> Result<Vec<u8>, GitError> {
        match self.run_once(args).await {
            Err(error)
                if ["--depth", "shallow"]
                    .iter()
                    .any(|text| error.stderr().contains(text)) =>
            {
                let deep: Vec<&str> = args.iter().copied().filter(|arg| *arg != "--depth=1").collect();
                if deep.len() == args.len() {
                    return Err(error);
                }
                self.run_once(&deep).await
            }
            done => done,
        }
    }

    async fn run_once(&self, args: &[&str]) -> Result<Vec<u8>, GitError> {
        if self.cancel.is_cancelled() {
            return Err(GitError::Canceled);
        }
        let mut child = self.command(args).spawn()?;
        let mut group = Group(child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)));
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (stdout, stderr) = stdout
            .zip(stderr)
            .ok_or(std::io::Error::other("git has no pipes"))?;
        let work = async {
            let (status, stdout, stderr) = tokio::join!(child.wait(), collect(stdout), self.show(stderr));
            (status, stdout, stderr)
        };
        let mut work = Box::pin(work);
        let (status, stdout, stderr) = tokio::select! {
            done = &mut work => done,
            () = self.cancel.cancelled() => {
                group.signal(Signal::TERM);
                // Git removes its lock files when it is asked to end.
                let _ = tokio::time::timeout(END_TIMEOUT, work).await;
                return Err(GitError::Canceled);
            }
        };
        group.0 = None;
        let (status, stdout, stderr) = (status?, stdout?, stderr?);
        if status.success() {
            return Ok(stdout);
        }
        if status.code() == Some(127) {
            return Err(GitError::Missing);
        }
        Err(GitError::Failed { stderr, status })
    }

    fn command(&self, args: &[&str]) -> Command {
        // Files are made with the ordinary mask, whatever the daemon's is; only a shell can set it for one process.
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "umask 0022 && exec git \"$@\"", "git"]);
        if let Some(work_tree) = &self.work_tree {
            command.arg("--work-tree").arg(work_tree);
        }
        if let Some(git_dir) = &self.git_dir {
            command.arg("--git-dir").arg(git_dir);
        }
        command.args(args);
        command.current_dir(
            self.work_tree
                .as_deref()
                .or(self.git_dir.as_deref())
                .unwrap_or(Path::new("/")),
        );
        command.env_clear().envs(self.environment());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        command
    }

    fn environment(&self) -> Vec<(String, OsString)> {
        let mut env = self.access.env.clone();
        // None at all, rather than the host's.
        let template = self.template.as_deref().unwrap_or(Path::new(""));
        env.push(("GIT_TEMPLATE_DIR".to_owned(), template.into()));
        let mut set = |name: &str, value: &str| env.push((name.to_owned(), value.into()));
        set("LC_ALL", "C");
        set("HOME", "/dev/null");
        set("GIT_TERMINAL_PROMPT", "0");
        set("GIT_CONFIG_NOSYSTEM", "1");
        set("GIT_ATTR_NOSYSTEM", "1");
        set("GIT_CONFIG_GLOBAL", "/dev/null");
        set("GIT_ALLOW_PROTOCOL", self.protocols);
        let fixed = [
            ("init.defaultBranch", "master"),
            ("core.hooksPath", "/dev/null"),
            ("core.logAllRefUpdates", "false"),
            ("advice.detachedHead", "false"),
            // Nothing goes on in the background once a command has ended.
            ("gc.autoDetach", "false"),
            ("maintenance.autoDetach", "false"),
            // A pack appears whole or not at all; loose objects come one by one.
            ("fetch.unpackLimit", "1"),
        ];
        let fixed = fixed.iter().map(|(key, value)| (*key, *value));
        let given = self
            .access
            .config
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()));
        let own = self.origin.iter().map(|url| ("remote.origin.url", url.as_str()));
        let mut count = 0;
        for (key, value) in fixed.chain(given).chain(own) {
            set(&format!("GIT_CONFIG_KEY_{count}"), key);
            set(&format!("GIT_CONFIG_VALUE_{count}"), value);
            count += 1;
        }
        set("GIT_CONFIG_COUNT", &count.to_string());
        env
    }

    /// Shows what a command says line by line, and returns the end of it.
    async fn show(&self, mut from: impl AsyncRead + Unpin) -> Result<String, GitError> {
        let (mut line, mut all) = (Vec::new(), String::new());
        let mut buffer = vec![0; 8 << 10];
        loop {
            let count = from.read(&mut buffer).await?;
            line.extend_from_slice(buffer.get(..count).unwrap_or_default());
            let end = line.iter().rposition(|byte| *byte == b'\n').map(|at| at + 1);
            let end = if count == 0 || line.len() > MAX_TEXT_BYTES {
                line.len()
            } else {
                end.unwrap_or(0)
            };
            if end > 0 {
                let text = self
                    .access
                    .redact(&String::from_utf8_lossy(line.get(..end).unwrap_or_default()));
                line.drain(..end);
                all.push_str(&text);
                self.progress.log(LogStream::Stderr, text);
            }
            if all.len() > MAX_TEXT_BYTES {
                let start = all.len() - MAX_TEXT_BYTES / 2;
                let start = (start..all.len())
                    .find(|at| all.is_char_boundary(*at))
                    .unwrap_or(0);
                all.drain(..start);
            }
            if count == 0 {
                return Ok(all.trim_end().to_owned());
            }
        }
    }
}

async fn collect(from: impl AsyncRead + Unpin) -> Result<Vec<u8>, GitError> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(MAX_OUTPUT_BYTES).unwrap_or(u64::MAX);
    from.take(limit + 1).read_to_end(&mut bytes).await?;
    if bytes.len() > MAX_OUTPUT_BYTES {
        Err(GitError::TooLong)
    } else {
        Ok(bytes)
    }
}

/// The processes of a command, which are ended with it.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(group) = self.0 {
            // One that has ended already is what is wanted.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

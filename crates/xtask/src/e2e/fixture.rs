//! What scenarios work with: binaries under their names, a registry with base images, daemons, contexts.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use prost::Message as _;

use crate::base_image::BaseRegistry;
use crate::setup;
use crate::shell::root;

/// Longest time any single command of a scenario may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// Builds the binary and links it under every name it answers to. Returns the directory of links.
pub fn build_binaries() -> Result<PathBuf> {
    build_with(&[], "debug")
}

/// The same as users have it.
pub fn build_optimised() -> Result<PathBuf> {
    build_with(&["--release"], "release")
}

fn build_with(flags: &[&str], profile: &str) -> Result<PathBuf> {
    crate::shell::run(
        Command::new(env!("CARGO"))
            .args(["build", "--locked", "--package", "cooper"])
            .args(flags)
            .current_dir(root()),
    )?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let binary = target.join(profile).join("cooper");
    ensure!(binary.is_file(), "cargo left no {}", binary.display());
    let links = target.join(format!("{profile}-bin"));
    fs::create_dir_all(&links)?;
    for name in ["cooper", "cooperd", "buildkitd", "buildctl"] {
        let link = links.join(name);
        if fs::symlink_metadata(&link).is_ok() {
            fs::remove_file(&link)?;
        }
        symlink(&binary, &link)?;
    }
    Ok(links)
}

/// One scenario's place: a temporary directory, a registry, the binaries.
pub struct Lab {
    dir: tempfile::TempDir,
    binaries: PathBuf,
    registry: BaseRegistry,
}

impl Lab {
    /// Makes an empty place with a registry that serves `library/busybox` and `library/alpine`.
    pub fn new(name: &str, binaries: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix(&format!("cooper-e2e-{name}-"))
            .tempdir()?;
        Ok(Self {
            dir,
            binaries: binaries.to_path_buf(),
            registry: BaseRegistry::start()?,
        })
    }

    /// The scenario's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `host:port` of the registry with the base images; plain http.
    pub fn registry(&self) -> &str {
        self.registry.address()
    }

    /// The busybox base image's full name.
    pub fn busybox(&self) -> String {
        format!("{}/library/busybox:latest", self.registry())
    }

    /// The registry with the base images, for other images.
    pub fn images(&self) -> &testkit::registry::Registry {
        self.registry.registry()
    }

    /// Lets `library/busybox:moving` be another image for each number.
    pub fn move_tag(&self, number: u32) -> Result<()> {
        self.registry.move_tag(number)
    }

    /// Writes a build context from `(path, content)` pairs. `@BASE@` in a content becomes the base image's name.
    pub fn context(&self, name: &str, files: &[(&str, &str)]) -> Result<PathBuf> {
        let context = self.dir().join(name);
        for (path, content) in files {
            let path = context.join(path);
            fs::create_dir_all(path.parent().context("a file has a directory")?)?;
            fs::write(path, content.replace("@BASE@", &self.busybox()))?;
        }
        Ok(context)
    }

    /// A command of ours by name, with an environment that does not leak the developer's settings.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.binaries.join(name));
        self.clean(&mut command);
        command
    }

    /// A command from the machine or the unpacked tools.
    pub fn tool(&self, name: &str) -> Result<Command> {
        let mut command =
            Command::new(setup::find(name).with_context(|| format!("{name} is not installed"))?);
        self.clean(&mut command);
        Ok(command)
    }

    /// A `buildkitd` of the machine that is not ours.
    pub fn foreign_daemon(&self) -> Result<Command> {
        let program = setup::foreign_daemon().context("no buildkitd but ours is on PATH")?;
        let mut command = Command::new(program);
        self.clean(&mut command);
        Ok(command)
    }

    /// A directory for programs that stand for others of the same name.
    pub fn programs(&self) -> Result<PathBuf> {
        let dir = self.dir().join("programs");
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    fn clean(&self, command: &mut Command) {
        let others = setup::path_with_tools();
        let dirs = std::iter::once(self.dir().join("programs")).chain(std::env::split_paths(&others));
        let path = std::env::join_paths(dirs).unwrap_or_else(|_| others.clone());
        command
            .env("PATH", path)
            .env("HOME", self.dir())
            .env("XDG_DATA_HOME", self.dir().join("data"))
            .env("COOPER_STATE", self.dir().join("state"))
            .env_remove("BUILDKIT_HOST")
            .env_remove("COOPER_HOST")
            .env_remove("DOCKER_HOST")
            .env_remove("DOCKER_CONFIG")
            .stdin(Stdio::null());
    }

    /// `cooper build` with an embedded engine, plain progress, and the scenario's state.
    pub fn cooper_build(&self, context: &Path) -> Command {
        let mut command = self.command("cooper");
        command.args(["build", "--progress=plain"]).arg(context);
        command
    }

    /// Starts a daemon on the scenario's state directory and waits until it answers.
    pub fn daemon(&self) -> Result<Daemon<'_>> {
        self.daemon_with(&[])
    }

    /// The same with further flags.
    pub fn daemon_with(&self, flags: &[&str]) -> Result<Daemon<'_>> {
        Daemon::start(self, flags)
    }

    /// Checks that nothing was left behind and removes the directory.
    pub fn finish(self) -> Result<()> {
        let dir = self.dir.path().to_string_lossy().into_owned();
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let leaked: Vec<&str> = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .filter(|target| target.starts_with(&dir))
            .collect();
        let processes = processes_of(&dir);
        for target in leaked.iter().rev() {
            let _ = Command::new("umount").arg("-l").arg(target).status();
        }
        ensure!(leaked.is_empty(), "mounts were leaked: {leaked:?}");
        ensure!(processes.is_empty(), "processes were leaked: {processes:?}");
        Ok(())
    }
}

/// Command lines of running processes that mention a directory.
pub fn processes_of(dir: &str) -> Vec<String> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir("/proc") else {
        return found;
    };
    for entry in entries.flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(dir) {
            found.push(line);
        }
    }
    found
}

/// A running `cooperd`.
pub struct Daemon<'lab> {
    lab: &'lab Lab,
    child: Child,
    flags: Vec<String>,
}

impl<'lab> Daemon<'lab> {
    fn start(lab: &'lab Lab, flags: &[&str]) -> Result<Self> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(lab.dir().join("daemon.log"))?;
        let child = lab
            .command("cooperd")
            .arg("--root")
            .arg(lab.dir().join("daemon"))
            .arg("--addr")
            .arg(address(lab))
            .args(flags)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting cooperd")?;
        let mut daemon = Self {
            lab,
            child,
            flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
        };
        daemon.wait_until_it_answers()?;
        Ok(daemon)
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            let answer = self.buildctl(&["debug", "workers"]).output()?;
            if answer.status.success() {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("cooperd ended with {status}:\n{}", self.log());
            }
            ensure!(
                start.elapsed() < Duration::from_secs(20),
                "cooperd does not answer: {}\n{}",
                text(&answer),
                self.log()
            );
        }
    }

    /// The daemon's address.
    pub fn address(&self) -> String {
        address(self.lab)
    }

    /// A command of ours by name.
    pub fn command(&self, name: &str) -> Command {
        self.lab.command(name)
    }

    /// What the daemon wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.lab.dir().join("daemon.log")).unwrap_or_default()
    }

    /// Our `buildctl` against this daemon.
    pub fn buildctl(&self, arguments: &[&str]) -> Command {
        let mut command = self.lab.command("buildctl");
        command.arg("--addr").arg(self.address()).args(arguments);
        command
    }

    /// `buildctl build` of a Dockerfile context with plain progress.
    pub fn buildctl_build(&self, context: &Path) -> Command {
        let mut command = self.buildctl(&["build", "--progress=plain", "--frontend=dockerfile.v0"]);
        let shown = context.display();
        command
            .arg(format!("--local=context={shown}"))
            .arg(format!("--local=dockerfile={shown}"));
        command
    }

    /// `buildctl build` of a definition, which is kept under a name, with plain progress.
    pub fn buildctl_definition(&self, name: &str, definition: &llb::pb::Definition) -> Result<Command> {
        let path = self.lab.dir().join(format!("{name}.llb"));
        fs::write(&path, definition.encode_to_vec())?;
        let mut command = self.buildctl(&["build", "--progress=plain"]);
        command.stdin(fs::File::open(path)?);
        Ok(command)
    }

    /// `cooper build` against this daemon.
    pub fn cooper_build(&self, context: &Path) -> Command {
        let mut command = self.lab.command("cooper");
        command
            .args(["build", "--progress=plain", "--addr", &self.address()])
            .arg(context);
        command
    }

    /// Ends the daemon as an init system does and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.signal("-TERM")?;
        self.start_again()
    }

    /// Whether the process that was started is still there.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.lab.dir().join("d.sock")
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends the daemon as an init system does.
    pub fn stop(&mut self) -> Result<()> {
        self.signal("-TERM")
    }

    /// Kills the daemon without warning.
    pub fn kill(&mut self) -> Result<()> {
        self.signal("-KILL")
    }

    /// The command that looks through the state directory of the stopped daemon.
    pub fn verify_command(&self) -> Command {
        let mut command = self.lab.command("cooperd");
        command
            .arg("--root")
            .arg(self.lab.dir().join("daemon"))
            .arg("--verify");
        command
    }

    /// Requires that the stopped daemon's state is sound; returns what was told of it.
    pub fn verify(&self) -> Result<String> {
        succeed(&mut self.verify_command())
    }

    /// Kills the daemon without warning and starts it again.
    pub fn kill_and_start(&mut self) -> Result<()> {
        self.signal("-KILL")?;
        self.start_again()
    }

    fn signal(&mut self, signal: &str) -> Result<()> {
        Command::new("kill")
            .arg(signal)
            .arg(self.child.id().to_string())
            .status()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts the daemon again after it ended.
    pub fn start_again(&mut self) -> Result<()> {
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        let fresh = Self::start(self.lab, &flags)?;
        *self = fresh;
        Ok(())
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.signal("-TERM");
        }
    }
}

fn address(lab: &Lab) -> String {
    format!("unix://{}", lab.dir().join("d.sock").display())
}

/// Both output streams of a finished command as text.
pub fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs a command that must succeed; returns its output as text.
pub fn succeed(command: &mut Command) -> Result<String> {
    let output = finish(command)?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}:\n{}",
        output.status,
        text(&output)
    );
    Ok(text(&output))
}

/// Runs a command that must fail; returns its exit code and its output as text.
pub fn fail(command: &mut Command) -> Result<(i32, String)> {
    let output = finish(command)?;
    let code = output
        .status
        .code()
        .with_context(|| format!("{command:?} was killed by a signal"))?;
    ensure!(code != 0, "{command:?} succeeded:\n{}", text(&output));
    Ok((code, text(&output)))
}

/// Runs a command to its end with a limit on its time.
fn finish(command: &mut Command) -> Result<Output> {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {command:?}"))?;
    let pid = child.id();
    let (ended, waits) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if waits.recv_timeout(COMMAND_LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = Command::new("kill").arg("-KILL").arg(pid.to_string()).status();
            return true;
        }
        false
    });
    let output = child.wait_with_output()?;
    drop(ended);
    let timed_out = watchdog.join().unwrap_or(false);
    ensure!(
        !timed_out,
        "{command:?} did not end in {COMMAND_LIMIT:?}:\n{}",
        text(&output)
    );
    Ok(output)
}

/// Polls until a condition holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !holds() {
        ensure!(
            start.elapsed() < Duration::from_secs(20),
            "{what} did not come true"
        );
        std::thread::park_timeout(Duration::from_millis(10));
    }
    Ok(())
}

/// Requires that a text contains another.
pub fn expect(haystack: &str, needle: &str) -> Result<()> {
    ensure!(haystack.contains(needle), "{needle:?} is not in:\n{haystack}");
    Ok(())
}

/// Requires that a text does not contain another.
pub fn expect_not(haystack: &str, needle: &str) -> Result<()> {
    ensure!(!haystack.contains(needle), "{needle:?} is in:\n{haystack}");
    Ok(())
}

/// How many lines say that a step was cached.
pub fn cached_steps(progress: &str) -> usize {
    progress
        .lines()
        .filter(|line| line.starts_with('#') && line.ends_with(" CACHED"))
        .count()
}

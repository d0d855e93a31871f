//! Runs the binary.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A directory in which the binary has all of its names.
pub struct Programs {
    pub dir: tempfile::TempDir,
}

impl Programs {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cooper")
            .tempdir_in("/tmp")
            .unwrap();
        for name in ["cooper", "cooperd", "buildkitd", "buildctl"] {
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_cooper"), dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command<S: AsRef<OsStr>>(&self, name: &str, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(self.path(name));
        command
            .args(args)
            .current_dir(self.dir.path())
            .env_remove("BUILDKIT_HOST")
            .env_remove("COOPER_HOST")
            .env("COOPER_CONFIG", "/nonexistent")
            .env("HOME", self.dir.path())
            .stdin(Stdio::null());
        command
    }

    pub fn run<S: AsRef<OsStr>>(&self, name: &str, args: impl IntoIterator<Item = S>) -> Output {
        self.command(name, args).output().unwrap()
    }

    /// Writes a context with a Dockerfile and a file.
    pub fn context(&self, dockerfile: &str) -> PathBuf {
        let context = self.path("context");
        std::fs::create_dir_all(&context).unwrap();
        std::fs::write(context.join("Dockerfile"), dockerfile).unwrap();
        std::fs::write(context.join("file"), "content").unwrap();
        context
    }
}

/// Returns what a program wrote, and fails when it failed.
pub fn success(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    (stdout, stderr)
}

/// Returns what a program wrote to standard error, and fails when it succeeded.
pub fn failure(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    stderr
}

/// A running daemon; killed when it is dropped.
pub struct Daemon {
    child: Child,
    pub address: String,
}

impl Daemon {
    pub fn start(programs: &Programs, name: &str, args: &[&str]) -> Self {
        let socket = programs.path("d.sock");
        let address = format!("unix://{}", socket.display());
        let root = programs.path("root");
        let log = std::fs::File::create(programs.path("log")).unwrap();
        let mut command = programs.command(name, args);
        command
            .args(["--config=/nonexistent", "--addr", &address, "--debug", "--root"])
            .arg(root)
            .stderr(log);
        let mut child = command.spawn().unwrap();
        let start = Instant::now();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            let log = || std::fs::read_to_string(programs.path("log")).unwrap();
            assert!(
                child.try_wait().unwrap().is_none(),
                "the daemon has ended: {}",
                log()
            );
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "the daemon does not listen: {}",
                log()
            );
            std::thread::yield_now();
        }
        Self { child, address }
    }

    /// Asks the daemon to end, and returns its exit code.
    pub fn stop(mut self) -> Option<i32> {
        let id = self.child.id().to_string();
        success(&Command::new("kill").args(["-TERM", &id]).output().unwrap());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads a file below a directory.
pub fn read(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap()
}

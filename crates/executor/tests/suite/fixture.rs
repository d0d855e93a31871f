//! A root file system with busybox, and short ways to run something in it.

use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use executor::{
    Executor, ExecutorConfig, ExitStatus, NetworkChoice, Process, Root, RunError, RunRequest, RuntimeChoice,
    Stdio,
};
use tokio_util::sync::CancellationToken;

const BUSYBOX: &str = "/bin/busybox";

/// Why nothing can be tested here.
pub fn cannot_run() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("containers need root".to_owned());
    }
    if !Path::new(BUSYBOX).exists() {
        return Some(format!("{BUSYBOX} is missing (Debian's busybox-static)"));
    }
    None
}

/// The runtimes to test; for those this machine lacks, why.
pub fn runtimes() -> Vec<Result<RuntimeChoice, String>> {
    let runc = [
        "/usr/sbin/runc",
        "/usr/bin/runc",
        "/usr/local/sbin/runc",
        "/usr/local/bin/runc",
    ];
    let runc = runc.iter().find(|path| Path::new(path).exists());
    vec![
        Ok(RuntimeChoice::Embedded),
        runc.map(|path| RuntimeChoice::Binary(PathBuf::from(path)))
            .ok_or_else(|| "runc is not installed".to_owned()),
    ]
}

/// An executor with what it runs in.
#[derive(Debug)]
pub struct Lab {
    pub executor: Executor,
    pub embedded: bool,
    pub runtime: RuntimeChoice,
    directory: tempfile::TempDir,
    count: AtomicUsize,
}

/// What a run yielded.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// A root made for one test.
#[derive(Debug)]
pub struct Tree {
    pub upper: PathBuf,
    pub root: Root,
}

impl Lab {
    pub fn new(runtime: &RuntimeChoice) -> Self {
        Self::with_network(runtime, NetworkChoice::Host)
    }

    pub fn with_network(runtime: &RuntimeChoice, network: NetworkChoice) -> Self {
        let config = ExecutorConfig {
            network,
            ..ExecutorConfig::default()
        };
        Self::configured(runtime, config)
    }

    /// Makes one with settings; where its state is and its runtime are not among them.
    pub fn configured(runtime: &RuntimeChoice, config: ExecutorConfig) -> Self {
        let directory = tempfile::tempdir().unwrap();
        make_rootfs(&directory.path().join("rootfs"));
        let config = ExecutorConfig {
            state_dir: directory.path().join("state"),
            runtime: runtime.clone(),
            ..config
        };
        Self {
            executor: Executor::new(config).unwrap(),
            embedded: *runtime == RuntimeChoice::Embedded,
            runtime: runtime.clone(),
            directory,
            count: AtomicUsize::new(0),
        }
    }

    pub fn name(&self) -> &'static str {
        if self.embedded { "embedded" } else { "runc" }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A directory of its own for a test.
    pub fn directory(&self) -> PathBuf {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.path().join(format!("d{number}"));
        std::fs::create_dir(&path).unwrap();
        path
    }

    /// An overlay on the busybox root.
    pub fn tree(&self) -> Tree {
        let directory = self.directory();
        let (upper, work) = (directory.join("upper"), directory.join("work"));
        std::fs::create_dir(&upper).unwrap();
        std::fs::set_permissions(&upper, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir(&work).unwrap();
        let lower = self.directory.path().join("rootfs");
        let volatile = ["volatile".to_owned()];
        let mount = snapshot::Mount::overlay([lower.as_path()], Some((&upper, &work)), &volatile);
        Tree {
            upper,
            root: Root {
                mounts: vec![mount],
                read_only: false,
            },
        }
    }

    pub fn request(&self, script: &str) -> RunRequest {
        RunRequest::new(self.tree().root, shell(script))
    }

    pub async fn run(&self, request: RunRequest) -> Result<Output, RunError> {
        self.run_with(request, &CancellationToken::new()).await
    }

    pub async fn run_with(
        &self,
        request: RunRequest,
        cancel: &CancellationToken,
    ) -> Result<Output, RunError> {
        let (stdio, streams) = pipes();
        let reading = read_all(streams);
        let status = self.executor.run(request, stdio, cancel).await?;
        let (stdout, stderr) = reading.await.unwrap();
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }

    /// Runs a script that must succeed, and returns what it wrote.
    pub async fn sh(&self, script: &str) -> String {
        self.ok(self.request(script)).await
    }

    pub async fn ok(&self, request: RunRequest) -> String {
        let output = self.run(request).await.unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    }
}

pub fn shell(script: &str) -> Process {
    process(&["/bin/sh", "-c", script])
}

pub fn process(args: &[&str]) -> Process {
    Process {
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
        cwd: String::new(),
        user: String::new(),
        tty: false,
    }
}

pub fn pipes() -> (Stdio, (OwnedFd, OwnedFd)) {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let ((out, stdout), (err, stderr)) = (pipe(), pipe());
    (
        Stdio {
            stdin: None,
            stdout: Some(stdout),
            stderr: Some(stderr),
        },
        (out, err),
    )
}

pub fn read_all((out, err): (OwnedFd, OwnedFd)) -> tokio::task::JoinHandle<(String, String)> {
    let read = |fd: OwnedFd| {
        let mut text = Vec::new();
        std::fs::File::from(fd).read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    };
    tokio::task::spawn_blocking(move || {
        let stderr = std::thread::spawn(move || read(err));
        (read(out), stderr.join().unwrap())
    })
}

fn make_rootfs(root: &Path) {
    for directory in ["bin", "etc", "tmp", "root", "home/user", "proc", "dev", "sys"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    for path in [
        root.to_owned(),
        root.join("home/user"),
        root.join("etc"),
        root.join("bin"),
    ] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    std::fs::set_permissions(root.join("tmp"), std::fs::Permissions::from_mode(0o1777)).unwrap();
    std::fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    let applets = "sh cat ls id mknod mkdir rmdir rm touch stat head tail dd test echo env sleep grep mount umount \
                   hostname kill true false seq readlink wc chroot ip ifconfig find cut pwd ln cp chmod sort tty stty \
                   unshare ps dmesg sync tr usleep nc ping sed";
    for applet in applets.split_whitespace() {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1001::/home/user:/bin/sh\n";
    std::fs::write(root.join("etc/passwd"), passwd).unwrap();
    std::fs::write(
        root.join("etc/group"),
        "root:x:0:\nuser:x:1001:\nwheel:x:10:root,user\nstaff:x:50:user\n",
    )
    .unwrap();
}

//! Base images without a public registry: made of Debian's static busybox, served in this process.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use oci::Platform;
use tar::EntryType;
use testkit::image::{Image, ImageBuilder, LayerBuilder};
use testkit::registry::{Accounts, Options, Registry};
use tokio::runtime::Runtime;

use crate::setup;
use crate::shell::output;

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n";
const GROUP: &str = "root:x:0:\ndaemon:x:1:\nnobody:x:65534:\n";

/// A registry in this process that serves `library/busybox` and `library/alpine`; plain http. It ends when dropped.
pub struct BaseRegistry {
    address: String,
    // Ended in this order.
    registry: Registry,
    _runtime: Runtime,
}

impl BaseRegistry {
    /// Makes the images and starts serving.
    pub fn start() -> Result<Self> {
        Self::start_with(Options::default())
    }

    /// The same for one account only, with a token server or with basic authentication.
    pub fn start_private(username: &str, password: &str, basic: bool) -> Result<Self> {
        let accounts = Accounts {
            users: [(username.to_owned(), password.to_owned())].into(),
            basic,
            ..Accounts::default()
        };
        Self::start_with(Options {
            accounts: Some(accounts),
            ..Options::default()
        })
    }

    fn start_with(options: Options) -> Result<Self> {
        let image = busybox_image()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let registry = runtime.block_on(Registry::start_with(options));
        registry.add_image("library/busybox", "latest", &image);
        registry.add_image("library/alpine", "latest", &image);
        Ok(Self {
            address: registry.domain(),
            registry,
            _runtime: runtime,
        })
    }

    /// Lets `library/busybox:moving` be another image for each number.
    pub fn move_tag(&self, number: u32) -> Result<()> {
        let image = busybox_builder()?
            .layer(LayerBuilder::new().file("etc/number", number.to_string()).build())
            .build();
        self.registry.add_image("library/busybox", "moving", &image);
        Ok(())
    }

    /// The registry itself, for other images.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }
}

fn busybox_image() -> Result<Image> {
    Ok(busybox_builder()?.build())
}

/// The base image, to be changed.
pub fn busybox_builder() -> Result<ImageBuilder> {
    let busybox = setup::find("busybox").context("busybox is not installed")?;
    let program = std::fs::read(&busybox).with_context(|| busybox.display().to_string())?;
    let applets = output(Command::new(&busybox).arg("--list"))?;
    let mut layer = LayerBuilder::new();
    for dir in [
        "bin",
        "dev",
        "etc",
        "home",
        "proc",
        "root",
        "sys",
        "usr",
        "usr/bin",
        "usr/share",
        "var",
    ] {
        layer = layer.dir(dir);
    }
    layer = layer.entry(EntryType::Directory, "tmp/", "", &[], 0o1777);
    layer = layer.file_with_mode("bin/busybox", program, 0o755);
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    let layer = layer.file("etc/passwd", PASSWD).file("etc/group", GROUP).build();
    Ok(ImageBuilder::new()
        .platform(Platform::host())
        .env("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .layer(layer)
        .edit(|config| config.config.cmd = vec!["sh".to_owned()]))
}

/// Debian's `docker-registry` on a port of its own; it ends when dropped.
pub struct RealRegistry {
    address: String,
    child: Child,
}

impl RealRegistry {
    /// Starts it with its storage below `dir`.
    pub fn start(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let address = format!("127.0.0.1:{port}");
        let config: PathBuf = dir.join("config.yml");
        let storage = dir.join("storage");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\nhttp: {{addr: \"{address}\"}}\n",
                storage.display()
            ),
        )?;
        let program = setup::find("docker-registry").context("docker-registry is not installed")?;
        let child = Command::new(program)
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting docker-registry")?;
        let mut registry = Self { address, child };
        registry.wait_until_it_listens()?;
        Ok(registry)
    }

    fn wait_until_it_listens(&mut self) -> Result<()> {
        let start = Instant::now();
        while std::net::TcpStream::connect(&self.address).is_err() {
            ensure!(
                start.elapsed() < Duration::from_secs(20),
                "docker-registry does not listen"
            );
            ensure!(self.child.try_wait()?.is_none(), "docker-registry ended");
            std::thread::yield_now();
        }
        Ok(())
    }

    /// `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

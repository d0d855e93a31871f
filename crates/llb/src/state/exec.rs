//! Running a command on a filesystem.

use std::sync::Arc;

use oci::Platform;

use super::vertex::{Kind, Output, Vertex};
use super::{Constraints, State};
use crate::pb::MountContentCache;

/// Who may use a cache mount at the same time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheSharing {
    /// Everyone.
    #[default]
    Shared,
    /// Everyone, but each has another one.
    Private,
    /// One after the other.
    Locked,
}

/// A filesystem mounted into a container. Secrets and agents are not mounts here, see [`Secret`] and [`Ssh`].
#[derive(Clone, Debug)]
pub struct Mount {
    target: String,
    source: Option<Output>,
    selector: String,
    readonly: bool,
    no_output: bool,
    cache: Option<(String, CacheSharing)>,
    /// Size limit in bytes, 0 for none.
    tmpfs: Option<i64>,
    content_cache: MountContentCache,
}

impl Mount {
    /// Mounts `source` at `target`; what the command changes there becomes an output.
    pub fn new(target: impl Into<String>, source: &State) -> Self {
        Self {
            target: target.into(),
            source: source.output.clone(),
            selector: String::new(),
            readonly: false,
            no_output: false,
            cache: None,
            tmpfs: None,
            content_cache: MountContentCache::Default,
        }
    }

    /// Mounts a directory that is kept between builds. It starts as `source`.
    pub fn cache(
        target: impl Into<String>,
        source: &State,
        id: impl Into<String>,
        sharing: CacheSharing,
    ) -> Self {
        Self {
            cache: Some((id.into(), sharing)),
            ..Self::new(target, source)
        }
    }

    /// Mounts a filesystem in memory; `size_bytes` 0 sets no limit.
    pub fn tmpfs(target: impl Into<String>, size_bytes: i64) -> Self {
        Self {
            tmpfs: Some(size_bytes),
            ..Self::new(target, &State::scratch())
        }
    }

    /// Refuses writes.
    #[must_use]
    pub fn readonly(mut self) -> Self {
        self.readonly = true;
        self
    }

    /// Mounts this path of the source.
    #[must_use]
    pub fn selector(mut self, path: impl Into<String>) -> Self {
        self.selector = path.into();
        self
    }

    /// Drops what the command changes.
    #[must_use]
    pub fn no_output(mut self) -> Self {
        self.no_output = true;
        self
    }

    /// Says whether the content of the source, rather than its definition, is a key.
    #[must_use]
    pub fn content_cache(mut self, content_cache: MountContentCache) -> Self {
        self.content_cache = content_cache;
        self
    }

    fn has_output(&self) -> bool {
        !self.no_output && !self.readonly && self.cache.is_none() && self.tmpfs.is_none()
    }
}

/// A secret given to a command, as a file, as an environment variable, or both.
#[derive(Clone, Debug)]
pub struct Secret {
    /// Name of the secret.
    pub id: String,
    /// Path of the file.
    pub target: Option<String>,
    /// Name of the variable.
    pub env: Option<String>,
    /// Permission bits of the file.
    pub mode: u32,
    /// Owner of the file.
    pub uid: u32,
    /// Group of the file.
    pub gid: u32,
    /// Whether the command runs without it, too.
    pub optional: bool,
}

impl Secret {
    /// A secret as a file of mode 0400.
    pub fn file(id: impl Into<String>, target: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            target: Some(target.into()),
            env: None,
            mode: 0o400,
            uid: 0,
            gid: 0,
            optional: false,
        }
    }

    /// A secret as an environment variable.
    pub fn env(id: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            target: None,
            env: Some(name.into()),
            ..Self::file(id, "")
        }
    }
}

/// An SSH agent given to a command.
#[derive(Clone, Debug)]
pub struct Ssh {
    /// Name of the agent.
    pub id: String,
    /// Path of the socket; empty for `/run/buildkit/ssh_agent.N`.
    pub target: String,
    /// Permission bits of the socket.
    pub mode: u32,
    /// Owner of the socket.
    pub uid: u32,
    /// Group of the socket.
    pub gid: u32,
    /// Whether the command runs without it, too.
    pub optional: bool,
}

impl Ssh {
    /// An agent with a socket of mode 0600 at the default place.
    pub fn new(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            target: String::new(),
            mode: 0o600,
            uid: 0,
            gid: 0,
            optional: false,
        }
    }
}

/// Proxies that a command sees without them being part of its cache key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyEnv {
    /// `HTTP_PROXY`.
    pub http_proxy: String,
    /// `HTTPS_PROXY`.
    pub https_proxy: String,
    /// `FTP_PROXY`.
    pub ftp_proxy: String,
    /// `NO_PROXY`.
    pub no_proxy: String,
    /// `ALL_PROXY`.
    pub all_proxy: String,
}

/// A command being described; [`Run::done`] adds it to the graph.
#[derive(Clone, Debug)]
#[must_use]
pub struct Run {
    /// The state run on: what comes out has its settings.
    from: State,
    /// The same with settings for this command alone.
    base: State,
    mounts: Vec<Mount>,
    readonly_root: bool,
    proxy: Option<ProxyEnv>,
    secrets: Vec<Secret>,
    ssh: Vec<Ssh>,
    cdi_devices: Vec<(String, bool)>,
    constraints: Constraints,
}

impl State {
    /// Starts to describe a command that runs on this filesystem.
    pub fn run<S: Into<String>>(&self, args: impl IntoIterator<Item = S>) -> Run {
        let args = args.into_iter().map(Into::into).collect();
        Run {
            from: self.clone(),
            base: self.set(|settings| settings.args = args),
            mounts: Vec::new(),
            readonly_root: false,
            proxy: None,
            secrets: Vec::new(),
            ssh: Vec::new(),
            cdi_devices: Vec::new(),
            constraints: Constraints::new(),
        }
    }
}

impl Run {
    /// Changes settings for this command alone, such as `|state| state.env("A", "b")`.
    pub fn with(mut self, change: impl FnOnce(&State) -> State) -> Self {
        self.base = change(&self.base);
        self
    }

    /// Sets the exit codes that mean success.
    pub fn valid_exit_codes(mut self, codes: impl IntoIterator<Item = i32>) -> Self {
        let codes = codes.into_iter().collect();
        self.base = self.base.set(|settings| settings.valid_exit_codes = Some(codes));
        self
    }

    /// Adds a mount.
    pub fn mount(mut self, mount: Mount) -> Self {
        self.mounts.push(mount);
        self
    }

    /// Refuses writes to the root.
    pub fn readonly_root(mut self) -> Self {
        self.readonly_root = true;
        self
    }

    /// Sets proxies.
    pub fn proxy(mut self, proxy: ProxyEnv) -> Self {
        self.proxy = Some(proxy);
        self
    }

    /// Adds a secret.
    pub fn secret(mut self, secret: Secret) -> Self {
        self.secrets.push(secret);
        self
    }

    /// Adds an SSH agent.
    pub fn ssh(mut self, ssh: Ssh) -> Self {
        self.ssh.push(ssh);
        self
    }

    /// Adds a device by its CDI name.
    pub fn cdi_device(mut self, name: impl Into<String>, optional: bool) -> Self {
        self.cdi_devices.push((name.into(), optional));
        self
    }

    /// Adds constraints.
    pub fn constraints(mut self, constraints: &Constraints) -> Self {
        self.constraints = self.constraints.and(constraints);
        self
    }

    /// Adds the command to the graph.
    pub fn done(self) -> ExecState {
        let root = Mount {
            readonly: self.readonly_root,
            ..Mount::new("/", &self.base)
        };
        let mut mounts: Vec<ExecMount> = vec![root.into()];
        mounts.extend(self.mounts.into_iter().map(Into::into));
        mounts.sort_by(|a, b| a.target.cmp(&b.target));
        let platform = self.constraints.platform.clone();
        let exec = ExecVertex {
            // The root mount has the filesystem. A second way to it would make dropping a chain recursive.
            base: State {
                output: None,
                settings: self.base.settings,
            },
            mounts,
            proxy: self.proxy,
            secrets: self.secrets,
            ssh: self.ssh,
            cdi_devices: self.cdi_devices,
        };
        let vertex = Arc::new(Vertex {
            kind: Kind::Exec(Box::new(exec)),
            constraints: self.constraints,
        });
        ExecState {
            from: self.from,
            vertex,
            platform,
        }
    }
}

#[derive(Debug)]
pub(super) struct ExecVertex {
    pub base: State,
    /// In order of their targets.
    pub mounts: Vec<ExecMount>,
    pub proxy: Option<ProxyEnv>,
    pub secrets: Vec<Secret>,
    pub ssh: Vec<Ssh>,
    pub cdi_devices: Vec<(String, bool)>,
}

#[derive(Debug)]
pub(super) struct ExecMount {
    pub target: String,
    pub source: Option<Output>,
    pub selector: String,
    pub readonly: bool,
    pub has_output: bool,
    pub cache: Option<(String, CacheSharing)>,
    pub tmpfs: Option<i64>,
    pub content_cache: MountContentCache,
}

impl From<Mount> for ExecMount {
    fn from(mount: Mount) -> Self {
        Self {
            has_output: mount.has_output(),
            target: mount.target,
            source: mount.source,
            selector: mount.selector,
            readonly: mount.readonly,
            cache: mount.cache,
            tmpfs: mount.tmpfs,
            content_cache: mount.content_cache,
        }
    }
}

/// A command in the graph.
#[derive(Clone, Debug)]
pub struct ExecState {
    from: State,
    vertex: Arc<Vertex>,
    platform: Option<Platform>,
}

impl ExecState {
    /// Returns the root after the command, with the settings of the state it ran on.
    pub fn root(&self) -> State {
        self.from.with_output(self.output("/").unwrap_or_default())
    }

    /// Returns what the command left in a mount: `None` for no such mount and for one that has no output.
    pub fn mount(&self, target: &str) -> Option<State> {
        self.output(target).map(State::new)
    }

    /// Returns what the command left in a mount, with the settings of `settings`.
    pub fn mount_with(&self, target: &str, settings: &State) -> Option<State> {
        self.output(target).map(|output| settings.with_output(output))
    }

    fn output(&self, target: &str) -> Option<Option<Output>> {
        let Kind::Exec(exec) = &self.vertex.kind else {
            return None;
        };
        let mut index = 0;
        for mount in &exec.mounts {
            if mount.target == target {
                if mount.readonly {
                    return Some(mount.source.clone());
                }
                let output = || Output {
                    vertex: Arc::clone(&self.vertex),
                    index,
                    platform: self.platform.clone(),
                };
                return mount.has_output.then(|| Some(output()));
            }
            index += i64::from(mount.has_output);
        }
        None
    }
}

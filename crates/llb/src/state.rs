//! Building definitions: a [`State`] is a filesystem that some operation will produce, together with the settings that
//! the next operation on it takes over.
//!
//! States are immutable and cheap to clone. The vocabulary and, above all, the bytes are those of BuildKit's Go client:
//! the same construction marshals to the same digests.

mod combine;
mod constraints;
mod deferred;
mod exec;
mod file;
mod imported;
mod marshal;
mod source;
mod source_map;
mod vertex;

use std::sync::Arc;

use oci::{ImageConfig, Platform, path};

pub use combine::{diff, merge};
pub use constraints::Constraints;
pub use deferred::Deferred;
pub use exec::{CacheSharing, ExecState, Mount, ProxyEnv, Run, Secret, Ssh};
pub use file::{
    Chown, CopyOptions, FileActions, FileSource, MkdirOptions, MkfileOptions, Owner, RmOptions,
    SymlinkOptions,
};
pub use marshal::{MarshalError, MarshalOptions};
pub use source::{
    GitOptions, HttpOptions, ImageBlobOptions, ImageOptions, LocalOptions, OciLayoutOptions, ResolveMode,
};
pub use source_map::{SourceLocation, SourceMap};

use vertex::Output;

use crate::pb::{HostIp, NetMode, SecurityMode, Ulimit};

/// The search path set on Unix when nothing else is.
pub const DEFAULT_PATH_UNIX: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The search path set on Windows when nothing else is.
pub const DEFAULT_PATH_WINDOWS: &str =
    "c:\\Windows\\System32;c:\\Windows;C:\\Windows\\System32\\WindowsPowerShell\\v1.0";

/// Returns the default search path of an operating system.
pub fn default_path(os: &str) -> &'static str {
    if os == "windows" {
        DEFAULT_PATH_WINDOWS
    } else {
        DEFAULT_PATH_UNIX
    }
}

/// A filesystem to be produced, and the settings for what is done on it next.
#[derive(Clone, Debug)]
pub struct State {
    output: Option<Output>,
    settings: Arc<Settings>,
}

#[derive(Clone, Debug)]
struct Settings {
    env: Arc<Vec<(String, String)>>,
    dir: String,
    args: Vec<String>,
    user: String,
    hostname: String,
    cgroup_parent: String,
    platform: Option<Platform>,
    network: NetMode,
    security: SecurityMode,
    extra_hosts: Vec<HostIp>,
    ulimits: Vec<Ulimit>,
    valid_exit_codes: Option<Vec<i32>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            env: Arc::default(),
            dir: "/".into(),
            args: Vec::new(),
            user: String::new(),
            hostname: String::new(),
            cgroup_parent: String::new(),
            platform: None,
            network: NetMode::Unset,
            security: SecurityMode::Sandbox,
            extra_hosts: Vec::new(),
            ulimits: Vec::new(),
            valid_exit_codes: None,
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self::scratch()
    }
}

impl State {
    /// Returns the empty filesystem.
    pub fn scratch() -> Self {
        Self {
            output: None,
            settings: Arc::default(),
        }
    }

    fn new(output: Option<Output>) -> Self {
        Self::scratch().with_output(output)
    }

    /// Tells whether this is the empty filesystem.
    pub const fn is_scratch(&self) -> bool {
        self.output.is_none()
    }

    /// Returns a state with the filesystem of `other` and the settings of `self`; a platform that the operation behind
    /// `other` was given replaces the setting.
    #[must_use]
    pub fn with_filesystem_of(&self, other: &Self) -> Self {
        self.with_output(other.output.clone())
    }

    fn with_output(&self, output: Option<Output>) -> Self {
        let platform = output.as_ref().and_then(|output| output.platform.clone());
        let state = Self {
            output,
            settings: Arc::clone(&self.settings),
        };
        match platform {
            Some(platform) => state.platform(&platform),
            None => state,
        }
    }

    fn set(&self, change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = Settings::clone(&self.settings);
        change(&mut settings);
        Self {
            output: self.output.clone(),
            settings: Arc::new(settings),
        }
    }

    /// Sets an environment variable; one that is set already moves to the end.
    #[must_use]
    pub fn env(&self, key: &str, value: &str) -> Self {
        self.set(|settings| set_env(Arc::make_mut(&mut settings.env), key, value))
    }

    /// Replaces the whole environment; each key stands once, in the order in which it is to appear.
    #[must_use]
    pub fn environment(&self, env: Arc<Vec<(String, String)>>) -> Self {
        self.set(|settings| settings.env = env)
    }

    /// Sets the working directory, relative to the present one unless absolute.
    #[must_use]
    pub fn dir(&self, dir: &str) -> Self {
        self.set(|settings| {
            settings.dir = if dir.starts_with('/') {
                dir.to_owned()
            } else {
                let from = if settings.dir.is_empty() {
                    "/"
                } else {
                    &settings.dir
                };
                path::join(&[from, dir])
            };
        })
    }

    /// Sets user and group of processes.
    #[must_use]
    pub fn user(&self, user: &str) -> Self {
        self.set(|settings| user.clone_into(&mut settings.user))
    }

    /// Sets the host name of containers.
    #[must_use]
    pub fn hostname(&self, hostname: &str) -> Self {
        self.set(|settings| hostname.clone_into(&mut settings.hostname))
    }

    /// Sets the platform of operations, normalized.
    #[must_use]
    pub fn platform(&self, platform: &Platform) -> Self {
        self.set(|settings| settings.platform = Some(platform.normalized()))
    }

    /// Sets the network mode of containers.
    #[must_use]
    pub fn network(&self, network: NetMode) -> Self {
        self.set(|settings| settings.network = network)
    }

    /// Sets the security mode of containers.
    #[must_use]
    pub fn security(&self, security: SecurityMode) -> Self {
        self.set(|settings| settings.security = security)
    }

    /// Adds a name to `/etc/hosts` of containers.
    #[must_use]
    pub fn extra_host(&self, host: &str, ip: std::net::IpAddr) -> Self {
        self.set(|settings| {
            settings.extra_hosts.push(HostIp {
                host: host.into(),
                ip: ip.to_string(),
            })
        })
    }

    /// Adds a resource limit of processes.
    #[must_use]
    pub fn ulimit(&self, name: &str, soft: i64, hard: i64) -> Self {
        self.set(|settings| {
            settings.ulimits.push(Ulimit {
                name: name.into(),
                soft,
                hard,
            })
        })
    }

    /// Sets the cgroup that containers are put into.
    #[must_use]
    pub fn cgroup_parent(&self, parent: &str) -> Self {
        self.set(|settings| parent.clone_into(&mut settings.cgroup_parent))
    }

    /// Takes over environment, working directory and platform of an image.
    #[must_use]
    pub fn image_config(&self, config: &ImageConfig) -> Self {
        let mut state = self.set(|settings| {
            for variable in &config.config.env {
                let (key, value) = variable.split_once('=').unwrap_or((variable, ""));
                if !key.is_empty() {
                    set_env(Arc::make_mut(&mut settings.env), key, value);
                }
            }
        });
        state = state.dir(&config.config.working_dir);
        if config.architecture.is_empty() || config.os.is_empty() {
            state
        } else {
            state.platform(&config.platform())
        }
    }

    /// Returns the environment in order.
    pub fn get_env(&self) -> &[(String, String)] {
        &self.settings.env
    }

    /// Returns the value of an environment variable.
    pub fn get_env_var(&self, key: &str) -> Option<&str> {
        self.settings
            .env
            .iter()
            .find(|(have, _)| have == key)
            .map(|(_, value)| value.as_str())
    }

    /// Returns the working directory.
    pub fn get_dir(&self) -> &str {
        &self.settings.dir
    }

    /// Returns the platform set or inherited.
    pub fn get_platform(&self) -> Option<&Platform> {
        self.settings.platform.as_ref()
    }
}

fn set_env(env: &mut Vec<(String, String)>, key: &str, value: &str) {
    env.retain(|(have, _)| have != key);
    env.push((key.to_owned(), value.to_owned()));
}

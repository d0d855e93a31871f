//! Labels of security modules: the AppArmor profile and the SELinux contexts that containers run under.
//!
//! What they are is decided here, once for each container; the process that becomes the container's program sets them
//! with [`set::Writer`], and an OCI runtime reads them in its configuration.

mod contexts;
pub(crate) mod set;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use self::contexts::{Contexts, with_level};
use crate::error::RunError;
use crate::request::Security;

/// The level of files of insecure containers: no confined container has it.
const INSECURE_LEVEL: &str = "s0:c1022,c1023";
/// Categories are numbered from 0 to this, exclusive.
const CATEGORIES: u16 = 1024;

/// Which labels containers get.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelConfig {
    /// The AppArmor profile of containers that are not insecure; empty: whatever the daemon's own leads to.
    pub apparmor_profile: String,
    /// Whether containers get SELinux labels with categories of their own.
    pub selinux: bool,
}

/// The labels of a container's processes; empty ones are not set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessLabels {
    /// Name of an AppArmor profile.
    pub(crate) apparmor: String,
    /// An SELinux context.
    pub(crate) selinux: String,
}

/// All labels of a container. They are its own for as long as this or a clone of it lives.
#[derive(Clone, Debug, Default)]
pub(crate) struct ContainerLabels {
    pub(crate) process: ProcessLabels,
    /// The SELinux context of what is mounted for the container alone; empty: none.
    pub(crate) mount: String,
    /// Held by whatever lives as long as the container.
    pub(crate) lease: Option<Arc<LevelLease>>,
}

/// Gives labels to containers.
#[derive(Debug)]
pub(crate) struct Labeler {
    config: LabelConfig,
    /// What `/` is taken to be.
    host: PathBuf,
    levels: Levels,
}

/// The levels that are in use.
type Levels = Arc<Mutex<BTreeSet<String>>>;

/// A level that no other container has meanwhile.
#[derive(Debug)]
pub(crate) struct LevelLease {
    level: String,
    levels: Levels,
}

impl Drop for LevelLease {
    fn drop(&mut self) {
        let mut levels = self.levels.lock().unwrap_or_else(PoisonError::into_inner);
        levels.remove(&self.level);
    }
}

impl Labeler {
    /// Makes one for the host whose root directory is `host`.
    pub(crate) fn new(config: LabelConfig, host: PathBuf) -> Self {
        Self {
            config,
            host,
            levels: Arc::default(),
        }
    }

    /// Chooses a container's labels.
    ///
    /// # Errors
    /// [`RunError::Invalid`] if labels are configured that this host cannot give.
    pub(crate) fn labels(&self, security: Security) -> Result<ContainerLabels, RunError> {
        let mut labels = if self.config.selinux {
            self.selinux(security)?
        } else {
            ContainerLabels::default()
        };
        let profile = &self.config.apparmor_profile;
        if security == Security::Sandbox && !profile.is_empty() {
            if !has_apparmor(&self.host) {
                return Err(unavailable(format!(
                    "AppArmor is not supported on this host, but the profile '{profile}' was specified"
                )));
            }
            labels.process.apparmor.clone_from(profile);
        }
        Ok(labels)
    }

    fn selinux(&self, security: Security) -> Result<ContainerLabels, RunError> {
        if !has_selinux(&self.host) {
            return Err(unavailable("selinux is not available"));
        }
        let contexts = Contexts::read(&self.host).map_err(|source| RunError::Io {
            what: "read the SELinux contexts of containers".to_owned(),
            source,
        })?;
        if security == Security::Insecure {
            // The process stays what the policy makes of it; what is mounted for it is no confined container's to read.
            let mount = with_level(&contexts.file, INSECURE_LEVEL);
            return Ok(ContainerLabels {
                mount: mount.unwrap_or_default(),
                ..ContainerLabels::default()
            });
        }
        let (Some(process), Some(mount)) = (context(&contexts.process), context(&contexts.file)) else {
            return Err(unavailable(format!(
                "selinux is enabled, but {} names no process and file context of containers",
                contexts.origin.display()
            )));
        };
        // A policy without categories has contexts of three parts.
        if process.splitn(4, ':').count() < 4 {
            return Ok(container_labels(process.to_owned(), mount.to_owned(), None));
        }
        let lease = self.lease();
        let labelled = |context: &str| with_level(context, &lease.level).unwrap_or_default();
        let (process, mount) = (labelled(process), labelled(mount));
        Ok(container_labels(process, mount, Some(Arc::new(lease))))
    }

    /// Takes a pair of categories that no container has.
    fn lease(&self) -> LevelLease {
        loop {
            let (low, high) = (random_category(), random_category());
            let (low, high) = (low.min(high), low.max(high));
            let level = format!("s0:c{low},c{high}");
            let mut levels = self.levels.lock().unwrap_or_else(PoisonError::into_inner);
            // There are half a million, far more than containers.
            if low != high && level != INSECURE_LEVEL && levels.insert(level.clone()) {
                return LevelLease {
                    level,
                    levels: Arc::clone(&self.levels),
                };
            }
        }
    }
}

fn container_labels(process: String, mount: String, lease: Option<Arc<LevelLease>>) -> ContainerLabels {
    ContainerLabels {
        process: ProcessLabels {
            apparmor: String::new(),
            selinux: process,
        },
        mount,
        lease,
    }
}

/// A context that has at least a user, a role and a type.
fn context(text: &str) -> Option<&str> {
    (text.splitn(4, ':').count() >= 3).then_some(text)
}

fn random_category() -> u16 {
    let mut bytes = [0; 2];
    // Small reads of it are never cut short nor interrupted once the system has started.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u16::from_ne_bytes(bytes) % CATEGORIES
}

fn unavailable(message: impl Into<String>) -> RunError {
    RunError::Invalid {
        message: message.into(),
    }
}

/// Whether the kernel confines by AppArmor and lets this process see it.
fn has_apparmor(host: &Path) -> bool {
    let enabled = std::fs::read(host.join("sys/module/apparmor/parameters/enabled"));
    host.join("sys/kernel/security/apparmor").exists()
        && enabled.is_ok_and(|enabled| enabled.first() == Some(&b'Y'))
}

/// Whether a policy is loaded: then its file system is mounted writable, and this process is not the `kernel`'s.
fn has_selinux(host: &Path) -> bool {
    let read = |path: &str| std::fs::read_to_string(host.join(path));
    let is_mounted = |mounts: String| mounts.lines().any(is_writable_selinuxfs);
    read("proc/self/mountinfo").is_ok_and(is_mounted)
        && read("proc/self/attr/current").is_ok_and(|own| own.trim_end_matches(['\0', '\n']) != "kernel")
}

/// Reads a line of `mountinfo`.
fn is_writable_selinuxfs(line: &str) -> bool {
    let Some((point, kind)) = line.split_once(" - ") else {
        return false;
    };
    let has_read_only =
        |options: Option<&str>| options.is_some_and(|all| all.split(',').any(|one| one == "ro"));
    kind.split(' ').next() == Some("selinuxfs")
        && !has_read_only(point.split(' ').nth(5))
        && !has_read_only(kind.split(' ').nth(2))
}

/// Reads a file; a missing one is `None`.
fn read_if_there(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;

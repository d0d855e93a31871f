//! The file of a host's policy that says which SELinux contexts containers have.

use std::io;
use std::path::{Path, PathBuf};

use super::read_if_there;

/// Where the contexts are that are independent of the policy's name; they win.
const SHARED: &str = "usr/share/containers/selinux/contexts";
/// Says which policy is in force.
const CONFIG: &str = "etc/selinux/config";

/// Contexts of containers; empty ones are not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contexts {
    /// Of processes.
    pub(super) process: String,
    /// Of files.
    pub(super) file: String,
    /// The file that names them, or would.
    pub(super) origin: PathBuf,
}

impl Contexts {
    /// Reads those of the host whose root directory is `host`.
    pub(super) fn read(host: &Path) -> io::Result<Self> {
        let shared = host.join(SHARED);
        let (origin, text) = match read_if_there(&shared)? {
            Some(text) => (shared, text),
            None => {
                let config = read_if_there(&host.join(CONFIG))?.unwrap_or_default();
                let policy = value(&config, "SELINUXTYPE").unwrap_or_default();
                let own = host
                    .join("etc/selinux")
                    .join(policy)
                    .join("contexts/lxc_contexts");
                let text = read_if_there(&own)?.unwrap_or_default();
                (own, text)
            }
        };
        let found = |key: &str| value(&text, key).unwrap_or_default().to_owned();
        Ok(Self {
            process: found("process"),
            file: found("file"),
            origin,
        })
    }
}

/// Finds the last value of a key in lines of `key = "value"`.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let settings = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with(['#', ';']));
    settings
        .filter_map(|line| line.split_once('='))
        .filter(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim().trim_matches('"'))
        .next_back()
}

/// Replaces the level of a context, its fourth part; `None` for what is no context.
pub(super) fn with_level(context: &str, level: &str) -> Option<String> {
    let parts: Vec<&str> = context.splitn(4, ':').collect();
    match parts.as_slice() {
        [user, role, kind, ..] => Some(format!("{user}:{role}:{kind}:{level}")),
        _ => None,
    }
}

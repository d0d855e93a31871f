//! Networks made by the plugins of CNI, as a configuration file says.

mod call;
mod journal;
mod list;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use self::call::{Plugins, Target};
use self::journal::{Entry, Journal};
use self::list::NetworkList;
use super::pool::{Lease, Provider};
use super::{CniConfig, NetworkError, namespace};
use crate::request::ContainerId;

/// How many leftovers are undone at once.
const PARALLEL: usize = 4;

/// A network of CNI.
#[derive(Clone, Debug)]
pub(super) struct Cni {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    list: NetworkList,
    plugins: Plugins,
    journal: Journal,
}

/// A namespace that plugins connected.
#[derive(Debug)]
struct Connected {
    id: String,
    namespace: OwnedFd,
    /// Where it is mounted for the plugins.
    path: PathBuf,
    arguments: String,
    result: Option<Value>,
    shared: Arc<Shared>,
}

fn failed(action: &str) -> impl FnOnce(io::Error) -> NetworkError {
    let action = action.to_owned();
    move |source| NetworkError::System { action, source }
}

impl Cni {
    /// Reads the configuration and undoes what an earlier daemon left. Blocking.
    pub(super) fn start(config: &CniConfig, journal: &Path) -> Result<Self, NetworkError> {
        let list = NetworkList::read(&config.config_path)?;
        let directory = &config.binary_dir;
        std::fs::metadata(directory)
            .map_err(failed(&format!("read cni binary dir {:?}", directory.display())))?;
        let journal = Journal::open(journal).map_err(failed("open the journal of networks"))?;
        let shared = Shared {
            list,
            plugins: Plugins {
                directory: directory.clone(),
            },
            journal,
        };
        shared.undo_leftovers()?;
        Ok(Self {
            shared: Arc::new(shared),
        })
    }
}

impl Shared {
    fn undo_leftovers(&self) -> Result<(), NetworkError> {
        let entries = self
            .journal
            .entries()
            .map_err(failed("read the journal of networks"))?;
        for some in entries.chunks(PARALLEL) {
            std::thread::scope(|scope| {
                for entry in some {
                    scope.spawn(move || self.undo(entry));
                }
            });
        }
        Ok(())
    }

    fn undo(&self, entry: &Entry) {
        tracing::info!(id = entry.id, "removing a network that an earlier daemon left");
        let path = self.journal.namespace(&entry.id);
        // Gone if the machine was started anew.
        let namespace = if namespace::is_mounted(&path) {
            path.to_string_lossy().into_owned()
        } else {
            String::new()
        };
        let target = Target {
            id: &entry.id,
            namespace: &namespace,
            arguments: "",
        };
        self.disconnect(&entry.list, entry.result.as_ref(), &target);
    }

    /// Lets the plugins undo what they made. What they cannot undo is tried again at the next start.
    fn disconnect(&self, list: &NetworkList, result: Option<&Value>, target: &Target<'_>) {
        let id = target.id;
        if let Err(message) = self.plugins.delete(list, result, target) {
            tracing::warn!(id, message, "cannot remove a network");
            return;
        }
        let ended = namespace::unmount(&self.journal.namespace(id)).and_then(|()| self.journal.end(id));
        if let Err(error) = ended {
            tracing::warn!(id, %error, "cannot forget a network");
        }
    }
}

/// Makes the arguments that tell a container's host name.
fn arguments(hostname: &str) -> Result<String, NetworkError> {
    if hostname.is_empty() {
        return Ok(String::new());
    }
    if hostname.contains([';', '=', '\0']) {
        return Err(NetworkError::Invalid {
            message: format!("host name {hostname:?} cannot be told to CNI plugins"),
        });
    }
    // The second is for plugins that do not know the first.
    Ok(format!("K8S_POD_NAME={hostname};IgnoreUnknown=1"))
}

impl Provider for Cni {
    fn knows_hostnames(&self) -> bool {
        true
    }

    fn make(&self, hostname: &str) -> Result<Box<dyn Lease>, NetworkError> {
        let shared = &self.shared;
        let arguments = arguments(hostname)?;
        let id = ContainerId::random().as_str().to_owned();
        let begun = shared.journal.begin(&id, &shared.list);
        begun.map_err(failed("note a network in the journal"))?;
        // Mounted, so that it outlives a killed daemon: plugins undo less without it.
        let path = shared.journal.namespace(&id);
        let made = namespace::make(|_| Ok(())).and_then(|namespace| {
            namespace::mount(namespace.as_fd(), &path)?;
            Ok(namespace)
        });
        let namespace = match made {
            Ok(namespace) => namespace,
            Err(error) => {
                // No plugin knows of it.
                let ended = namespace::unmount(&path).and_then(|()| shared.journal.end(&id));
                if let Err(error) = ended {
                    tracing::warn!(id, %error, "cannot forget a network");
                }
                return Err(failed("make a network namespace")(error));
            }
        };
        let mut connected = Connected {
            id,
            namespace,
            path,
            arguments,
            result: None,
            shared: Arc::clone(shared),
        };
        let added = shared.plugins.add(&shared.list, &connected.target());
        match added {
            Ok(result) => {
                if let Err(error) = shared.journal.set_result(&connected.id, &result) {
                    tracing::warn!(%error, "cannot note a network's result");
                }
                connected.result = Some(result);
                Ok(Box::new(connected))
            }
            Err(message) => {
                Box::new(connected).release();
                Err(NetworkError::Program {
                    program: "CNI setup error".to_owned(),
                    message,
                })
            }
        }
    }

    fn close(&self) {}
}

impl Connected {
    fn target(&self) -> Target<'_> {
        Target {
            id: &self.id,
            // Made of the state directory's path, which the daemon was given as text.
            namespace: self.path.to_str().unwrap_or_default(),
            arguments: &self.arguments,
        }
    }
}

impl Lease for Connected {
    fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    fn release(self: Box<Self>) {
        self.shared
            .disconnect(&self.shared.list, self.result.as_ref(), &self.target());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_are_told_in_arguments() {
        assert_eq!(arguments("").unwrap(), "");
        assert_eq!(arguments("a.b").unwrap(), "K8S_POD_NAME=a.b;IgnoreUnknown=1");
        assert!(arguments("a;B=c").is_err());
    }

    #[test]
    fn what_an_earlier_daemon_left_is_undone_by_the_plugins() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let log = path.join("log");
        // Fails for one of them, which is then tried again at the next start.
        let script = format!(
            "#!/bin/sh\necho \"$CNI_COMMAND $CNI_CONTAINERID ns=$CNI_NETNS $(cat)\" >> {}\n[ $CNI_CONTAINERID != b ]\n",
            log.display()
        );
        std::fs::write(path.join("fake"), script).unwrap();
        std::fs::set_permissions(path.join("fake"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let list = serde_json::json!({"name": "n", "plugins": [{"type": "fake"}]});
        std::fs::write(path.join("n.conflist"), list.to_string()).unwrap();
        let journal = Journal::open(&path.join("journal")).unwrap();
        for id in ["a", "b"] {
            journal
                .begin(id, &serde_json::from_value(list.clone()).unwrap())
                .unwrap();
            journal.set_result(id, &Value::from(7)).unwrap();
        }
        let config = CniConfig {
            config_path: path.join("n.conflist"),
            binary_dir: path.to_owned(),
            pool_size: 0,
        };
        Cni::start(&config, &path.join("journal")).unwrap();
        let log = std::fs::read_to_string(log).unwrap();
        let mut calls: Vec<&str> = log.lines().collect();
        calls.sort_unstable();
        assert_eq!(calls.len(), 2, "{log}");
        assert!(
            calls[0].starts_with("DEL a ns= {") && calls[0].contains("\"prevResult\":7"),
            "{log}"
        );
        let left: Vec<String> = journal
            .entries()
            .unwrap()
            .into_iter()
            .map(|entry| entry.id)
            .collect();
        assert_eq!(left, ["b"]);
        let missing = CniConfig {
            binary_dir: path.join("nowhere"),
            ..config
        };
        let error = Cni::start(&missing, &path.join("journal"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("read cni binary dir") && error.contains("nowhere"),
            "{error}"
        );
    }
}

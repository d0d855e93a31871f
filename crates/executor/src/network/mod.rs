//! The networks of containers: whose network namespace a container is in, and what that is connected to.

mod addresses;
mod bridge;
mod cni;
mod firewall;
mod forward;
mod link;
mod namespace;
mod netlink;
mod pool;
mod program;
mod proxy;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use proxy::{Egress, ProxyNetwork};

use bridge::Bridge;
use cni::Cni;
use pool::{Pool, Pooled};

/// Namespaces of the built-in bridge that are kept ready unless the configuration says how many.
const BRIDGE_READY: usize = 4;
/// The same for CNI, whose plugins take longer and more.
const CNI_READY: usize = 1;

/// Which network containers get that ask for none in particular.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NetworkChoice {
    /// The host's.
    #[default]
    Host,
    /// The built-in bridge.
    Bridge(BridgeConfig),
    /// What the plugins of CNI make.
    Cni(CniConfig),
}

/// The built-in bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgeConfig {
    /// The device's name; made if it is missing.
    pub name: String,
    /// The IPv4 network of its containers, such as `10.10.0.0/16`; the bridge has its first address.
    pub subnet: String,
    /// Namespaces that are kept ready; 0: some.
    pub pool_size: usize,
}

/// A network of CNI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniConfig {
    /// The configuration: a list of plugins if its name ends in `.conflist`, else a single plugin.
    pub config_path: PathBuf,
    /// Where the plugins are.
    pub binary_dir: PathBuf,
    /// Namespaces that are kept ready; 0: some.
    pub pool_size: usize,
}

/// Why a network could not be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A setting makes no sense, or the host contradicts it.
    #[error("{message}")]
    Invalid {
        /// What is wrong.
        message: String,
    },
    /// All addresses are in use.
    #[error("all addresses of {subnet} are in use; configure a larger bridgeSubnet")]
    Exhausted {
        /// The network.
        subnet: String,
    },
    /// The executor is being closed.
    #[error("the networks of containers are being removed: the daemon ends")]
    Closed,
    /// A program of the host failed.
    #[error("{program}: {message}")]
    Program {
        /// Its name.
        program: String,
        /// What it said.
        message: String,
    },
    /// The kernel refused something.
    #[error("cannot {action}: {source}")]
    System {
        /// What was being done.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// A network namespace that a container is in.
#[derive(Clone, Debug)]
pub(crate) enum Hold {
    /// Of a pool, given back when the last copy is dropped.
    Pooled(Arc<Pooled>),
    /// Made for one container.
    Own(Arc<OwnedFd>),
}

impl Hold {
    /// Returns the namespace.
    pub(crate) fn namespace(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Pooled(pooled) => pooled.namespace(),
            Self::Own(namespace) => Some(namespace.as_fd()),
        }
    }
}

/// The network of containers that ask for none in particular.
#[derive(Clone, Debug)]
pub(crate) struct Networks {
    sandbox: Option<Arc<Pool>>,
}

impl Networks {
    /// Sets up what the choice needs. `journal` is a directory of its own, made if it is needed. Blocking.
    pub(crate) fn start(choice: &NetworkChoice, journal: &Path) -> Result<Self, NetworkError> {
        let ready = |size: usize, default| if size == 0 { default } else { size };
        let sandbox = match choice {
            NetworkChoice::Host => None,
            NetworkChoice::Bridge(config) => {
                let bridge = Bridge::start(config)?;
                Some(Pool::start(
                    Box::new(bridge),
                    ready(config.pool_size, BRIDGE_READY),
                )?)
            }
            NetworkChoice::Cni(config) => {
                let cni = Cni::start(config, journal)?;
                Some(Pool::start(Box::new(cni), ready(config.pool_size, CNI_READY))?)
            }
        };
        Ok(Self { sandbox })
    }

    /// Removes all networks once nobody uses them. Dropping the future does not stop that.
    pub(crate) async fn close(&self) {
        let Some(pool) = self.sandbox.clone() else { return };
        // It ends in a panic only if the pool's keeper did, and nothing can be waited for then.
        let _ = tokio::task::spawn_blocking(move || pool.close()).await;
    }

    /// Takes a namespace for a container of a host name (empty: the usual one); `None`: it gets the host's.
    pub(crate) async fn take(&self, hostname: &str) -> Result<Option<Hold>, NetworkError> {
        match &self.sandbox {
            None => Ok(None),
            Some(pool) => Ok(Some(Hold::Pooled(Arc::new(pool.take(hostname).await?)))),
        }
    }
}

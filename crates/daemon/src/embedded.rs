//! An engine inside of a client's process, for builds that name no daemon. Other clients of the same state directory
//! join it through its socket; it ends when its own client is done and all others are.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use crate::config::{ConfigError, ConfigFile, load, refuse_unsupported};
use crate::listen::{Listener, OpenConnections, SocketOwner, listen};
use crate::program::COOPERD;
use crate::serve::{drain, serve_connections};
use crate::wiring::{StartError, Wired, wire};

/// The socket in the state directory.
const SOCKET: &str = "cooper.sock";
/// How long to wait for another process between two tries.
const RETRY: Duration = Duration::from_millis(50);
/// How long to wait for another process without a word.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the last connection may be gone before the engine ends: a client may be about to use another one.
const LINGER: Duration = Duration::from_millis(20);

/// A future that ends an engine.
pub type Stop = Pin<Box<dyn Future<Output = ()> + Send>>;

/// An engine that can be connected to.
pub struct Embedded {
    /// Its address.
    pub address: String,
    /// Ends it once nobody uses it; does nothing when it is another process'.
    pub stop: Stop,
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedded")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// Returns where the state of builds without a daemon is kept: `$COOPER_STATE`, the system's directory for root, else the
/// user's.
pub fn default_root() -> PathBuf {
    let env = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(root) = env("COOPER_STATE") {
        return root;
    }
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/cooper");
    }
    let data = env("XDG_DATA_HOME").or_else(|| env("HOME").map(|home| home.join(".local/share")));
    data.map_or_else(|| std::env::temp_dir().join("cooper"), |data| data.join("cooper"))
}

/// Joins the engine that runs on a state directory, or starts one. Waits while another process uses the directory
/// without being reachable. Called on a tokio runtime.
///
/// # Errors
/// [`StartError`] when the state directory cannot be used for another reason than being in use.
pub async fn start(root: &Path) -> Result<Embedded, StartError> {
    let socket = root.join(SOCKET);
    let address = format!("unix://{}", socket.display());
    let file = configuration()?;
    let mut silent_until = Some(Instant::now() + PATIENCE);
    loop {
        if UnixStream::connect(&socket).await.is_ok() {
            return Ok(Embedded {
                address,
                stop: Box::pin(std::future::ready(())),
            });
        }
        match wire(&file, root.to_owned(), None) {
            Ok(wired) => return own(wired, address),
            Err(StartError::Engine(error)) if error.kind() == engine::ErrorKind::Unavailable => {
                // A process that starts or ends is away for a moment only.
                if silent_until.is_some_and(|until| Instant::now() >= until) {
                    tracing::warn!(root = %root.display(), "waiting for another process to let the state directory go");
                    silent_until = None;
                }
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Reads the first configuration that there is: `$COOPER_CONFIG`, the user's, the system's. The client's own user may use
/// all that the machine lets it use, so builds need no rights beyond what they ask for.
fn configuration() -> Result<ConfigFile, StartError> {
    let env = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let users = env("XDG_CONFIG_HOME").or_else(|| env("HOME").map(|home| home.join(".config")));
    let candidates = [
        env("COOPER_CONFIG"),
        users.map(|dir| dir.join("cooper/cooperd.toml")),
        Some(PathBuf::from(COOPERD.config)),
    ];
    let path = candidates.into_iter().flatten().find(|path| path.exists());
    let mut file = match path {
        Some(path) => load(&path)?.0,
        None => ConfigFile::default(),
    };
    refuse_unsupported(&file).map_err(ConfigError::from)?;
    for name in ["network.host", "security.insecure"] {
        if !file.insecure_entitlements.iter().any(|known| known == name) {
            file.insecure_entitlements.push(name.to_owned());
        }
    }
    Ok(file)
}

fn own(wired: Wired, address: String) -> Result<Embedded, StartError> {
    let listener = listen(&address, SocketOwner::default(), None).map_err(ConfigError::from)?;
    let open = OpenConnections::default();
    let accepting = CancellationToken::new();
    let server = tokio::spawn(serve(
        listener,
        wired.routes.clone(),
        open.clone(),
        accepting.clone(),
    ));
    let stop = async move {
        loop {
            open.none().await;
            tokio::time::sleep(LINGER).await;
            if open.is_none() {
                break;
            }
        }
        accepting.cancel();
        // What the server fails with in the end concerns nobody any more.
        let _ = server.await;
        drain(wired).await;
    };
    Ok(Embedded {
        address,
        stop: Box::pin(stop),
    })
}

async fn serve(
    listener: Listener,
    routes: tonic::service::Routes,
    open: OpenConnections,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    serve_connections(routes, listener.connections(open), stop).await
}

//! The daemon from its start to its end: listeners, signals, an orderly stop.

use std::io::Write as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::bounds::bound_statuses;
use api::transport::tune_server;
use futures_util::{Stream, stream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Server;

use crate::config::{ConfigError, ConfigFile};
use crate::debug;
use crate::listen::{Connection, Listener, OpenConnections, SocketOwner, acceptor, listen};
use crate::trace_socket::{self, TraceSocketChoice};
use crate::wiring::{StartError, Wired, wire};

/// Calls that one connection may have open: a build of many targets holds several each.
const MAX_STREAMS: u32 = 1 << 16;
/// How long calls may go on after the daemon was told to stop, with builds running and without.
const GRACE_BUSY: Duration = Duration::from_secs(10);
const GRACE_IDLE: Duration = Duration::from_millis(500);
/// How long to wait for a predecessor that is about to end, as after a restart by a service supervisor.
const HANDOVER: Duration = Duration::from_secs(2);
/// How long the engine may take to clean up.
const DRAIN: Duration = Duration::from_secs(5);

/// What is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The configuration, flags included.
    pub file: ConfigFile,
    /// The state directory.
    pub root: PathBuf,
    /// Where to listen.
    pub addresses: Vec<String>,
    /// Where steps leave their spans.
    pub trace_socket: TraceSocketChoice,
    /// Where to write the process' id.
    pub pidfile: Option<PathBuf>,
}

/// Serves gRPC on accepted connections until told to stop; then lets calls come to their end.
///
/// # Errors
/// When the server fails.
pub async fn serve_connections(
    routes: tonic::service::Routes,
    connections: impl Stream<Item = std::io::Result<Connection>> + Send + 'static,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let server = tune_server(Server::builder()).max_concurrent_streams(MAX_STREAMS);
    server
        .layer(bound_statuses())
        .add_routes(routes)
        .serve_with_incoming_shutdown(connections, stop.cancelled_owned())
        .await
}

/// Signals that end the daemon: the first lets calls come to their end, the second does not.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self, StartError> {
        let failed = |source| StartError::System {
            action: "failed to listen for signals".to_owned(),
            source,
        };
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Starts to listen at all addresses.
fn listen_at(addresses: &[String], file: &ConfigFile) -> Result<Vec<Listener>, StartError> {
    let tls = acceptor(&file.grpc.tls).map_err(ConfigError::from)?;
    let owner = SocketOwner {
        uid: file.grpc.uid,
        gid: file.grpc.gid,
    };
    let mut listeners = Vec::new();
    for address in addresses {
        let listener = listen(address, owner, tls.as_ref()).map_err(ConfigError::from)?;
        tracing::info!("running server on {}", listener.name());
        listeners.push(listener);
    }
    Ok(listeners)
}

/// Runs the daemon until a signal ends it.
///
/// # Errors
/// [`StartError`] when it cannot start, or serving fails.
pub async fn run(settings: Settings) -> Result<(), StartError> {
    let Settings {
        file,
        root,
        addresses,
        trace_socket,
        pidfile,
    } = settings;
    if addresses.is_empty() {
        return Err(ConfigError::invalid("--addr cannot be empty").into());
    }
    let _pidfile = pidfile.map(|path| PidFile::write(&path)).transpose()?;
    let signals = Signals::new()?;
    // The state directory is locked first: a second daemon must not take the first one's socket away.
    let wired = wire(&file, root, Some(HANDOVER))?;
    let listeners = listen_at(&addresses, &file)?;
    let taking_spans = trace_socket::serve(&trace_socket, &wired.trace_socket, wired.history.traces())?;
    let debugging = match file.grpc.debug_address.as_str() {
        "" => None,
        address => {
            let listener = debug::bind(address).map_err(ConfigError::from)?;
            let (history, stop) = (wired.history.clone(), wired.stop.clone());
            Some(AbortOnDropHandle::new(tokio::spawn(debug::serve(
                listener, history, stop,
            ))))
        }
    };
    notify("READY=1");
    let served = serve_until(signals, &wired, listeners).await;
    // Before the state directory is let go of: whoever waits for it makes its own socket then.
    if let Some(server) = taking_spans {
        server.abort();
        // It ends as it was told to.
        let _ = server.await;
    }
    drain(wired).await;
    drop(debugging);
    served
}

/// Serves until a signal, then until calls have come to their end, for a bounded time.
async fn serve_until(
    mut signals: Signals,
    wired: &Wired,
    listeners: Vec<Listener>,
) -> Result<(), StartError> {
    let open = OpenConnections::default();
    let connections = listeners
        .into_iter()
        .map(|listener| listener.connections(open.clone()));
    let accepting = CancellationToken::new();
    let routes = wired.routes.clone();
    let server = serve_connections(routes, stream::select_all(connections), accepting.clone());
    let mut server = std::pin::pin!(server);
    tokio::select! {
        served = &mut server => return Ok(served?),
        () = signals.next() => {}
    }
    tracing::info!("stopping server");
    notify("STOPPING=1");
    accepting.cancel();
    let is_idle = wired.history.describe_running().is_empty();
    let grace = if is_idle { GRACE_IDLE } else { GRACE_BUSY };
    tokio::select! {
        served = &mut server => served?,
        () = tokio::time::sleep(grace) => {}
        () = signals.next() => {}
    }
    Ok(())
}

/// Waits, for a bounded time, until nothing runs any more.
pub async fn drain(wired: Wired) {
    wired.stop.cancel();
    let Wired {
        engine,
        sessions,
        history,
        explanations,
        ..
    } = wired;
    let store = engine.services().store.clone();
    let work = async {
        engine.drain().await;
        sessions.drain().await;
        history.drain().await;
        explanations.drain().await;
        // The store would do so when its last user lets go of it, which the end of the process may not wait for.
        flush(store).await;
    };
    if tokio::time::timeout(DRAIN, work).await.is_err() {
        tracing::warn!("something still runs after {} s", DRAIN.as_secs());
    }
}

async fn flush(store: engine::cache::Store) {
    match tokio::task::spawn_blocking(move || store.flush()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(
            error = &error as &dyn std::error::Error,
            "what was done last is not durable"
        ),
        Err(error) => tracing::error!(%error, "flushing was aborted"),
    }
}

/// Tells systemd how far the daemon is, if it asked to be told.
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => std::os::unix::net::SocketAddr::from_abstract_name(name),
        _ => std::os::unix::net::SocketAddr::from_pathname(Path::new(&path)),
    };
    let sent = address.and_then(|address| {
        let socket = std::os::unix::net::UnixDatagram::unbound()?;
        socket.send_to_addr(state.as_bytes(), &address)
    });
    if let Err(error) = sent {
        tracing::debug!(%error, "systemd was not told");
    }
}

/// The file with the process' id; it goes with the daemon.
#[derive(Debug)]
struct PidFile(PathBuf);

impl PidFile {
    fn write(path: &Path) -> Result<Self, StartError> {
        let written = std::fs::File::create(path).and_then(|mut file| write!(file, "{}", std::process::id()));
        let action = format!("failed to write {}", path.display());
        written
            .map(|()| Self(path.to_owned()))
            .map_err(|source| StartError::System { action, source })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // A leftover names a process that is gone.
        let _ = std::fs::remove_file(&self.0);
    }
}

//! The socket at which steps leave their spans: it is mounted into containers, so that whatever runs in one can talk to it.
//! Nothing else is served there, and everything that can be sent is bounded.

use std::future::ready;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::pb::trace::trace_service_server::TraceServiceServer;
use engine::error::chain_text;
use executor::TraceSocket;
use futures_util::StreamExt as _;
use tokio::net::UnixListener;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Server;

use crate::config::OtelTable;
use crate::listen::{Listener, OpenConnections, SocketFile, SocketModes, bind_unix};
use crate::services::traces::Traces;
use crate::wiring::StartError;

/// Connections that may be open at once; further ones are closed.
const MAX_CONNECTIONS: usize = 64;
/// Calls of one connection that may be open at once.
const MAX_STREAMS: u32 = 4;
/// Most bytes of one message: as many as gRPC's peers expect by default.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Bytes of one connection that wait to be read.
const WINDOW_BYTES: u32 = 256 << 10;
/// How long a call may take, with its message on its way.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const NAME: &str = "otel-grpc.sock";

/// Which socket steps are given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceSocketChoice {
    /// Where it is; absolute.
    pub path: PathBuf,
    /// Whether it was asked for. If not, a daemon that cannot have it does without.
    pub is_asked_for: bool,
}

impl TraceSocketChoice {
    /// Chooses what the configuration says, else the place that the daemon has by its name: `runtime_dir`, or in a user
    /// namespace the directory of the same name in the user's own.
    ///
    /// # Errors
    /// For a relative path when there is no working directory.
    pub fn new(table: &OtelTable, runtime_dir: &Path, user_dir: Option<&str>) -> Result<Self, io::Error> {
        let asked = table.socket_path.as_ref();
        if let Some(path) = asked.filter(|path| !path.as_os_str().is_empty()) {
            return Ok(Self {
                path: std::path::absolute(path)?,
                is_asked_for: true,
            });
        }
        let user_dir = user_dir.and_then(|dirs| dirs.split(':').next());
        let dir = match (user_dir.filter(|dir| !dir.is_empty()), runtime_dir.file_name()) {
            (Some(user_dir), Some(name)) => Path::new(user_dir).join(name),
            _ => runtime_dir.to_owned(),
        };
        Ok(Self {
            path: std::path::absolute(dir.join(NAME))?,
            is_asked_for: false,
        })
    }
}

/// Listens, lets containers have the socket, and serves it until what is returned is dropped. `None`: there is none, which
/// the log says. Called on a tokio runtime.
///
/// # Errors
/// When a socket that was asked for cannot be made.
pub fn serve(
    choice: &TraceSocketChoice,
    offered: &TraceSocket,
    traces: Traces,
) -> Result<Option<AbortOnDropHandle<()>>, StartError> {
    let path = &choice.path;
    let bound = bind(path).and_then(|listener| {
        let file = SocketFile::new(path.clone());
        offered.offer(path)?;
        Ok(Listener::Unix(listener, Some(file)))
    });
    match bound {
        Ok(listener) => Ok(Some(AbortOnDropHandle::new(tokio::spawn(run(listener, traces))))),
        Err(source) => {
            let action = format!("failed to listen for spans at {}", path.display());
            let failed = StartError::System { action, source };
            if choice.is_asked_for {
                return Err(failed);
            }
            tracing::warn!("{}: steps cannot leave spans", chain_text(&failed));
            Ok(None)
        }
    }
}

async fn run(listener: Listener, traces: Traces) {
    let open = OpenConnections::default();
    let counted = open.clone();
    let connections = listener.connections(open);
    let served = Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .timeout(CALL_TIMEOUT)
        .add_service(TraceServiceServer::new(traces).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .serve_with_incoming(connections.filter(move |_| ready(counted.count() <= MAX_CONNECTIONS)))
        .await;
    if let Err(error) = served {
        tracing::error!("spans of steps are no longer taken: {}", chain_text(&error));
    }
}

/// Makes the socket in place of one that nobody listens at any more. Every user of a container may write to it.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let modes = SocketModes {
        dir: 0o770,
        socket: 0o666,
    };
    bind_unix(path, modes, |path| match std::fs::symlink_metadata(path) {
        Ok(found) => replace(path, &found),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    })
}

/// Removes what a daemon left behind; a socket that is listened at, and anything else, stays.
fn replace(path: &Path, found: &std::fs::Metadata) -> io::Result<()> {
    if !found.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is no socket"));
    }
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another process listens there",
        ));
    }
    std::fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use api::pb::trace as pb;
    use api::pb::trace::trace_service_client::TraceServiceClient;
    use tonic::Code;
    use tonic::transport::{Channel, Endpoint};

    use super::*;
    use crate::services::traces::tests::request;

    fn choice(path: PathBuf, is_asked_for: bool) -> TraceSocketChoice {
        TraceSocketChoice { path, is_asked_for }
    }

    async fn connect(path: &Path) -> Channel {
        let address = format!("unix://{}", path.display());
        Endpoint::try_from(address).unwrap().connect().await.unwrap()
    }

    fn export(name: &str) -> pb::ExportTraceServiceRequest {
        request(&[pb::Span {
            trace_id: vec![7; 16].into(),
            span_id: vec![7; 8].into(),
            name: name.to_owned(),
            ..Default::default()
        }])
    }

    #[tokio::test]
    async fn spans_are_taken_and_nothing_else_is_served() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("below/socket");
        let traces = Traces::default();
        let collecting = traces.collect(&"07".repeat(16));
        let server = serve(&choice(path.clone(), true), &TraceSocket::default(), traces).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o666);
        let channel = connect(&path).await;
        let mut client = TraceServiceClient::new(channel.clone());
        let answer = client.export(export("work")).await.unwrap().into_inner();
        assert_eq!(answer.partial_success, None);
        let kept = String::from_utf8(collecting.spans()).unwrap();
        assert!(kept.contains("\"Name\":\"work\""), "{kept}");
        let too_large = client.export(export(&"x".repeat(MAX_MESSAGE_BYTES))).await;
        assert_eq!(too_large.unwrap_err().code(), Code::OutOfRange);
        let mut control = api::pb::control::control_client::ControlClient::new(channel);
        let refused = control.info(api::pb::control::InfoRequest {}).await;
        assert_eq!(refused.unwrap_err().code(), Code::Unimplemented);
        drop(server);
    }

    #[tokio::test]
    async fn surplus_connections_are_closed() {
        use tokio::io::AsyncReadExt as _;

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let traces = Traces::default();
        let _server = serve(&choice(path.clone(), true), &TraceSocket::default(), traces).unwrap();
        let mut open = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
            // The server's settings: it has been accepted.
            assert!(stream.read(&mut [0; 9]).await.unwrap() > 0);
            open.push(stream);
        }
        let mut surplus = tokio::net::UnixStream::connect(&path).await.unwrap();
        let read = surplus.read(&mut [0; 9]).await;
        assert!(read.as_ref().map_or(true, |len| *len == 0), "{read:?}");
    }

    #[tokio::test]
    async fn a_socket_in_use_is_not_taken_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let start = |is_asked_for| {
            serve(
                &choice(path.clone(), is_asked_for),
                &TraceSocket::default(),
                Traces::default(),
            )
        };
        let first = start(true).unwrap().unwrap();
        assert!(start(false).unwrap().is_none());
        let error = chain_text(&start(true).unwrap_err());
        assert!(
            error.contains("failed to listen for spans at") && error.contains("another process"),
            "{error}"
        );
        first.abort();
        let _ended = first.await;
        assert!(!path.exists());
        // One that is left behind is replaced.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        drop(start(true).unwrap().unwrap());
    }

    #[tokio::test]
    async fn what_is_no_socket_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "precious").unwrap();
        let offered = TraceSocket::default();
        let start = |is_asked_for| serve(&choice(path.clone(), is_asked_for), &offered, Traces::default());
        assert!(start(true).is_err() && start(false).unwrap().is_none());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn the_socket_has_a_default_place() {
        let table = OtelTable::default();
        let of = |table: &OtelTable, user_dir| {
            TraceSocketChoice::new(table, Path::new("/run/buildkit"), user_dir).unwrap()
        };
        assert_eq!(
            of(&table, None),
            choice("/run/buildkit/otel-grpc.sock".into(), false)
        );
        assert_eq!(
            of(&table, Some("/run/user/7:/x")),
            choice("/run/user/7/buildkit/otel-grpc.sock".into(), false)
        );
        assert_eq!(of(&table, Some("")), of(&table, None));
        let asked = OtelTable {
            socket_path: Some("/tmp/s".into()),
        };
        assert_eq!(of(&asked, Some("/run/user/7")), choice("/tmp/s".into(), true));
    }
}

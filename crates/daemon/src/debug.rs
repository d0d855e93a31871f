//! The debugging address: answers every HTTP request with the builds and steps that run.

use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

pub use cache::dump as dump_metadata;

use crate::listen::{ListenError, Listener, OpenConnections, SocketOwner, listen};
use crate::services::history::History;

/// Longest request that is read.
const MAX_REQUEST_BYTES: usize = 8 << 10;
/// How long a client may take to ask.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Listens at a debugging address: one with a scheme, or a bare host and port.
///
/// # Errors
/// When the address cannot be listened at.
pub fn bind(address: &str) -> Result<Listener, ListenError> {
    let address = if address.contains("://") {
        address.to_owned()
    } else {
        format!("tcp://{address}")
    };
    listen(&address, SocketOwner::default(), None)
}

/// Answers requests one after another until told to stop.
pub async fn serve(listener: Listener, history: History, stop: CancellationToken) {
    let mut connections = listener.connections(OpenConnections::default());
    loop {
        let connection = tokio::select! {
            connection = connections.next() => connection,
            () = stop.cancelled() => return,
        };
        let Some(Ok(mut connection)) = connection else {
            continue;
        };
        let answer = async {
            let mut request = Vec::new();
            while !request.windows(4).any(|window| window == b"\r\n\r\n") && request.len() < MAX_REQUEST_BYTES
            {
                if connection.read_buf(&mut request).await? == 0 {
                    break;
                }
            }
            let body = history.describe_running();
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            connection.write_all(head.as_bytes()).await?;
            connection.write_all(body.as_bytes()).await?;
            connection.shutdown().await
        };
        // A client that breaks off or dawdles gets no answer.
        let _: Result<std::io::Result<()>, _> = tokio::time::timeout(READ_TIMEOUT, answer).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::history::HistoryLimits;

    #[tokio::test]
    async fn running_builds_are_told() {
        let listener = bind("127.0.0.1:0").unwrap();
        let port = listener.port().unwrap();
        let history = History::new(HistoryLimits::default());
        let record = api::pb::control::BuildHistoryRecord {
            r#ref: "abc".to_owned(),
            ..Default::default()
        };
        let _running = history.start(record, engine::trace::Trace::begin());
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(listener, history, stop.clone()));
        let mut client = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        client
            .write_all(b"GET /debug/pprof/goroutine?debug=2 HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200 OK") && answer.contains("build abc"),
            "{answer}"
        );
        stop.cancel();
        server.await.unwrap();
    }
}

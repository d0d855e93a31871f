//! A client's agent as a socket.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use llb::pb;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet};

use crate::error::{BuildError, ErrorKind};
use crate::name::random_name;
use crate::session::{ByteStream, Session};

/// Connections to one agent at once.
const MAX_CONNECTIONS: usize = 64;
/// Bytes read from a connection at once.
const PIECE_BYTES: usize = 32 << 10;

/// A socket that forwards to a client's agent until it is dropped.
#[derive(Debug)]
pub struct AgentSocket {
    path: PathBuf,
    serving: AbortHandle,
}

impl AgentSocket {
    /// Makes a socket in `dir` with the owner and mode that the mount asks for.
    pub async fn open(
        dir: &Path,
        session: Arc<dyn Session>,
        options: &pb::SshOpt,
    ) -> Result<Self, BuildError> {
        let failure = |error| {
            BuildError::from_source(ErrorKind::Internal, error)
                .context("failed to make a socket for the agent")
        };
        let path = dir.join(random_name());
        let listener = UnixListener::bind(&path).map_err(failure)?;
        let serving = tokio::spawn(serve(listener, session, options.id.clone())).abort_handle();
        let socket = Self { path, serving };
        chown(&socket.path, Some(options.uid), Some(options.gid)).map_err(failure)?;
        let permissions = std::fs::Permissions::from_mode(options.mode & 0o777);
        std::fs::set_permissions(&socket.path, permissions).map_err(failure)?;
        Ok(socket)
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        self.serving.abort();
        // What cannot be removed now goes with the directory at the next start.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Accepts connections; ended by aborting it, which ends them too.
async fn serve(listener: UnixListener, session: Arc<dyn Session>, id: String) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= MAX_CONNECTIONS {
            connections.join_next().await;
            continue;
        }
        let Ok((connection, _)) = listener.accept().await else {
            return;
        };
        connections.spawn(forward(connection, Arc::clone(&session), id.clone()));
    }
}

/// Carries bytes both ways until either side ends. A failure shows to the process as a closed connection.
async fn forward(connection: UnixStream, session: Arc<dyn Session>, id: String) {
    if let Ok(agent) = session.forward_agent(&id).await {
        carry(connection, agent).await;
    }
}

/// Either side's end is passed on, so that the client closes its connection to the agent when the process closes its own.
async fn carry(connection: UnixStream, mut agent: ByteStream) {
    let (mut read, mut write) = connection.into_split();
    let outgoing = agent.outgoing;
    let to_agent = async move {
        let mut buffer = vec![0; PIECE_BYTES];
        while let Ok(count) = read.read(&mut buffer).await {
            let Some(piece) = buffer.get(..count).filter(|piece| !piece.is_empty()) else {
                return;
            };
            if outgoing.send(Bytes::copy_from_slice(piece)).await.is_err() {
                return;
            }
        }
    };
    let from_agent = async move {
        while let Some(Ok(bytes)) = agent.incoming.recv().await {
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(to_agent, from_agent);
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_closed_connection_closes_the_clients() {
        let (ours, mut process) = UnixStream::pair().expect("makes a pair");
        let (to_process, incoming) = mpsc::channel(1);
        let (outgoing, mut from_process) = mpsc::channel(1);
        let carrying = tokio::spawn(carry(ours, ByteStream { incoming, outgoing }));
        process.write_all(b"ask").await.expect("writes");
        assert_eq!(from_process.recv().await, Some(Bytes::from_static(b"ask")));
        to_process
            .send(Ok(Bytes::from_static(b"answer")))
            .await
            .expect("is heard");
        let mut answer = [0; 6];
        process.read_exact(&mut answer).await.expect("reads");
        assert_eq!(&answer, b"answer");
        drop(process);
        // The client sees the end, closes its connection to the agent and ends the stream.
        assert_eq!(from_process.recv().await, None);
        drop(to_process);
        carrying.await.expect("ends");
    }
}

//! A daemon that accepts sessions and does nothing else.

use std::path::{Path, PathBuf};

use api::pb::control::control_server::{Control, ControlServer};
use api::pb::control::{self as pb, BytesMessage};
use api::session::SessionConn;
use api::transport::{MAX_MESSAGE_BYTES, tune_server};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

pub struct Daemon {
    pub socket: PathBuf,
    pub sessions: mpsc::Receiver<SessionConn>,
    task: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn start() -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("daemon.sock");
    let (accepted, sessions) = mpsc::channel(4);
    let listener = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
    let service = ControlServer::new(Accept(accepted)).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let task = tokio::spawn(async move {
        tune_server(Server::builder())
            .add_service(service)
            .serve_with_incoming(listener)
            .await
            .unwrap();
    });
    Daemon {
        socket,
        sessions,
        task,
        _dir: dir,
    }
}

pub async fn dial(socket: &Path) -> Channel {
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
    api::transport::tune_endpoint(endpoint).connect().await.unwrap()
}

struct Accept(mpsc::Sender<SessionConn>);

type Empty<T> = tokio_stream::Empty<Result<T, Status>>;

#[tonic::async_trait]
impl Control for Accept {
    type PruneStream = Empty<pb::UsageRecord>;
    type StatusStream = Empty<pb::StatusResponse>;
    type SessionStream = ReceiverStream<Result<BytesMessage, Status>>;
    type ListenBuildHistoryStream = Empty<pb::BuildHistoryEvent>;

    async fn session(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (outgoing, messages) = mpsc::channel(8);
        let (metadata, _, incoming) = request.into_parts();
        let accepted = self.0.clone();
        tokio::spawn(async move {
            let session = SessionConn::accept(&metadata, incoming, outgoing).await.unwrap();
            let _ = accepted.send(session).await;
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn disk_usage(
        &self,
        _: Request<pb::DiskUsageRequest>,
    ) -> Result<Response<pb::DiskUsageResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn prune(&self, _: Request<pb::PruneRequest>) -> Result<Response<Self::PruneStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn solve(&self, _: Request<pb::SolveRequest>) -> Result<Response<pb::SolveResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<Self::StatusStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_workers(
        &self,
        _: Request<pb::ListWorkersRequest>,
    ) -> Result<Response<pb::ListWorkersResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn info(&self, _: Request<pb::InfoRequest>) -> Result<Response<pb::InfoResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn listen_build_history(
        &self,
        _: Request<pb::BuildHistoryRequest>,
    ) -> Result<Response<Self::ListenBuildHistoryStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn update_build_history(
        &self,
        _: Request<pb::UpdateBuildHistoryRequest>,
    ) -> Result<Response<pb::UpdateBuildHistoryResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

//! A client hosts services, a daemon calls them, both over one unix socket.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use api::file_send::{self, Answers, BytesMessage, FileSend, FileSendServer, Messages};
use api::fsutil::{FilterOptions, Packet, ReceiveOptions, SendSource, receive, send};
use api::pb::control::control_client::ControlClient;
use api::pb::filesync::file_sync_client::FileSyncClient;
use api::pb::filesync::file_sync_server::{FileSync, FileSyncServer};
use api::session::{SessionConn, SessionHost, decode_lists, encode_lists, methods};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::daemon;

type Packets = Pin<Box<dyn Stream<Item = Result<Packet, Status>> + Send>>;

struct Files(PathBuf);

#[tonic::async_trait]
impl FileSync for Files {
    type DiffCopyStream = Packets;
    type TarStreamStream = Packets;

    async fn diff_copy(&self, request: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        let mut lists = decode_lists(request.metadata());
        let mut take = |key| lists.remove(key).unwrap_or_default();
        if take("dir-name") != ["context"] {
            return Err(api::errors::Failure::new(tonic::Code::NotFound, "no access allowed").to_status());
        }
        let filter = FilterOptions {
            include_patterns: take("include-patterns"),
            exclude_patterns: take("exclude-patterns"),
            follow_paths: take("followpaths"),
        };
        let (outgoing, packets) = mpsc::channel(16);
        let source = SendSource {
            dir: self.0.clone(),
            filter,
        };
        tokio::spawn(send(source, request.into_inner(), outgoing, None));
        Ok(Response::new(Box::pin(ReceiverStream::new(packets))))
    }

    async fn tar_stream(&self, _: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        Err(Status::unimplemented(""))
    }
}

struct Target(PathBuf);

#[tonic::async_trait]
impl FileSend for Target {
    async fn receive(&self, headers: MetadataMap, incoming: Streaming<Bytes>) -> Result<Answers, Status> {
        let dest = self.0.clone();
        if headers
            .get(file_send::HEADER_EXPORTER)
            .is_some_and(|id| id == "tree")
        {
            let (outgoing, packets) = mpsc::channel(16);
            let incoming = Messages::<Packet>::new(incoming);
            tokio::spawn(receive(
                dest.join("tree"),
                ReceiveOptions::default(),
                incoming,
                outgoing,
                None,
            ));
            let answers = ReceiverStream::new(packets);
            return Ok(Box::pin(
                answers.map(|packet| packet.map(|packet| packet.encode_to_vec().into())),
            ));
        }
        let mut file = fs::File::create(dest.join("file")).unwrap();
        let mut chunks = Messages::<BytesMessage>::new(incoming);
        while let Some(chunk) = chunks.next().await {
            std::io::Write::write_all(&mut file, &chunk?.data).unwrap();
        }
        Ok(Box::pin(tokio_stream::empty()))
    }
}

fn host(context: &Path, out: &Path) -> SessionHost {
    let mut services = tonic::service::Routes::builder();
    services.add_service(FileSyncServer::new(Files(context.into())));
    services.add_service(FileSendServer::new(Target(out.into())));
    SessionHost {
        id: "session-1".into(),
        name: String::new(),
        shared_key: "key".into(),
        methods: [methods::FILE_SYNC, methods::FILE_SEND].concat(),
        services,
    }
}

async fn fetch_tree(session: &SessionConn, dest: &Path) {
    let (requests, outgoing) = mpsc::channel(16);
    let packets = ReceiverStream::new(outgoing);
    let mut call =
        Request::new(packets.filter_map(|packet: Result<Packet, Status>| std::future::ready(packet.ok())));
    let (dir, include) = (["context".to_owned()], ["ü".to_owned()]);
    *call.metadata_mut() = encode_lists([
        ("dir-name", dir.as_slice()),
        ("include-patterns", include.as_slice()),
    ]);
    let incoming = FileSyncClient::new(session.channel.clone())
        .diff_copy(call)
        .await
        .unwrap()
        .into_inner();
    receive(dest.into(), ReceiveOptions::default(), incoming, requests, None)
        .await
        .unwrap();
}

async fn send_file(session: &SessionConn) {
    let headers = file_send::headers("file", &BTreeMap::new());
    let (chunks, mut answers) = file_send::call::<BytesMessage>(session.channel.clone(), headers)
        .await
        .unwrap();
    for _ in 0..4 {
        chunks
            .send(BytesMessage {
                data: vec![1; 1 << 20].into(),
            })
            .await
            .unwrap();
    }
    drop(chunks);
    assert!(answers.next().await.is_none());
}

async fn send_tree(session: &SessionConn, dir: &Path) {
    let headers = file_send::headers("tree", &BTreeMap::new());
    let (chunks, answers) = file_send::call::<Packet>(session.channel.clone(), headers)
        .await
        .unwrap();
    let (packets, mut queue) = mpsc::channel::<Result<Packet, Status>>(16);
    tokio::spawn(async move {
        while let Some(Ok(packet)) = queue.recv().await {
            chunks.send(packet).await.unwrap();
        }
    });
    let source = SendSource {
        dir: dir.into(),
        filter: FilterOptions::default(),
    };
    send(source, answers, packets, None).await.unwrap();
}

#[tokio::test]
async fn files_move_both_ways() {
    let mut daemon = daemon::start();
    let dirs: [tempfile::TempDir; 3] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
    let [context, out, work] = dirs.each_ref().map(tempfile::TempDir::path);
    fs::create_dir(context.join("ü")).unwrap();
    fs::write(context.join("ü/file"), vec![7; 3 << 20]).unwrap();
    fs::write(context.join("skipped"), "no").unwrap();

    let hosted = tokio::spawn(host(context, out).run(ControlClient::new(daemon::dial(&daemon.socket).await)));
    let session = daemon.sessions.recv().await.unwrap();
    assert_eq!(
        (session.id.as_str(), session.shared_key.as_str()),
        ("session-1", "key")
    );
    assert!(session.supports("/moby.filesync.v1.FileSync/diffcopy"));
    assert!(!session.supports(methods::GET_SECRET));

    fetch_tree(&session, work).await;
    assert_eq!(fs::read(work.join("ü/file")).unwrap(), vec![7; 3 << 20]);
    assert!(!work.join("skipped").exists());
    send_file(&session).await;
    assert_eq!(fs::metadata(out.join("file")).unwrap().len(), 4 << 20);
    send_tree(&session, context).await;
    assert_eq!(fs::read(out.join("tree/ü/file")).unwrap(), vec![7; 3 << 20]);

    let mut refused = Request::new(tokio_stream::empty());
    *refused.metadata_mut() = encode_lists([("dir-name", ["other".to_owned()].as_slice())]);
    let status = FileSyncClient::new(session.channel.clone())
        .diff_copy(refused)
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (tonic::Code::NotFound, "no access allowed")
    );

    session.close();
    session.closed().cancelled().await;
    hosted.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_client_that_goes_away_closes_the_session() {
    let mut daemon = daemon::start();
    let host = SessionHost {
        id: "session-2".into(),
        name: "name".into(),
        shared_key: String::new(),
        methods: Vec::new(),
        services: tonic::service::Routes::builder(),
    };
    let hosted = tokio::spawn(host.run(ControlClient::new(daemon::dial(&daemon.socket).await)));
    let session = daemon.sessions.recv().await.unwrap();
    let watched = session.clone();
    let watch = tokio::spawn(async move { watched.watch().await });
    hosted.abort();
    assert_eq!(watch.await.unwrap(), "connection closed");
}

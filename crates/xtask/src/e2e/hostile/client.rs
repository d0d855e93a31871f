//! A client that sends what no honest client would: raw requests, and a directory that is whatever a script says.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use api::fsutil::{Message, Packet, Stat};
use api::pb::control::control_client::ControlClient;
use api::pb::control::{SolveRequest, SolveResponse};
use api::pb::filesync::file_sync_server::{FileSync, FileSyncServer};
use api::pb::gateway::ReturnRequest;
use api::pb::gateway::llb_bridge_client::LlbBridgeClient;
use api::session::{SessionHost, methods};
use api::transport::MAX_MESSAGE_BYTES;
use bytes::Bytes;
use llb::pb;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};

use crate::e2e::fixture::Daemon;

/// Longest time in which a daemon has to answer.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Bytes of a file that are sent at once.
const PIECE: usize = 1 << 20;

/// A connection to a daemon.
pub struct Client {
    channel: Channel,
    // Ended last.
    runtime: Runtime,
}

impl Client {
    /// Connects.
    pub fn connect(daemon: &Daemon<'_>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let endpoint = Endpoint::from_shared(format!("unix:{}", daemon.socket().display()))?;
        let channel = runtime.block_on(api::transport::tune_endpoint(endpoint).connect())?;
        Ok(Self { channel, runtime })
    }

    fn control(&self) -> ControlClient<Channel> {
        ControlClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// When there is no answer in time. What the daemon refuses is no error.
    pub fn solve(&self, request: SolveRequest) -> Result<Answer> {
        let mut control = self.control();
        self.runtime.block_on(async {
            tokio::time::timeout(LIMIT, control.solve(request))
                .await
                .context("the daemon did not answer")
                .map(|answer| answer.map(Response::into_inner))
        })
    }

    /// The same with a session in which every directory is the one of `files`.
    pub fn solve_with(&self, files: Files, mut request: SolveRequest) -> Result<Answer> {
        let host = files.host()?;
        request.session.clone_from(&host.id);
        let (mut control, session) = (self.control(), self.control());
        self.runtime.block_on(async {
            tokio::select! {
                answer = tokio::time::timeout(LIMIT, control.solve(request)) => {
                    answer.context("the daemon did not answer").map(|answer| answer.map(Response::into_inner))
                }
                ended = host.run(session) => Err(anyhow!("the session ended: {ended:?}")),
            }
        })
    }

    /// Sends a request whose call is given up after a time. Returns what was answered before, if anything.
    pub fn give_up(&self, files: Files, request: SolveRequest, after: Duration) -> Result<Option<Answer>> {
        self.give_up_when(files, request, async { tokio::time::sleep(after).await })
    }

    /// The same at the moment that a future comes to its end.
    pub fn give_up_when(
        &self,
        files: Files,
        mut request: SolveRequest,
        moment: impl Future<Output = ()>,
    ) -> Result<Option<Answer>> {
        let host = files.host()?;
        request.session.clone_from(&host.id);
        let (mut control, session) = (self.control(), self.control());
        self.runtime.block_on(async {
            tokio::select! {
                answer = control.solve(request) => Ok(Some(answer.map(Response::into_inner))),
                ended = host.run(session) => Err(anyhow!("the session ended: {ended:?}")),
                () = moment => Ok(None),
            }
        })
    }
}

/// Names the build that a call is for.
#[derive(Clone)]
pub struct BuildHeader(MetadataValue<Ascii>);

impl Interceptor for BuildHeader {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        let name = "buildkit-controlapi-buildid";
        request.metadata_mut().insert(name, self.0.clone());
        Ok(request)
    }
}

/// A build's connection to its daemon.
pub type Bridge = LlbBridgeClient<InterceptedService<Channel, BuildHeader>>;

impl Client {
    /// Runs a build whose frontend is this client: `drive` is given the build's bridge, and the build ends with it.
    ///
    /// # Errors
    /// Those of `drive`, and of the build.
    pub fn drive<F>(&self, drive: impl FnOnce(Bridge) -> F) -> Result<()>
    where
        F: Future<Output = Result<()>>,
    {
        let request = SolveRequest {
            r#ref: name("driven"),
            ..SolveRequest::default()
        };
        let header = BuildHeader(request.r#ref.parse()?);
        let bridge = LlbBridgeClient::with_interceptor(self.channel.clone(), header);
        let mut ending = bridge.clone();
        let mut control = self.control();
        self.runtime.block_on(async {
            let driving = async {
                let outcome = tokio::time::timeout(LIMIT, drive(bridge)).await;
                let result = Some(api::pb::gateway::Result::default());
                ending
                    .r#return(ReturnRequest { result, error: None })
                    .await
                    .context("the build cannot be ended")?;
                outcome.context("the build did not come to an end")?
            };
            let (driven, built) = tokio::join!(driving, control.solve(request));
            driven?;
            built.map(drop).context("the build failed")
        })
    }
}

/// What a daemon says to a request.
pub type Answer = std::result::Result<SolveResponse, Status>;

/// A request for a definition's result, which goes nowhere.
pub fn request(definition: pb::Definition) -> SolveRequest {
    SolveRequest {
        r#ref: name("build"),
        definition: Some(definition),
        ..SolveRequest::default()
    }
}

/// A name that was not used before.
pub fn name(kind: &str) -> String {
    static NUMBERS: AtomicU64 = AtomicU64::new(0);
    format!("hostile-{kind}-{}", NUMBERS.fetch_add(1, Ordering::Relaxed))
}

/// A directory by script.
#[derive(Clone)]
pub struct Files {
    /// What is sent at once.
    pub listing: Vec<Packet>,
    /// What is answered to a request for an entry.
    pub content: Content,
    /// Key under which the daemon keeps the directory.
    pub shared_key: String,
}

impl Files {
    /// A directory with this listing whose files all are `content`.
    pub fn new(listing: Vec<Packet>) -> Self {
        Self {
            listing,
            content: Content::Bytes(Bytes::from_static(b"content")),
            shared_key: name("key"),
        }
    }

    /// A directory of files with these attributes that all have the same content, honestly sent.
    pub fn honest(stats: Vec<Stat>, content: Vec<u8>) -> Self {
        let mut listing: Vec<Packet> = stats
            .into_iter()
            .map(|stat| Message::Stat(Some(stat)).into())
            .collect();
        listing.push(Message::Stat(None).into());
        Self {
            listing,
            content: Content::Bytes(content.into()),
            shared_key: name("key"),
        }
    }

    fn host(self) -> Result<SessionHost> {
        let mut services = tonic::service::Routes::builder();
        let shared_key = self.shared_key.clone();
        services.add_service(FileSyncServer::new(self).max_encoding_message_size(MAX_MESSAGE_BYTES));
        Ok(SessionHost {
            id: name("session"),
            name: String::new(),
            shared_key,
            methods: methods::FILE_SYNC.to_vec(),
            services,
        })
    }

    /// Plays the script until the daemon is gone or says that it is done.
    async fn play(self, mut incoming: Streaming<Packet>, outgoing: mpsc::Sender<Result<Packet, Status>>) {
        let listing = async {
            for packet in self.listing {
                if outgoing.send(Ok(packet)).await.is_err() {
                    return;
                }
            }
        };
        let answers = async {
            while let Ok(Some(packet)) = incoming.message().await {
                let answers = match Message::try_from(packet) {
                    Ok(Message::Request(id)) => self.content.packets(id),
                    Ok(Message::Fin) => vec![Message::Fin.into()],
                    _ => return,
                };
                for packet in answers {
                    if outgoing.send(Ok(packet)).await.is_err() {
                        return;
                    }
                }
            }
        };
        tokio::join!(listing, answers);
    }
}

/// What files consist of.
#[derive(Clone)]
pub enum Content {
    /// Of these bytes.
    Bytes(Bytes),
    /// Of whatever these packets say.
    Script(fn(u32) -> Vec<Packet>),
}

impl Content {
    fn packets(&self, id: u32) -> Vec<Packet> {
        match self {
            Self::Script(script) => script(id),
            Self::Bytes(bytes) => {
                let pieces = bytes.chunks(PIECE).map(|piece| bytes.slice_ref(piece));
                let pieces = pieces.chain([Bytes::new()]);
                pieces.map(|bytes| Message::Data { id, bytes }.into()).collect()
            }
        }
    }
}

type Packets = Pin<Box<ReceiverStream<Result<Packet, Status>>>>;

#[tonic::async_trait]
impl FileSync for Files {
    type DiffCopyStream = Packets;
    type TarStreamStream = Packets;

    async fn diff_copy(&self, request: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        let (outgoing, packets) = mpsc::channel(64);
        // Ends with the call: both of its ends are the daemon's.
        tokio::spawn(self.clone().play(request.into_inner(), outgoing));
        Ok(Response::new(Box::pin(ReceiverStream::new(packets))))
    }

    async fn tar_stream(&self, _: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        Err(Status::unimplemented("directories are sent by DiffCopy"))
    }
}

//! `FileSend.DiffCopy`, the one method whose messages are of two types: [`Packet`]s when the client receives a tree,
//! [`BytesMessage`]s when it receives a file. Which one it is, the client knows from the exporter that the call names.
//!
//! The stubs generated for `FileSend` only speak [`BytesMessage`], so both ends use the ones of this module, whose
//! messages are raw.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf as _, BufMut as _, Bytes};
use futures_util::{Stream, StreamExt as _};
use http::uri::PathAndQuery;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{Body, Service, StdError};
use tonic::metadata::{AsciiMetadataKey, MetadataMap, MetadataValue};
use tonic::server::{NamedService, StreamingService};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

pub use crate::fsutil::Packet;
pub use crate::pb::filesync::BytesMessage;
use crate::session::methods::FILE_SEND_DIFF_COPY;
use crate::transport::{Answer, MAX_MESSAGE_BYTES};

/// Header with the index of the exporter in the request.
pub const HEADER_EXPORTER: &str = "buildkit-attachable-exporter-id";
/// Header by which a daemon tells that it sends all platforms in one tree.
pub const HEADER_MULTI_PLATFORM: &str = "buildkit-exporter-multi-platform";
/// Prefix of headers with what the exporter tells of a file.
pub const HEADER_METADATA_PREFIX: &str = "exporter-md-";

/// Messages on their way.
const QUEUE: usize = 8;

/// Makes the headers of a call. What cannot be sent in a header is left out.
pub fn headers(exporter: &str, metadata: &BTreeMap<String, String>) -> MetadataMap {
    let mut map = MetadataMap::new();
    let mut insert = |key: &str, value: &str| {
        if let (Ok(key), Ok(value)) = (key.parse::<AsciiMetadataKey>(), MetadataValue::try_from(value)) {
            map.insert(key, value);
        }
    };
    insert(HEADER_EXPORTER, exporter);
    insert(HEADER_MULTI_PLATFORM, "1");
    for (key, value) in metadata {
        insert(&format!("{HEADER_METADATA_PREFIX}{}", key.to_lowercase()), value);
    }
    map
}

/// Calls the client, which may say nothing before it has everything; what is sent ends when the sender is dropped. Dropping both ends cancels the call.
pub async fn call<M: Message + 'static>(
    channel: Channel,
    headers: MetadataMap,
) -> Result<(mpsc::Sender<M>, Messages<M>), Status> {
    let (outgoing, messages) = mpsc::channel::<M>(QUEUE);
    let mut client = tonic::client::Grpc::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    client
        .ready()
        .await
        .map_err(|error| Status::unavailable(format!("client is not ready: {error}")))?;
    let encoded = ReceiverStream::new(messages).map(|message| Bytes::from(message.encode_to_vec()));
    let mut request = Request::new(encoded);
    *request.metadata_mut() = headers;
    let path = PathAndQuery::from_static(FILE_SEND_DIFF_COPY);
    let answer = Answer::new(async move { client.streaming(request, path, RawCodec).await });
    Ok((
        outgoing,
        Messages {
            raw: answer,
            _message: std::marker::PhantomData,
        },
    ))
}

/// Raw messages, decoded as they come.
#[derive(Debug)]
pub struct Messages<M> {
    raw: Answer<Bytes>,
    _message: std::marker::PhantomData<fn() -> M>,
}

impl<M> Messages<M> {
    /// Reads raw messages as ones of a type.
    pub fn new(raw: Streaming<Bytes>) -> Self {
        Self {
            raw: raw.into(),
            _message: std::marker::PhantomData,
        }
    }
}

impl<M: Message + Default> Stream for Messages<M> {
    type Item = Result<M, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let decode = |bytes: Bytes| M::decode(bytes).map_err(|error| Status::internal(error.to_string()));
        self.raw
            .poll_next_unpin(cx)
            .map(|next| next.map(|raw| raw.and_then(decode)))
    }
}

/// What goes back to the daemon.
pub type Answers = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

/// The client's side of the method.
#[tonic::async_trait]
pub trait FileSend: Send + Sync + 'static {
    /// Receives what an exporter sends; the headers name the exporter.
    async fn receive(&self, headers: MetadataMap, incoming: Streaming<Bytes>) -> Result<Answers, Status>;
}

/// Offers the client's side as a gRPC service.
#[derive(Debug)]
pub struct FileSendServer<T>(Arc<T>);

impl<T> FileSendServer<T> {
    /// Makes the service.
    pub fn new(inner: T) -> Self {
        Self(Arc::new(inner))
    }
}

impl<T> Clone for FileSendServer<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> NamedService for FileSendServer<T> {
    const NAME: &'static str = "moby.filesync.v1.FileSend";
}

type BoxFuture<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

struct DiffCopy<T>(Arc<T>);

impl<T: FileSend> StreamingService<Bytes> for DiffCopy<T> {
    type Response = Bytes;
    type ResponseStream = Answers;
    type Future = BoxFuture<Response<Answers>, Status>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            let (headers, _, incoming) = request.into_parts();
            inner.receive(headers, incoming).await.map(Response::new)
        })
    }
}

impl<T, B> Service<http::Request<B>> for FileSendServer<T>
where
    T: FileSend,
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            if request.uri().path() != FILE_SEND_DIFF_COPY {
                return Ok(Status::unimplemented("unknown method").into_http());
            }
            let mut grpc = tonic::server::Grpc::new(RawCodec)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES);
            Ok(grpc.streaming(DiffCopy(inner), request).await)
        })
    }
}

/// Passes messages on without looking at them.
#[derive(Clone, Copy, Debug, Default)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, dst: &mut EncodeBuf<'_>) -> Result<(), Status> {
        dst.put(item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let len = src.remaining();
        Ok(Some(src.copy_to_bytes(len)))
    }
}

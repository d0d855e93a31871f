//! gRPC over any byte stream, with the limits that BuildKit's peers expect.

use std::io;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use futures_util::{Stream, StreamExt as _};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Response, Status, Streaming};

use crate::bounds::bound_statuses;

mod message_io;

pub use message_io::{Carrier, MessageIo, gathered};

/// Most bytes of one message, both ways. Stubs must be told: `client.max_decoding_message_size(MAX_MESSAGE_BYTES)`.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// Most bytes of headers and trailers of one call: details of errors travel in trailers.
pub const MAX_HEADER_BYTES: u32 = 16 << 20;

const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Why a connection could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// gRPC over the stream failed.
    #[error("gRPC connection failed")]
    Grpc(#[from] tonic::transport::Error),
}

/// Sets windows and header limits of a client.
pub fn tune_endpoint(endpoint: Endpoint) -> Endpoint {
    endpoint
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
}

/// Sets windows and header limits of a server.
pub fn tune_server<L>(server: Server<L>) -> Server<L> {
    server
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
}

/// Makes a client of the services at the other end of a byte stream. The stream is dropped with the last clone.
pub async fn connect_over<I>(io: I) -> Result<Channel, TransportError>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let io = Mutex::new(Some(io));
    let connector = tower::service_fn(move |_| {
        let io = io.lock().unwrap_or_else(PoisonError::into_inner).take();
        let once = || io::Error::new(io::ErrorKind::NotConnected, "only one connection allowed");
        std::future::ready(io.map(TokioIo::new).ok_or_else(once))
    });
    let endpoint = tune_endpoint(Endpoint::from_static("http://localhost"));
    Ok(endpoint.connect_with_connector(connector).await?)
}

/// Serves the other end of a byte stream until it ends. Dropping the future ends the connection.
pub async fn serve_over<I>(routes: Routes, io: I) -> Result<(), TransportError>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (cancel, gone) = (CancellationToken::new(), CancellationToken::new());
    let _cancel = cancel.clone().drop_guard();
    let io = Watched::new(io, cancel, gone.clone());
    let incoming = tokio_stream::once(Ok::<_, io::Error>(io)).chain(tokio_stream::pending());
    let mut server = tune_server(Server::builder()).layer(bound_statuses());
    Ok(server
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, gone.cancelled_owned())
        .await?)
}

/// A byte stream that ends when told to and tells when it is dropped.
pub(crate) struct Watched<I> {
    io: I,
    cancel: Pin<Box<WaitForCancellationFutureOwned>>,
    _gone: DropGuard,
}

impl<I> Watched<I> {
    /// Ends for the reader when `cancel` is cancelled, and cancels `gone` when dropped.
    pub(crate) fn new(io: I, cancel: CancellationToken, gone: CancellationToken) -> Self {
        Self {
            io,
            cancel: Box::pin(cancel.cancelled_owned()),
            _gone: gone.drop_guard(),
        }
    }
}

impl<I> Connected for Watched<I> {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl<I: AsyncRead + Unpin> AsyncRead for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.cancel.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Watched<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// What a peer answers to a streaming call, from before it has said anything.
///
/// Go servers send headers only with their first message, or with none at all, and tonic's calls return with the headers.
/// Whoever has to talk first must therefore not wait for the call. Dropping this cancels the call.
#[derive(Debug)]
pub struct Answer<M>(AnswerState<M>);

#[derive(Debug)]
enum AnswerState<M> {
    Waiting(AbortOnDropHandle<Result<Response<Streaming<M>>, Status>>),
    Open(Box<Streaming<M>>),
    Over,
}

impl<M: Send + 'static> Answer<M> {
    /// Starts a call of a stub. Needs a tokio runtime.
    pub fn new(call: impl Future<Output = Result<Response<Streaming<M>>, Status>> + Send + 'static) -> Self {
        Self(AnswerState::Waiting(AbortOnDropHandle::new(tokio::spawn(call))))
    }
}

impl<M> From<Streaming<M>> for Answer<M> {
    fn from(open: Streaming<M>) -> Self {
        Self(AnswerState::Open(Box::new(open)))
    }
}

impl<M> Stream for Answer<M> {
    type Item = Result<M, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match &mut self.0 {
                AnswerState::Waiting(call) => {
                    let answered =
                        ready!(Pin::new(call).poll(cx)).map_err(|_| Status::cancelled("call stopped"));
                    match answered.and_then(|answer| answer) {
                        Ok(answer) => self.0 = AnswerState::Open(Box::new(answer.into_inner())),
                        Err(status) => {
                            self.0 = AnswerState::Over;
                            return Poll::Ready(Some(Err(status)));
                        }
                    }
                }
                AnswerState::Open(open) => return open.poll_next_unpin(cx),
                AnswerState::Over => return Poll::Ready(None),
            }
        }
    }
}

//! A byte stream in messages of a gRPC call.
//!
//! What is carried is gRPC itself, whose frames are small, so the cost of a transfer is that of its messages: a frame's header
//! and its content go into one, and what waits for the peer is put together.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _, stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;
use tonic::{Code, Status};

use crate::pb::control::BytesMessage;

/// Most bytes of one message that is written.
const CHUNK_BYTES: usize = 1 << 20;
/// Messages are put together up to about this size.
const GATHERED_BYTES: usize = 256 << 10;

/// A message that carries bytes and nothing else.
pub trait Carrier: Send + 'static {
    /// Wraps bytes.
    fn wrap(bytes: Bytes) -> Self;

    /// Returns the bytes; the message itself if it is an error.
    ///
    /// # Errors
    /// The message.
    fn into_bytes(self) -> Result<Bytes, Self>
    where
        Self: Sized;
}

macro_rules! carriers {
    ($($message:ty),* $(,)?) => {$(
        impl Carrier for $message {
            fn wrap(data: Bytes) -> Self {
                Self { data }
            }

            fn into_bytes(self) -> Result<Bytes, Self> {
                Ok(self.data)
            }
        }

        impl From<$message> for Bytes {
            fn from(message: $message) -> Self {
                message.data
            }
        }
    )*};
}

carriers!(
    BytesMessage,
    crate::pb::filesync::BytesMessage,
    crate::pb::ssh::BytesMessage,
    crate::pb::upload::BytesMessage,
);

/// Servers answer with results.
impl<M: Carrier> Carrier for Result<M, Status> {
    fn wrap(bytes: Bytes) -> Self {
        Ok(M::wrap(bytes))
    }

    fn into_bytes(self) -> Result<Bytes, Self> {
        self.and_then(|message| {
            message
                .into_bytes()
                .map_err(|_| Status::internal("a message is no error"))
        })
        .map_err(Err)
    }
}

/// Turns the other end of the channel of a [`MessageIo`] into a stream in which messages that wait together are one.
pub fn gathered<T: Carrier>(messages: mpsc::Receiver<T>) -> impl Stream<Item = T> + Send {
    stream::unfold((messages, None), |(mut messages, last)| async move {
        let first = match last {
            Some(last) => last,
            None => messages.recv().await?,
        };
        let (gathered, last) = gather(first, &mut messages);
        Some((gathered, (messages, last)))
    })
}

/// Puts what waits behind a message into it; also returns an error that comes after it.
fn gather<T: Carrier>(first: T, messages: &mut mpsc::Receiver<T>) -> (T, Option<T>) {
    let first = match first.into_bytes() {
        Ok(bytes) => bytes,
        Err(error) => return (error, None),
    };
    let (mut count, mut parts, mut last) = (first.len(), vec![first], None);
    while count < GATHERED_BYTES
        && let Ok(next) = messages.try_recv()
    {
        match next.into_bytes() {
            Ok(bytes) => {
                count += bytes.len();
                parts.push(bytes);
            }
            Err(error) => {
                last = Some(error);
                break;
            }
        }
    }
    if let [only] = &mut parts[..] {
        return (T::wrap(std::mem::take(only)), last);
    }
    let mut all = BytesMut::with_capacity(count);
    parts.iter().for_each(|part| all.extend_from_slice(part));
    (T::wrap(all.freeze()), last)
}

/// A byte stream made of a stream of messages and a channel of messages back. What is written is sent when it is flushed, or
/// is enough for a message.
#[derive(Debug)]
pub struct MessageIo<S, T> {
    incoming: S,
    unread: Bytes,
    unsent: BytesMut,
    outgoing: PollSender<T>,
}

impl<S, T: Carrier> MessageIo<S, T> {
    /// Makes a byte stream. The channel should be short: it is what holds a writer back.
    pub fn new(incoming: S, outgoing: mpsc::Sender<T>) -> Self {
        Self {
            incoming,
            unread: Bytes::new(),
            unsent: BytesMut::new(),
            outgoing: PollSender::new(outgoing),
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unsent.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.outgoing.poll_reserve(cx)).map_err(gone)?;
        let bytes = std::mem::take(&mut self.unsent).freeze();
        Poll::Ready(self.outgoing.send_item(T::wrap(bytes)).map_err(gone))
    }
}

impl<S, T, M> AsyncRead for MessageIo<S, T>
where
    S: Stream<Item = Result<M, Status>> + Unpin,
    T: Carrier,
    M: Into<Bytes>,
{
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.unread.is_empty() {
            match ready!(self.incoming.poll_next_unpin(cx)) {
                Some(Ok(message)) => self.unread = message.into(),
                Some(Err(status)) if status.code() == Code::Cancelled => return Poll::Ready(Ok(())),
                Some(Err(status)) => return Poll::Ready(Err(io::Error::other(status))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = self.unread.len().min(buf.remaining());
        buf.put_slice(&self.unread[..count]);
        self.unread.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<S: Unpin, T: Carrier> AsyncWrite for MessageIo<S, T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.unsent.len() >= CHUNK_BYTES {
            ready!(self.poll_send(cx))?;
        }
        let count = buf.len().min(CHUNK_BYTES - self.unsent.len());
        self.unsent.extend_from_slice(&buf[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = ready!(self.poll_send(cx));
        self.outgoing.close();
        Poll::Ready(sent)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    type Message = Result<BytesMessage, Status>;

    fn message(bytes: &'static [u8]) -> Message {
        Message::wrap(Bytes::from_static(bytes))
    }

    #[tokio::test]
    async fn what_is_written_is_sent_with_the_flush() {
        let (outgoing, mut messages) = mpsc::channel::<Message>(4);
        let mut io = MessageIo::new(stream::pending::<Message>(), outgoing);
        io.write_all(b"header").await.unwrap();
        io.write_all(b"content").await.unwrap();
        assert!(messages.try_recv().is_err());
        io.flush().await.unwrap();
        io.flush().await.unwrap();
        assert_eq!(messages.try_recv().unwrap().unwrap().data, "headercontent");
        assert!(messages.try_recv().is_err());
        // More than one message is sent before a flush, so that not everything is kept.
        io.write_all(&vec![b'x'; CHUNK_BYTES + 1]).await.unwrap();
        assert_eq!(messages.try_recv().unwrap().unwrap().data.len(), CHUNK_BYTES);
        io.shutdown().await.unwrap();
        assert_eq!(messages.recv().await.unwrap().unwrap().data, "x");
        assert!(messages.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_peer_that_is_gone_is_an_error() {
        let (outgoing, messages) = mpsc::channel::<Message>(4);
        drop(messages);
        let mut io = MessageIo::new(stream::pending::<Message>(), outgoing);
        io.write_all(b"x").await.unwrap();
        let error = io.flush().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn messages_that_wait_together_are_one_in_order() {
        let (sender, messages) = mpsc::channel::<Message>(1000);
        for part in [b"a", b"b", b"c"] {
            sender.send(message(part)).await.unwrap();
        }
        sender.send(Err(Status::unknown("over"))).await.unwrap();
        sender.send(message(b"d")).await.unwrap();
        let mut stream = Box::pin(gathered(messages));
        assert_eq!(stream.next().await.unwrap().unwrap().data, "abc");
        assert_eq!(stream.next().await.unwrap().unwrap_err().message(), "over");
        assert_eq!(stream.next().await.unwrap().unwrap().data, "d");
        let large = vec![b'x'; GATHERED_BYTES / 2 + 1];
        for _ in 0..3 {
            sender.send(Message::wrap(large.clone().into())).await.unwrap();
        }
        assert_eq!(stream.next().await.unwrap().unwrap().data.len(), 2 * large.len());
        assert_eq!(stream.next().await.unwrap().unwrap().data.len(), large.len());
        drop(sender);
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn what_is_read_is_what_was_sent() {
        let (sender, messages) = mpsc::channel::<Message>(4);
        let (outgoing, _messages) = mpsc::channel::<Message>(1);
        let mut io = MessageIo::new(ReceiverStream::new(messages), outgoing);
        for part in [&b"one"[..], b"", b"two"] {
            sender.send(message(part)).await.unwrap();
        }
        sender.send(Err(Status::cancelled("gone"))).await.unwrap();
        let mut all = String::new();
        io.read_to_string(&mut all).await.unwrap();
        assert_eq!(all, "onetwo");
    }
}

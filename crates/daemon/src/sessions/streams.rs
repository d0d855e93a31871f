//! Moves messages between gRPC streams and the engine's channels.

use engine::session::SessionError;
use futures_util::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

/// Messages that may wait on either side.
pub(super) const QUEUE: usize = 64;

/// Passes on what comes in until the stream ends, the engine loses interest, or the session is gone. Then the stream is
/// dropped, which cancels the call.
pub(super) fn pump<M, T>(
    tasks: &TaskTracker,
    mut incoming: impl Stream<Item = Result<M, Status>> + Send + Unpin + 'static,
    closed: CancellationToken,
    mut convert: impl FnMut(M) -> Result<T, SessionError> + Send + 'static,
    explain: impl Fn(&Status) -> SessionError + Send + 'static,
) -> mpsc::Receiver<Result<T, SessionError>>
where
    M: Send + 'static,
    T: Send + 'static,
{
    let (sender, receiver) = mpsc::channel(QUEUE);
    tasks.spawn(async move {
        loop {
            let next = tokio::select! {
                () = sender.closed() => return,
                next = incoming.next() => next,
                () = closed.cancelled() => Some(Err(Status::unavailable("the connection was closed"))),
            };
            let item = match next {
                None => return,
                Some(Ok(message)) => convert(message),
                Some(Err(status)) => Err(explain(&status)),
            };
            let failed = item.is_err();
            if sender.send(item).await.is_err() || failed {
                return;
            }
        }
    });
    receiver
}

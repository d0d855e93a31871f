//! What a client offers to the daemon during a build: files, accounts, secrets, agents, export targets, blobs.
//!
//! Every service is a gRPC server that the daemon calls through the session.

pub mod accounts;
pub mod agents;
mod authority;
pub mod directories;
pub mod layouts;
pub mod secrets;
pub mod targets;
pub mod tokens;
pub mod uploads;

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::Stream;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

/// A stream of answers together with the task that makes them; the task ends with the stream.
#[derive(Debug)]
pub struct OwnedStream<T> {
    answers: mpsc::Receiver<Result<T, Status>>,
    _task: AbortOnDropHandle<()>,
}

impl<T: Send + 'static> OwnedStream<T> {
    /// Starts the task; `buffered` answers may wait to be read. What the task fails with is the last answer.
    pub fn new<F>(buffered: usize, make: impl FnOnce(mpsc::Sender<Result<T, Status>>) -> F) -> Self
    where
        F: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let (sender, answers) = mpsc::channel(buffered);
        let work = make(sender.clone());
        let task = tokio::spawn(async move {
            if let Err(status) = work.await {
                // Without a reader there is nobody to tell.
                let _ = sender.send(Err(status)).await;
            }
        });
        Self {
            answers,
            _task: AbortOnDropHandle::new(task),
        }
    }
}

impl<T> Stream for OwnedStream<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.answers.poll_recv(cx)
    }
}

//! The receiving side: writing a tree below a local directory.

mod writer;

use std::path::{Path, PathBuf};

use futures_util::{Stream, StreamExt as _};
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::Status;

use super::{Message, Packet, Progress, TransferError};
use writer::Writer;

/// Packets on their way from the network to the disk.
const QUEUE: usize = 64;

/// How to receive.
#[derive(Clone, Debug, Default)]
pub struct ReceiveOptions {
    /// Removes what is not sent; otherwise what is sent is added to what is there.
    pub delete: bool,
}

/// Receives a tree into `dest`, which is made if it is not there. Everything written belongs to the calling user.
///
/// Nothing outside of `dest` is touched, whatever paths come in and whatever symlinks are there. Entries of another kind
/// are replaced. Returns when the sender has said that it is done; errors are told to the sender.
pub async fn receive<S>(
    dest: PathBuf,
    options: ReceiveOptions,
    mut incoming: S,
    outgoing: mpsc::Sender<Result<Packet, Status>>,
    progress: Option<Progress>,
) -> Result<(), TransferError>
where
    S: Stream<Item = Result<Packet, Status>> + Unpin,
{
    let (packets, queue) = mpsc::channel::<Message>(QUEUE);
    let requests = outgoing.clone();
    let mut disk = tokio::task::spawn_blocking(move || write(&dest, options, queue, &requests));
    let mut moved = 0;
    let mut report = |bytes: usize, last: bool| {
        moved += bytes as u64;
        if let Some(progress) = &progress {
            progress(moved, last);
        }
    };
    let mut finished = false;
    let written = loop {
        let packet = tokio::select! {
            biased;
            done = &mut disk => break joined(done),
            packet = incoming.next() => packet,
        };
        let message = match packet {
            Some(Ok(packet)) => {
                report(packet.encoded_len(), false);
                Message::try_from(packet).map_err(Into::into)
            }
            Some(Err(status)) => Err(TransferError::Call(Box::new(status))),
            // Nothing more comes: the writer is done, or it says that it is not.
            None => Ok(Message::Fin),
        };
        match message {
            Ok(Message::Failed(message)) => {
                break Err(TransferError::Remote {
                    side: "sender",
                    message,
                });
            }
            Err(err) => break Err(err),
            Ok(Message::Fin) => {
                finished = true;
                drop(packets);
                break joined(disk.await);
            }
            // A writer that stopped says why when it is joined.
            Ok(message) => {
                let _ = packets.send(message).await;
            }
        }
    };
    report(0, true);
    if let Err(err) = written {
        let _ = outgoing
            .send(Ok(Message::Failed(super::error_text(&err)).into()))
            .await;
        return Err(err);
    }
    while !finished {
        match incoming.next().await {
            Some(Ok(packet)) => finished = matches!(Message::try_from(packet), Ok(Message::Fin)),
            Some(Err(status)) => return Err(TransferError::Call(Box::new(status))),
            None => finished = true,
        }
    }
    Ok(())
}

/// Writes what comes out of the queue, until all is there.
fn write(
    dest: &Path,
    options: ReceiveOptions,
    mut queue: mpsc::Receiver<Message>,
    requests: &mpsc::Sender<Result<Packet, Status>>,
) -> Result<(), TransferError> {
    let put = |message: Message| {
        requests
            .blocking_send(Ok(message.into()))
            .map_err(|_| TransferError::Ended)
    };
    let mut writer = Writer::open(dest, options)?;
    while let Some(message) = queue.blocking_recv() {
        for id in writer.handle(message)? {
            put(Message::Request(id))?;
        }
        if writer.is_done() {
            writer.finish()?;
            return put(Message::Fin);
        }
    }
    Err(TransferError::Ended)
}

fn joined(done: Result<Result<(), TransferError>, tokio::task::JoinError>) -> Result<(), TransferError> {
    done.unwrap_or(Err(TransferError::Protocol("writer stopped")))
}

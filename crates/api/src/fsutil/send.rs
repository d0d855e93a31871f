//! The sending side.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _};
use prost::Message as _;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tonic::Status;

use super::{FilterOptions, Message, Packet, TransferError, Tree, TreeError, walk};

/// Bytes of one piece of content.
const PIECE_BYTES: usize = 128 << 10;
/// Files read at the same time.
const READERS: usize = 4;

/// Told the total of bytes moved so far, and whether that is all.
pub type Progress = Arc<dyn Fn(u64, bool) + Send + Sync>;

/// What to send.
#[derive(Clone, Debug)]
pub struct SendSource {
    /// A local directory.
    pub dir: PathBuf,
    /// Which of its entries.
    pub filter: FilterOptions,
}

/// Sends a directory: lists it, and answers requests until the receiver is done.
///
/// Errors of reading the tree are told to the receiver; a file that cannot be opened is sent empty, as it would be had it
/// been truncated. Dropping the future stops the transfer once `outgoing` is closed.
pub async fn send<S>(
    source: SendSource,
    mut incoming: S,
    outgoing: mpsc::Sender<Result<Packet, Status>>,
    progress: Option<Progress>,
) -> Result<(), TransferError>
where
    S: Stream<Item = Result<Packet, Status>> + Unpin,
{
    let sender = Arc::new(Sender {
        outgoing,
        progress,
        moved: AtomicU64::new(0),
        files: Mutex::default(),
    });
    let tree = Tree::open(&source.dir)?;
    let tree = Arc::new(tree);
    let mut tasks = JoinSet::new();
    {
        let (sender, tree) = (Arc::clone(&sender), Arc::clone(&tree));
        tasks.spawn_blocking(move || sender.list(&tree, &source.filter));
    }
    let readers = Arc::new(Semaphore::new(READERS));
    let outcome = loop {
        let packet = tokio::select! {
            packet = incoming.next() => packet,
            Some(done) = tasks.join_next() => {
                match done.unwrap_or_else(|_| Err(TransferError::Protocol("reader stopped"))) {
                    Ok(()) => continue,
                    Err(err) => break Err(err),
                }
            }
        };
        match packet
            .transpose()
            .map_err(|status| TransferError::Call(Box::new(status)))?
        {
            None => break Err(TransferError::Ended),
            Some(packet) => match Message::try_from(packet)? {
                Message::Request(id) => {
                    let Some(path) = sender.take(id) else {
                        break Err(TransferError::InvalidFile(id));
                    };
                    let (sender, tree, readers) =
                        (Arc::clone(&sender), Arc::clone(&tree), Arc::clone(&readers));
                    tasks.spawn(async move {
                        let Ok(_permit) = readers.acquire().await else {
                            return Ok(());
                        };
                        let read = tokio::task::spawn_blocking(move || sender.content(&tree, id, &path));
                        read.await
                            .unwrap_or(Err(TransferError::Protocol("reader stopped")))
                    });
                }
                Message::Fin => break sender.put(Message::Fin).await,
                Message::Failed(message) => {
                    break Err(TransferError::Remote {
                        side: "receiver",
                        message,
                    });
                }
                Message::Stat(_) | Message::Data { .. } => {
                    break Err(TransferError::Protocol("from a receiver"));
                }
            },
        }
    };
    sender.report(0, true);
    outcome
}

struct Sender {
    outgoing: mpsc::Sender<Result<Packet, Status>>,
    progress: Option<Progress>,
    moved: AtomicU64,
    /// Paths of the entries whose content may be asked for, once.
    files: Mutex<BTreeMap<u32, Bytes>>,
}

impl Sender {
    fn take(&self, id: u32) -> Option<Bytes> {
        self.files
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id)
    }

    fn report(&self, bytes: usize, last: bool) {
        let before = self.moved.fetch_add(bytes as u64, Ordering::Relaxed);
        if let Some(progress) = &self.progress {
            progress(before + bytes as u64, last);
        }
    }

    async fn put(&self, message: Message) -> Result<(), TransferError> {
        self.outgoing
            .send(Ok(message.into()))
            .await
            .map_err(|_| TransferError::Ended)
    }

    fn put_blocking(&self, message: Message) -> Result<(), TransferError> {
        let packet = Packet::from(message);
        let bytes = packet.encoded_len();
        self.outgoing
            .blocking_send(Ok(packet))
            .map_err(|_| TransferError::Ended)?;
        self.report(bytes, false);
        Ok(())
    }

    fn list(&self, tree: &Tree, filter: &FilterOptions) -> Result<(), TransferError> {
        let mut next: u32 = 0;
        let listed = walk(tree, filter, &mut |stat| {
            if stat.is_file() {
                self.files
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(next, stat.path.clone());
            }
            let Some(following) = next.checked_add(1) else {
                return ControlFlow::Break(());
            };
            next = following;
            match self.put_blocking(Message::Stat(Some(stat))) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        });
        match listed {
            Ok(()) => self.put_blocking(Message::Stat(None)),
            Err(TreeError::Stopped) => Err(TransferError::Ended),
            Err(err) => {
                let text = super::error_text(&err);
                // The receiver may be gone; the error returned is what counts.
                let _ = self.put_blocking(Message::Failed(text));
                Err(err.into())
            }
        }
    }

    fn content(&self, tree: &Tree, id: u32, path: &[u8]) -> Result<(), TransferError> {
        if let Ok(mut file) = tree.open_file(path) {
            loop {
                let mut piece = BytesMut::zeroed(PIECE_BYTES);
                let count = file
                    .read(&mut piece)
                    .map_err(|source| TreeError::io("read", path, source))?;
                if count == 0 {
                    break;
                }
                piece.truncate(count);
                self.put_blocking(Message::Data {
                    id,
                    bytes: piece.freeze(),
                })?;
            }
        }
        self.put_blocking(Message::Data {
            id,
            bytes: Bytes::new(),
        })
    }
}

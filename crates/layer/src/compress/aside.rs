//! A digest that a thread of its own works out, so that whoever writes need not wait for it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use oci::{Digest, Digester};

/// Bytes handed over at once.
const BLOCK: usize = 256 << 10;
/// Blocks that wait at most.
const QUEUED: usize = 4;

/// Digests what it is given, in order: at once what is less than one block, else in a thread. Dropping it ends the thread.
pub(super) struct Aside {
    /// What was not handed over yet.
    block: Vec<u8>,
    worker: Option<Worker>,
}

/// Bytes handed over.
enum Block {
    /// Filled again once they are digested.
    Own(Vec<u8>),
    /// Needed by others as well.
    Shared(Arc<Vec<u8>>),
}

struct Worker {
    blocks: SyncSender<Block>,
    /// Blocks to be filled again.
    emptied: Receiver<Vec<u8>>,
    thread: JoinHandle<Digest>,
}

impl Worker {
    fn start() -> Self {
        let (blocks, queue) = sync_channel::<Block>(QUEUED);
        let (back, emptied) = channel();
        let thread = thread::spawn(move || {
            let mut digester = Digester::sha256();
            for block in queue {
                match block {
                    Block::Own(mut block) => {
                        digester.update(&block);
                        block.clear();
                        // Nobody takes blocks back at the end.
                        let _ = back.send(block);
                    }
                    Block::Shared(block) => digester.update(&*block),
                }
            }
            digester.finish()
        });
        Self {
            blocks,
            emptied,
            thread,
        }
    }

    fn send(&self, block: Block) -> io::Result<()> {
        self.blocks.send(block).map_err(|_| ended())
    }
}

fn ended() -> io::Error {
    io::Error::other("the digesting thread ended")
}

impl Aside {
    pub(super) fn new() -> Self {
        Self {
            block: Vec::new(),
            worker: None,
        }
    }

    /// Adds bytes.
    pub(super) fn update(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - self.block.len()));
            self.block.extend_from_slice(now);
            bytes = later;
            if self.block.len() == BLOCK {
                let worker = self.worker.get_or_insert_with(Worker::start);
                let next = worker.emptied.try_recv();
                let next = next.unwrap_or_else(|_| Vec::with_capacity(BLOCK));
                worker.send(Block::Own(std::mem::replace(&mut self.block, next)))?;
            }
        }
        Ok(())
    }

    /// Adds a block that others need as well, without a copy unless it is small.
    pub(super) fn share(&mut self, block: &Arc<Vec<u8>>) -> io::Result<()> {
        if block.len() < BLOCK {
            return self.update(block);
        }
        let worker = self.worker.get_or_insert_with(Worker::start);
        if !self.block.is_empty() {
            worker.send(Block::Own(std::mem::take(&mut self.block)))?;
        }
        worker.send(Block::Shared(Arc::clone(block)))
    }

    /// Returns the digest of everything added.
    pub(super) fn finish(self) -> io::Result<Digest> {
        let Some(worker) = self.worker else {
            return Ok(Digest::sha256(&self.block));
        };
        worker.send(Block::Own(self.block))?;
        let Worker { blocks, thread, .. } = worker;
        drop(blocks);
        thread.join().map_err(|_| ended())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use oci::Digest;

    use super::{Aside, BLOCK, QUEUED};

    #[test]
    fn digests_are_of_all_bytes_in_order() {
        let lengths = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, (QUEUED + 3) * BLOCK + 77];
        for length in lengths {
            let bytes: Vec<u8> = (0_u32..).map(|n| n.to_be_bytes()[3]).take(length).collect();
            for piece in [1000, BLOCK, 3 * BLOCK] {
                let mut aside = Aside::new();
                for part in bytes.chunks(piece) {
                    aside.update(part).unwrap();
                }
                assert_eq!(
                    aside.finish().unwrap(),
                    Digest::sha256(&bytes),
                    "{length} {piece}"
                );
                let mut aside = Aside::new();
                for (at, part) in bytes.chunks(piece).enumerate() {
                    match at % 2 {
                        0 => aside.share(&Arc::new(part.to_vec())).unwrap(),
                        _ => aside.update(part).unwrap(),
                    }
                }
                assert_eq!(
                    aside.finish().unwrap(),
                    Digest::sha256(&bytes),
                    "{length} {piece} shared"
                );
            }
        }
    }
}

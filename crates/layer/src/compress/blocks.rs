//! gzip in members whose bounds the input alone decides, compressed by several threads.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use libdeflater::{CompressionLvl, Compressor};

use super::aside::Aside;
use super::density::runs;

/// Bytes compressed at once. Fixed, as it decides the output's bytes.
const BLOCK: usize = 1 << 20;
/// More threads than this gain nothing over the digests and the disk.
const THREADS_MAX: usize = 8;

/// How hard to try.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    level: CompressionLvl,
    /// Store what looks as if it could not be made smaller, without trying.
    skip_dense: bool,
}

impl Effort {
    /// Sets a level, 0 to 12, and whether to try it on everything.
    pub(super) fn new(level: i32, skip_dense: bool) -> io::Result<Self> {
        let level = CompressionLvl::new(level)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("gzip level {level}")))?;
        Ok(Self { level, skip_dense })
    }
}

/// Writes gzip members of bounded input each, in order, and digests the input. The output depends on input, effort and cuts
/// alone.
pub(super) struct GzipBlocks<W> {
    out: Counted<W>,
    effort: Effort,
    /// Most bytes of input in one block.
    limit: usize,
    block: Vec<u8>,
    digester: Aside,
    /// Threads that compress.
    threads: usize,
    workers: Option<Workers>,
    is_empty: bool,
}

/// A stream that ended.
pub(super) struct Ended<W> {
    /// The output.
    pub(super) out: Counted<W>,
    /// What the input was added to.
    pub(super) digester: Aside,
}

/// The output, with where in it each block begins.
pub(super) struct Counted<W> {
    /// The output itself.
    pub(super) out: W,
    /// Offset of each block in bytes, in order.
    pub(super) starts: Vec<u64>,
    /// Bytes written in all.
    pub(super) length: u64,
}

impl<W: Write> Counted<W> {
    fn put(&mut self, members: &[u8]) -> io::Result<()> {
        self.starts.push(self.length);
        self.length += members.len() as u64;
        self.out.write_all(members)
    }
}

struct Workers {
    jobs: SyncSender<(u64, Arc<Vec<u8>>)>,
    results: Receiver<(u64, io::Result<Vec<u8>>)>,
    threads: Vec<JoinHandle<()>>,
    sent: u64,
    written: u64,
    /// Members that came before their turn.
    early: BTreeMap<u64, io::Result<Vec<u8>>>,
}

/// Makes gzip members of blocks.
struct Members {
    compressor: Compressor,
    /// Stores; `None`: everything is compressed.
    storer: Option<Compressor>,
}

impl Members {
    fn new(effort: Effort) -> Self {
        let store = CompressionLvl::new(0).ok().filter(|_| effort.skip_dense);
        Self {
            compressor: Compressor::new(effort.level),
            storer: store.map(Compressor::new),
        }
    }

    fn of(&mut self, block: &[u8]) -> io::Result<Vec<u8>> {
        let Some(storer) = &mut self.storer else {
            return append_member(&mut self.compressor, block, Vec::new());
        };
        let mut members = Vec::new();
        for (dense, range) in runs(block) {
            let compressor = if dense { &mut *storer } else { &mut self.compressor };
            members = append_member(compressor, &block[range], members)?;
        }
        Ok(members)
    }
}

/// Compresses all bytes into one member.
pub(super) fn whole_member(effort: Effort, bytes: &[u8]) -> io::Result<Vec<u8>> {
    append_member(&mut Compressor::new(effort.level), bytes, Vec::new())
}

fn append_member(compressor: &mut Compressor, bytes: &[u8], mut members: Vec<u8>) -> io::Result<Vec<u8>> {
    let start = members.len();
    members.resize(start + compressor.gzip_compress_bound(bytes.len()), 0);
    let length = compressor
        .gzip_compress(bytes, &mut members[start..])
        .map_err(io::Error::other)?;
    members.truncate(start + length);
    Ok(members)
}

impl Workers {
    fn start(effort: Effort, count: usize) -> Self {
        let (jobs, queue) = sync_channel::<(u64, Arc<Vec<u8>>)>(count);
        let (done, results) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let threads = (0..count)
            .map(|_| {
                let (queue, done) = (Arc::clone(&queue), done.clone());
                thread::spawn(move || {
                    let mut members = Members::new(effort);
                    loop {
                        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        let Ok((index, block)) = job else { return };
                        if done.send((index, members.of(&block))).is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        Self {
            jobs,
            results,
            threads,
            sent: 0,
            written: 0,
            early: BTreeMap::new(),
        }
    }

    fn send(&mut self, block: Arc<Vec<u8>>) -> io::Result<()> {
        self.jobs
            .send((self.sent, block))
            .map_err(|_| io::Error::other("the compressing threads ended"))?;
        self.sent += 1;
        Ok(())
    }

    /// Writes what is ready; with `all` waits for what is not.
    fn drain(&mut self, out: &mut Counted<impl Write>, all: bool) -> io::Result<()> {
        // Bounds what lies in memory when output is slow.
        let backlog = self.threads.len() as u64 * 2;
        while self.written < self.sent {
            let must_wait = all || self.sent - self.written > backlog;
            while !self.early.contains_key(&self.written) {
                let next = if must_wait {
                    self.results.recv().ok()
                } else {
                    self.results.try_recv().ok()
                };
                match next {
                    Some((index, member)) => {
                        self.early.insert(index, member);
                    }
                    None if must_wait => return Err(io::Error::other("a compressing thread ended")),
                    None => return Ok(()),
                }
            }
            if let Some(member) = self.early.remove(&self.written) {
                out.put(&member?)?;
            }
            self.written += 1;
        }
        Ok(())
    }
}

impl<W: Write> GzipBlocks<W> {
    /// Starts with blocks of one MiB.
    pub(super) fn new(out: W, effort: Effort, threads: usize) -> Self {
        Self::with_limit(out, effort, threads, BLOCK)
    }

    /// Starts with blocks of at most `limit` bytes.
    pub(super) fn with_limit(out: W, effort: Effort, threads: usize, limit: usize) -> Self {
        let out = Counted {
            out,
            starts: Vec::new(),
            length: 0,
        };
        Self {
            out,
            effort,
            limit,
            block: Vec::new(),
            digester: Aside::new(),
            threads: threads.clamp(1, THREADS_MAX),
            workers: None,
            is_empty: true,
        }
    }

    /// Ends the block begun, if any; returns the number of the next.
    pub(super) fn cut(&mut self) -> io::Result<u64> {
        if !self.block.is_empty() {
            self.end_block()?;
        }
        Ok(self.workers.as_ref().map_or(0, |workers| workers.sent))
    }

    fn end_block(&mut self) -> io::Result<()> {
        let (effort, threads) = (self.effort, self.threads);
        let workers = self
            .workers
            .get_or_insert_with(|| Workers::start(effort, threads));
        // Where blocks are short there are many.
        let capacity = if self.block.len() == self.limit {
            self.limit
        } else {
            0
        };
        let block = Arc::new(std::mem::replace(&mut self.block, Vec::with_capacity(capacity)));
        workers.send(Arc::clone(&block))?;
        self.digester.share(&block)?;
        self.is_empty = false;
        workers.drain(&mut self.out, false)
    }

    pub(super) fn finish(mut self) -> io::Result<Ended<W>> {
        let block = Arc::new(std::mem::take(&mut self.block));
        if let Some(mut workers) = self.workers.take() {
            if !block.is_empty() {
                workers.send(Arc::clone(&block))?;
                self.digester.share(&block)?;
            }
            workers.drain(&mut self.out, true)?;
            let Workers { jobs, threads, .. } = workers;
            drop(jobs);
            for thread in threads {
                thread
                    .join()
                    .map_err(|_| io::Error::other("a compressing thread panicked"))?;
            }
        } else if !block.is_empty() {
            // Too small to be worth threads.
            let members = Members::new(self.effort).of(&block)?;
            self.out.put(&members)?;
            self.digester.share(&block)?;
        } else if self.is_empty {
            // An empty stream still is one member.
            self.out.put(&whole_member(self.effort, &[])?)?;
        }
        Ok(Ended {
            out: self.out,
            digester: self.digester,
        })
    }
}

impl<W: Write> Write for GzipBlocks<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.limit - self.block.len());
        self.block.extend_from_slice(&bytes[..count]);
        if self.block.len() == self.limit {
            self.end_block()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        // Blocks are fixed, so nothing can be hurried.
        Ok(())
    }
}

//! Threads that copy the files of a directory side by side: what takes long is what the kernel does for each.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::CopyError;
use super::file::{self, Look, Place};
use crate::tree::{Stat, TreeContext};

/// Files that are given to a thread at once: waking it for each costs as much as copying a small one.
const BATCH: usize = 16;
/// Batches that wait for a thread. Each file holds two directories open, mostly the same two.
const QUEUE: usize = 8;
/// A file system has its own locks; more threads than this wait for them.
const MAX_THREADS: usize = 7;

/// One file to be copied to a name that is free.
pub(super) struct Job {
    pub(super) from: Arc<OwnedFd>,
    pub(super) name: PathBuf,
    pub(super) stat: Stat,
    pub(super) to: Arc<OwnedFd>,
    pub(super) target: PathBuf,
    pub(super) look: Look,
    /// The source's path, for errors.
    pub(super) path: PathBuf,
}

impl Job {
    pub(super) fn run(&self) -> Result<(), CopyError> {
        let source = Place {
            dir: self.from.as_fd(),
            name: &self.name,
        };
        let target = Place {
            dir: self.to.as_fd(),
            name: &self.target,
        };
        Ok(file::create(source, &self.stat, target, self.look).on("copy", &self.path)?)
    }
}

/// The threads. They end when it is dropped, after what was given to them.
pub(super) struct Pool {
    jobs: Option<SyncSender<Batch>>,
    progress: Arc<Progress>,
    threads: Vec<JoinHandle<()>>,
    /// What is given next, and how many files were given before.
    waiting: Vec<Job>,
    files: u64,
}

/// Files with the number of the first.
type Batch = (u64, Vec<Job>);

#[derive(Default)]
struct Progress {
    state: Mutex<State>,
    settled: Condvar,
}

#[derive(Default)]
struct State {
    /// Batches.
    given: u64,
    done: u64,
    /// The failure of the file that was given first.
    failed: Option<(u64, CopyError)>,
}

impl Progress {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, (first, jobs): &Batch) {
        let ended = Ended(self);
        for (number, job) in (*first..).zip(jobs) {
            let Err(error) = job.run() else { continue };
            let mut state = self.state();
            if state.failed.as_ref().is_none_or(|(first, _)| number < *first) {
                state.failed = Some((number, error));
            }
        }
        drop(ended);
    }
}

/// Counts a batch when it ends, however it does.
struct Ended<'a>(&'a Progress);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.done += 1;
        if state.done == state.given {
            self.0.settled.notify_all();
        }
    }
}

impl Pool {
    /// Starts threads beside the caller's; `None` where there would be none, or none can be had.
    pub(super) fn start() -> Option<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let (jobs, receiver) = sync_channel(QUEUE);
        let receiver = Arc::new(Mutex::new(receiver));
        let progress = Arc::<Progress>::default();
        let start = |_| {
            let (receiver, progress) = (Arc::clone(&receiver), Arc::clone(&progress));
            let builder = std::thread::Builder::new().name("copy".to_owned());
            builder.spawn(move || work(&receiver, &progress)).ok()
        };
        let threads: Vec<_> = (1..cores.min(MAX_THREADS + 1)).filter_map(start).collect();
        (!threads.is_empty()).then_some(Self {
            jobs: Some(jobs),
            progress,
            threads,
            waiting: Vec::new(),
            files: 0,
        })
    }

    /// Has a file copied, by the caller itself when the threads have enough to do. A failure shows here or in
    /// [`settle`](Self::settle).
    pub(super) fn give(&mut self, job: Job) -> Result<(), CopyError> {
        self.waiting.push(job);
        if self.waiting.len() < BATCH {
            return Ok(());
        }
        let Some(batch) = self.batch() else {
            return self.wait();
        };
        let sent = match &self.jobs {
            Some(jobs) => jobs.try_send(batch),
            None => Err(TrySendError::Disconnected(batch)),
        };
        if let Err(TrySendError::Full(batch) | TrySendError::Disconnected(batch)) = sent {
            self.progress.run(&batch);
        }
        Ok(())
    }

    /// Takes what waits to be given; `None` when something has failed.
    fn batch(&mut self) -> Option<Batch> {
        let batch = (self.files, std::mem::take(&mut self.waiting));
        self.files += u64::try_from(batch.1.len()).unwrap_or(0);
        let mut state = self.progress.state();
        if state.failed.is_some() {
            return None;
        }
        state.given += 1;
        drop(state);
        Some(batch)
    }

    /// Waits until all that was given is copied. The error is that of the file that was given first.
    pub(super) fn settle(&mut self) -> Result<(), CopyError> {
        if !self.waiting.is_empty()
            && let Some(batch) = self.batch()
        {
            self.progress.run(&batch);
        }
        self.wait()
    }

    fn wait(&self) -> Result<(), CopyError> {
        let mut state = self.progress.state();
        while state.done < state.given {
            let waited = self.progress.settled.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.failed.take().map_or(Ok(()), |(_, error)| Err(error))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // Whoever panicked has said so.
            let _ = thread.join();
        }
    }
}

fn work(jobs: &Mutex<Receiver<Batch>>, progress: &Progress) {
    loop {
        let batch = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(batch) = batch else { return };
        progress.run(&batch);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::tree::{TreeError, at};

    #[test]
    fn the_first_file_that_fails_is_named_and_the_others_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["from", "to"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        let open = |sub| {
            Arc::new(at::open_dir_beneath(fs::File::open(dir.path()).unwrap(), Path::new(sub)).unwrap())
        };
        let (from, to) = (open("from"), open("to"));
        let Some(mut pool) = Pool::start() else { return };
        for number in 0..300 {
            let name = PathBuf::from(number.to_string());
            fs::write(
                dir.path().join("from").join(&name),
                name.as_os_str().as_encoded_bytes(),
            )
            .unwrap();
            let stat = at::stat_at(&from, &name).unwrap();
            if number % 100 == 50 {
                fs::remove_file(dir.path().join("from").join(&name)).unwrap();
            }
            let job = Job {
                from: Arc::clone(&from),
                name: name.clone(),
                stat,
                to: Arc::clone(&to),
                target: name.clone(),
                look: Look::of(&stat),
                path: name,
            };
            let given = pool.give(job);
            if let Err(error) = given {
                assert_names_50(&error);
                return;
            }
        }
        assert_names_50(&pool.settle().unwrap_err());
        assert!(pool.settle().is_ok());
        assert!(dir.path().join("to/0").exists() && !dir.path().join("to/50").exists());
    }

    fn assert_names_50(error: &CopyError) {
        let CopyError::Tree(TreeError { path, .. }) = error else {
            panic!("{error}");
        };
        assert_eq!(path, Path::new("50"));
    }
}

//! The store: where blobs lie, how they become durable, how they go.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use oci::{Descriptor, Digest, Digester};

use crate::blob::Blob;
use crate::error::{IoContext, StoreError, VerifyError, WriteError};
use crate::ingest::{self, IngestStat, Writer};

/// Age after which an ingest nobody writes is removed when the store opens.
pub const STALE_INGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Threads that flush blobs at once in [`Store::sync`]; more do not help, as the file system's journal groups them.
const SYNC_THREADS: usize = 8;

/// When a committed blob has to be on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// Before the commit returns: one flush of the file and one of its directory.
    #[default]
    Immediate,
    /// At the next [`Store::sync`]. Until then the blob is readable in this process and gone after a crash; whoever
    /// records it durably calls `sync` first. Sixty small blobs cost one group of flushes instead of sixty.
    Deferred,
}

/// A blob's place in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobStat {
    /// The blob.
    pub digest: Digest,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// When it was committed.
    pub created: SystemTime,
}

/// How blobs get onto stable storage. Tests put something else in place, to have crashes in between.
pub trait Flush: std::fmt::Debug + Send + Sync {
    /// Makes a file's bytes durable.
    ///
    /// # Errors
    /// When they may not be.
    fn file(&self, file: &File, path: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// When they may not be.
    fn directory(&self, path: &Path) -> io::Result<()>;
}

/// Flushes with the system's calls.
#[derive(Debug, Default)]
struct SystemFlush;

impl Flush for SystemFlush {
    fn file(&self, file: &File, _path: &Path) -> io::Result<()> {
        file.sync_data()
    }

    fn directory(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
}

/// Blobs by digest in one directory. Cloning is cheap and shares the store; all methods work from any thread.
///
/// One process owns a directory at a time; the owner of the metadata database guards that.
#[derive(Debug, Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    root: PathBuf,
    flush: Arc<dyn Flush>,
    /// Reference keys with an open writer.
    writers: Mutex<BTreeSet<String>>,
    /// Blobs committed with `Deferred`, which lie in `pending/`, each with the number of its commit: a blob may go and come
    /// again while the first is being flushed.
    pending: Mutex<BTreeMap<Digest, u64>>,
    sequence: AtomicU64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The sets are changed by single operations, so a panicking holder leaves them whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn writers(&self) -> MutexGuard<'_, BTreeSet<String>> {
        locked(&self.writers)
    }

    pub(crate) fn ingest_dir(&self, ref_key: &str) -> PathBuf {
        self.root
            .join("ingest")
            .join(Digest::sha256(ref_key.as_bytes()).hex())
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root
            .join("blobs")
            .join(digest.algorithm().as_str())
            .join(digest.hex())
    }

    fn pending_path(&self, digest: &Digest) -> PathBuf {
        self.root
            .join("pending")
            .join(format!("{}-{}", digest.algorithm().as_str(), digest.hex()))
    }

    /// Moves a verified file to where readers look.
    pub(crate) fn publish(
        &self,
        from: &Path,
        file: &File,
        digest: &Digest,
        durability: Durability,
    ) -> Result<(), StoreError> {
        let to = self.blob_path(digest);
        match durability {
            // Whoever placed it may not have flushed the directory yet.
            Durability::Immediate if fs::symlink_metadata(&to).is_ok() => self.sync_dir(&to),
            Durability::Deferred if fs::symlink_metadata(&to).is_ok() => Ok(()),
            Durability::Immediate => {
                self.flush.file(file, from).at("flush", from)?;
                self.place(from, &to)?;
                self.sync_dir(&to)
            }
            Durability::Deferred => {
                let mut pending = locked(&self.pending);
                let path = self.pending_path(digest);
                fs::rename(from, &path).at("rename to", &path)?;
                pending.insert(*digest, self.next());
                Ok(())
            }
        }
    }

    fn next(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed)
    }

    fn place(&self, from: &Path, to: &Path) -> Result<(), StoreError> {
        match fs::rename(from, to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(dir) = to.parent() {
                    fs::create_dir_all(dir).at("create", dir)?;
                }
                fs::rename(from, to).at("rename to", to)
            }
            done => done.at("rename to", to),
        }
    }

    fn sync_dir(&self, file: &Path) -> Result<(), StoreError> {
        let dir = file.parent().unwrap_or(&self.root);
        self.flush.directory(dir).at("flush", dir)
    }

    fn open_blob(&self, digest: &Digest) -> Result<File, StoreError> {
        // A pending blob may move between the two looks, hence the third.
        for path in [
            self.blob_path(digest),
            self.pending_path(digest),
            self.blob_path(digest),
        ] {
            match File::open(&path) {
                Ok(file) => return Ok(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).at("open", path),
            }
        }
        Err(StoreError::NotFound { digest: *digest })
    }
}

impl Store {
    /// Opens the store in `dir`, creating what is missing; drops what a crash left half committed and ingests older
    /// than [`STALE_INGEST`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(dir, Arc::new(SystemFlush))
    }

    /// Does what [`open`](Self::open) does, with another way to flush.
    pub fn open_with(dir: &Path, flush: Arc<dyn Flush>) -> Result<Self, StoreError> {
        private_dir(dir).at("create", dir)?;
        for sub in ["blobs/sha256", "ingest"] {
            fs::create_dir_all(dir.join(sub)).at("create", dir.join(sub))?;
        }
        let pending = dir.join("pending");
        match fs::remove_dir_all(&pending) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            done => done.at("remove", &pending)?,
        }
        fs::create_dir(&pending).at("create", &pending)?;
        let shared = Shared {
            root: dir.to_owned(),
            flush,
            writers: Mutex::default(),
            pending: Mutex::default(),
            sequence: AtomicU64::new(0),
        };
        let store = Self {
            shared: Arc::new(shared),
        };
        store.sweep_ingests(STALE_INGEST)?;
        Ok(store)
    }

    /// Opens or resumes the ingest `ref_key`. With `expected`, the digest and size of that descriptor are enforced.
    ///
    /// Bytes of an earlier, dropped writer are kept: see [`Writer::offset`].
    pub fn writer(&self, ref_key: &str, expected: Option<&Descriptor>) -> Result<Writer, WriteError> {
        Writer::open(&self.shared, ref_key, expected)
    }

    /// Stores `bytes` and returns their SHA-256 digest.
    pub fn put(&self, bytes: &[u8], durability: Durability) -> Result<Digest, WriteError> {
        let digest = Digest::sha256(bytes);
        if self.exists(&digest)? {
            if durability == Durability::Immediate {
                self.sync_if_pending(&digest)?;
            }
            return Ok(digest);
        }
        // Two callers may put the same bytes at once: each writes its own file.
        let sequence = self.shared.next();
        let path = self.shared.root.join("pending").join(format!("put-{sequence}"));
        let mut file = File::create(&path).at("create", &path)?;
        io::Write::write_all(&mut file, bytes).at("write", &path)?;
        self.shared.publish(&path, &file, &digest, durability)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(digest),
            done => Ok(done.at("remove", &path).map(|()| digest)?),
        }
    }

    fn sync_if_pending(&self, digest: &Digest) -> Result<(), StoreError> {
        let is_pending = locked(&self.shared.pending).contains_key(digest);
        if is_pending { self.sync() } else { Ok(()) }
    }

    /// Opens a blob.
    pub fn reader(&self, digest: &Digest) -> Result<Blob, StoreError> {
        let file = self.shared.open_blob(digest)?;
        let size_bytes = file.metadata().at("stat", self.shared.blob_path(digest))?.len();
        Ok(Blob {
            digest: *digest,
            file,
            size_bytes,
        })
    }

    /// Returns a blob's size and age, `None` when there is no such blob.
    pub fn info(&self, digest: &Digest) -> Result<Option<BlobStat>, StoreError> {
        match self.shared.open_blob(digest) {
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
            Ok(file) => {
                let path = self.shared.blob_path(digest);
                let metadata = file.metadata().at("stat", &path)?;
                let created = metadata.modified().at("stat", &path)?;
                Ok(Some(BlobStat {
                    digest: *digest,
                    size_bytes: metadata.len(),
                    created,
                }))
            }
        }
    }

    /// Reports whether the blob is readable.
    pub fn exists(&self, digest: &Digest) -> Result<bool, StoreError> {
        Ok(self.info(digest)?.is_some())
    }

    /// Removes a blob; `false` when there was none. Open readers keep their bytes.
    pub fn delete(&self, digest: &Digest) -> Result<bool, StoreError> {
        let mut pending = locked(&self.shared.pending);
        let mut found = pending.remove(digest).is_some();
        for path in [self.shared.pending_path(digest), self.shared.blob_path(digest)] {
            match fs::remove_file(&path) {
                Ok(()) => found = true,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).at("remove", path),
            }
        }
        Ok(found)
    }

    /// Calls `visit` with every blob, in no particular order; stops at its first error.
    pub fn walk<E: From<StoreError>>(
        &self,
        mut visit: impl FnMut(BlobStat) -> Result<(), E>,
    ) -> Result<(), E> {
        let blobs = self.shared.root.join("blobs");
        for algorithm in list(&blobs)? {
            for path in list(&algorithm)? {
                if let Some(stat) = blob_stat(&algorithm, &path) {
                    visit(stat)?;
                }
            }
        }
        let pending: Vec<Digest> = locked(&self.shared.pending).keys().copied().collect();
        for digest in pending {
            if let Some(stat) = self.info(&digest)? {
                visit(stat)?;
            }
        }
        Ok(())
    }

    /// Reads the whole blob and compares its digest. Leaves a corrupt blob where it is: the caller decides.
    pub fn verify(&self, digest: &Digest) -> Result<(), VerifyError> {
        let mut reader = self.reader(digest)?.into_reader();
        let mut digester = Digester::new(digest.algorithm());
        let mut buf = vec![0; 128 * 1024];
        loop {
            let count = io::Read::read(&mut reader, &mut buf).at("read", self.shared.blob_path(digest))?;
            if count == 0 {
                break;
            }
            digester.update(&buf[..count]);
        }
        let actual = digester.finish();
        if actual == *digest {
            Ok(())
        } else {
            Err(VerifyError::Corrupt {
                digest: *digest,
                actual: actual.into(),
            })
        }
    }

    /// Makes every blob committed so far durable. Call it before recording a deferred blob in a database.
    ///
    /// Files are flushed by a few threads at once, moved to `blobs/`, and their directories flushed once each. When it
    /// fails, what could not be flushed stays pending.
    pub fn sync(&self) -> Result<(), StoreError> {
        let batch: Vec<(Digest, u64)> = locked(&self.shared.pending)
            .iter()
            .map(|(digest, number)| (*digest, *number))
            .collect();
        if batch.is_empty() {
            return Ok(());
        }
        let share = batch.len().div_ceil(SYNC_THREADS);
        std::thread::scope(|scope| {
            let running: Vec<_> = batch
                .chunks(share)
                .map(|part| scope.spawn(|| self.flush(part)))
                .collect();
            running.into_iter().try_for_each(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })?;
        let mut dirs = BTreeSet::new();
        let mut pending = locked(&self.shared.pending);
        for (digest, number) in &batch {
            let (from, to) = (self.shared.pending_path(digest), self.shared.blob_path(digest));
            // Deleted meanwhile, or put again: what lies there is not what was flushed.
            if pending.get(digest) == Some(number) {
                self.shared.place(&from, &to)?;
                dirs.insert(to.parent().unwrap_or(&self.shared.root).to_owned());
            }
        }
        for dir in &dirs {
            self.shared.flush.directory(dir).at("flush", dir)?;
        }
        for (digest, number) in &batch {
            if pending.get(digest) == Some(number) {
                pending.remove(digest);
            }
        }
        Ok(())
    }

    fn flush(&self, batch: &[(Digest, u64)]) -> Result<(), StoreError> {
        for (digest, _) in batch {
            let path = self.shared.pending_path(digest);
            match File::open(&path) {
                Ok(file) => self.shared.flush.file(&file, &path).at("flush", &path)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).at("open", path),
            }
        }
        Ok(())
    }

    /// Lists unfinished ingests.
    pub fn ingests(&self) -> Result<Vec<IngestStat>, StoreError> {
        let mut found: Vec<_> = list(&self.shared.root.join("ingest"))?
            .iter()
            .filter_map(|dir| ingest::stat(dir))
            .collect();
        found.sort_by(|a, b| a.ref_key.cmp(&b.ref_key));
        Ok(found)
    }

    /// Removes ingests to which nothing was written for `age` and which no writer holds; returns how many.
    pub fn sweep_ingests(&self, age: Duration) -> Result<usize, StoreError> {
        let now = SystemTime::now();
        let mut count = 0;
        for dir in list(&self.shared.root.join("ingest"))? {
            let writers = self.shared.writers();
            let stale = match ingest::stat(&dir) {
                Some(stat) => {
                    !writers.contains(&stat.ref_key)
                        && now.duration_since(stat.updated).unwrap_or_default() >= age
                }
                // Not one of ours, or created by a process that died in between.
                None => writers.is_empty(),
            };
            if stale {
                fs::remove_dir_all(&dir).at("remove", &dir)?;
                count += 1;
            }
        }
        Ok(count)
    }
}

/// Makes a directory that only its owner may enter, whatever the umask; closes one that others may.
fn private_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    if fs::metadata(dir)?.mode() & 0o077 == 0 {
        return Ok(());
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let entries = fs::read_dir(dir).at("list", dir)?;
    entries.map(|entry| Ok(entry.at("list", dir)?.path())).collect()
}

fn blob_stat(algorithm: &Path, path: &Path) -> Option<BlobStat> {
    let name = format!(
        "{}:{}",
        algorithm.file_name()?.to_str()?,
        path.file_name()?.to_str()?
    );
    let metadata = fs::symlink_metadata(path).ok()?;
    Some(BlobStat {
        digest: name.parse().ok()?,
        size_bytes: metadata.len(),
        created: metadata.modified().ok()?,
    })
}

//! The receiving side of a file transfer, on a thread of its own: merges the client's listing with what is kept, asks for
//! the content that is missing, writes it.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use build::error::{BuildError, ErrorKind};
use build::progress::StatusStep;
use build::session::{FilePacket, FileStat, SessionError};
use cache::{ImmutableRef, MutableRef};
use layer::checksum::{ChecksumError, ChecksumTree, FileHasher};
use layer::tree::GoStat;
use oci::Digest;
use oci::pattern::Matcher;
use tokio::sync::mpsc;

use super::attributes::{Attributes, Differ};
use super::listing::Listing;
use super::manifest::{self, Entry};
use super::order::{MODE_DIR, Order, compare, has_content, is_hard_link};
use super::tree::Tree;

/// Name of the manifest among a ref's metadata.
const MANIFEST: &str = "local.manifest";
/// Files whose content is on its way at once.
const MAX_OPEN: usize = 64;
/// How often progress is shown.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransferError {
    /// The client's listing is not a directory tree.
    #[error("invalid entry {path:?} from the client: {reason}")]
    Listing {
        /// The entry's path.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The client broke the protocol.
    #[error("file transfer: {0}")]
    Protocol(&'static str),
    /// The client could not go on.
    #[error("error from sender: {0}")]
    Sender(String),
    /// An entry could not be written here.
    #[error("{action} {path}")]
    Write {
        /// The entry's path.
        path: String,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// An entry's digest could not be computed.
    #[error(transparent)]
    Checksum(#[from] ChecksumError),
    /// The session failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] cache::StoreError),
    /// The client's connection ended before the transfer did.
    #[error("the client ended the file transfer early")]
    Ended,
}

impl From<TransferError> for BuildError {
    fn from(error: TransferError) -> Self {
        let kind = match &error {
            TransferError::Session(SessionError::NotFound { .. }) => ErrorKind::NotFound,
            TransferError::Session(_) | TransferError::Ended | TransferError::Write { .. } => {
                ErrorKind::Unavailable
            }
            TransferError::Store(_) => ErrorKind::Internal,
            _ => ErrorKind::User,
        };
        Self::from_source(kind, error)
    }
}

/// Both ends of one transfer.
#[derive(Debug)]
pub(super) struct Receiver {
    incoming: mpsc::Receiver<Result<FilePacket, SessionError>>,
    outgoing: mpsc::Sender<FilePacket>,
    attributes: Attributes,
    step: StatusStep,
}

impl Receiver {
    pub fn new(
        incoming: mpsc::Receiver<Result<FilePacket, SessionError>>,
        outgoing: mpsc::Sender<FilePacket>,
        attributes: Attributes,
        step: StatusStep,
    ) -> Self {
        Self {
            incoming,
            outgoing,
            attributes,
            step,
        }
    }

    /// Brings the tree of `reference` up to date and commits it. If this fails the tree has no manifest, so that the next
    /// transfer starts from nothing.
    pub fn run(mut self, reference: MutableRef, shared_key: &str) -> Result<ImmutableRef, BuildError> {
        let outcome = self.transfer(&reference);
        if let Err(error) = &outcome {
            // The client shows it; if it is gone already nobody is left to tell.
            let _ = self.outgoing.try_send(FilePacket::Failed(error.to_string()));
        }
        let kept = outcome?;
        reference.set_index(shared_key).map_err(TransferError::from)?;
        reference.retain();
        if let Some(entries) = &kept.manifest {
            reference
                .set_metadata(MANIFEST, Some(&manifest::encode(entries)))
                .map_err(TransferError::from)?;
        }
        let committed = reference.commit().map_err(TransferError::from)?;
        if let Some(mut checksums) = kept.checksums {
            committed
                .set_checksums(&checksums.encode())
                .map_err(TransferError::from)?;
        }
        Ok(committed)
    }

    fn transfer(&mut self, reference: &MutableRef) -> Result<Kept, TransferError> {
        let filter = self
            .attributes
            .content_filter()
            .map_err(|error| TransferError::Sender(error.to_string()))?;
        let mut work = Work::begin(reference, filter, self.attributes.differ)?;
        let mut progress = Progress {
            received: 0,
            shown: Instant::now(),
        };
        let mut fin_is_sent = false;
        loop {
            let packet = self.incoming.blocking_recv().ok_or(TransferError::Ended)??;
            progress.count(&packet, &mut self.step);
            match packet {
                FilePacket::Stat(Some(stat)) => work.entry(stat)?,
                FilePacket::Stat(None) => work.end_listing()?,
                FilePacket::Content { id, bytes } => work.content(id, &bytes)?,
                FilePacket::Failed(message) => return Err(TransferError::Sender(message)),
                FilePacket::Request(_) => return Err(TransferError::Protocol("the sender sent a request")),
                FilePacket::Fin if fin_is_sent => break,
                FilePacket::Fin => {
                    return Err(TransferError::Protocol("the sender ended before the receiver"));
                }
            }
            for id in work.start_requests()? {
                self.send(FilePacket::Request(id))?;
            }
            if work.is_complete() && !fin_is_sent {
                fin_is_sent = true;
                self.send(FilePacket::Fin)?;
            }
        }
        progress.show(&mut self.step);
        work.finish()
    }

    fn send(&self, packet: FilePacket) -> Result<(), TransferError> {
        self.outgoing
            .blocking_send(packet)
            .map_err(|_| TransferError::Ended)
    }
}

/// Shows how much was received, not too often.
struct Progress {
    received: u64,
    shown: Instant,
}

impl Progress {
    fn count(&mut self, packet: &FilePacket, step: &mut StatusStep) {
        // As many bytes as the packet has on the wire, roughly.
        let bytes = match packet {
            FilePacket::Stat(Some(stat)) => stat.path.len() + stat.linkname.len() + 24,
            FilePacket::Content { bytes, .. } => bytes.len() + 8,
            _ => 2,
        };
        self.received += u64::try_from(bytes).unwrap_or(0);
        if self.shown.elapsed() >= PROGRESS_INTERVAL {
            self.show(step);
        }
    }

    fn show(&mut self, step: &mut StatusStep) {
        self.shown = Instant::now();
        step.update(self.received, 0);
    }
}

/// What is stored with the tree after a transfer.
struct Kept {
    /// The new manifest; `None`: nothing changed, the old one stays.
    manifest: Option<Vec<Entry>>,
    /// Digests of the tree's entries, when all are known.
    checksums: Option<ChecksumTree>,
}

/// A file whose content is on its way.
struct OpenFile {
    stat: FileStat,
    file: File,
    hasher: FileHasher,
    received_bytes: u64,
}

/// One transfer in progress.
struct Work<'a> {
    reference: &'a MutableRef,
    tree: Tree,
    filter: Option<Matcher>,
    differ: Differ,
    began_ns: i64,
    order: Order,
    /// What is kept and was not met in the listing yet, last first.
    old: Vec<Entry>,
    /// What the listing has so far.
    new: Vec<Entry>,
    checksums: Option<ChecksumTree>,
    changed: bool,
    /// A path that is gone with all that was kept below it.
    gone: Option<String>,
    /// Files that got a new inode, so that hard links to them have to be made again.
    rewritten: HashSet<String>,
    /// Directories whose entries changed, by their index in `new`.
    touched: HashSet<String>,
    /// With `filter`: everything that was listed, and directories not made yet.
    listing: Option<Listing>,
    entries: u32,
    waiting: VecDeque<(u32, FileStat)>,
    open: BTreeMap<u32, OpenFile>,
    listing_ended: bool,
}

impl<'a> Work<'a> {
    fn begin(
        reference: &'a MutableRef,
        filter: Option<Matcher>,
        differ: Differ,
    ) -> Result<Self, TransferError> {
        let known = reference
            .metadata(MANIFEST)?
            .and_then(|bytes| manifest::decode(&bytes));
        let checksums = match &known {
            Some(_) => reference
                .take_checksums()
                .and_then(|bytes| ChecksumTree::decode(&bytes).ok()),
            None => Some(ChecksumTree::new()),
        };
        let root = open_root(reference)?;
        let tree = Tree::new(&root).map_err(|source| write_error("/", "open", source))?;
        let is_fresh = known.is_none();
        let mut old = known.unwrap_or_default();
        old.reverse();
        let mut work = Self {
            reference,
            tree,
            listing: filter.is_some().then(Listing::default),
            filter,
            differ,
            began_ns: now_ns(),
            order: Order::default(),
            old,
            new: Vec::new(),
            checksums,
            changed: false,
            gone: None,
            rewritten: HashSet::new(),
            touched: HashSet::new(),
            entries: 0,
            waiting: VecDeque::new(),
            open: BTreeMap::new(),
            listing_ended: false,
        };
        if is_fresh {
            work.begin_changes()?;
            work.tree.clear()?;
        }
        Ok(work)
    }

    /// Before the first change the manifest is removed, so that a tree that was left half-way is never trusted. After a
    /// crash the store itself forgets what it knew of a ref that was being written to.
    fn begin_changes(&mut self) -> Result<(), TransferError> {
        if !self.changed {
            self.changed = true;
            if self.reference.metadata(MANIFEST)?.is_some() {
                self.reference.set_metadata(MANIFEST, None)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, stat: FileStat) -> Result<(), TransferError> {
        if self.listing_ended {
            return Err(TransferError::Protocol(
                "an entry came after the end of the listing",
            ));
        }
        self.order.accept(&stat)?;
        let id = self.entries;
        self.entries += 1;
        let Some(filter) = &self.filter else {
            return self.keep(id, stat);
        };
        let wanted = filter.matches_or_parent(&stat.path).unwrap_or(false);
        let Some(listing) = &mut self.listing else {
            return Ok(());
        };
        for (id, stat) in listing.accept(id, stat, wanted) {
            self.keep(id, stat)?;
        }
        Ok(())
    }

    /// Brings one entry up to date.
    fn keep(&mut self, id: u32, stat: FileStat) -> Result<(), TransferError> {
        self.remove_before(&stat.path)?;
        let old = self.old.pop_if(|old| old.stat.path == stat.path);
        let old = old.filter(|old| !self.is_gone(&old.stat.path));
        let source_is_new = is_hard_link(&stat) && self.rewritten.contains(&stat.linkname);
        if let Some(old) = old
            .as_ref()
            .filter(|old| self.is_kept(old, &stat) && !source_is_new)
        {
            self.new.push(Entry {
                stat,
                is_racy: old.is_racy,
            });
            return Ok(());
        }
        self.begin_changes()?;
        self.touch_parent(&stat.path);
        let is_dir = stat.mode & MODE_DIR != 0;
        let was_dir = old.as_ref().is_some_and(|old| old.stat.mode & MODE_DIR != 0);
        if was_dir && !is_dir {
            self.gone = Some(stat.path.clone());
        }
        if is_dir {
            self.tree.directory(&stat, was_dir)?;
        } else if has_content(&stat) {
            drop(self.tree.create_file(&stat.path)?);
            self.rewritten.insert(stat.path.clone());
            self.waiting.push_back((id, stat.clone()));
            self.new.push(Entry::new(stat, self.began_ns));
            return Ok(());
        } else if !self.tree.special(&stat)? {
            return Ok(());
        }
        let digest = FileHasher::new(&go_stat(&stat))?.finish();
        self.record(&stat, digest)?;
        self.new.push(Entry::new(stat, self.began_ns));
        Ok(())
    }

    fn is_kept(&self, old: &Entry, stat: &FileStat) -> bool {
        match self.differ {
            Differ::Surely => old.is_current(stat),
            Differ::Attributes => old.has_attributes_of(stat),
            Differ::Always => old.is_current(stat) && !has_content(stat),
        }
    }

    fn is_gone(&self, path: &str) -> bool {
        self.gone.as_ref().is_some_and(|gone| {
            path.strip_prefix(gone.as_str())
                .is_some_and(|rest| rest.starts_with('/'))
        })
    }

    /// Removes what is kept but comes before `path` and so is not in the listing.
    fn remove_before(&mut self, path: &str) -> Result<(), TransferError> {
        while let Some(old) = self.old.pop_if(|old| compare(&old.stat.path, path).is_lt()) {
            self.remove(&old)?;
        }
        Ok(())
    }

    fn remove(&mut self, old: &Entry) -> Result<(), TransferError> {
        let path = &old.stat.path;
        if self.is_gone(path) {
            return Ok(());
        }
        self.begin_changes()?;
        self.touch_parent(path);
        self.tree.remove(path)?;
        if let Some(checksums) = &mut self.checksums {
            checksums.remove(path.as_bytes())?;
        }
        if old.stat.mode & MODE_DIR != 0 {
            self.gone = Some(path.clone());
        }
        Ok(())
    }

    fn touch_parent(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.touched.insert(parent.to_owned());
        }
    }

    fn end_listing(&mut self) -> Result<(), TransferError> {
        self.listing_ended = true;
        while let Some(old) = self.old.pop() {
            self.remove(&old)?;
        }
        Ok(())
    }

    /// Opens files whose content is asked for next.
    fn start_requests(&mut self) -> Result<Vec<u32>, TransferError> {
        let mut ids = Vec::new();
        while self.open.len() < MAX_OPEN {
            let Some((id, stat)) = self.waiting.pop_front() else {
                break;
            };
            let file = self.tree.open_file(&stat.path)?;
            let hasher = FileHasher::new(&go_stat(&stat))?;
            self.open.insert(
                id,
                OpenFile {
                    stat,
                    file,
                    hasher,
                    received_bytes: 0,
                },
            );
            ids.push(id);
        }
        Ok(ids)
    }

    fn content(&mut self, id: u32, bytes: &[u8]) -> Result<(), TransferError> {
        let unknown = TransferError::Protocol("content came that was not asked for");
        if !bytes.is_empty() {
            let open = self.open.get_mut(&id).ok_or(unknown)?;
            open.received_bytes += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            open.hasher.update(bytes);
            return open
                .file
                .write_all(bytes)
                .map_err(|source| write_error(&open.stat.path, "write", source));
        }
        let open = self.open.remove(&id).ok_or(unknown)?;
        self.tree.finish_file(&open.file, &open.stat)?;
        if i64::try_from(open.received_bytes) != Ok(open.stat.size_bytes) {
            // It changed between listing and reading; its attributes say nothing about the next edit.
            self.distrust(&open.stat.path);
        }
        self.record(&open.stat, open.hasher.finish())
    }

    fn distrust(&mut self, path: &str) {
        let found = self.new.binary_search_by(|entry| compare(&entry.stat.path, path));
        if let Some(entry) = found.ok().and_then(|at| self.new.get_mut(at)) {
            entry.is_racy = true;
        }
    }

    fn record(&mut self, stat: &FileStat, digest: Digest) -> Result<(), TransferError> {
        if let Some(checksums) = &mut self.checksums {
            checksums.upsert(stat.path.as_bytes(), &go_stat(stat), digest)?;
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.listing_ended && self.waiting.is_empty() && self.open.is_empty()
    }

    fn finish(mut self) -> Result<Kept, TransferError> {
        if let Some(listing) = self.listing.take() {
            self.write_listing(&listing)?;
        }
        if !self.changed {
            return Ok(Kept {
                manifest: None,
                checksums: self.checksums,
            });
        }
        for entry in self.new.iter().filter(|entry| entry.stat.mode & MODE_DIR != 0) {
            if self.touched.contains(&entry.stat.path) {
                self.tree.touch(&entry.stat)?;
            }
        }
        Ok(Kept {
            manifest: Some(self.new),
            checksums: self.checksums,
        })
    }

    /// The listing of a transfer of metadata alone is a file of the tree.
    fn write_listing(&mut self, listing: &Listing) -> Result<(), TransferError> {
        self.begin_changes()?;
        let stat = listing.stat();
        let mut file = self.tree.create_file(&stat.path)?;
        let mut hasher = FileHasher::new(&go_stat(&stat))?;
        hasher.update(listing.bytes());
        file.write_all(listing.bytes())
            .map_err(|source| write_error(&stat.path, "write", source))?;
        self.tree.finish_file(&file, &stat)?;
        self.record(&stat, hasher.finish())
    }
}

fn open_root(reference: &MutableRef) -> Result<snapshot::MountedTree, TransferError> {
    let mounts = reference.mounts(false)?;
    let mount = mounts
        .first()
        .ok_or(TransferError::Protocol("the tree has no mount"))?;
    mount
        .open()
        .map_err(|error| write_error("/", "mount", io::Error::other(error)))
}

fn write_error(path: &str, action: &'static str, source: io::Error) -> TransferError {
    TransferError::Write {
        path: path.to_owned(),
        action,
        source,
    }
}

fn go_stat(stat: &FileStat) -> GoStat {
    GoStat {
        path: stat.path.clone(),
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        size: stat.size_bytes,
        mod_time: stat.mod_time_ns,
        linkname: stat.linkname.clone(),
        devmajor: stat.dev_major,
        devminor: stat.dev_minor,
        xattrs: stat
            .xattrs
            .iter()
            .map(|(name, value)| (name.clone(), value.to_vec()))
            .collect(),
    }
}

fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

//! Reading the tree: which paths exist, and the digests of single files.

use std::ffi::{CStr, CString, OsStr};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::hash::{self, FileHasher, Header};
use super::listing::Attributes;
use super::lookup::MAX_LINKS;
use super::{
    ChecksumError, ChecksumTree, Hash, Kind, OpenRoot, Record, hash_of, key_path, lookup, lossy, path_key,
};
use crate::Stop;

/// Threads that read files at once.
const MAX_THREADS: usize = 8;
/// Fewer files than this are read by one thread.
const FILES_PER_THREAD: usize = 64;
/// Largest extended attribute, and list of names; the kernel's limits.
const XATTR_MAX: usize = 64 * 1024;

/// The tree's root directory, opened when first needed.
pub(super) struct Root<'o, 'a> {
    open: &'o mut OpenRoot<'a>,
    fd: Option<OwnedFd>,
    stop: Stop,
}

impl<'o, 'a> Root<'o, 'a> {
    pub fn new(open: &'o mut OpenRoot<'a>, stop: &Stop) -> Self {
        Self {
            open,
            fd: None,
            stop: stop.clone(),
        }
    }

    pub fn fd(&mut self) -> Result<BorrowedFd<'_>, ChecksumError> {
        if self.fd.is_none() {
            self.fd = Some((self.open)().map_err(|source| ChecksumError::Open { source })?);
        }
        Ok(self.fd.as_ref().expect("opened above").as_fd())
    }
}

pub(super) fn io_error(path: &[u8], source: impl Into<io::Error>) -> ChecksumError {
    ChecksumError::Io {
        path: Path::new(OsStr::from_bytes(path)).to_owned(),
        source: source.into(),
    }
}

/// Opens `path`, none of whose parts may be a link, below `root`.
fn open_plain(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let relative = path.strip_prefix(b"/").unwrap_or(path);
    let relative = if relative.is_empty() { b"." } else { relative };
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    loop {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(root, relative, flags, Mode::empty(), resolve) {
            // Something was renamed meanwhile.
            Err(Errno::AGAIN) => {}
            done => return done,
        }
    }
}

pub(super) fn open_dir(root: BorrowedFd<'_>, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    open_plain(root, path, OFlags::RDONLY | OFlags::DIRECTORY)
}

pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// What a path on disk is.
enum OnDisk {
    Dir,
    Link(Vec<u8>),
    Other,
}

fn look(root: BorrowedFd<'_>, path: &[u8]) -> Result<Option<OnDisk>, ChecksumError> {
    let (parent, name) = split(path);
    if name.is_empty() {
        return Ok(Some(OnDisk::Dir));
    }
    let absent = |error: &Errno| matches!(*error, Errno::NOENT | Errno::NOTDIR);
    let dir = match open_dir(root, parent) {
        Err(error) if absent(&error) => return Ok(None),
        done => done.map_err(|error| io_error(path, error))?,
    };
    let stat = match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(error) if absent(&error) => return Ok(None),
        done => done.map_err(|error| io_error(path, error))?,
    };
    Ok(Some(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => OnDisk::Dir,
        FileType::Symlink => {
            OnDisk::Link(read_link(dir.as_fd(), name).map_err(|error| io_error(path, error))?)
        }
        _ => OnDisk::Other,
    }))
}

pub(super) fn read_link(dir: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<Vec<u8>> {
    rustix::fs::readlinkat(dir, name, Vec::new()).map(CString::into_bytes)
}

impl ChecksumTree {
    /// Makes sure that there is a record for `path` if it exists, and for all below it if it is a directory.
    pub(super) fn scan(
        &mut self,
        root: &mut Root<'_, '_>,
        path: &[u8],
        follow: bool,
    ) -> Result<(), ChecksumError> {
        let found = self.find(&path_key(path), follow)?;
        if found.exists || found.known {
            return Ok(());
        }
        let fd = root.fd()?;
        let mut records = Vec::new();
        let Some((resolved, on_disk)) = resolve(fd, path, follow, &mut records)? else {
            self.add(records);
            return Ok(());
        };
        let key = path_key(&resolved);
        match on_disk {
            OnDisk::Other => records.push((key, Record::new(Kind::File))),
            OnDisk::Link(text) => records.push((key, link_record(&text))),
            OnDisk::Dir => {
                walk(fd, &resolved, &mut records)?;
                let below = [&key[..], &[0]].concat();
                self.complete.retain(|other| !other.starts_with(&below));
                self.complete.insert(key);
            }
        }
        self.add(records);
        Ok(())
    }

    fn add(&mut self, records: Vec<(Vec<u8>, Record)>) {
        self.dirty |= !records.is_empty();
        for (key, record) in records {
            self.records.entry(key).or_insert(record);
        }
    }

    /// Computes the digests that `keys` lack. None of them is a directory.
    pub(super) fn read_files(
        &mut self,
        root: &mut Root<'_, '_>,
        keys: &[Vec<u8>],
    ) -> Result<(), ChecksumError> {
        let lacking = |key: &&Vec<u8>| {
            self.records
                .get(&key[..])
                .is_some_and(|record| record.hash.is_none())
        };
        let keys: Vec<&Vec<u8>> = keys.iter().filter(lacking).collect();
        if keys.is_empty() {
            return Ok(());
        }
        let stop = root.stop.clone();
        let (fd, stop) = (root.fd()?, &stop);
        let cores = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(MAX_THREADS);
        let threads = keys.len().div_ceil(FILES_PER_THREAD).clamp(1, cores);
        let share = keys.len().div_ceil(threads);
        let hashes = std::thread::scope(|scope| {
            let running: Vec<_> = keys
                .chunks(share)
                .map(|keys| scope.spawn(move || read_share(fd, keys, stop)))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Vec<Hash>, ChecksumError>>| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            running.into_iter().map(join).collect::<Result<Vec<_>, _>>()
        })?;
        let found: Vec<(Vec<u8>, Hash)> = keys
            .into_iter()
            .cloned()
            .zip(hashes.into_iter().flatten())
            .collect();
        for (key, hash) in found {
            if let Some(record) = self.records.get_mut(&key) {
                record.hash = Some(hash);
            }
        }
        self.dirty = true;
        Ok(())
    }
}

fn link_record(text: &[u8]) -> Record {
    Record {
        link: Some(text.into()),
        ..Record::new(Kind::Symlink)
    }
}

/// Resolves links on disk; pushes a record for each one passed. Nothing if the path does not exist.
fn resolve(
    root: BorrowedFd<'_>,
    path: &[u8],
    follow: bool,
    records: &mut Vec<(Vec<u8>, Record)>,
) -> Result<Option<(Vec<u8>, OnDisk)>, ChecksumError> {
    let (mut rest, mut current, mut links) = (path.to_vec(), Vec::new(), 0);
    let mut on_disk = Some(OnDisk::Dir);
    while !rest.is_empty() {
        if rest.last() == Some(&b'/') {
            rest.pop();
        }
        let at = rest.iter().position(|byte| *byte == b'/');
        let part: Vec<u8> = rest
            .drain(..at.map_or(rest.len(), |at| at + 1))
            .filter(|byte| *byte != b'/')
            .collect();
        let next = lookup::absolute(&[&current[..], b"/", &part].concat());
        on_disk = look(root, &next)?;
        match &on_disk {
            Some(OnDisk::Link(text)) if follow || !rest.is_empty() => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(ChecksumError::TooManyLinks { path: lossy(path) });
                }
                records.push((path_key(&next), link_record(text)));
                if text.first() == Some(&b'/') {
                    current.clear();
                }
                rest = [text, &b"/"[..], &rest].concat();
            }
            _ => current = next,
        }
    }
    Ok(on_disk.map(|on_disk| (current, on_disk)))
}

/// Pushes records for the directory `top` and everything below it.
fn walk(root: BorrowedFd<'_>, top: &[u8], records: &mut Vec<(Vec<u8>, Record)>) -> Result<(), ChecksumError> {
    let mut pending = vec![top.to_vec()];
    while let Some(path) = pending.pop() {
        let key = path_key(&path);
        records.push(([&key[..], &[0]].concat(), Record::new(Kind::DirHeader)));
        records.push((key, Record::new(Kind::Dir)));
        let fail = |error: Errno| io_error(&path, error);
        let dir = open_dir(root, &path).map_err(fail)?;
        for entry in Dir::read_from(&dir).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let child = [&path[..], b"/", name].concat();
            match file_type(dir.as_fd(), entry.file_name(), entry.file_type()).map_err(fail)? {
                FileType::Directory => pending.push(child),
                FileType::Symlink => {
                    let text = read_link(dir.as_fd(), name).map_err(fail)?;
                    records.push((path_key(&child), link_record(&text)));
                }
                _ => records.push((path_key(&child), Record::new(Kind::File))),
            }
        }
    }
    Ok(())
}

fn file_type(dir: BorrowedFd<'_>, name: &CStr, listed: FileType) -> rustix::io::Result<FileType> {
    if listed != FileType::Unknown {
        return Ok(listed);
    }
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}

/// Reads files one after the other; neighbours share the open directory.
fn read_share(root: BorrowedFd<'_>, keys: &[&Vec<u8>], stop: &Stop) -> Result<Vec<Hash>, ChecksumError> {
    let mut buffer = vec![0; 256 * 1024];
    let mut dir: Option<(Vec<u8>, OwnedFd)> = None;
    let mut hashes = Vec::with_capacity(keys.len());
    for key in keys {
        if stop.is_stopped() {
            return Err(ChecksumError::Stopped);
        }
        let path = key_path(key);
        let hash = if path.last() == Some(&b'/') {
            let fd = open_dir(root, &path[..path.len() - 1]).map_err(|error| io_error(&path, error))?;
            read_dir_header(&fd, &path)?
        } else {
            let (parent, name) = split(&path);
            if dir.as_ref().is_none_or(|(open, _)| open != parent) {
                dir = Some((
                    parent.to_vec(),
                    open_dir(root, parent).map_err(|error| io_error(&path, error))?,
                ));
            }
            let fd = &dir.as_ref().expect("set above").1;
            read_file(fd.as_fd(), name, &path, &mut buffer, stop)?
        };
        hashes.push(hash);
    }
    Ok(hashes)
}

fn read_dir_header(fd: &OwnedFd, path: &[u8]) -> Result<Hash, ChecksumError> {
    let fail = |error: Errno| io_error(path, error);
    let stat = rustix::fs::fstat(fd).map_err(fail)?;
    let xattrs = xattrs(
        |buffer| rustix::fs::flistxattr(fd, buffer),
        |name, buffer| rustix::fs::fgetxattr(fd, name, buffer),
    );
    let xattrs = xattrs.map_err(fail)?;
    Ok(hash_of(&start(&stat, b"", &xattrs, path)?.finish()))
}

fn read_file(
    dir: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
    buffer: &mut [u8],
    stop: &Stop,
) -> Result<Hash, ChecksumError> {
    let fail = |error: Errno| io_error(path, error);
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind == FileType::RegularFile {
        // Should it have been swapped for a pipe, opening must not block.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(fail)?;
        return read_regular(fd, path, buffer, stop);
    }
    let link = if kind == FileType::Symlink {
        read_link(dir, name).map_err(fail)?
    } else {
        Vec::new()
    };
    // Neither links nor devices can be opened just to look at them; the last part of the path is not followed.
    let at = [format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(), name].concat();
    let xattrs = xattrs(
        |buffer| rustix::fs::llistxattr(&at[..], buffer),
        |name, buffer| rustix::fs::lgetxattr(&at[..], name, buffer),
    );
    Ok(hash_of(
        &start(&stat, &link, &xattrs.map_err(fail)?, path)?.finish(),
    ))
}

fn read_regular(fd: OwnedFd, path: &[u8], buffer: &mut [u8], stop: &Stop) -> Result<Hash, ChecksumError> {
    let fail = |error: Errno| io_error(path, error);
    let stat = rustix::fs::fstat(&fd).map_err(fail)?;
    let xattrs = xattrs(
        |buffer| rustix::fs::flistxattr(&fd, buffer),
        |name, buffer| rustix::fs::fgetxattr(&fd, name, buffer),
    );
    let hasher = start(&stat, b"", &xattrs.map_err(fail)?, path)?;
    read_content(fd, &stat, hasher, path, buffer, stop)
}

/// Reads a regular file as if it had these attributes.
pub(super) fn read_regular_as(
    root: &mut Root<'_, '_>,
    path: &[u8],
    attributes: Attributes,
) -> Result<Hash, ChecksumError> {
    let fail = |error: Errno| io_error(path, error);
    let stop = root.stop.clone();
    let fd = open_plain(root.fd()?, path, OFlags::RDONLY | OFlags::NONBLOCK).map_err(fail)?;
    let mut stat = rustix::fs::fstat(&fd).map_err(fail)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(fail(Errno::INVAL));
    }
    stat.st_mode = (stat.st_mode & !0o7777) | attributes.mode;
    (stat.st_uid, stat.st_gid) = (attributes.uid, attributes.gid);
    let xattrs = xattrs(
        |buffer| rustix::fs::flistxattr(&fd, buffer),
        |name, buffer| rustix::fs::fgetxattr(&fd, name, buffer),
    );
    let hasher = start(&stat, b"", &xattrs.map_err(fail)?, path)?;
    read_content(fd, &stat, hasher, path, &mut vec![0; 256 * 1024], &stop)
}

fn read_content(
    fd: OwnedFd,
    stat: &rustix::fs::Stat,
    mut hasher: FileHasher,
    path: &[u8],
    buffer: &mut [u8],
    stop: &Stop,
) -> Result<Hash, ChecksumError> {
    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size > 0 {
        let mut file = std::fs::File::from(fd);
        loop {
            if stop.is_stopped() {
                return Err(ChecksumError::Stopped);
            }
            match file.read(buffer) {
                Ok(0) => break,
                Ok(count) => hasher.update(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io_error(path, error)),
            }
        }
    }
    Ok(hash_of(&hasher.finish()))
}

pub(super) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

fn start(
    stat: &rustix::fs::Stat,
    link: &[u8],
    xattrs: &Xattrs,
    path: &[u8],
) -> Result<FileHasher, ChecksumError> {
    let mode = hash::go_mode(stat.st_mode);
    let (uid, gid, size) = (stat.st_uid, stat.st_gid, stat.st_size);
    let header = Header {
        mode,
        uid,
        gid,
        size,
        link,
        device: (0, 0),
    };
    header
        .digest(xattrs.iter().map(|(name, value)| (&name[..], &value[..])))
        .map(FileHasher::from_digester)
        .ok_or_else(|| ChecksumError::UnknownMode {
            path: lossy(path),
            mode,
        })
}

/// Reads extended attributes; none where the file system has none, and without those that cannot be read.
pub(super) fn xattrs(
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    get: impl Fn(&[u8], &mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<Xattrs> {
    // Nearly all files have none or few: the first try fits.
    let mut names = vec![0; 1024];
    let length = match list(&mut names) {
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(Errno::RANGE) => {
            names.resize(XATTR_MAX, 0);
            list(&mut names)?
        }
        done => done?,
    };
    if length == 0 {
        return Ok(Vec::new());
    }
    let mut value = vec![0; XATTR_MAX];
    let mut found = Vec::new();
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        if let Ok(length) = get(name, &mut value) {
            found.push((name.to_vec(), value[..length].to_vec()));
        }
    }
    Ok(found)
}

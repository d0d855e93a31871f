//! Writing entries below a directory handle.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, RenameFlags, ResolveFlags, Timespec, Timestamps,
    UTIME_OMIT, XattrFlags,
};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};

use super::ReceiveOptions;
use crate::fsutil::{Message, OrderError, Stat, TransferError, Validator, mode};

/// Contents asked for at the same time. A sender queues 128 requests before it stops reading.
const REQUESTS: usize = 64;

/// State of one transfer on the receiving side.
pub(super) struct Writer {
    root: OwnedFd,
    options: ReceiveOptions,
    order: Validator,
    next: u32,
    listed: bool,
    /// Regular files seen: what hard links may point to.
    files: BTreeSet<String>,
    /// Everything seen, when the rest is to be removed.
    kept: BTreeSet<String>,
    /// Contents still to be asked for.
    waiting: VecDeque<(u32, Stat, String)>,
    /// Contents asked for.
    open: BTreeMap<u32, (File, Stat, String)>,
    /// Directories, whose times are set when nothing changes in them any more.
    dirs: Vec<(String, Stat)>,
}

fn fail(action: &'static str, path: &str) -> impl FnOnce(Errno) -> TransferError {
    let path = path.to_owned();
    move |err| TransferError::Write {
        action,
        path,
        source: err.into(),
    }
}

impl Writer {
    pub fn open(dest: &Path, options: ReceiveOptions) -> Result<Self, TransferError> {
        let path = dest.to_string_lossy().into_owned();
        let made = std::fs::DirBuilder::new().recursive(true).create(dest);
        made.map_err(|source| TransferError::Write {
            action: "create",
            path: path.clone(),
            source,
        })?;
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, dest, flags, Mode::empty()).map_err(fail("open", &path))?;
        Ok(Self {
            root,
            options,
            order: Validator::default(),
            next: 0,
            listed: false,
            files: BTreeSet::new(),
            kept: BTreeSet::new(),
            waiting: VecDeque::new(),
            open: BTreeMap::new(),
            dirs: Vec::new(),
        })
    }

    /// Handles a packet; returns the contents to ask for.
    pub fn handle(&mut self, message: Message) -> Result<Vec<u32>, TransferError> {
        match message {
            Message::Stat(Some(_)) if self.listed => {
                return Err(TransferError::Protocol("entry behind the last"));
            }
            Message::Stat(Some(stat)) => self.entry(stat)?,
            Message::Stat(None) => self.listed = true,
            Message::Data { id, bytes } if bytes.is_empty() => {
                let (file, stat, path) = self.open.remove(&id).ok_or(TransferError::InvalidFile(id))?;
                drop(file);
                self.set_metadata(&path, &stat)?;
            }
            Message::Data { id, bytes } => {
                let (file, _, path) = self.open.get_mut(&id).ok_or(TransferError::InvalidFile(id))?;
                let path = path.clone();
                file.write_all(&bytes).map_err(|source| TransferError::Write {
                    action: "write",
                    path,
                    source,
                })?;
            }
            Message::Request(_) | Message::Fin | Message::Failed(_) => {
                return Err(TransferError::Protocol("from a sender"));
            }
        }
        self.ask()
    }

    fn ask(&mut self) -> Result<Vec<u32>, TransferError> {
        let mut out = Vec::new();
        while self.open.len() < REQUESTS
            && let Some((id, stat, path)) = self.waiting.pop_front()
        {
            let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW;
            let file = self.open_beneath(&path, flags).map_err(fail("open", &path))?;
            self.open.insert(id, (File::from(file), stat, path));
            out.push(id);
        }
        Ok(out)
    }

    pub fn is_done(&self) -> bool {
        self.listed && self.waiting.is_empty() && self.open.is_empty()
    }

    /// Removes what is not to be kept, and sets the times of directories, innermost first.
    pub fn finish(&mut self) -> Result<(), TransferError> {
        if self.options.delete {
            self.prune("")?;
        }
        for (path, stat) in std::mem::take(&mut self.dirs).iter().rev() {
            self.set_metadata(path, stat)?;
        }
        Ok(())
    }

    fn open_beneath(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let path = if path.is_empty() { "." } else { path };
        loop {
            let opened =
                rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve);
            if !matches!(opened, Err(Errno::AGAIN | Errno::INTR)) {
                return opened;
            }
        }
    }

    /// Opens the directory of an entry; returns it with the entry's name.
    fn parent<'p>(&self, path: &'p str) -> Result<(OwnedFd, &'p str), TransferError> {
        let (dir, base) = path.rsplit_once('/').unwrap_or(("", path));
        let dir = self
            .open_beneath(dir, OFlags::PATH | OFlags::DIRECTORY)
            .map_err(fail("open directory of", path))?;
        Ok((dir, base))
    }

    fn entry(&mut self, stat: Stat) -> Result<(), TransferError> {
        let text = |bytes: &[u8]| match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(OrderError::NotText(String::from_utf8_lossy(bytes).into_owned())),
        };
        let path = text(&stat.path)?;
        self.order.check(&path, stat.is_dir())?;
        let id = self.next;
        self.next = id
            .checked_add(1)
            .ok_or(TransferError::Protocol("too many entries"))?;
        let link = text(&stat.linkname)?;
        let is_link = !link.is_empty() && !stat.is_dir() && !stat.is_symlink();
        if is_link && !self.files.contains(&link) {
            return Err(OrderError::Link { path, target: link }.into());
        }
        if self.options.delete {
            self.kept.insert(path.clone());
        }
        if stat.is_dir() {
            self.make_dir(&path, &stat)?;
            self.dirs.push((path, stat));
            return Ok(());
        }
        if !is_link {
            self.files.insert(path.clone());
        }
        let is_file = stat.is_file() && !is_link;
        self.replace(&path, |dir, name| {
            if stat.is_symlink() {
                rustix::fs::symlinkat(link.as_str(), dir, name)
            } else if is_link {
                rustix::fs::linkat(&self.root, link.as_str(), dir, name, AtFlags::empty())
            } else if is_file {
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map(drop)
            } else {
                make_special(dir, name, &stat)
            }
        })?;
        if is_file {
            self.waiting.push_back((id, stat, path));
            return Ok(());
        }
        if is_link {
            Ok(())
        } else {
            self.set_metadata(&path, &stat)
        }
    }

    fn make_dir(&self, path: &str, stat: &Stat) -> Result<(), TransferError> {
        let (dir, base) = self.parent(path)?;
        match rustix::fs::mkdirat(&dir, base, Mode::RWXU) {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => {}
            Err(err) => return Err(fail("create directory", path)(err)),
        }
        let have = rustix::fs::statat(&dir, base, AtFlags::SYMLINK_NOFOLLOW).map_err(fail("stat", path))?;
        if FileType::from_raw_mode(have.st_mode) == FileType::Directory {
            let writable = Mode::from_raw_mode(mode::to_unix_permissions(stat.mode) | 0o700);
            return rustix::fs::chmodat(&dir, base, writable, AtFlags::empty())
                .map_err(fail("change mode of", path));
        }
        rustix::fs::unlinkat(&dir, base, AtFlags::empty()).map_err(fail("remove", path))?;
        rustix::fs::mkdirat(&dir, base, Mode::RWXU).map_err(fail("create directory", path))
    }

    /// Makes an entry under a name of its own where the name is taken, and moves it over.
    fn replace(
        &self,
        path: &str,
        make: impl Fn(&OwnedFd, &str) -> rustix::io::Result<()>,
    ) -> Result<(), TransferError> {
        let (dir, base) = self.parent(path)?;
        match make(&dir, base) {
            Err(Errno::EXIST) => {}
            made => return made.map_err(fail("create", path)),
        }
        let have = rustix::fs::statat(&dir, base, AtFlags::SYMLINK_NOFOLLOW).map_err(fail("stat", path))?;
        if FileType::from_raw_mode(have.st_mode) == FileType::Directory {
            self.remove_tree(path)?;
            return make(&dir, base).map_err(fail("create", path));
        }
        for attempt in 0..1000 {
            let temporary = format!(".tmp.{}.{attempt}", std::process::id());
            match make(&dir, &temporary) {
                Err(Errno::EXIST) => {}
                Err(err) => return Err(fail("create", path)(err)),
                Ok(()) => {
                    let renamed =
                        rustix::fs::renameat_with(&dir, &temporary, &dir, base, RenameFlags::empty());
                    // Two names of the same file: the rename does nothing and leaves the temporary one.
                    let _ = rustix::fs::unlinkat(&dir, &temporary, AtFlags::empty());
                    return renamed.map_err(fail("rename", path));
                }
            }
        }
        Err(fail("create", path)(Errno::EXIST))
    }

    fn list(&self, path: &str) -> Result<Vec<(Vec<u8>, bool)>, TransferError> {
        let dir = self
            .open_beneath(path, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(fail("open", path))?;
        let mut buffer = Vec::with_capacity(32 << 10);
        let mut entries = RawDir::new(&dir, buffer.spare_capacity_mut());
        let mut out = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(fail("read directory", path))?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    let stat = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)
                        .map_err(fail("stat", path))?;
                    FileType::from_raw_mode(stat.st_mode)
                }
                kind => kind,
            };
            out.push((name.to_vec(), kind == FileType::Directory));
        }
        Ok(out)
    }

    /// Removes everything below a directory that was not sent.
    fn prune(&self, top: &str) -> Result<(), TransferError> {
        let mut pending = vec![top.to_owned()];
        while let Some(dir) = pending.pop() {
            for (name, is_dir) in self.list(&dir)? {
                let path = std::str::from_utf8(&name).ok().map(|name| join(&dir, name));
                match path.filter(|path| self.kept.contains(path)) {
                    Some(path) if is_dir => pending.push(path),
                    Some(_) => {}
                    None => self.remove_in(&dir, &name, is_dir)?,
                }
            }
        }
        Ok(())
    }

    fn remove_tree(&self, path: &str) -> Result<(), TransferError> {
        let (dir, base) = path.rsplit_once('/').unwrap_or(("", path));
        self.remove_in(dir, base.as_bytes(), true)
    }

    /// Removes an entry of a directory with everything below it, by handles: names need not be UTF-8.
    fn remove_in(&self, dir: &str, name: &[u8], is_dir: bool) -> Result<(), TransferError> {
        let parent = self
            .open_beneath(dir, OFlags::PATH | OFlags::DIRECTORY)
            .map_err(fail("open", dir))?;
        let shown = join(dir, &String::from_utf8_lossy(name));
        if !is_dir {
            return rustix::fs::unlinkat(&parent, name, AtFlags::empty()).map_err(fail("remove", &shown));
        }
        let path = format!("/proc/self/fd/{}", parent.as_raw_fd());
        let path = Path::new(&path).join(std::ffi::OsStr::from_bytes(name));
        std::fs::remove_dir_all(path).map_err(|source| TransferError::Write {
            action: "remove",
            path: shown,
            source,
        })
    }

    /// Sets attributes, mode and times.
    fn set_metadata(&self, path: &str, stat: &Stat) -> Result<(), TransferError> {
        let (dir, base) = self.parent(path)?;
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let owned = rustix::fs::chownat(&dir, base, Some(geteuid()), Some(getegid()), flags);
        owned.map_err(fail("change owner of", path))?;
        if !stat.is_symlink() {
            let bits = Mode::from_raw_mode(mode::to_unix_permissions(stat.mode));
            rustix::fs::chmodat(&dir, base, bits, AtFlags::empty()).map_err(fail("change mode of", path))?;
            let handle = self
                .open_beneath(path, OFlags::PATH | OFlags::NOFOLLOW)
                .map_err(fail("open", path))?;
            let handle = format!("/proc/self/fd/{}", handle.as_raw_fd());
            for (name, value) in &stat.xattrs {
                // File systems differ in what they store; the content matters more.
                let _ = rustix::fs::setxattr(&handle, name.as_str(), value, XattrFlags::empty());
            }
        }
        let time = Timespec {
            tv_sec: stat.mod_time.div_euclid(1_000_000_000),
            tv_nsec: stat.mod_time.rem_euclid(1_000_000_000),
        };
        let access = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        };
        let times = Timestamps {
            last_access: access,
            last_modification: time,
        };
        rustix::fs::utimensat(&dir, base, &times, flags).map_err(fail("set times of", path))
    }
}

fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() {
        name.to_owned()
    } else {
        format!("{dir}/{name}")
    }
}

fn make_special(dir: &OwnedFd, name: &str, stat: &Stat) -> rustix::io::Result<()> {
    let kind = if stat.mode & mode::CHAR_DEVICE != 0 {
        FileType::CharacterDevice
    } else if stat.mode & mode::DEVICE != 0 {
        FileType::BlockDevice
    } else if stat.mode & mode::NAMED_PIPE != 0 {
        FileType::Fifo
    } else {
        return Err(Errno::INVAL);
    };
    let number = |number: i64| u32::try_from(number).map_err(|_| Errno::INVAL);
    let device = rustix::fs::makedev(number(stat.devmajor)?, number(stat.devminor)?);
    rustix::fs::mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, device)
}

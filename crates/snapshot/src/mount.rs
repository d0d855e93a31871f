//! Describing mounts and making them.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use layer::tree::at::proc_path;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use crate::error::MountError;

/// Longest option value the new mount API takes, in bytes.
const OPTION_MAX: usize = 255;
/// Most lower directories of an overlay: `OVL_MAX_STACK` of the kernel.
const MAX_LAYERS: usize = 500;

/// A mount as plain data, in containerd's terms.
///
/// Types: `bind` and `overlay`. For `overlay`, options are `lowerdir+=<dir>` once for each lower directory, nearest first
/// (a directory's name may hold any character), then `upperdir=`, `workdir=` if writable, and what else overlayfs takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The file system's type.
    pub fstype: String,
    /// What is mounted; `overlay` for overlays.
    pub source: PathBuf,
    /// Where below the mount point this goes; empty for the mount point itself.
    pub target: PathBuf,
    /// Options; of the general ones `ro`, `rw`, `bind`, `rbind`, `nodev`, `nosuid`, `noexec` are understood.
    pub options: Vec<OsString>,
}

/// A mount that ends when this is dropped (lazily, so also with open files).
#[derive(Debug)]
pub struct MountGuard {
    path: PathBuf,
    armed: bool,
}

/// A tree that is mounted nowhere: reachable through its descriptor alone, gone when dropped. Nothing to clean up
/// after a crash, nothing for others to see. Devices in it cannot be opened.
#[derive(Debug)]
pub struct MountedTree {
    fd: OwnedFd,
    read_only: bool,
}

impl Mount {
    /// Describes a bind mount of `source` with everything mounted below it.
    pub fn bind(source: impl Into<PathBuf>, read_only: bool) -> Self {
        let mode = if read_only { "ro" } else { "rw" };
        let options = vec!["rbind".into(), mode.into()];
        Self {
            fstype: "bind".into(),
            source: source.into(),
            target: PathBuf::new(),
            options,
        }
    }

    /// Describes an overlay; `lower` nearest first; `upper` is the upper and the work directory, without which the overlay
    /// is read-only and needs two lower directories.
    pub fn overlay<'a>(
        lower: impl IntoIterator<Item = &'a Path>,
        upper: Option<(&Path, &Path)>,
        options: &[String],
    ) -> Self {
        let option = |key: &str, path: &Path| {
            let mut option = OsString::from(key);
            option.push(path);
            option
        };
        let mut all: Vec<OsString> = lower.into_iter().map(|dir| option("lowerdir+=", dir)).collect();
        match upper {
            Some((upper, work)) => all.extend([option("upperdir=", upper), option("workdir=", work)]),
            None => all.push("ro".into()),
        }
        all.extend(options.iter().map(Into::into));
        Self {
            fstype: "overlay".into(),
            source: "overlay".into(),
            target: PathBuf::new(),
            options: all,
        }
    }

    /// Reports whether nothing can be written through this mount.
    pub fn is_read_only(&self) -> bool {
        self.options.iter().any(|option| option == "ro")
    }

    /// Returns an overlay's lower directories, nearest first.
    pub fn lower_dirs(&self) -> Vec<&Path> {
        self.values("lowerdir+=").collect()
    }

    /// Returns an overlay's upper directory.
    pub fn upper_dir(&self) -> Option<&Path> {
        self.values("upperdir=").next()
    }

    fn values<'a>(&'a self, key: &'static str) -> impl Iterator<Item = &'a Path> {
        let strip = |option: &'a OsString| option.as_bytes().strip_prefix(key.as_bytes());
        self.options
            .iter()
            .filter_map(strip)
            .map(|value| Path::new(OsStr::from_bytes(value)))
    }

    fn is_bind(&self) -> bool {
        matches!(self.fstype.as_str(), "bind" | "rbind")
    }

    fn failed(&self, action: &str, path: &Path) -> impl FnOnce(io::Error) -> MountError {
        let (action, path) = (format!("{action} {}", self.fstype), path.to_owned());
        let layers = self.lower_dirs().len();
        move |source| MountError {
            action,
            path,
            source: too_many_layers(layers, &source).unwrap_or(source),
        }
    }

    fn attributes(&self) -> MountAttrFlags {
        let mut flags = MountAttrFlags::empty();
        for option in &self.options {
            match option.as_bytes() {
                b"ro" => flags |= MountAttrFlags::MOUNT_ATTR_RDONLY,
                b"nodev" => flags |= MountAttrFlags::MOUNT_ATTR_NODEV,
                b"nosuid" => flags |= MountAttrFlags::MOUNT_ATTR_NOSUID,
                b"noexec" => flags |= MountAttrFlags::MOUNT_ATTR_NOEXEC,
                _ => {}
            }
        }
        flags
    }

    /// Mounts at `path` (joined with `target`), which must exist, in this thread's mount namespace. The mount lasts as
    /// long as the guard.
    pub fn mount_at(&self, path: &Path) -> Result<MountGuard, MountError> {
        let point = if self.target.as_os_str().is_empty() {
            path.to_owned()
        } else {
            path.join(&self.target)
        };
        let mount = || -> io::Result<()> {
            if self.is_bind() {
                return bind(&self.source, &point, self.is_read_only());
            }
            match self.detached(self.attributes()) {
                Ok(fd) => Ok(rustix::mount::move_mount(
                    fd,
                    c"",
                    CWD,
                    &point,
                    MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
                )?),
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.mount_classic(&point),
                Err(error) => Err(error.into()),
            }
        };
        mount().map_err(self.failed("mount", &point))?;
        Ok(MountGuard {
            path: point,
            armed: true,
        })
    }

    /// Mounts without a mount point and returns the tree. For a bind mount this is just the opened directory; honouring
    /// `ro` is then left to the caller, who asks [`MountedTree::is_read_only`].
    pub fn open(&self) -> Result<MountedTree, MountError> {
        let open = || -> io::Result<OwnedFd> {
            if self.is_bind() {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                return Ok(rustix::fs::open(&self.source, flags, Mode::empty())?);
            }
            let hardened = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
            match self.detached(self.attributes() | hardened) {
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.detached_classic(),
                done => Ok(done?),
            }
        };
        let fd = open().map_err(self.failed("open", &self.source))?;
        Ok(MountedTree {
            fd,
            read_only: self.is_read_only(),
        })
    }

    /// Makes the mount with the new API, attached nowhere.
    fn detached(&self, attributes: MountAttrFlags) -> Result<OwnedFd, Errno> {
        let context = rustix::mount::fsopen(self.fstype.as_str(), FsOpenFlags::FSOPEN_CLOEXEC)?;
        let fd = context.as_fd();
        rustix::mount::fsconfig_set_string(fd, "source", &self.source)?;
        // Long paths go as descriptors, which must stay open until the mount is made.
        let mut held = Vec::new();
        for option in self.options.iter().filter(|option| !is_general(option)) {
            let bytes = option.as_bytes();
            let Some(equals) = bytes.iter().position(|byte| *byte == b'=') else {
                rustix::mount::fsconfig_set_flag(fd, bytes)?;
                continue;
            };
            let (key, value) = (&bytes[..equals], &bytes[equals + 1..]);
            if value.len() < OPTION_MAX {
                rustix::mount::fsconfig_set_string(fd, key, value)?;
            } else {
                let dir = rustix::fs::open(value, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
                rustix::mount::fsconfig_set_string(fd, key, proc_path(&dir))?;
                held.push(dir);
            }
        }
        rustix::mount::fsconfig_create(fd)?;
        drop(held);
        rustix::mount::fsmount(fd, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    }

    /// Makes an overlay with `mount(2)`, for kernels whose new API lacks `lowerdir+` (before 6.8).
    fn mount_classic(&self, point: &Path) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        // Descriptors as paths: short, so that many fit into the page `mount` takes, and free of colons.
        let mut held = Vec::new();
        let mut data = b"lowerdir=".to_vec();
        for dir in self.lower_dirs() {
            let dir = rustix::fs::open(dir, flags, Mode::empty())?;
            if !held.is_empty() {
                data.push(b':');
            }
            data.extend_from_slice(proc_path(&dir).as_os_str().as_bytes());
            held.push(dir);
        }
        for option in self.options.iter().filter(|option| !is_general(option)) {
            if option.as_bytes().starts_with(b"lowerdir+=") {
                continue;
            }
            data.push(b',');
            data.extend_from_slice(option.as_bytes());
        }
        if data.len() >= 4096 {
            return Err(Errno::TOOBIG.into());
        }
        let data = std::ffi::CString::new(data)?;
        let mut flags = MountFlags::empty();
        let attributes = self.attributes();
        for (attribute, flag) in [
            (MountAttrFlags::MOUNT_ATTR_RDONLY, MountFlags::RDONLY),
            (MountAttrFlags::MOUNT_ATTR_NODEV, MountFlags::NODEV),
            (MountAttrFlags::MOUNT_ATTR_NOSUID, MountFlags::NOSUID),
            (MountAttrFlags::MOUNT_ATTR_NOEXEC, MountFlags::NOEXEC),
        ] {
            if attributes.contains(attribute) {
                flags |= flag;
            }
        }
        Ok(rustix::mount::mount(
            &self.source,
            point,
            self.fstype.as_str(),
            flags,
            &*data,
        )?)
    }

    /// As [`detached`](Self::detached), by way of a mount point that is given up at once.
    fn detached_classic(&self) -> io::Result<OwnedFd> {
        let base = self
            .upper_dir()
            .and_then(Path::parent)
            .map_or_else(std::env::temp_dir, Path::to_owned);
        let point = base.join(format!("mount-{}", std::process::id()));
        std::fs::create_dir(&point)?;
        let open = || -> io::Result<OwnedFd> {
            self.mount_classic(&point)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let fd = rustix::fs::open(&point, flags, Mode::empty());
            rustix::mount::unmount(&point, UnmountFlags::DETACH)?;
            Ok(fd?)
        };
        let opened = open();
        std::fs::remove_dir(&point)?;
        opened
    }
}

/// Says what is wrong with an overlay that has more layers than the kernel takes, which says so in other words.
fn too_many_layers(layers: usize, source: &io::Error) -> Option<io::Error> {
    // A kernel without `lowerdir+` takes as many as can be described in a page.
    let is_too_long = source.raw_os_error() == Some(Errno::TOOBIG.raw_os_error());
    (layers > MAX_LAYERS || is_too_long).then(|| {
        io::Error::other(format!(
            "{layers} layers are too many for an overlay, which has {MAX_LAYERS} at most (kernels before 6.8: fewer); combine \
             steps, or use the native snapshotter"
        ))
    })
}

/// Reports whether an option is about mounts as such and not one of the file system.
fn is_general(option: &OsString) -> bool {
    matches!(
        option.as_bytes(),
        b"ro" | b"rw" | b"bind" | b"rbind" | b"nodev" | b"nosuid" | b"noexec"
    )
}

fn bind(source: &Path, point: &Path, read_only: bool) -> io::Result<()> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = rustix::mount::open_tree(CWD, source, flags)?;
    rustix::mount::move_mount(tree, c"", CWD, point, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    if !read_only {
        return Ok(());
    }
    let read_only = MountFlags::BIND | MountFlags::RDONLY;
    let done = match rustix::mount::mount_remount(point, read_only, c"") {
        // Within a user namespace flags that came from outside cannot be dropped, so they are named again.
        Err(Errno::PERM) => {
            rustix::mount::mount_remount(point, read_only | MountFlags::NOSUID | MountFlags::NODEV, c"")
        }
        done => done,
    };
    if done.is_err() {
        rustix::mount::unmount(point, UnmountFlags::DETACH)?;
    }
    Ok(done?)
}

impl MountGuard {
    /// Returns the mount point.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends the mount now and reports what went wrong.
    pub fn unmount(mut self) -> Result<(), MountError> {
        self.armed = false;
        unmount(&self.path)
    }

    /// Leaves the mount in place for someone else to end.
    pub fn leave(mut self) -> PathBuf {
        self.armed = false;
        std::mem::take(&mut self.path)
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        if self.armed {
            // Nobody is left to tell; `unmount_below` at the next start ends what stays.
            let _ = unmount(&self.path);
        }
    }
}

impl MountedTree {
    /// Reports whether nothing may be written to the tree.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }
}

impl AsFd for MountedTree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Unmounts whatever is on top at `path`, lazily (`MNT_DETACH`). A path that is no mount point, or is not there, is a
/// success.
pub fn unmount(path: &Path) -> Result<(), MountError> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(MountError {
            action: "unmount".into(),
            path: path.to_owned(),
            source: error.into(),
        }),
    }
}

/// Unmounts everything mounted below the directory `dir`, last mounted first: what a process that was killed left behind.
/// Returns how many mounts that were.
pub fn unmount_below(dir: &Path) -> Result<usize, MountError> {
    let table = Path::new("/proc/self/mountinfo");
    let text = std::fs::read(table).map_err(|source| MountError {
        action: "read".into(),
        path: table.to_owned(),
        source,
    })?;
    // The mount point is the fifth field.
    let points = text
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    let mut below: Vec<PathBuf> = points
        .map(unescape)
        .filter(|point| point.starts_with(dir) && point != dir)
        .collect();
    below.reverse();
    below.iter().try_for_each(|point| unmount(point))?;
    Ok(below.len())
}

/// Undoes the kernel's `\040` for spaces and the like.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(byte) = code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            path.push(byte);
            rest = &tail[3..];
        } else {
            path.push(*first);
            rest = tail;
        }
    }
    PathBuf::from(OsStr::from_bytes(&path))
}

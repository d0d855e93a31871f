//! Building a container's file system, from inside its own mount namespace.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};

use super::cgroup::Cgroup;
use super::child::{Fallible as _, SetupError};
use super::device;
use crate::spec::{
    ATTR_NODEV, ATTR_NOEXEC, ATTR_NOSUID, ATTR_RDONLY, ContainerSpec, MountKind, MountSpec, TreeSpec,
};
use crate::sys::{self, MountChange};
use crate::tree::{self, Stub, make_place};

/// Where in the staging directory the root is mounted. Nothing else may be mounted on top of it: `/..` would lead there.
pub(crate) const STAGED_ROOT: &str = "root";
/// Where everything else is mounted of which parts are needed.
pub(crate) const STAGED_TREE: &str = "tree";

/// A root file system under construction.
#[derive(Debug)]
pub(super) struct Builder<'a> {
    spec: &'a ContainerSpec,
    attachment: &'a [u8],
    cgroup: Option<&'a Cgroup>,
    root: OwnedFd,
    stubs: Vec<Stub>,
    /// The host's `/dev/null`, for masking: the container's own `/dev` may be anything.
    null: OwnedFd,
    /// Writable trees that are mounted already: a second overlay on the same upper directory would break it.
    trees: BTreeMap<TreeSpec, OwnedFd>,
}

/// A root file system that is complete.
#[derive(Debug)]
pub(super) struct Built {
    /// The root without anything mounted read-only over it, for removing the stubs later.
    pub(super) root: OwnedFd,
    pub(super) stubs: Vec<Stub>,
}

impl<'a> Builder<'a> {
    /// Mounts the root on the staging directory. From here on nothing of the host's mounts is changed by what happens
    /// here.
    pub(super) fn new(
        spec: &'a ContainerSpec,
        attachment: &'a [u8],
        cgroup: Option<&'a Cgroup>,
    ) -> Result<Self, SetupError> {
        use rustix::mount::{MountPropagationFlags, mount_change};
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change("/", slave).or_fail("detach the host's mounts")?;
        let root =
            mount_tree(&spec.root, &spec.staging.join(STAGED_ROOT)).or_fail("mount the root file system")?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&root).or_fail("look at the root")?.st_mode);
        if kind != FileType::Directory {
            return Err(SetupError::new("the root file system is not a directory"));
        }
        let null = open_path(Path::new("/dev/null")).or_fail("open /dev/null")?;
        Ok(Self {
            spec,
            null,
            attachment,
            cgroup,
            root,
            stubs: Vec::new(),
            trees: BTreeMap::new(),
        })
    }

    /// Returns the root.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Makes the working directory in the root itself, where it stays, even if something is mounted over it.
    pub(super) fn make_working_directory(&self, path: &str, uid: u32, gid: u32) -> Result<(), SetupError> {
        tree::make_working_directory(self.root(), path, uid, gid)
            .or_fail(format_args!("create working directory {path}"))
    }

    /// Mounts everything in order.
    pub(super) fn mount_all(&mut self) -> Result<(), SetupError> {
        for mount in &self.spec.mounts {
            self.mount(mount)?;
            if mount.target == "/dev" && matches!(mount.kind, MountKind::Kernel { .. }) {
                device::populate(self.root(), &self.spec.devices)?;
            }
        }
        Ok(())
    }

    /// Hides what must not be seen, makes the rest read-only, and hands out what remains.
    pub(super) fn finish(self) -> Result<Built, SetupError> {
        for path in &self.spec.read_only_paths {
            make_read_only(self.root(), path).or_fail(format_args!("make {path} read-only"))?;
        }
        for path in &self.spec.masked_paths {
            self.mask(path).or_fail(format_args!("mask {path}"))?;
        }
        if !self.spec.read_only_root {
            enter(self.root()).or_fail("change the root")?;
            return Ok(Built {
                root: self.root,
                stubs: self.stubs,
            });
        }
        // A read-only copy of the mount, so that stubs can still be removed through the original.
        let copy = clone_mount(self.root()).or_fail("make the root read-only")?;
        let change = MountChange {
            set: ATTR_RDONLY,
            ..MountChange::default()
        };
        sys::change_mount(&copy, change).or_fail("make the root read-only")?;
        attach(copy.as_fd(), self.root()).or_fail("make the root read-only")?;
        let top = open_path(&self.spec.staging.join(STAGED_ROOT)).or_fail("open the root")?;
        enter(top.as_fd()).or_fail("change the root")?;
        Ok(Built {
            root: self.root,
            stubs: self.stubs,
        })
    }

    fn mount(&mut self, mount: &MountSpec) -> Result<(), SetupError> {
        let target = &mount.target;
        match &mount.kind {
            MountKind::Kernel { fstype, options } => {
                let what = format_args!("mount {fstype} for {target}");
                let source = self.new_mount(fstype, options, mount.attributes).or_fail(what)?;
                self.label_root(fstype, &source).or_fail(what)?;
                self.place(mount, &source, true)
            }
            MountKind::Tmpfs { size_bytes } => self.tmpfs(mount, *size_bytes),
            MountKind::File {
                offset,
                len,
                uid,
                gid,
                mode,
            } => {
                let bytes = offset
                    .checked_add(*len)
                    .and_then(|end| self.attachment.get(*offset..end));
                let bytes = bytes.ok_or_else(|| SetupError::new("a file's content is missing"))?;
                let staging =
                    open_path(&self.spec.staging.join(STAGED_TREE)).or_fail("open the staging directory")?;
                let source = self
                    .memory_file(bytes, (*uid, *gid), *mode, mount.attributes, staging.as_fd())
                    .or_fail(format_args!("make the file for {target}"))?;
                self.place(mount, &source, false)
            }
            MountKind::Host(path) => {
                let source = self.host_source(path, mount)?;
                self.place_bind(mount, &source)
            }
            MountKind::Tree(tree) => {
                let source = self.tree_source(tree, mount)?;
                self.place_bind(mount, &source)
            }
            MountKind::Cgroup => self.cgroup(mount),
        }
    }

    fn host_source(&self, path: &Path, mount: &MountSpec) -> Result<OwnedFd, SetupError> {
        let source = open_path(path).or_fail(format_args!("open the source of {}", mount.target))?;
        select(source, &mount.selector)
    }

    fn tree_source(&mut self, tree: &TreeSpec, mount: &MountSpec) -> Result<OwnedFd, SetupError> {
        if tree.fstype == "bind" || tree.fstype == "rbind" {
            return self.host_source(&tree.source, mount);
        }
        if !self.trees.contains_key(tree) {
            let mounted = mount_tree(tree, &self.spec.staging.join(STAGED_TREE))
                .or_fail(format_args!("mount {}", mount.target))?;
            self.trees.insert(tree.clone(), mounted);
        }
        let mounted = self
            .trees
            .get(tree)
            .ok_or_else(|| SetupError::new("a mount vanished"))?;
        let mounted = rustix::io::fcntl_dupfd_cloexec(mounted, 3).or_fail("copy a descriptor")?;
        select(mounted, &mount.selector)
    }

    /// Puts a copy of what is at `source`, with everything mounted below it, at the mount's target.
    fn place_bind(&mut self, mount: &MountSpec, source: &OwnedFd) -> Result<(), SetupError> {
        let target = &mount.target;
        let stat = rustix::fs::fstat(source).or_fail(format_args!("look at the source of {target}"))?;
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let copy = clone_mount(source.as_fd()).or_fail(format_args!("bind the source of {target}"))?;
        let change = MountChange {
            set: mount.attributes,
            clear: 0,
            propagation: libc::MS_PRIVATE,
            recursive: true,
        };
        sys::change_mount(&copy, change).or_fail(format_args!("set the attributes of {target}"))?;
        self.place(mount, &copy, is_directory)
    }

    /// Attaches a mount at its target, which is made if it is missing.
    fn place(&mut self, mount: &MountSpec, source: &OwnedFd, is_directory: bool) -> Result<(), SetupError> {
        let point = self.mount_point(mount, is_directory)?;
        attach(source.as_fd(), point.as_fd()).or_fail(format_args!("mount at {}", mount.target))
    }

    fn mount_point(&mut self, mount: &MountSpec, is_directory: bool) -> Result<OwnedFd, SetupError> {
        let what = format!("create mount point {}", mount.target);
        let (mut above, mut own) = (Vec::new(), Vec::new());
        let place = make_place(self.root.as_fd(), &mount.target, &mut above).or_fail(&what)?;
        if place.name.is_none() {
            return Err(SetupError::new(format!(
                "mount point {} is the root",
                mount.target
            )));
        }
        // What is masked later is found by these names, so they must not lead to something else.
        if matches!(mount.kind, MountKind::Kernel { .. }) && !place.is_at(&mount.target) {
            return Err(SetupError::new(format!(
                "{} is a symbolic link in the image",
                mount.target
            )));
        }
        let point = place.ensure(is_directory, &mut own).or_fail(&what)?;
        if mount.stub {
            if self.spec.stubs_recursive {
                self.stubs.append(&mut above);
            }
            self.stubs.append(&mut own);
        }
        Ok(point)
    }

    /// A tmpfs has the mode of the directory that it covers.
    fn tmpfs(&mut self, mount: &MountSpec, size_bytes: Option<u64>) -> Result<(), SetupError> {
        let existing = tree::open_in_root(self.root(), &mount.target, OFlags::PATH).ok();
        let stat = existing
            .as_ref()
            .and_then(|existing| rustix::fs::fstat(existing).ok());
        let mode = stat.map_or(0o1777, |stat| stat.st_mode & 0o7777);
        let mut options = vec![("mode".to_owned(), format!("{mode:o}"))];
        if let Some(size) = size_bytes {
            options.push(("size".to_owned(), size.to_string()));
        }
        let source = self.new_mount("tmpfs", &options, mount.attributes);
        let source = source.or_fail(format_args!("mount tmpfs for {}", mount.target))?;
        self.place(mount, &source, true)
    }

    fn cgroup(&mut self, mount: &MountSpec) -> Result<(), SetupError> {
        let what = "mount the cgroups";
        let Some(cgroup) = self.cgroup else { return Ok(()) };
        if cgroup.is_unified() {
            let source = self.new_mount("cgroup2", &[], mount.attributes).or_fail(what)?;
            return self.place(mount, &source, true);
        }
        let options = [("mode".to_owned(), "755".to_owned())];
        let source = self.new_mount("tmpfs", &options, mount.attributes & !ATTR_RDONLY);
        let source = source.or_fail(what)?;
        self.place(mount, &source, true)?;
        let change = MountChange {
            set: mount.attributes,
            ..MountChange::default()
        };
        for (hierarchy, directory) in cgroup.directories() {
            let Some(name) = hierarchy.mount.file_name() else {
                continue;
            };
            rustix::fs::mkdirat(&source, name, Mode::from_raw_mode(0o755)).or_fail(what)?;
            let own = clone_mount(open_path(&directory).or_fail(what)?.as_fd()).or_fail(what)?;
            sys::change_mount(&own, change).or_fail(what)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let point = rustix::fs::openat(&source, name, flags, Mode::empty()).or_fail(what)?;
            attach(own.as_fd(), point.as_fd()).or_fail(what)?;
            for controller in hierarchy.controllers.iter().filter(|own| own.as_str() != name) {
                rustix::fs::symlinkat(name, &source, controller.as_str()).or_fail(what)?;
            }
        }
        sys::change_mount(&source, change).or_fail(what)
    }

    /// Makes a file system of the kernel, with the container's label if it can have one.
    fn new_mount(&self, fstype: &str, options: &[(String, String)], attributes: u64) -> io::Result<OwnedFd> {
        kernel_mount(
            fstype,
            &labelled(fstype, options, &self.spec.mount_label),
            attributes,
        )
    }

    /// Message queues cannot be mounted with a label, but have one.
    fn label_root(&self, fstype: &str, mount: &OwnedFd) -> io::Result<()> {
        let label = &self.spec.mount_label;
        if fstype != "mqueue" || label.is_empty() {
            return Ok(());
        }
        let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
        let flags = rustix::fs::XattrFlags::empty();
        Ok(rustix::fs::setxattr(
            path,
            c"security.selinux",
            label.as_bytes(),
            flags,
        )?)
    }

    /// Makes a file in a file system of its own, so that it is nowhere but in memory, and a mount of just that file.
    fn memory_file(
        &self,
        bytes: &[u8],
        (uid, gid): (u32, u32),
        mode: u32,
        attributes: u64,
        staging: BorrowedFd<'_>,
    ) -> io::Result<OwnedFd> {
        let options = [("mode".to_owned(), "711".to_owned())];
        let directory = self.new_mount("tmpfs", &options, attributes & !ATTR_RDONLY)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&directory, c"file", flags, Mode::from_raw_mode(0o600))?;
        let mut file = std::fs::File::from(file);
        file.write_all(bytes)?;
        rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
        drop(file);
        // Copying from a mount that is attached nowhere needs a recent kernel, so it is attached for a moment.
        attach(directory.as_fd(), staging)?;
        let file = rustix::fs::openat(&directory, c"file", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let copy = clone_mount(file.as_fd())?;
        sys::change_mount(
            &copy,
            MountChange {
                set: attributes,
                ..MountChange::default()
            },
        )?;
        Ok(copy)
    }

    fn mask(&self, path: &str) -> io::Result<()> {
        let Some(point) = existing(self.root(), path)? else {
            return Ok(());
        };
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&point)?.st_mode);
        let cover = if kind == FileType::Directory {
            let options = [
                ("size".to_owned(), "4k".to_owned()),
                ("mode".to_owned(), "755".to_owned()),
            ];
            self.new_mount("tmpfs", &options, ATTR_RDONLY)?
        } else {
            clone_mount(self.null.as_fd())?
        };
        attach(cover.as_fd(), point.as_fd())
    }
}

/// Adds the label to the options of a file system that has none of its own.
fn labelled(fstype: &str, options: &[(String, String)], label: &str) -> Vec<(String, String)> {
    let has_own = ["proc", "sysfs", "mqueue", "cgroup2"].contains(&fstype);
    let context = (!has_own && !label.is_empty()).then(|| ("context".to_owned(), label.to_owned()));
    options.iter().cloned().chain(context).collect()
}

/// Mounts a snapshot on the staging directory, on top of what is there, and opens it.
fn mount_tree(tree: &TreeSpec, staging: &Path) -> io::Result<OwnedFd> {
    let mount = snapshot::Mount {
        fstype: tree.fstype.clone(),
        source: tree.source.clone(),
        target: std::path::PathBuf::new(),
        options: tree.options.iter().map(Into::into).collect(),
    };
    mount
        .mount_at(staging)
        .map_err(|error| io::Error::new(error.source.kind(), error.source))?
        .leave();
    open_path(staging)
}

fn open_path(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Finds the selected part of a source; links in it are followed inside it.
fn select(source: OwnedFd, selector: &str) -> Result<OwnedFd, SetupError> {
    if selector.split('/').all(|part| part.is_empty() || part == ".") {
        return Ok(source);
    }
    tree::open_in_root(source.as_fd(), selector, OFlags::PATH)
        .map_err(|error| SetupError::new(format!("open {selector}: {}", super::child::plain(&error))))
}

/// Copies a mount with everything mounted below it; the copy is attached nowhere.
fn clone_mount(source: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(rustix::mount::open_tree(source, c"", flags)?)
}

fn attach(mount: BorrowedFd<'_>, point: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, c"", point, c"", flags)?)
}

fn kernel_mount(fstype: &str, options: &[(String, String)], attributes: u64) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Listings of mounts show it.
    rustix::mount::fsconfig_set_string(&context, "source", fstype)?;
    for (key, value) in options {
        if value.is_empty() {
            rustix::mount::fsconfig_set_flag(&context, key.as_str())?;
        } else {
            rustix::mount::fsconfig_set_string(&context, key.as_str(), value.as_str())?;
        }
    }
    rustix::mount::fsconfig_create(&context)?;
    let attributes = u32::try_from(attributes).map_err(io::Error::other)?;
    let attributes = MountAttrFlags::from_bits_retain(attributes);
    Ok(rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// Opens a path of the container for hiding or protecting; `None` if there is none.
fn existing(root: BorrowedFd<'_>, path: &str) -> io::Result<Option<OwnedFd>> {
    match tree::open_in_root(root, path, OFlags::PATH) {
        Ok(found) => Ok(Some(found)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn make_read_only(root: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    let Some(point) = existing(root, path)? else {
        return Ok(());
    };
    let copy = clone_mount(point.as_fd())?;
    let set = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC;
    sys::change_mount(
        &copy,
        MountChange {
            set,
            recursive: true,
            ..MountChange::default()
        },
    )?;
    attach(copy.as_fd(), point.as_fd())
}

/// Makes `root` the root and gives up everything of the host.
fn enter(root: BorrowedFd<'_>) -> io::Result<()> {
    let host = rustix::fs::open(
        c"/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    rustix::process::fchdir(root)?;
    match rustix::process::pivot_root(c".", c".") {
        Err(Errno::INVAL) => {
            return Err(io::Error::other(
                "pivot_root is refused; is the host's root file system an initramfs?",
            ));
        }
        result => result?,
    }
    // The host's root now lies on top of the new one.
    rustix::process::fchdir(&host)?;
    rustix::mount::unmount(c".", rustix::mount::UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir(c"/")?)
}

#[cfg(test)]
mod tests {
    use super::labelled;

    #[test]
    fn file_systems_without_labels_of_their_own_get_the_containers() {
        let mode = [("mode".to_owned(), "755".to_owned())];
        let context = ("context".to_owned(), "a:b:c:s0:c1,c2".to_owned());
        for fstype in ["tmpfs", "devpts"] {
            let options = labelled(fstype, &mode, &context.1);
            assert_eq!(options, [mode[0].clone(), context.clone()]);
            assert_eq!(labelled(fstype, &mode, ""), mode);
        }
        for fstype in ["proc", "sysfs", "mqueue", "cgroup2"] {
            assert_eq!(labelled(fstype, &mode, &context.1), mode);
        }
    }
}

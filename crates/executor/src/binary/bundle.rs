//! What an OCI runtime needs on the host while a container runs: a directory with its configuration, and mounts.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags};

use super::config::{self, OciMount};
use crate::error::RunError;
use crate::spec::{ContainerSpec, MountKind, MountSpec, TreeSpec};
use crate::supervisor::cgroup::{Cgroup, Layout};
use crate::tree::{self, Stub, make_place};
use crate::trust::{self, Trusted};
use crate::user::{self, Identity};

/// A container's directory and mounts; gone when dropped.
#[derive(Debug)]
pub(super) struct Bundle {
    pub(super) path: PathBuf,
    pub(super) cgroup: Cgroup,
    pub(super) identity: Identity,
    root: OwnedFd,
    stubs: Vec<Stub>,
    trusted: Option<Trusted>,
    /// In the order in which they were made.
    mounts: Vec<HostMount>,
    /// Where overlays are mounted: two on one upper directory would break it.
    trees: BTreeMap<TreeSpec, PathBuf>,
    directories: usize,
}

/// A mount of the host that ends, with its directory, when this is dropped.
#[derive(Debug)]
struct HostMount(PathBuf);

impl Drop for HostMount {
    fn drop(&mut self) {
        // One that stays is ended at the next start; a mount point that is a file goes with its directory.
        let _ = snapshot::unmount(&self.0);
        let _ = fs::remove_dir(&self.0);
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if let Some(trusted) = &self.trusted
            && let Err(error) = trust::remove(self.root.as_fd(), trusted)
        {
            tracing::warn!(%error, "cannot take a certificate out of a step's bundle");
        }
        tree::remove_stubs(self.root.as_fd(), &self.stubs);
        while let Some(mount) = self.mounts.pop() {
            drop(mount);
        }
        self.cgroup.remove();
    }
}

/// How the bundle is mounted: what is in it is for the container to read.
fn memory_options(label: &str) -> CString {
    let context = match label {
        "" => String::new(),
        label => format!(",context=\"{label}\""),
    };
    // A context never holds a NUL byte: the kernel could not have one.
    CString::new(format!("mode=711{context}")).unwrap_or_default()
}

fn io_error(what: &str) -> impl Fn(io::Error) -> RunError {
    let what = what.to_owned();
    move |source| RunError::Io {
        what: what.clone(),
        source,
    }
}

fn start(what: impl std::fmt::Display) -> impl Fn(io::Error) -> RunError {
    let what = what.to_string();
    move |error| RunError::Start {
        message: format!("{what}: {error}"),
    }
}

impl Bundle {
    /// Prepares everything. Blocking.
    pub(super) fn new(
        bundles: &Path,
        spec: &ContainerSpec,
        attachment: &[u8],
        network: Option<&str>,
    ) -> Result<Self, RunError> {
        let path = bundles.join(&spec.id);
        fs::DirBuilder::new()
            .mode(0o711)
            .create(&path)
            .map_err(io_error("make the bundle"))?;
        // The configuration may hold secrets, so nothing of it is written to disk.
        let memory = rustix::mount::mount(
            "tmpfs",
            &path,
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV,
            memory_options(&spec.mount_label).as_c_str(),
        );
        memory.map_err(|error| io_error("mount the bundle")(error.into()))?;
        let memory = HostMount(path.clone());
        let layout = Layout::probe().map_err(io_error("look for cgroups"))?;
        let unified = layout.unified;
        let cgroup = Cgroup::new(&layout, &spec.cgroup_parent, &spec.id, true);
        let rootfs = path.join("rootfs");
        let (guard, root) = mount_tree(&spec.root, &rootfs)?;
        let mut bundle = Self {
            path,
            cgroup,
            identity: Identity {
                uid: 0,
                gid: 0,
                groups: Vec::new(),
                home: None,
            },
            root,
            stubs: Vec::new(),
            trusted: None,
            mounts: vec![memory, guard],
            trees: BTreeMap::new(),
            directories: 0,
        };
        bundle.identity = user::look_up(
            bundle.root.as_fd(),
            &spec.process.user,
            &spec.process.extra_groups,
        )
        .map_err(|message| RunError::Start { message })?;
        if let Some(certificate) = &spec.trusted_authority {
            bundle.trusted = trust::add(bundle.root.as_fd(), certificate)
                .map_err(start("add a certificate to the image's bundle"))?;
        }
        let (uid, gid) = (bundle.identity.uid, bundle.identity.gid);
        let cwd = &spec.process.cwd;
        tree::make_working_directory(bundle.root.as_fd(), cwd, uid, gid)
            .map_err(start(format_args!("create working directory {cwd}")))?;
        let mut mounts = Vec::with_capacity(spec.mounts.len());
        for mount in &spec.mounts {
            let (prepared, is_directory) = bundle.prepare(mount, attachment)?;
            if mount.stub {
                bundle.stub(mount, is_directory, spec.stubs_recursive)?;
            }
            mounts.push(prepared);
        }
        let config = config::config(spec, &bundle.identity, &rootfs, &mounts, network, unified);
        let file = bundle.path.join("config.json");
        fs::write(&file, config.to_string()).map_err(io_error("write config.json"))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))
            .map_err(io_error("write config.json"))?;
        Ok(bundle)
    }

    /// Makes a mount point before the runtime does, to know what to remove.
    fn stub(&mut self, mount: &MountSpec, is_directory: bool, recursive: bool) -> Result<(), RunError> {
        let failed = start(format!("create mount point {}", mount.target));
        let (mut above, mut own) = (Vec::new(), Vec::new());
        let place = make_place(self.root.as_fd(), &mount.target, &mut above).map_err(&failed)?;
        place.ensure(is_directory, &mut own).map_err(&failed)?;
        if let (MountKind::Tmpfs { .. }, Some(name), false) = (&mount.kind, &place.name, own.is_empty()) {
            // The runtime gives a tmpfs the mode of its mount point.
            rustix::fs::chmodat(&place.parent, name, Mode::from_raw_mode(0o1777), AtFlags::empty())
                .map_err(|error| failed(error.into()))?;
        }
        if recursive {
            self.stubs.append(&mut above);
        }
        self.stubs.append(&mut own);
        Ok(())
    }

    fn prepare(&mut self, mount: &MountSpec, attachment: &[u8]) -> Result<(OciMount, bool), RunError> {
        match &mount.kind {
            MountKind::Kernel { fstype, options } => {
                let option = |(key, value): &(String, String)| {
                    if value.is_empty() {
                        key.clone()
                    } else {
                        format!("{key}={value}")
                    }
                };
                Ok((config::instance(mount, fstype, options.iter().map(option)), true))
            }
            MountKind::Tmpfs { size_bytes } => {
                let options = size_bytes.map(|size| format!("size={size}"));
                Ok((config::instance(mount, "tmpfs", options), true))
            }
            MountKind::Cgroup => Ok((config::instance(mount, "cgroup", None), true)),
            MountKind::File {
                offset,
                len,
                uid,
                gid,
                mode,
            } => {
                let bytes = offset
                    .checked_add(*len)
                    .and_then(|end| attachment.get(*offset..end));
                let bytes = bytes.unwrap_or_default();
                let path = self
                    .memory_file(bytes, *uid, *gid, *mode)
                    .map_err(start("make a file"))?;
                Ok((config::bound(mount, &path), false))
            }
            MountKind::Host(path) => self.bind(mount, path),
            MountKind::Tree(tree) if tree.fstype == "bind" || tree.fstype == "rbind" => {
                self.bind(mount, &tree.source)
            }
            MountKind::Tree(tree) => {
                if let Some(point) = self.trees.get(tree).cloned() {
                    return self.bind(mount, &point);
                }
                let point = self.directory();
                let (guard, _) = mount_tree(tree, &point)?;
                self.mounts.push(guard);
                self.trees.insert(tree.clone(), point.clone());
                self.bind(mount, &point)
            }
        }
    }

    /// Describes a bind mount of a part of what is at `path`.
    fn bind(&mut self, mount: &MountSpec, path: &Path) -> Result<(OciMount, bool), RunError> {
        let what = format!("open the source of {}", mount.target);
        let source = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| start(&what)(error.into()))?;
        if mount
            .selector
            .split('/')
            .all(|part| part.is_empty() || part == ".")
        {
            let is_directory = is_directory(&source).map_err(start(&what))?;
            return Ok((config::bound(mount, path), is_directory));
        }
        let selected =
            tree::open_in_root(source.as_fd(), &mount.selector, OFlags::PATH).map_err(|error| {
                RunError::Start {
                    message: format!("open {}: {}", mount.selector, plain(&error)),
                }
            })?;
        let is_directory = is_directory(&selected).map_err(start(&what))?;
        // The runtime takes paths, and a path could be changed until it is used.
        let point = self.directory();
        let made = if is_directory {
            fs::create_dir(&point)
        } else {
            fs::write(&point, "")
        };
        made.map_err(start(&what))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE;
        rustix::mount::open_tree(&selected, c"", flags)
            .and_then(|copy| {
                rustix::mount::move_mount(copy, c"", CWD, &point, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            })
            .map_err(|error| start(&what)(error.into()))?;
        self.mounts.push(HostMount(point.clone()));
        Ok((config::bound(mount, &point), is_directory))
    }

    fn directory(&mut self) -> PathBuf {
        self.directories += 1;
        self.path.join(format!("m{}", self.directories))
    }

    fn memory_file(&mut self, bytes: &[u8], uid: u32, gid: u32, mode: u32) -> io::Result<PathBuf> {
        let file = self.directory();
        fs::write(&file, bytes)?;
        chown(&file, Some(uid), Some(gid))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
        Ok(file)
    }
}

fn plain(error: &io::Error) -> String {
    crate::supervisor::plain(error)
}

fn is_directory(file: &OwnedFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode) == FileType::Directory)
}

fn mount_tree(tree: &TreeSpec, point: &Path) -> Result<(HostMount, OwnedFd), RunError> {
    fs::DirBuilder::new()
        .mode(0o700)
        .create(point)
        .map_err(io_error("make a mount point"))?;
    let mount = snapshot::Mount {
        fstype: tree.fstype.clone(),
        source: tree.source.clone(),
        target: PathBuf::new(),
        options: tree.options.iter().map(Into::into).collect(),
    };
    let mounted = mount.mount_at(point).map_err(|error| RunError::Start {
        message: error.to_string(),
    })?;
    let guard = HostMount(mounted.leave());
    let root = rustix::fs::open(
        point,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| io_error("open a mount")(error.into()))?;
    Ok((guard, root))
}

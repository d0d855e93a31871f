//! The overlayfs backend: a snapshot is a directory of changes.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use layer::tree::at;
use rustix::fs::CWD;

use crate::error::{IoContext, SnapshotError};
use crate::key::SnapshotKey;
use crate::layout::{self, Layout};
use crate::merge;
use crate::mount::Mount;
use crate::snapshotter::{Diff, Kind, SnapshotStat, Snapshotter, Storage, Swept, Usage};

/// How overlays are made.
#[derive(Debug, Clone, Default)]
pub struct OverlayOptions {
    /// Keeps overlayfs' marks in `user.*` attributes, as user namespaces need; `None` finds out.
    pub userxattr: Option<bool>,
    /// Lets programs in a container wait for the disk when they ask to. Normally their flushes are dropped, as
    /// [`Snapshotter::sync`] flushes what is worth keeping.
    pub honour_flushes: bool,
}

/// Keeps snapshots as overlayfs directories. Cheap to prepare, and a layer is what lies in the directory.
#[derive(Debug)]
pub struct Overlay {
    layout: Layout,
    userxattr: bool,
    /// Options of every mount.
    options: Vec<String>,
    /// Options of writable mounts besides.
    write_options: Vec<String>,
}

impl Overlay {
    /// Opens or creates the backend in `root`; fails with `Unsupported` where overlays cannot be mounted.
    pub fn open(root: &Path, options: OverlayOptions) -> Result<Self, SnapshotError> {
        let layout = Layout::open(root)?;
        let candidates = match options.userxattr {
            Some(userxattr) => vec![userxattr],
            None => vec![false, true],
        };
        let mut failure = None;
        for userxattr in candidates {
            for volatile in [true, false] {
                if volatile && options.honour_flushes {
                    continue;
                }
                let mut common = vec!["index=off".to_owned()];
                if userxattr {
                    common.push("userxattr".to_owned());
                } else {
                    // Renamed directories are copied: a layer cannot say "moved".
                    common.extend(["redirect_dir=off".to_owned(), "metacopy=off".to_owned()]);
                }
                let write_options = if volatile {
                    vec!["volatile".to_owned()]
                } else {
                    Vec::new()
                };
                match probe(&layout, &[common.clone(), write_options.clone()].concat())? {
                    Ok(()) => {
                        return Ok(Self {
                            layout,
                            userxattr,
                            options: common,
                            write_options,
                        });
                    }
                    Err(error) => failure = Some(error),
                }
            }
        }
        let source = failure.unwrap_or_else(|| crate::error::MountError {
            action: "mount overlay".into(),
            path: root.to_owned(),
            source: io::ErrorKind::Unsupported.into(),
        });
        Err(SnapshotError::Unsupported {
            backend: "overlayfs",
            root: root.to_owned(),
            source,
        })
    }

    /// Reports whether marks of deletions are in `user.*` attributes.
    pub fn uses_userxattr(&self) -> bool {
        self.userxattr
    }

    fn read_only(&self, chain: &[PathBuf]) -> Mount {
        match chain {
            [] => Mount::bind(self.layout.empty_dir(), true),
            [only] => Mount::bind(only, true),
            _ => Mount::overlay(chain.iter().map(PathBuf::as_path), None, &self.options),
        }
    }

    fn chain(&self, parent: Option<&SnapshotKey>) -> Result<Vec<PathBuf>, SnapshotError> {
        parent.map_or_else(|| Ok(Vec::new()), |parent| self.layout.chain(parent))
    }
}

/// Tries one writable overlay.
fn probe(layout: &Layout, options: &[String]) -> Result<Result<(), crate::error::MountError>, SnapshotError> {
    let dir = layout.root().join("new").join("probe");
    for sub in ["lower", "upper", "work"] {
        fs::create_dir_all(dir.join(sub)).at("create", dir.join(sub))?;
    }
    let (lower, upper, work) = (dir.join("lower"), dir.join("upper"), dir.join("work"));
    let mount = Mount::overlay([lower.as_path()], Some((&upper, &work)), options);
    let opened = mount.open().map(drop);
    at::remove_all(CWD, &dir).at("remove", &dir)?;
    Ok(opened)
}

/// Forgets that a work directory was used by a mount that drops flushes, which overlayfs takes for a crash.
fn forget_volatile(work: &Path) -> Result<(), SnapshotError> {
    let mark = work.join("work").join("incompat");
    at::remove_all(CWD, &mark)
        .or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })
        .at("remove", &mark)
}

impl Snapshotter for Overlay {
    fn name(&self) -> &'static str {
        "overlayfs"
    }

    fn prepare(&self, key: &SnapshotKey, parent: Option<&SnapshotKey>) -> Result<(), SnapshotError> {
        let below = self.chain(parent)?;
        self.layout.create(Kind::Active, key, parent, |dir| {
            let upper = dir.join("fs");
            make_dir(&upper)?;
            let Some(below) = below.first() else { return Ok(()) };
            let work = dir.join("work");
            make_dir(&work)?;
            // The merged root shows the upper directory's owner.
            let owner = fs::metadata(below).at("stat", below)?;
            let own = fs::metadata(&upper).at("stat", &upper)?;
            if (owner.uid(), owner.gid()) != (own.uid(), own.gid()) {
                at::set_owner(CWD, &upper, owner.uid(), owner.gid()).at("chown", &upper)?;
            }
            Ok(())
        })
    }

    fn view(&self, key: &SnapshotKey, parent: Option<&SnapshotKey>) -> Result<(), SnapshotError> {
        self.layout.create(Kind::View, key, parent, |_| Ok(()))
    }

    fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>, SnapshotError> {
        let (dir, stat) = self.layout.find(key)?;
        let chain = self.chain(stat.parent.as_ref())?;
        match stat.kind {
            Kind::View => Ok(vec![self.read_only(&chain)]),
            Kind::Committed => Err(SnapshotError::WrongKind {
                key: key.clone(),
                kind: stat.kind,
                wanted: Kind::Active,
            }),
            Kind::Active if chain.is_empty() => {
                self.layout.touch();
                Ok(vec![Mount::bind(dir.join("fs"), false)])
            }
            Kind::Active => {
                self.layout.touch();
                let (upper, work) = (dir.join("fs"), dir.join("work"));
                forget_volatile(&work)?;
                let options = [self.options.clone(), self.write_options.clone()].concat();
                Ok(vec![Mount::overlay(
                    chain.iter().map(PathBuf::as_path),
                    Some((&upper, &work)),
                    &options,
                )])
            }
        }
    }

    fn read_mounts(&self, name: Option<&SnapshotKey>) -> Result<Vec<Mount>, SnapshotError> {
        Ok(vec![self.read_only(&self.chain(name)?)])
    }

    fn commit(&self, name: &SnapshotKey, key: &SnapshotKey) -> Result<(), SnapshotError> {
        self.layout
            .commit(name, key, |dir| self.layout.discard(&dir.join("work")))
    }

    fn remove(&self, key: &SnapshotKey) -> Result<(), SnapshotError> {
        self.layout.remove(key)
    }

    fn stat(&self, key: &SnapshotKey) -> Result<SnapshotStat, SnapshotError> {
        Ok(self.layout.find(key)?.1)
    }

    fn check(&self, key: &SnapshotKey) -> Result<(), SnapshotError> {
        self.layout.check(key)
    }

    fn expire_checks(&self) {
        self.layout.expire_checks();
    }

    fn usage(&self, key: &SnapshotKey) -> Result<Usage, SnapshotError> {
        layout::usage(&self.layout.find(key)?.0)
    }

    fn list(&self) -> Vec<SnapshotStat> {
        self.layout.list()
    }

    fn merge(&self, name: &SnapshotKey, diffs: &[Diff]) -> Result<(), SnapshotError> {
        merge::merge(self, &self.layout, name, diffs, true)
    }

    fn sync(&self) -> Result<(), SnapshotError> {
        self.layout.sync()
    }

    fn sweep(&self, keep: &dyn Fn(&SnapshotKey) -> bool) -> Result<Swept, SnapshotError> {
        self.layout.sweep(keep)
    }

    fn storage(&self, key: &SnapshotKey) -> Result<Storage, SnapshotError> {
        let (dir, stat) = self.layout.find(key)?;
        let own = dir.join("fs");
        match (stat.kind, &stat.parent) {
            (Kind::View, Some(parent)) => self.storage(parent),
            (Kind::View, None) => Ok(Storage::Whole(self.layout.empty_dir())),
            (_, None) => Ok(Storage::Whole(own)),
            (_, Some(parent)) => {
                let lower = self.layout.chain(parent)?;
                Ok(Storage::Changes {
                    upper: own,
                    lower,
                    userxattr: self.userxattr,
                })
            }
        }
    }
}

/// Makes a directory that all may enter, whatever the umask.
pub(crate) fn make_dir(path: &Path) -> Result<(), SnapshotError> {
    at::make_dir(CWD, path, 0o755).at("create", path)
}

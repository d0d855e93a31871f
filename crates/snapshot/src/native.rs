//! The copying backend: a snapshot is a whole tree. Works on any file system and without privileges.

use std::path::{Path, PathBuf};

use layer::tree::Root;

use crate::error::{IoContext, SnapshotError};
use crate::key::SnapshotKey;
use crate::layout::{self, Layout};
use crate::merge;
use crate::mount::Mount;
use crate::overlay::make_dir;
use crate::snapshotter::{Diff, Kind, SnapshotStat, Snapshotter, Storage, Swept, Usage};

/// Keeps snapshots as full copies, sharing blocks by reflink where the file system can.
#[derive(Debug)]
pub struct Native {
    layout: Layout,
}

impl Native {
    /// Opens or creates the backend in `root`.
    pub fn open(root: &Path) -> Result<Self, SnapshotError> {
        Ok(Self {
            layout: Layout::open(root)?,
        })
    }

    fn tree_of(&self, parent: Option<&SnapshotKey>) -> Result<PathBuf, SnapshotError> {
        match parent {
            None => Ok(self.layout.empty_dir()),
            Some(parent) => {
                let (dir, stat) = self.layout.find(parent)?;
                if stat.kind != Kind::Committed {
                    let (key, kind) = (parent.clone(), stat.kind);
                    return Err(SnapshotError::WrongKind {
                        key,
                        kind,
                        wanted: Kind::Committed,
                    });
                }
                Ok(dir.join("fs"))
            }
        }
    }
}

impl Snapshotter for Native {
    fn name(&self) -> &'static str {
        "native"
    }

    fn prepare(&self, key: &SnapshotKey, parent: Option<&SnapshotKey>) -> Result<(), SnapshotError> {
        let source = self.tree_of(parent)?;
        self.layout.create(Kind::Active, key, parent, |dir| {
            let target = dir.join("fs");
            make_dir(&target)?;
            if parent.is_none() {
                return Ok(());
            }
            let from = Root::open(&source).at("open", &source)?;
            let to = Root::open(&target).at("open", &target)?;
            layer::copy::copy_tree(&from, &to).map_err(|error| SnapshotError::Tree {
                key: key.clone(),
                source: error.into(),
            })
        })
    }

    fn view(&self, key: &SnapshotKey, parent: Option<&SnapshotKey>) -> Result<(), SnapshotError> {
        self.layout.create(Kind::View, key, parent, |_| Ok(()))
    }

    fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>, SnapshotError> {
        let (dir, stat) = self.layout.find(key)?;
        match stat.kind {
            Kind::Active => {
                self.layout.touch();
                Ok(vec![Mount::bind(dir.join("fs"), false)])
            }
            Kind::View => Ok(vec![Mount::bind(self.tree_of(stat.parent.as_ref())?, true)]),
            Kind::Committed => Err(SnapshotError::WrongKind {
                key: key.clone(),
                kind: stat.kind,
                wanted: Kind::Active,
            }),
        }
    }

    fn read_mounts(&self, name: Option<&SnapshotKey>) -> Result<Vec<Mount>, SnapshotError> {
        Ok(vec![Mount::bind(self.tree_of(name)?, true)])
    }

    fn commit(&self, name: &SnapshotKey, key: &SnapshotKey) -> Result<(), SnapshotError> {
        self.layout.commit(name, key, |_| Ok(()))
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
        merge::merge(self, &self.layout, name, diffs, false)
    }

    fn sync(&self) -> Result<(), SnapshotError> {
        self.layout.sync()
    }

    fn sweep(&self, keep: &dyn Fn(&SnapshotKey) -> bool) -> Result<Swept, SnapshotError> {
        self.layout.sweep(keep)
    }

    fn storage(&self, key: &SnapshotKey) -> Result<Storage, SnapshotError> {
        let (dir, stat) = self.layout.find(key)?;
        match stat.kind {
            Kind::View => Ok(Storage::Whole(self.tree_of(stat.parent.as_ref())?)),
            Kind::Active | Kind::Committed => Ok(Storage::Whole(dir.join("fs"))),
        }
    }
}

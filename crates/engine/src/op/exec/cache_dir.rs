//! Cache mounts: directories that outlive builds, found by key, shared or locked across all builds of the daemon.
//!
//! A directory is held by one [`CacheDir`] at a time, or, when shared, by clones of one. Whoever wants a locked one waits
//! until its holder is gone; ops take their keys in one global order, so no set of ops can wait in a circle.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, Weak};

use cache::{ImmutableRef, MutableRef, RecordType, RefOptions, Store};
use executor::{ContainerId, MountSource};
use llb::pb::CacheSharingOpt;
use snapshot::MountGuard;
use tokio::sync::{Mutex, Notify};

use super::blocking;
use crate::error::{BuildError, ErrorKind};

#[derive(Debug, Default)]
struct Shared {
    /// Directories that are held for sharing, by key.
    shared: Mutex<BTreeMap<String, Weak<Held>>>,
    released: Notify,
}

/// All cache mounts in use by the daemon. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct CacheDirs(Arc<Shared>);

#[derive(Debug)]
struct Held {
    /// Taken when it is let go of.
    reference: Option<MutableRef>,
    dirs: Arc<Shared>,
    /// Where a shared overlay is mounted: two overlays on one upper directory would break it.
    mount_dir: Option<PathBuf>,
    mounted: std::sync::Mutex<Option<MountGuard>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mounted = self
            .mounted
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(mounted) = mounted {
            let path = mounted.path().to_owned();
            // What cannot be removed now goes at the next start.
            let _ = mounted.unmount();
            let _ = std::fs::remove_dir(path);
        }
        drop(self.reference.take());
        self.dirs.released.notify_waiters();
    }
}

/// A hold on a cache mount's directory. Clones share it; the last one lets go.
#[derive(Clone, Debug)]
pub(super) struct CacheDir(Arc<Held>);

impl CacheDir {
    /// Describes what to mount. Blocking.
    pub fn source(&self, read_only: bool) -> Result<MountSource, BuildError> {
        let internal = |error| BuildError::from_source(ErrorKind::Internal, error);
        let held = &*self.0;
        let mut mounted = held.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mounted) = &*mounted {
            return Ok(MountSource::Host(mounted.path().to_owned()));
        }
        let reference = held.reference.as_ref();
        let reference = reference.ok_or_else(|| BuildError::internal("a cache mount was let go of"))?;
        let (Some(dir), false) = (&held.mount_dir, reference.stat().parents.ids().is_empty()) else {
            return reference
                .mounts(read_only)
                .map(MountSource::Snapshot)
                .map_err(internal);
        };
        let mounts = reference.mounts(false).map_err(internal)?;
        let [mount] = mounts.as_slice() else {
            return Ok(MountSource::Snapshot(mounts));
        };
        let path = dir.join(ContainerId::random().as_str());
        let failed =
            |error| BuildError::from_source(ErrorKind::Internal, error).context("mount a shared cache");
        std::fs::create_dir(&path).map_err(failed)?;
        *mounted = Some(
            mount
                .mount_at(&path)
                .map_err(|error| BuildError::from_source(ErrorKind::Internal, error))?,
        );
        Ok(MountSource::Host(path))
    }
}

impl CacheDirs {
    /// Takes the directory of `key`, making it on top of `base` if there is none to have. Waits for locked ones; dropping
    /// the future gives up. Shared directories with a base are mounted below `mount_dir` for all who share them.
    pub(super) async fn take(
        &self,
        (store, mount_dir): (&Store, &Path),
        key: &str,
        base: Option<ImmutableRef>,
        sharing: CacheSharingOpt,
        description: String,
    ) -> Result<CacheDir, BuildError> {
        loop {
            let released = self.0.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            let mut shared = self.0.shared.lock().await;
            shared.retain(|_, held| held.strong_count() > 0);
            if sharing == CacheSharingOpt::Shared
                && let Some(held) = shared.get(key).and_then(Weak::upgrade)
            {
                return Ok(CacheDir(held));
            }
            let may_wait = sharing == CacheSharingOpt::Locked;
            let request = Request {
                store: store.clone(),
                index: format!("cache-dir:{key}"),
                base: base.clone(),
                description: description.clone(),
                may_wait,
            };
            if let Some(reference) = blocking(move || request.find_or_make()).await? {
                let is_shared = sharing == CacheSharingOpt::Shared;
                let held = Arc::new(Held {
                    reference: Some(reference),
                    dirs: Arc::clone(&self.0),
                    mount_dir: is_shared.then(|| mount_dir.to_owned()),
                    mounted: std::sync::Mutex::default(),
                });
                if sharing == CacheSharingOpt::Shared {
                    shared.insert(key.to_owned(), Arc::downgrade(&held));
                }
                return Ok(CacheDir(held));
            }
            drop(shared);
            released.await;
        }
    }
}

struct Request {
    store: Store,
    index: String,
    base: Option<ImmutableRef>,
    description: String,
    may_wait: bool,
}

impl Request {
    /// Takes a directory that nobody holds; else `None` if it is worth waiting for, or a new one. Blocking.
    fn find_or_make(self) -> Result<Option<MutableRef>, BuildError> {
        let internal = |error| BuildError::from_source(ErrorKind::Internal, error);
        let mut is_held = false;
        for id in self.store.search_index(&self.index).map_err(internal)? {
            match self.store.get_mutable(&id) {
                Ok(reference) => return Ok(Some(reference)),
                Err(cache::StoreError::Locked { .. }) => is_held = true,
                // It went meanwhile.
                Err(_) => {}
            }
        }
        if is_held && self.may_wait {
            return Ok(None);
        }
        let options = RefOptions {
            description: self.description,
            record_type: RecordType::ExecCacheMount,
            retain: true,
            ..RefOptions::default()
        };
        let reference = self
            .store
            .create_mutable(self.base.as_ref(), options)
            .map_err(internal)?;
        reference.set_index(&self.index).map_err(internal)?;
        Ok(Some(reference))
    }
}

//! Cache mounts: directories that outlive builds, found by key, shared or locked across all builds of the daemon.
//!
//! A directory is held by one [`CacheDir`] at a time, or, when shared, by clones of one. Whoever wants a locked one waits
//! until its holder is gone; ops take their keys in one global order, so no set of ops can wait in a circle.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cache::{ImmutableRef, MutableRef, RecordType, RefOptions, Store};
use executor::{ContainerId, MountSource};
use llb::pb::CacheSharingOpt;
use snapshot::MountGuard;
use tokio::sync::Notify;

use super::blocking;
use crate::error::{BuildError, ErrorKind};

/// Before a cache mount's key, how its directory is found in the store.
const INDEX: &str = "cache-dir:";

#[derive(Debug, Default)]
struct Shared {
    /// Directories that are held for sharing, by key. One is listed until it is let go of for good: who finds one that
    /// cannot be shared any more knows that it is about to be free.
    shared: Mutex<BTreeMap<String, Weak<Held>>>,
    released: Notify,
}

impl Shared {
    fn shared(&self) -> MutexGuard<'_, BTreeMap<String, Weak<Held>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All cache mounts in use by the daemon. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct CacheDirs(Arc<Shared>);

#[derive(Debug)]
struct Held {
    /// Taken when it is let go of.
    reference: Option<MutableRef>,
    dirs: Arc<Shared>,
    /// Under which key it is shared, if it is.
    shared_key: Option<String>,
    /// Where a shared overlay is mounted: two overlays on one upper directory would break it.
    mount_dir: Option<PathBuf>,
    mounted: Mutex<Option<MountGuard>>,
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
        if let Some(key) = &self.shared_key {
            let mut shared = self.dirs.shared();
            // Another may have the key by now, if this one was forgotten.
            if shared
                .get(key)
                .is_some_and(|held| std::ptr::eq(held.as_ptr(), self))
            {
                shared.remove(key);
            }
        }
        self.dirs.released.notify_waiters();
    }
}

/// A hold on a cache mount's directory. Clones share it; the last one lets go.
#[derive(Clone, Debug)]
pub(super) struct CacheDir(Arc<Held>);

impl CacheDir {
    /// Describes what to mount. Blocking.
    pub fn source(&self, read_only: bool) -> Result<MountSource, BuildError> {
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

/// What is asked for.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// Where directories are kept.
    pub store: Store,
    /// Below which shared directories with a base are mounted for all who share them.
    pub mount_dir: PathBuf,
    /// Under which the directory is found.
    pub key: String,
    /// On what it is made, if there is none to have.
    pub base: Option<ImmutableRef>,
    /// Who else may have it at the same time.
    pub sharing: CacheSharingOpt,
    /// What disk usage shows of one that is made.
    pub description: String,
}

impl CacheDirs {
    /// Takes a directory, making it if there is none to have. Waits for a locked one, and for a shared one that is just
    /// being let go of; dropping the future gives up.
    async fn take(&self, wanted: Wanted) -> Result<CacheDir, BuildError> {
        loop {
            let released = self.0.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            let (dirs, wanted) = (Arc::clone(&self.0), wanted.clone());
            // What is taken after the caller has gone is let go of like any other.
            if let Some(dir) = blocking(move || wanted.try_take(&dirs)).await? {
                return Ok(dir);
            }
            released.await;
        }
    }

    /// Takes several directories, all or none, and returns them in the order asked for. Whoever asks takes them in the order
    /// of their keys, so that no two can wait for each other; of a key that occurs twice the first mode counts.
    pub(super) async fn take_all(&self, wanted: Vec<Wanted>) -> Result<Vec<CacheDir>, BuildError> {
        let keys: Vec<String> = wanted.iter().map(|wanted| wanted.key.clone()).collect();
        let mut in_order = BTreeMap::new();
        for wanted in wanted {
            in_order.entry(wanted.key.clone()).or_insert(wanted);
        }
        let mut taken = BTreeMap::new();
        for (key, wanted) in in_order {
            taken.insert(key, self.take(wanted).await?);
        }
        Ok(keys.iter().filter_map(|key| taken.get(key).cloned()).collect())
    }

    /// Makes the directories of `id`, or with `nested` those that lie on a ref under that id, findable no more: who has one
    /// keeps it to the end, whoever asks from now on begins with an empty one. What nobody has is removed.
    pub(crate) async fn forget(&self, store: &Store, id: &str, nested: bool) -> Result<(), BuildError> {
        let (dirs, store, id) = (Arc::clone(&self.0), store.clone(), id.to_owned());
        blocking(move || {
            // Taking looks for a directory under this lock.
            let mut shared = dirs.shared();
            let below = format!("{id}:");
            shared.retain(|key, _| {
                let is_meant = if nested {
                    key.starts_with(&below)
                } else {
                    *key == id
                };
                !is_meant
            });
            let forgotten = store.forget_index(&format!("{INDEX}{id}"), nested);
            drop(shared);
            // Whoever waits for one of them need not.
            dirs.released.notify_waiters();
            forgotten.map_err(internal)
        })
        .await
    }
}

fn internal(error: impl std::error::Error + Send + Sync + 'static) -> BuildError {
    BuildError::from_source(ErrorKind::Internal, error)
}

impl Wanted {
    /// Takes what is there or makes it; `None` if it is worth waiting for. Blocking.
    fn try_take(self, dirs: &Arc<Shared>) -> Result<Option<CacheDir>, BuildError> {
        let mut shared = dirs.shared();
        let is_shared = self.sharing == CacheSharingOpt::Shared;
        if is_shared && let Some(held) = shared.get(&self.key) {
            return Ok(held.upgrade().map(CacheDir));
        }
        let Some(reference) = self.find_or_make()? else {
            return Ok(None);
        };
        let held = Arc::new(Held {
            reference: Some(reference),
            dirs: Arc::clone(dirs),
            shared_key: is_shared.then(|| self.key.clone()),
            mount_dir: is_shared.then_some(self.mount_dir),
            mounted: Mutex::default(),
        });
        if is_shared {
            shared.insert(self.key, Arc::downgrade(&held));
        }
        Ok(Some(CacheDir(held)))
    }

    /// Takes a directory that nobody holds; else `None` if it is locked for a while, or a new one.
    fn find_or_make(&self) -> Result<Option<MutableRef>, BuildError> {
        let index = format!("{INDEX}{}", self.key);
        let mut is_held = false;
        for id in self.store.search_index(&index).map_err(internal)? {
            match self.store.get_mutable(&id) {
                Ok(reference) => return Ok(Some(reference)),
                Err(cache::StoreError::Locked { .. }) => is_held = true,
                // It went meanwhile.
                Err(_) => {}
            }
        }
        if is_held && self.sharing == CacheSharingOpt::Locked {
            return Ok(None);
        }
        let options = RefOptions {
            description: self.description.clone(),
            record_type: RecordType::ExecCacheMount,
            retain: true,
            ..RefOptions::default()
        };
        let reference = self
            .store
            .create_mutable(self.base.as_ref(), options)
            .map_err(internal)?;
        reference.set_index(&index).map_err(internal)?;
        Ok(Some(reference))
    }
}

#[cfg(test)]
mod tests;

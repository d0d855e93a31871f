//! Many builds on few directories: nobody waits for ever, nobody has what another has, nobody finds nothing.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cache::StoreOptions;
use snapshot::Native;
use tokio::task::JoinSet;

use super::*;

/// How long a test may take before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(120);

fn open(path: &Path) -> Store {
    let content = content::Store::open(&path.join("content")).unwrap();
    let snapshotter = Native::open(&path.join("snapshots")).unwrap();
    Store::open(path, content, Arc::new(snapshotter), StoreOptions::default()).unwrap()
}

fn wanted(store: &Store, key: &str, sharing: CacheSharingOpt) -> Wanted {
    Wanted {
        store: store.clone(),
        mount_dir: PathBuf::from("/nonexistent"),
        key: key.to_owned(),
        base: None,
        sharing,
        description: format!("cache {key}"),
    }
}

/// Where the directory's files are.
fn files(dir: &CacheDir) -> PathBuf {
    match dir.source(false).unwrap() {
        MountSource::Snapshot(mounts) => mounts[0].source.clone(),
        other => panic!("{other:?}"),
    }
}

async fn take(dirs: &CacheDirs, wanted: Wanted) -> CacheDir {
    dirs.take_all(vec![wanted]).await.unwrap().remove(0)
}

/// A reproducible order of things.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// What all builds together saw.
struct World {
    store: Store,
    dirs: CacheDirs,
    /// How many have each locked directory.
    owners: Vec<AtomicUsize>,
    /// The directories that someone has alone.
    exclusive: Mutex<BTreeSet<PathBuf>>,
    /// Whether a directory was filled once.
    filled: Vec<AtomicUsize>,
    done: AtomicUsize,
}

const IDS: usize = 20;

fn sharing(id: usize) -> CacheSharingOpt {
    match id % 3 {
        0 => CacheSharingOpt::Locked,
        1 => CacheSharingOpt::Shared,
        _ => CacheSharingOpt::Private,
    }
}

impl World {
    async fn build(&self, seed: u64) {
        let mut random = Random(seed);
        for _ in 0..10 {
            let mut ids: Vec<usize> = Vec::new();
            for _ in 0..=random.below(5) {
                ids.push(random.below(IDS));
            }
            let all = ids
                .iter()
                .map(|id| wanted(&self.store, &format!("id{id}"), sharing(*id)));
            let taking = self.dirs.take_all(all.collect());
            let patience = if random.below(3) == 0 {
                random.below(6)
            } else {
                usize::MAX
            };
            let taken = tokio::select! {
                biased;
                taken = taking => taken.unwrap(),
                () = give_up_after(patience) => continue,
            };
            let unique: BTreeSet<usize> = ids.iter().copied().collect();
            self.enter(&ids, &unique, &taken);
            for _ in 0..random.below(4) {
                tokio::task::yield_now().await;
            }
            self.leave(&ids, &unique, &taken);
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn enter(&self, ids: &[usize], unique: &BTreeSet<usize>, taken: &[CacheDir]) {
        assert_eq!(ids.len(), taken.len());
        for id in unique {
            let dir = &taken[ids.iter().position(|known| known == id).unwrap()];
            let path = files(dir);
            if sharing(*id) != CacheSharingOpt::Shared {
                assert!(
                    self.exclusive.lock().unwrap().insert(path.clone()),
                    "{path:?} has two owners"
                );
            }
            if sharing(*id) == CacheSharingOpt::Locked {
                assert_eq!(
                    self.owners[*id].fetch_add(1, Ordering::SeqCst),
                    0,
                    "id{id} has two owners"
                );
            }
            if sharing(*id) != CacheSharingOpt::Private {
                let mark = path.join("mark");
                let was_filled = self.filled[*id].load(Ordering::SeqCst) > 0;
                assert!(!was_filled || mark.exists(), "id{id} is empty again");
                std::fs::write(mark, b"").unwrap();
                self.filled[*id].fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    fn leave(&self, ids: &[usize], unique: &BTreeSet<usize>, taken: &[CacheDir]) {
        for id in unique {
            let path = files(&taken[ids.iter().position(|known| known == id).unwrap()]);
            if sharing(*id) != CacheSharingOpt::Shared {
                self.exclusive.lock().unwrap().remove(&path);
            }
            if sharing(*id) == CacheSharingOpt::Locked {
                self.owners[*id].fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
}

async fn give_up_after(turns: usize) {
    for _ in 0..turns {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_builds_share_few_directories() {
    let dir = tempfile::tempdir().unwrap();
    let zeros = || (0..IDS).map(|_| AtomicUsize::new(0)).collect();
    let world = Arc::new(World {
        store: open(dir.path()),
        dirs: CacheDirs::default(),
        owners: zeros(),
        exclusive: Mutex::default(),
        filled: zeros(),
        done: AtomicUsize::new(0),
    });
    let mut builds = JoinSet::new();
    for seed in 0..50 {
        let world = Arc::clone(&world);
        builds.spawn(async move { world.build(seed).await });
    }
    let all = async {
        while let Some(build) = builds.join_next().await {
            build.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, all)
        .await
        .expect("no build waits for ever");
    assert!(
        world.done.load(Ordering::Relaxed) > 100,
        "most builds got what they wanted"
    );
    // What was being taken for those who gave up is let go of a little later.
    let drained = async {
        loop {
            let released = world.dirs.0.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            if world.dirs.0.shared().is_empty() {
                break;
            }
            released.await;
        }
    };
    tokio::time::timeout(PATIENCE, drained)
        .await
        .expect("nothing is held any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_that_ignores_the_cache_begins_with_an_empty_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (store, dirs) = (open(dir.path()), CacheDirs::default());
    for sharing in [CacheSharingOpt::Shared, CacheSharingOpt::Locked] {
        let old = take(&dirs, wanted(&store, "a", sharing)).await;
        let other = take(&dirs, wanted(&store, "ab", sharing)).await;
        for dir in [&old, &other] {
            std::fs::write(files(dir).join("mark"), b"").unwrap();
        }
        drop(other);
        dirs.forget(&store, "a", false).await.unwrap();
        // Its holder keeps it, and nobody waits for that.
        let new = take(&dirs, wanted(&store, "a", sharing)).await;
        assert!(files(&old).join("mark").exists());
        assert!(!files(&new).join("mark").exists());
        let gone = files(&old);
        drop((old, new));
        let other = take(&dirs, wanted(&store, "ab", sharing)).await;
        assert!(
            files(&other).join("mark").exists(),
            "another id is none of its business"
        );
        assert_eq!(store.search_index("cache-dir:a").unwrap().len(), 1);
        // Waits until what was removed is deleted.
        store
            .prune(&[], &mut |_| std::ops::ControlFlow::Continue(()))
            .unwrap();
        assert!(
            !gone.join("mark").exists(),
            "nobody can find it, so it is removed"
        );
        drop(other);
        dirs.forget(&store, "a", false).await.unwrap();
        dirs.forget(&store, "ab", false).await.unwrap();
    }
}

#[tokio::test]
async fn directories_on_a_ref_are_forgotten_by_id() {
    let dir = tempfile::tempdir().unwrap();
    let (store, dirs) = (open(dir.path()), CacheDirs::default());
    for key in ["a:base", "a", "a2:base"] {
        take(&dirs, wanted(&store, key, CacheSharingOpt::Shared)).await;
    }
    dirs.forget(&store, "a", true).await.unwrap();
    let left = |key: &str| store.search_index(&format!("cache-dir:{key}")).unwrap().len();
    assert_eq!([left("a:base"), left("a"), left("a2:base")], [0, 1, 1]);
}

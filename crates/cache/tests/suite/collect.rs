//! Garbage collection and holds on blobs.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use cache::{ImmutableRef, PruneOptions, RecordType, RefOptions, Store, UsageRecord};
use proptest::prelude::*;

use crate::fixture::*;

fn prune(store: &Store, options: PruneOptions) -> Vec<UsageRecord> {
    let mut removed = Vec::new();
    let mut note = |record| {
        removed.push(record);
        ControlFlow::Continue(())
    };
    store.prune(&[options], &mut note).unwrap();
    removed
}

fn names(records: &[UsageRecord]) -> Vec<&str> {
    records.iter().map(|record| record.description.as_str()).collect()
}

/// A step that stays without a handle.
fn kept(store: &Store, parent: Option<&ImmutableRef>, name: &str) -> ImmutableRef {
    let reference = step(store, parent, name);
    reference.finalize().unwrap();
    reference.retain();
    reference
}

#[test]
fn children_go_before_parents_and_holds_protect_both() {
    let dir = Dir::new();
    let store = dir.open();
    let a = kept(&store, None, "a");
    let b = kept(&store, Some(&a), "b");
    let c = kept(&store, Some(&b), "c");
    let other = kept(&store, Some(&a), "other");
    drop((a, c, other));
    let removed = prune(&store, PruneOptions::default());
    assert_eq!(
        names(&removed).into_iter().collect::<BTreeSet<_>>(),
        BTreeSet::from(["c", "other"])
    );
    assert_eq!(listed(&store), ["a", "b"]);
    assert_eq!(store.snapshotter().list().len(), 2);
    drop(b);
    assert_eq!(names(&prune(&store, PruneOptions::default())), ["b", "a"]);
    assert_eq!(store.snapshotter().list(), []);
}

#[test]
fn filters_and_types_select() {
    let dir = Dir::new();
    let store = dir.open();
    let make = |name: &str, record_type| {
        let reference = store
            .create_mutable(
                None,
                RefOptions {
                    record_type,
                    ..retained(name)
                },
            )
            .unwrap();
        drop(reference);
    };
    make("mount", RecordType::ExecCacheMount);
    make("frontend", RecordType::Frontend);
    make("internal", RecordType::Internal);
    drop(kept(&store, None, "step"));
    let filter = vec!["type==exec.cachemount".to_owned()];
    assert_eq!(
        names(&prune(
            &store,
            PruneOptions {
                filter,
                ..PruneOptions::default()
            }
        )),
        ["mount"]
    );
    let keep_duration = Duration::from_secs(3600);
    assert_eq!(
        prune(
            &store,
            PruneOptions {
                keep_duration,
                ..PruneOptions::default()
            }
        ),
        []
    );
    assert_eq!(names(&prune(&store, PruneOptions::default())), ["step"]);
    let all = prune(
        &store,
        PruneOptions {
            all: true,
            ..PruneOptions::default()
        },
    );
    assert_eq!(
        names(&all).into_iter().collect::<BTreeSet<_>>(),
        BTreeSet::from(["frontend", "internal"])
    );
    assert!(
        store
            .prune(
                &[PruneOptions {
                    filter: vec!["=".into()],
                    ..PruneOptions::default()
                }],
                &mut |_| ControlFlow::Continue(())
            )
            .is_err()
    );
}

#[test]
fn a_cap_is_met_even_through_chains() {
    let dir = Dir::new();
    let store = dir.open();
    let mut last = None;
    for number in 0..6 {
        let name = format!("s{number}");
        let reference = store.create_mutable(last.as_ref(), described(&name)).unwrap();
        write(&reference, &name, &"x".repeat(200_000));
        let reference = reference.commit().unwrap();
        reference.finalize().unwrap();
        reference.retain();
        last = Some(reference);
    }
    drop(last);
    store.flush().unwrap();
    let metadata = dir.path().join("metadata.redb").metadata().unwrap().blocks() * 512;
    // The native backend copies: sizes are 0.2 to 1.2 MB, 4.2 MB in sum.
    let removed = prune(
        &store,
        PruneOptions {
            max_used_bytes: metadata + 1_300_000,
            ..PruneOptions::default()
        },
    );
    assert_eq!(names(&removed), ["s5", "s4", "s3"]);
    let removed = prune(
        &store,
        PruneOptions {
            max_used_bytes: 1,
            reserved_bytes: metadata + 700_000,
            ..PruneOptions::default()
        },
    );
    assert_eq!(names(&removed), ["s2"]);
}

#[test]
fn what_refs_share_is_counted_once() {
    let dir = Dir::new();
    let store = dir.open();
    let tar = tar_layer("a", &"x".repeat(100_000));
    let shared = layer_blob(&tar, &[]);
    let digest = put(&store, &tar);
    let image = |layers: &[cache::LayerBlob]| {
        store
            .from_blob_chain(layers, &retained("image"))
            .unwrap()
            .unwrap()
    };
    let below = layer_blob(&tar_layer("b", "1"), &["r"]);
    let (first, second) = (
        image(std::slice::from_ref(&shared)),
        image(&[below, shared.clone()]),
    );
    let total = || -> u64 {
        let records = store.disk_usage(&cache::UsageOptions::default()).unwrap();
        records.iter().map(|record| record.size_bytes).sum()
    };
    let size = shared.descriptor.size;
    assert_eq!(total(), size);
    let filter = vec![format!("id=={}", first.id())];
    drop(first);
    let options = PruneOptions {
        filter,
        ..PruneOptions::default()
    };
    assert_eq!(prune(&store, options).len(), 1);
    // It counts for the other one now, whichever it counted for before.
    assert_eq!(total(), size);
    assert!(store.content().exists(&digest).unwrap());
    drop(second);
}

#[test]
fn pruning_stops_when_told() {
    let dir = Dir::new();
    let store = dir.open();
    for name in ["a", "b", "c"] {
        drop(kept(&store, None, name));
    }
    store
        .prune(&[PruneOptions::default(), PruneOptions::default()], &mut |_| {
            ControlFlow::Break(())
        })
        .unwrap();
    assert_eq!(listed(&store).len(), 2);
}

#[test]
fn blobs_live_as_long_as_something_holds_them() {
    let dir = Dir::new();
    let store = dir.open();
    let settle = || {
        prune(
            &store,
            PruneOptions {
                filter: vec!["id==none".into()],
                ..PruneOptions::default()
            },
        )
    };
    let exists = |digest| store.content().exists(digest).unwrap();
    let tar = tar_layer("a", "1");
    let layer = layer_blob(&tar, &[]);
    let digest = layer.descriptor.digest;

    let pin = store.pin(&[digest]);
    put(&store, &tar);
    let second = store.pin(&[digest]);
    drop(pin);
    settle();
    assert!(exists(&digest), "a second pin holds it");
    store.retain("history/1", &[digest]).unwrap();
    drop(second);
    settle();
    assert!(exists(&digest), "a name holds it");
    assert_eq!(store.retained("history/1"), [digest]);
    assert_eq!(store.retained_names("history/"), ["history/1"]);
    let image = store
        .from_blob_chain(&[layer], &described("image"))
        .unwrap()
        .unwrap();
    store.release("history/1").unwrap();
    settle();
    assert!(exists(&digest), "a ref holds it");
    drop(image);
    assert_eq!(names(&prune(&store, PruneOptions::default())), ["image"]);
    assert!(!exists(&digest));
    assert_eq!(store.retained_names(""), Vec::<String>::new());
}

#[test]
fn what_is_shared_by_name_goes_only_with_all() {
    let dir = Dir::new();
    let store = dir.open();
    let tar = tar_layer("a", "1");
    let layer = layer_blob(&tar, &["r"]);
    store.retain("image", &[layer.descriptor.digest]).unwrap();
    drop(store.from_blob_chain(&[layer], &described("image")).unwrap());
    assert_eq!(prune(&store, PruneOptions::default()), []);
    assert!(
        prune(
            &store,
            PruneOptions {
                all: true,
                ..PruneOptions::default()
            }
        )[0]
        .shared
    );
}

/// What a random caller does.
#[derive(Clone, Debug)]
enum Action {
    Step(usize),
    Merge(usize, usize),
    Drop(usize),
    Clone(usize),
    Get(usize),
    Prune,
}

fn action() -> impl Strategy<Value = Action> {
    let any = 0..8usize;
    prop_oneof![
        3 => any.clone().prop_map(Action::Step),
        1 => (any.clone(), any.clone()).prop_map(|(a, b)| Action::Merge(a, b)),
        3 => any.clone().prop_map(Action::Drop),
        1 => any.clone().prop_map(Action::Clone),
        2 => any.prop_map(Action::Get),
        2 => Just(Action::Prune),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever happens, a held ref keeps its files, all of them.
    #[test]
    fn collection_never_takes_what_is_held(actions in prop::collection::vec(action(), 1..40)) {
        let dir = Dir::new();
        let store = dir.open();
        let mut held: Vec<(ImmutableRef, BTreeSet<String>)> = Vec::new();
        let mut known: Vec<(cache::RefId, BTreeSet<String>)> = Vec::new();
        let mut number = 0;
        let at = |index: usize, length: usize| index.checked_rem(length);
        for action in actions {
            match action {
                Action::Step(index) => {
                    let parent = at(index, held.len()).map(|index| held[index].clone());
                    number += 1;
                    let name = format!("f{number}");
                    let reference = kept(&store, parent.as_ref().map(|(parent, _)| parent), &name);
                    let mut files = parent.map(|(_, files)| files).unwrap_or_default();
                    files.insert(name);
                    known.push((reference.id().clone(), files.clone()));
                    held.push((reference, files));
                }
                Action::Merge(a, b) => {
                    let (Some(a), Some(b)) = (at(a, held.len()), at(b, held.len())) else { continue };
                    let merged = store.merge(&[held[a].0.clone(), held[b].0.clone()], described("m")).unwrap();
                    let files = held[a].1.union(&held[b].1).cloned().collect();
                    held.push((merged, files));
                }
                Action::Drop(index) => {
                    if let Some(index) = at(index, held.len()) {
                        held.swap_remove(index);
                    }
                }
                Action::Clone(index) => {
                    if let Some(index) = at(index, held.len()) {
                        held.push(held[index].clone());
                    }
                }
                Action::Get(index) => {
                    let Some(index) = at(index, known.len()) else { continue };
                    if let Ok(reference) = store.get(&known[index].0) {
                        held.push((reference, known[index].1.clone()));
                    }
                }
                Action::Prune => {
                    prune(&store, PruneOptions { all: true, ..PruneOptions::default() });
                }
            }
            for (reference, files) in &held {
                for file in files {
                    prop_assert!(read(reference, file).is_some(), "{} lost {file}", reference.id());
                }
            }
        }
        drop(held);
        prune(&store, PruneOptions { all: true, ..PruneOptions::default() });
        prop_assert_eq!(listed(&store), Vec::<String>::new());
        prop_assert_eq!(store.snapshotter().list(), []);
    }
}

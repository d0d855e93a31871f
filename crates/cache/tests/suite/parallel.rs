//! Many threads at once.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use cache::{Batch, CacheResult, PruneOptions};

use crate::fixture::*;

#[test]
fn unpacking_is_done_once_for_all_who_ask() {
    let dir = Dir::new();
    let store = dir.open();
    let tars: Vec<Vec<u8>> = (0..5)
        .map(|number| tar_layer(&format!("f{number}"), "x"))
        .collect();
    let layers: Vec<_> = tars.iter().map(|tar| layer_blob(tar, &[])).collect();
    for tar in &tars {
        put(&store, tar);
    }
    let image = store
        .from_blob_chain(&layers, &described("image"))
        .unwrap()
        .unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let image = store
                    .from_blob_chain(&layers, &described("image"))
                    .unwrap()
                    .unwrap();
                image.unpack().unwrap();
                assert!(read(&image, "f0").is_some());
            });
        }
    });
    assert_eq!(store.snapshotter().list().len(), 5);
    assert!(!image.is_lazy());
}

/// Builds, loads and records run while garbage is collected all the time.
#[test]
fn collection_runs_beside_builds() {
    let dir = Dir::new();
    let store = dir.open();
    let tar = tar_layer("base", "x");
    let layer = layer_blob(&tar, &[]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let all = PruneOptions {
                all: true,
                ..PruneOptions::default()
            };
            while !stop.load(Ordering::Relaxed) {
                store
                    .prune(std::slice::from_ref(&all), &mut |_| ControlFlow::Continue(()))
                    .unwrap();
            }
        });
        let builders: Vec<_> = (0..3)
            .map(|builder| {
                let (store, tar, layer) = (&store, &tar, &layer);
                scope.spawn(move || {
                    for round in 0..15 {
                        // As a pull does: hold, look, fetch, unpack.
                        let pin = store.pin(&[layer.descriptor.digest]);
                        if !store.content().exists(&layer.descriptor.digest).unwrap() {
                            put(store, tar);
                        }
                        let layers = std::slice::from_ref(layer);
                        let image = store
                            .from_blob_chain(layers, &described("image"))
                            .unwrap()
                            .unwrap();
                        drop(pin);
                        image.unpack().unwrap();
                        let name = format!("b{builder}-{round}");
                        let made = step(store, Some(&image), &name);
                        let mut batch = Batch::new();
                        let created_at = std::time::SystemTime::now();
                        let result = CacheResult {
                            id: made.id().to_string(),
                            refs: vec![made.id().clone()],
                            created_at,
                        };
                        batch.result(name.clone(), result);
                        store.records().apply(batch).unwrap();
                        drop(image);
                        let made_id = made.id().clone();
                        assert!(read(&made, "base").is_some() && read(&made, &name).is_some());
                        drop(made);
                        // A hit is whole, a miss leaves no record.
                        match store.get(&made_id) {
                            Ok(found) => assert!(read(&found, &name).is_some()),
                            Err(error) => {
                                assert!(error.is_not_found(), "{error}");
                                assert_eq!(store.records().results(&name).unwrap(), []);
                            }
                        }
                    }
                })
            })
            .collect();
        let built: Vec<_> = builders
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect();
        stop.store(true, Ordering::Relaxed);
        assert!(collector.join().is_ok() && built.iter().all(Result::is_ok));
    });
    check(&store);
}

//! What cached results take in memory. Alone in its program, as it measures all of the process.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::sync::Arc;
use std::time::SystemTime;

use cache::{Batch, CacheResult, ImmutableRef, RefOptions, Store, StoreOptions};
use oci::Digest;
use snapshot::Native;

/// Results made before the first look: by then the database's cache is full.
const BEFORE: usize = 400;
/// Results made between the looks.
const BETWEEN: usize = 2000;
/// What a result may take: a ref with its twin, their snapshot, and fragments of memory.
const MOST_BYTES: usize = 1300;

/// Makes the result of a step that nothing stands on yet, as the last step of a build leaves it.
fn result(store: &Store, base: &ImmutableRef, number: usize) {
    let options = RefOptions {
        description: "mount / from exec /bin/sh -c make all".to_owned(),
        ..RefOptions::default()
    };
    let made = store
        .create_mutable(Some(base), options)
        .unwrap()
        .commit()
        .unwrap();
    let mut batch = Batch::new();
    let result = CacheResult {
        id: made.id().to_string(),
        refs: vec![made.id().clone()],
        created_at: SystemTime::now(),
    };
    batch.result(Digest::sha256(number.to_string()).to_string(), result);
    store.records().apply(batch).unwrap();
}

/// Bytes of the process that no file backs.
fn anonymous_bytes() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    let kilobytes: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes * 1024
}

#[test]
fn a_cached_result_takes_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let content = content::Store::open(&dir.path().join("content")).unwrap();
    let snapshotter = Native::open(&dir.path().join("snapshots")).unwrap();
    let store = Store::open(
        dir.path(),
        content,
        Arc::new(snapshotter),
        StoreOptions::default(),
    )
    .unwrap();
    let base = store
        .create_mutable(None, RefOptions::default())
        .unwrap()
        .commit()
        .unwrap();
    for number in 0..BEFORE {
        result(&store, &base, number);
    }
    store.flush().unwrap();
    let before = anonymous_bytes();
    for number in BEFORE..BEFORE + BETWEEN {
        result(&store, &base, number);
    }
    store.flush().unwrap();
    let grown = anonymous_bytes().saturating_sub(before);
    assert!(
        grown <= BETWEEN * MOST_BYTES,
        "{} bytes per result",
        grown / BETWEEN
    );
}

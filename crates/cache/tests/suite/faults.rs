//! What someone, or a bad disk, took away: a miss, a repair or an error that says so, never other content.

use std::fs;
use std::path::PathBuf;

use cache::{ImmutableRef, StoreError, UsageOptions};
use oci::Digest;

use crate::fixture::*;

/// Removes the files of a ref's committed snapshot by hand.
fn remove_tree(dir: &Dir, reference: &ImmutableRef) {
    let key = reference.snapshot().unwrap().unwrap();
    fs::remove_dir_all(dir.path().join("snapshots/committed").join(key.as_str())).unwrap();
    reference.store().expire_checks();
}

fn blob_file(dir: &Dir, digest: &Digest) -> PathBuf {
    dir.path().join("content/blobs/sha256").join(digest.hex())
}

#[test]
fn a_step_whose_files_are_gone_is_a_miss() {
    let dir = Dir::new();
    let store = dir.open();
    let below = step(&store, None, "below");
    let above = step(&store, Some(&below), "above");
    above.finalize().unwrap();
    below.retain();
    above.retain();
    remove_tree(&dir, &below);
    let (below_id, above_id) = (below.id().clone(), above.id().clone());
    drop((below, above));
    assert!(store.get(&above_id).unwrap_err().is_not_found());
    assert!(store.get(&below_id).unwrap_err().is_not_found());
    assert_eq!(listed(&store), Vec::<String>::new());
    check(&store);
}

#[test]
fn an_image_whose_files_are_gone_is_unpacked_again() {
    let dir = Dir::new();
    let store = dir.open();
    let tars = [tar_layer("a", "1"), tar_layer("b", "2")];
    let layers: Vec<_> = tars.iter().map(|tar| layer_blob(tar, &["r"])).collect();
    for tar in &tars {
        put(&store, tar);
    }
    let image = || {
        store
            .from_blob_chain(&layers, &retained("image"))
            .unwrap()
            .unwrap()
    };
    let first = image();
    first.unpack().unwrap();
    let base = first.parents().remove(0);
    // Another step's snapshot still stands on the old one.
    let child = step(&store, Some(&first), "child");
    child.finalize().unwrap();
    remove_tree(&dir, &base);
    let id = first.id().clone();
    drop((first, base));
    let again = image();
    assert_eq!(again.id(), &id);
    again.unpack().unwrap();
    assert_eq!(read(&again, "a").as_deref(), Some("1"));
    assert_eq!(read(&again, "b").as_deref(), Some("2"));
    drop((child, again));
    store.flush().unwrap();
    drop(store);
    let store = dir.open();
    check(&store);
    let again = store.get(&id).unwrap();
    assert_eq!(read(&again, "a").as_deref(), Some("1"));
}

#[test]
fn a_cache_mount_whose_files_are_gone_is_made_anew() {
    let dir = Dir::new();
    let store = dir.open();
    let mount = store.create_mutable(None, retained("mount")).unwrap();
    let id = mount.id().clone();
    drop(mount);
    fs::remove_dir_all(dir.path().join("snapshots/active").join(id.as_str())).unwrap();
    assert!(store.get_mutable(&id).unwrap_err().is_not_found());
    assert!(store.disk_usage(&UsageOptions::default()).unwrap().is_empty());
}

#[test]
fn a_damaged_blob_is_dropped_and_fetched_again() {
    let dir = Dir::new();
    let store = dir.open();
    let tar = tar_layer("a", "right");
    let layer = layer_blob(&tar, &["r"]);
    let image = store
        .from_blob_chain(std::slice::from_ref(&layer), &retained("image"))
        .unwrap()
        .unwrap();
    let digest = put(&store, &tar);
    let mut damaged = tar.clone();
    damaged[512] ^= 1;
    fs::write(blob_file(&dir, &digest), damaged).unwrap();
    assert!(matches!(image.unpack(), Err(StoreError::Lazy { digests, .. }) if digests == [digest]));
    assert_eq!(image.missing_blobs().unwrap()[0].descriptor.digest, digest);
    put(&store, &tar);
    image.unpack().unwrap();
    assert_eq!(read(&image, "a").as_deref(), Some("right"));
    drop(image);
    check(&store);
}

#[test]
fn an_image_that_lies_keeps_its_blob() {
    let dir = Dir::new();
    let store = dir.open();
    let tar = tar_layer("a", "1");
    let mut layer = layer_blob(&tar, &[]);
    layer.diff_id = Digest::sha256("other");
    let digest = put(&store, &tar);
    let image = store
        .from_blob_chain(&[layer], &described("image"))
        .unwrap()
        .unwrap();
    assert!(matches!(image.unpack(), Err(StoreError::WrongDiffId { .. })));
    assert!(store.content().exists(&digest).unwrap());
}

#[test]
fn a_lost_blob_of_a_step_is_packed_again() {
    let dir = Dir::new();
    let store = dir.open();
    let reference = step(&store, None, "a");
    let tar = tar_layer("a", "a");
    let layer = layer_blob(&tar, &[]);
    let pin = store.pin(&[layer.descriptor.digest]);
    let digest = put(&store, &tar);
    reference
        .set_blob(layer.diff_id, layer.descriptor.clone(), Vec::new(), true)
        .unwrap();
    drop(pin);
    assert_eq!(reference.usable_blobs().unwrap().len(), 1);
    fs::remove_file(blob_file(&dir, &digest)).unwrap();
    assert_eq!(reference.usable_blobs().unwrap(), []);
    assert_eq!(reference.blobs(), []);
    // One that can be fetched is not lost.
    let places = vec![provider("r")];
    reference
        .set_blob(layer.diff_id, layer.descriptor, places, true)
        .unwrap();
    assert_eq!(reference.usable_blobs().unwrap().len(), 1);
}

//! Layers into snapshots and out of them.

use std::fs;

use layer::{ApplyOptions, DiffOptions};
use snapshot::{LayerError, apply_layer, diff_layer};

use crate::support::*;

fn diff(bench: &Bench, lower: Option<&str>, upper: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let (lower, upper) = (lower.map(key), key(upper));
    diff_layer(
        &*bench.snapshotter,
        lower.as_ref(),
        &upper,
        &mut out,
        &DiffOptions::default(),
    )
    .unwrap();
    out
}

fn apply(bench: &Bench, name: &str, parent: Option<&str>, layer: &[u8]) -> layer::Applied {
    let active = key("applying");
    bench
        .snapshotter
        .prepare(&active, parent.map(key).as_ref())
        .unwrap();
    let applied = apply_layer(&*bench.snapshotter, &active, layer, ApplyOptions::default()).unwrap();
    bench.snapshotter.commit(&key(name), &active).unwrap();
    applied
}

fn chain(bench: &Bench) {
    bench.commit("one", None, |root| {
        for name in ["kept", "gone", "dir/a", "dir/b", "opaque/old", "was-dir/x"] {
            write(root.join(name), "1");
        }
    });
    bench.commit("two", Some("one"), |root| {
        fs::remove_file(root.join("gone")).unwrap();
        write(root.join("dir/c"), "2");
        fs::remove_dir_all(root.join("opaque")).unwrap();
        write(root.join("opaque/new"), "2");
        fs::remove_dir_all(root.join("was-dir")).unwrap();
        write(root.join("was-dir"), "2");
    });
    bench.commit("three", Some("two"), |root| {
        fs::rename(root.join("dir/a"), root.join("moved")).unwrap();
        fs::remove_file(root.join("dir/c")).unwrap();
    });
}

pub fn layers_go_in_and_out(bench: &mut Bench) {
    chain(bench);
    let layers = [
        diff(bench, None, "one"),
        diff(bench, Some("one"), "two"),
        diff(bench, Some("two"), "three"),
    ];
    let mut parent = None;
    for (layer, name) in layers.iter().zip(["copy-one", "copy-two", "copy-three"]) {
        let applied = apply(bench, name, parent, layer);
        assert_eq!(applied.diff_id, oci_digest(layer));
        parent = Some(name);
    }
    for (name, copy) in [("one", "copy-one"), ("two", "copy-two"), ("three", "copy-three")] {
        assert_eq!(bench.tree(name), bench.tree(copy));
    }
    assert!(matches!(
        apply_layer(
            &*bench.snapshotter,
            &key("one"),
            &*layers[0],
            ApplyOptions::default()
        ),
        Err(LayerError::Snapshot(snapshot::SnapshotError::WrongKind { .. }))
    ));
}

fn oci_digest(bytes: &[u8]) -> oci::Digest {
    oci::Digest::sha256(bytes)
}

pub fn a_layer_deletes_what_is_below(bench: &mut Bench) {
    chain(bench);
    let second = diff(bench, Some("one"), "two");
    apply(bench, "again", Some("one"), &second);
    let tree = bench.tree("again");
    assert_eq!(
        names(&tree),
        [
            "dir",
            "dir/a",
            "dir/b",
            "dir/c",
            "kept",
            "opaque",
            "opaque/new",
            "was-dir"
        ]
    );
}

pub fn differences_of_strangers_are_worked_out(bench: &mut Bench) {
    chain(bench);
    let jump = diff(bench, Some("one"), "three");
    apply(bench, "jumped", Some("one"), &jump);
    assert_eq!(bench.tree("jumped"), bench.tree("three"));
    let back = diff(bench, Some("three"), "one");
    apply(bench, "back", Some("three"), &back);
    assert_eq!(bench.tree("back"), bench.tree("one"));
    let whole = diff(bench, None, "three");
    apply(bench, "whole", None, &whole);
    assert_eq!(bench.tree("whole"), bench.tree("three"));
}

pub fn a_diff_is_what_was_applied(bench: &mut Bench) {
    chain(bench);
    let (first, second) = (diff(bench, None, "one"), diff(bench, Some("one"), "two"));
    apply(bench, "a", None, &first);
    apply(bench, "b", Some("a"), &second);
    assert_eq!(
        diff(bench, None, "a"),
        first,
        "unpacking and packing gives the same bytes"
    );
    let names = |layer: &[u8]| {
        let mut reader = layer::tar::Reader::new(layer);
        let mut names = Vec::new();
        while let Some(header) = reader.next_entry().unwrap() {
            names.push(String::from_utf8(header.name).unwrap());
        }
        names
    };
    assert_eq!(names(&diff(bench, Some("a"), "b")), names(&second));
}

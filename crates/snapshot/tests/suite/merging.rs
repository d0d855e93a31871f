//! Merges.

use std::fs;

use layer::{ApplyOptions, DiffOptions};
use snapshot::{Diff, Kind, SnapshotError, apply_layer, diff_layer};

use crate::support::*;

fn step(lower: Option<&str>, upper: Option<&str>) -> Diff {
    Diff {
        lower: lower.map(key),
        upper: upper.map(key),
    }
}

/// Does by layers what a merge does by links.
fn unpack(bench: &Bench, name: &str, diffs: &[Diff]) {
    let mut parent = None;
    for (index, diff) in diffs.iter().enumerate() {
        let mut layer = Vec::new();
        let empty = key("empty");
        let upper = diff.upper.as_ref().unwrap_or(&empty);
        diff_layer(
            &*bench.snapshotter,
            diff.lower.as_ref(),
            upper,
            &mut layer,
            &DiffOptions::default(),
        )
        .unwrap();
        let active = key("unpacking");
        bench.snapshotter.prepare(&active, parent.as_ref()).unwrap();
        apply_layer(&*bench.snapshotter, &active, &*layer, ApplyOptions::default()).unwrap();
        let committed = if index == diffs.len() - 1 {
            key(name)
        } else {
            key(&format!("{name}-{index}"))
        };
        bench.snapshotter.commit(&committed, &active).unwrap();
        parent = Some(committed);
    }
}

fn fixture(bench: &Bench) {
    bench.commit("empty", None, |_| ());
    bench.commit("a", None, |root| {
        write(root.join("both"), "a");
        write(root.join("dir/a"), "a");
        write(root.join("turns"), "a");
        fs::hard_link(root.join("dir/a"), root.join("dir/hard")).unwrap();
    });
    bench.commit("b", None, |root| {
        write(root.join("both"), "b");
        write(root.join("dir/b"), "b");
        write(root.join("turns/into/dir"), "b");
    });
    bench.commit("b2", Some("b"), |root| {
        fs::remove_file(root.join("both")).unwrap();
        fs::remove_dir_all(root.join("turns")).unwrap();
        write(root.join("turns"), "b2");
        fs::remove_dir_all(root.join("dir")).unwrap();
        write(root.join("dir/opaque"), "b2");
    });
    bench.commit("a2", Some("a"), |root| write(root.join("top"), "a2"));
}

pub fn merging_looks_like_unpacking_layers(bench: &mut Bench) {
    fixture(bench);
    let cases = [
        vec![step(None, Some("a")), step(None, Some("b"))],
        vec![step(None, Some("b")), step(None, Some("a"))],
        vec![step(None, Some("a")), step(Some("b"), Some("b2"))],
        vec![
            step(None, Some("a")),
            step(Some("a"), Some("a2")),
            step(None, Some("b2")),
        ],
        vec![step(Some("b"), Some("b2")), step(Some("b"), Some("b2"))],
        vec![
            step(None, Some("b2")),
            step(Some("a2"), Some("b")),
            step(None, Some("a2")),
        ],
    ];
    for (index, diffs) in cases.iter().enumerate() {
        let (merged, unpacked) = (format!("merged-{index}"), format!("unpacked-{index}"));
        bench.snapshotter.merge(&key(&merged), diffs).unwrap();
        unpack(bench, &unpacked, diffs);
        assert_eq!(bench.tree(&merged), bench.tree(&unpacked), "case {index}");
        assert_eq!(
            bench.snapshotter.stat(&key(&merged)).unwrap().kind,
            Kind::Committed
        );
    }
    // Nothing that was merged has changed.
    assert_eq!(bench.tree("a")["both"], bench.tree("merged-1")["both"]);
    assert!(
        bench
            .snapshotter
            .merge(&key("merged-0"), &cases[0])
            .unwrap_err()
            .is_exists()
    );
    assert!(
        bench
            .snapshotter
            .merge(&key("x"), &[step(None, Some("none"))])
            .unwrap_err()
            .is_not_found()
    );
    bench.snapshotter.prepare(&key("active"), None).unwrap();
    assert!(matches!(
        bench.snapshotter.merge(&key("x"), &[step(None, Some("active"))]),
        Err(SnapshotError::WrongKind { .. })
    ));
    assert!(!bench.keys().iter().any(|key| key.starts_with("merging")));
}

pub fn merging_keeps_whole_chains(bench: &mut Bench) {
    fixture(bench);
    bench.snapshotter.sync().unwrap();
    let diffs = [
        step(None, Some("a")),
        step(Some("a"), Some("a2")),
        step(None, Some("b")),
    ];
    bench.snapshotter.merge(&key("m"), &diffs).unwrap();
    let stat = bench.snapshotter.stat(&key("m")).unwrap();
    let usage = bench.snapshotter.usage(&key("m")).unwrap();
    if bench.snapshotter.name() == "overlayfs" {
        assert_eq!(stat.parent, Some(key("a2")));
    } else {
        assert_eq!(stat.parent, None);
    }
    // Directories only: the files belong to what was merged.
    assert_eq!(usage.inodes, 4, "{usage:?}");
    bench.reopen();
    assert_eq!(bench.snapshotter.usage(&key("m")).unwrap(), usage);
    // A snapshot on top changes neither the merge nor what was merged.
    bench.commit("on-top", Some("m"), |root| write(root.join("both"), "changed"));
    assert!(bench.tree("m")["both"].ends_with(" b") && bench.tree("b")["both"].ends_with(" b"));
}

pub fn deletions_merge(bench: &mut Bench) {
    fixture(bench);
    // All of "a" taken away again, from something else that has it too.
    let diffs = [
        step(None, Some("a")),
        step(None, Some("b")),
        step(Some("a"), None),
    ];
    bench.snapshotter.merge(&key("m"), &diffs).unwrap();
    assert!(bench.tree("m").is_empty(), "{:?}", bench.tree("m"));
}

pub fn a_merge_of_nothing_is_empty(bench: &mut Bench) {
    bench.snapshotter.merge(&key("m"), &[]).unwrap();
    assert!(bench.tree("m").is_empty());
    bench.snapshotter.merge(&key("n"), &[step(None, None)]).unwrap();
    assert!(bench.tree("n").is_empty());
}

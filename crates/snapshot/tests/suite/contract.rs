//! The contract.

use std::fs;

use snapshot::{Kind, SnapshotError, SnapshotStat};

use crate::support::*;

pub fn life_of_a_snapshot(bench: &mut Bench) {
    bench.commit("one", None, |root| {
        write(root.join("kept"), "1");
        write(root.join("dir/gone"), "1");
        write(root.join("changed"), "1");
    });
    bench.commit("two", Some("one"), |root| {
        assert_eq!(fs::read_to_string(root.join("kept")).unwrap(), "1");
        fs::remove_file(root.join("dir/gone")).unwrap();
        write(root.join("changed"), "2");
        write(root.join("new"), "2");
    });
    assert_eq!(names(&bench.tree("one")), ["changed", "dir", "dir/gone", "kept"]);
    let two = bench.tree("two");
    assert_eq!(names(&two), ["changed", "dir", "kept", "new"]);
    assert!(two["changed"].ends_with(" 2"));
    assert!(
        bench.tree("one")["changed"].ends_with(" 1"),
        "a parent never changes"
    );
    let stat = bench.snapshotter.stat(&key("two")).unwrap();
    assert_eq!(
        stat,
        SnapshotStat {
            key: key("two"),
            kind: Kind::Committed,
            parent: Some(key("one"))
        }
    );
    assert_eq!(bench.keys(), ["one", "two"]);
    bench.snapshotter.remove(&key("two")).unwrap();
    bench.snapshotter.remove(&key("one")).unwrap();
    assert!(bench.keys().is_empty());
}

pub fn keys_and_kinds_are_checked(bench: &mut Bench) {
    let s = &bench.snapshotter;
    s.prepare(&key("a"), None).unwrap();
    assert!(s.prepare(&key("a"), None).unwrap_err().is_exists());
    assert!(s.view(&key("a"), None).unwrap_err().is_exists());
    assert!(
        s.prepare(&key("b"), Some(&key("none")))
            .unwrap_err()
            .is_not_found()
    );
    assert!(matches!(
        s.prepare(&key("b"), Some(&key("a"))),
        Err(SnapshotError::WrongKind { .. })
    ));
    assert!(s.mounts(&key("none")).unwrap_err().is_not_found());
    assert!(s.commit(&key("x"), &key("none")).unwrap_err().is_not_found());
    assert!(s.remove(&key("none")).unwrap_err().is_not_found());
    assert!(s.stat(&key("none")).unwrap_err().is_not_found());
    s.commit(&key("x"), &key("a")).unwrap();
    assert!(s.stat(&key("a")).unwrap_err().is_not_found());
    assert!(matches!(
        s.commit(&key("y"), &key("x")),
        Err(SnapshotError::WrongKind { .. })
    ));
    assert!(matches!(
        s.mounts(&key("x")),
        Err(SnapshotError::WrongKind { .. })
    ));
    s.prepare(&key("a"), Some(&key("x"))).unwrap();
    assert!(s.commit(&key("x"), &key("a")).unwrap_err().is_exists());
    s.commit(&key("a"), &key("a")).unwrap();
    assert_eq!(s.stat(&key("a")).unwrap().kind, Kind::Committed);
    assert!(
        fs::read_dir(bench.root.join("new")).unwrap().next().is_none(),
        "nothing half made is left"
    );
}

pub fn parents_are_held(bench: &mut Bench) {
    let s = &bench.snapshotter;
    s.prepare(&key("a"), None).unwrap();
    s.commit(&key("base"), &key("a")).unwrap();
    s.prepare(&key("child"), Some(&key("base"))).unwrap();
    s.view(&key("look"), Some(&key("base"))).unwrap();
    for (children, next) in [(2, "child"), (1, "look")] {
        match s.remove(&key("base")) {
            Err(SnapshotError::HasChildren { children: found, .. }) => assert_eq!(found, children),
            other => panic!("{other:?}"),
        }
        s.remove(&key(next)).unwrap();
    }
    assert!(s.prepare(&key("fails"), Some(&key("none"))).is_err());
    assert!(s.prepare(&key("base"), Some(&key("base"))).is_err());
    s.remove(&key("base")).unwrap();
}

pub fn views_are_read_only(bench: &mut Bench) {
    bench.commit("one", None, |root| write(root.join("a"), "1"));
    bench.commit("two", Some("one"), |root| write(root.join("b"), "2"));
    for (view, parent, expected) in [
        ("v0", None, vec![]),
        ("v1", Some(key("one")), vec!["a"]),
        ("v2", Some(key("two")), vec!["a", "b"]),
    ] {
        bench.snapshotter.view(&key(view), parent.as_ref()).unwrap();
        let mounts = bench.snapshotter.mounts(&key(view)).unwrap();
        assert!(mounts.iter().all(snapshot::Mount::is_read_only));
        bench.mounted(&mounts, |root| {
            assert_eq!(names(&describe(root)), expected);
            assert!(fs::write(root.join("x"), "").is_err());
        });
        assert!(bench.snapshotter.commit(&key("c"), &key(view)).is_err());
        bench.snapshotter.remove(&key(view)).unwrap();
    }
    let nothing = bench.snapshotter.read_mounts(None).unwrap();
    bench.mounted(&nothing, |root| assert!(describe(root).is_empty()));
}

pub fn parallel_steps_on_one_parent(bench: &mut Bench) {
    bench.commit("base", None, |root| write(root.join("base"), "1"));
    let shared = &*bench;
    std::thread::scope(|scope| {
        for index in 0..6 {
            scope.spawn(move || {
                let name = format!("step-{index}");
                shared.commit(&name, Some("base"), |root| write(root.join(&name), &name));
                assert_eq!(names(&shared.tree(&name)), ["base", name.as_str()]);
            });
        }
    });
    assert_eq!(bench.keys().len(), 7);
}

pub fn survives_reopening(bench: &mut Bench) {
    bench.commit("one", None, |root| write(root.join("a"), "1"));
    bench.commit("two", Some("one"), |root| write(root.join("b"), "2"));
    bench
        .snapshotter
        .prepare(&key("active"), Some(&key("two")))
        .unwrap();
    bench.mounted(&bench.snapshotter.mounts(&key("active")).unwrap(), |root| {
        write(root.join("c"), "3")
    });
    bench.snapshotter.view(&key("look"), Some(&key("one"))).unwrap();
    bench.snapshotter.sync().unwrap();
    let before = bench.snapshotter.list();
    bench.reopen();
    assert_eq!(bench.snapshotter.list(), before);
    bench.mounted(&bench.snapshotter.mounts(&key("active")).unwrap(), |root| {
        assert_eq!(names(&describe(root)), ["a", "b", "c"]);
    });
    assert!(matches!(
        bench.snapshotter.remove(&key("one")),
        Err(SnapshotError::HasChildren { children: 2, .. })
    ));
}

pub fn sweeps_what_nobody_keeps(bench: &mut Bench) {
    for (name, parent) in [
        ("a", None),
        ("b", Some("a")),
        ("c", Some("b")),
        ("d", Some("b")),
        ("e", None),
    ] {
        bench.commit(name, parent, |_| ());
    }
    bench
        .snapshotter
        .prepare(&key("active"), Some(&key("d")))
        .unwrap();
    let swept = bench.snapshotter.sweep(&|key| key.as_str() == "c").unwrap();
    let texts = |keys: &[snapshot::SnapshotKey]| keys.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&swept.removed), ["active", "e", "d"]);
    assert_eq!(texts(&swept.held), ["a", "b"]);
    assert_eq!(bench.keys(), ["a", "b", "c"]);
}

pub fn a_crash_leaves_nothing_behind(bench: &mut Bench) {
    bench.commit("one", None, |root| write(root.join("a"), "1"));
    bench.commit("two", Some("one"), |_| ());
    bench.commit("three", Some("two"), |_| ());
    // Half created, half removed, and a chain whose middle is lost.
    write(bench.root.join("new/7/fs/x"), "half");
    write(bench.root.join("trash/8/fs/x"), "half");
    fs::remove_dir_all(bench.root.join("committed/two")).unwrap();
    bench.reopen();
    assert_eq!(bench.keys(), ["one"]);
    for sub in ["new", "trash"] {
        assert!(
            fs::read_dir(bench.root.join(sub)).unwrap().next().is_none(),
            "{sub}"
        );
    }
    bench.commit("two", Some("one"), |_| ());
    bench.snapshotter.remove(&key("two")).unwrap();
    bench.snapshotter.remove(&key("one")).unwrap();
}

pub fn usage_counts_own_files_once(bench: &mut Bench) {
    bench.commit("one", None, |root| {
        write(root.join("a"), &"x".repeat(100_000));
        fs::hard_link(root.join("a"), root.join("b")).unwrap();
        let sparse = fs::File::create(root.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
    });
    bench.snapshotter.sync().unwrap();
    let usage = bench.snapshotter.usage(&key("one")).unwrap();
    assert_eq!(usage.inodes, 3, "{usage:?}");
    assert!((100_000..200_000).contains(&usage.size_bytes), "{usage:?}");
    bench.snapshotter.view(&key("look"), Some(&key("one"))).unwrap();
    assert_eq!(
        bench.snapshotter.usage(&key("look")).unwrap(),
        snapshot::Usage::default()
    );
}

pub fn the_tree_looks_the_same_through_many_parents(bench: &mut Bench) {
    let count = if bench.snapshotter.name() == "overlayfs" {
        200
    } else {
        10
    };
    for index in 0..count {
        let parent = index - 1;
        let parent = (parent >= 0).then(|| format!("layer-{parent}"));
        let active = key("active");
        bench
            .snapshotter
            .prepare(&active, parent.as_deref().map(key).as_ref())
            .unwrap();
        if index % 20 == 0 || index == count - 1 {
            bench.mounted(&bench.snapshotter.mounts(&active).unwrap(), |root| {
                write(root.join(format!("file-{index}")), "1");
            });
        }
        bench
            .snapshotter
            .commit(&key(&format!("layer-{index}")), &active)
            .unwrap();
    }
    let tree = bench.tree(&format!("layer-{}", count - 1));
    assert_eq!(tree.len(), if count == 200 { 11 } else { 2 });
}

pub fn files_removed_by_hand_are_missed(bench: &mut Bench) {
    bench.commit("one", None, |root| write(root.join("a"), "1"));
    bench.commit("two", Some("one"), |root| write(root.join("b"), "2"));
    let s = &bench.snapshotter;
    s.view(&key("view"), Some(&key("two"))).unwrap();
    for name in ["one", "two", "view"] {
        s.check(&key(name)).unwrap();
    }
    fs::remove_dir_all(bench.root.join("committed/one")).unwrap();
    // What stands on it was found with it a moment ago, and counts as found until it is to be looked at again.
    s.check(&key("two")).unwrap();
    s.expire_checks();
    for name in ["one", "two", "view"] {
        let gone = s.check(&key(name)).unwrap_err();
        assert!(
            matches!(&gone, SnapshotError::NotFound { key } if key.as_str() == "one"),
            "{gone}"
        );
    }
    assert!(s.check(&key("none")).unwrap_err().is_not_found());
    // What is left can be removed as ever.
    for name in ["view", "two", "one"] {
        s.remove(&key(name)).unwrap();
    }
    assert!(bench.keys().is_empty());
    bench.reopen();
    assert!(bench.keys().is_empty());
}

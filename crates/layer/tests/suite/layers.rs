//! Layers out of trees and back.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use layer::tar::{EntryKind, Header, Reader, Writer};
use layer::tree::{FileType, Timestamp};
use layer::{ApplyOptions, DiffError, DiffOptions, Stop, Whiteouts, apply, diff, diff_upperdir, rewrite};

use crate::support::*;

fn rich_tree(root: &Path) {
    write(root.join("a/file"), "hello");
    write(root.join("a/b/empty"), "");
    write(
        root.join("a-b"),
        "sorts between a and a/file by bytes, after by parts",
    );
    chmod(root.join("a/file"), 0o4755);
    fs::hard_link(root.join("a/file"), root.join("a/hard")).unwrap();
    fs::hard_link(root.join("a/file"), root.join("z-hard")).unwrap();
    symlink("../a/file", root.join("a/soft")).unwrap();
    symlink("x".repeat(150), root.join("long-link")).unwrap();
    let long = "d".repeat(90);
    write(root.join(&long).join(&long).join("name"), "split");
    write(root.join("e".repeat(120)), "pax path");
    write(root.join("umläut/ß"), "not ascii");
    write(root.join("sticky/x"), "1");
    chmod(root.join("sticky"), 0o1777);
    mknod(root.join("fifo"), FileType::Fifo, 0o640, (0, 0));
    mknod(root.join("null"), FileType::CharDevice, 0o666, (1, 3));
    mknod(root.join("block"), FileType::BlockDevice, 0o660, (7, 200));
    std::os::unix::fs::lchown(root.join("a/b/empty"), Some(3_000_000), Some(12)).unwrap();
    set_xattr(root.join("a/file"), "user.note", b"kept");
    set_xattr(root.join("sticky"), "user.dir", b"\0binary\xff");
    // cap_net_raw+ep, version 2
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set_xattr(root.join("a-b"), "security.capability", &capability);
    settle(root, 1_577_836_800);
    set_time(root.join("a-b"), 1_577_836_800, 123_456_789);
}

fn layer_of(lower: Option<&Path>, upper: &Path, options: &DiffOptions) -> Vec<u8> {
    let mut out = Vec::new();
    diff(lower.map(open), open(upper), &mut out, options).unwrap();
    out
}

fn names(layer: &[u8]) -> Vec<String> {
    let mut reader = Reader::new(layer);
    let mut names = Vec::new();
    while let Some(header) = reader.next_entry().unwrap() {
        names.push(String::from_utf8(header.name).unwrap());
    }
    names
}

#[test]
fn a_rich_tree_survives_the_round_trip() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::create_dir_all(&source).unwrap();
    fs::create_dir_all(&target).unwrap();
    rich_tree(&source);
    let options = DiffOptions {
        keep_nanoseconds: true,
        ..DiffOptions::default()
    };
    let layer = layer_of(None, &source, &options);
    let applied = apply(&*layer, open(&target), &ApplyOptions::default()).unwrap();
    assert_same(&source, &target);
    assert_eq!(applied.diff_id, oci::Digest::sha256(&layer));
    assert_eq!(applied.archive_bytes, layer.len() as u64);
    assert!(applied.ignored_xattrs.is_empty());
    assert_eq!(
        layer_of(None, &target, &options),
        layer,
        "writing it again gives the same bytes"
    );
}

#[test]
fn headers_are_what_another_reader_expects() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    rich_tree(dir.path());
    let layer = layer_of(None, dir.path(), &DiffOptions::default());
    let mut archive = tar::Archive::new(&*layer);
    let mut seen = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let entry = entry.unwrap();
        let name = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
        seen.insert(
            name,
            (
                entry.header().entry_type(),
                entry.header().uid().ok(),
                entry.header().mtime().unwrap(),
            ),
        );
    }
    let expected: std::collections::BTreeSet<String> = walk(dir.path())
        .iter()
        .map(|path| {
            let is_dir = fs::symlink_metadata(dir.path().join(path)).unwrap().is_dir();
            format!("{}{}", path.display(), if is_dir { "/" } else { "" })
        })
        .collect();
    assert_eq!(
        seen.keys().cloned().collect::<std::collections::BTreeSet<_>>(),
        expected
    );
    assert!(seen["a/hard"].0.is_hard_link());
    assert_eq!(seen["a-b"].2, 1_577_836_800);
}

#[test]
fn changes_become_whiteouts_and_parents_come_along() {
    let dir = tempfile::tempdir().unwrap();
    let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
    for root in [&lower, &upper] {
        write(root.join("same/deep/file"), "1");
        write(root.join("changed/file"), "1");
        settle(root, 1_000_000_000);
    }
    write(lower.join("gone/x"), "1");
    write(lower.join("same/deep/gone"), "1");
    write(lower.join("was-dir/x"), "1");
    write(lower.join("was-file"), "1");
    settle(&lower, 1_000_000_000);
    write(upper.join("changed/file"), "2");
    write(upper.join("was-dir"), "1");
    write(upper.join("was-file/y"), "1");
    settle(&upper, 1_000_000_000);
    let layer = layer_of(Some(&lower), &upper, &DiffOptions::default());
    let expected = [
        "changed/",
        "changed/file",
        ".wh.gone",
        "same/",
        "same/deep/",
        "same/deep/.wh.gone",
        "was-dir",
        "was-file/",
        "was-file/y",
    ];
    assert_eq!(names(&layer), expected);
    apply(
        &*layer,
        open(&lower),
        &ApplyOptions {
            keep_owner: true,
            ..ApplyOptions::default()
        },
    )
    .unwrap();
    assert_same(&upper, &lower);
}

#[test]
fn same_size_and_time_but_other_bytes_is_a_change() {
    let dir = tempfile::tempdir().unwrap();
    let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
    write(lower.join("file"), "one");
    write(upper.join("file"), "two");
    settle(&lower, 1_000_000_000);
    settle(&upper, 1_000_000_000);
    assert_eq!(
        names(&layer_of(Some(&lower), &upper, &DiffOptions::default())),
        ["file"]
    );
}

#[test]
fn an_unmodified_name_of_a_changed_inode_becomes_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
    write(lower.join("a"), "1");
    settle(&lower, 1_000_000_000);
    write(upper.join("a"), "1");
    fs::hard_link(upper.join("a"), upper.join("b")).unwrap();
    settle(&upper, 1_000_000_000);
    let layer = layer_of(Some(&lower), &upper, &DiffOptions::default());
    let mut reader = Reader::new(&*layer);
    let first = reader.next_entry().unwrap().unwrap();
    assert_eq!((first.kind, &*first.name), (EntryKind::Regular, &b"b"[..]));
    let second = reader.next_entry().unwrap().unwrap();
    assert_eq!(
        (second.kind, &*second.name, &*second.link),
        (EntryKind::Hardlink, &b"a"[..], &b"b"[..])
    );
}

#[test]
fn times_are_clamped_to_the_epoch() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path().join("new"), "1");
    write(dir.path().join("old"), "1");
    set_time(dir.path().join("new"), 2_000_000_000, 5);
    set_time(dir.path().join("old"), 1_000_000_000, 0);
    let options = DiffOptions {
        latest: Some(Timestamp::from_seconds(1_500_000_000)),
        ..DiffOptions::default()
    };
    let times = |layer: &[u8]| {
        let mut reader = Reader::new(layer);
        let mut times = Vec::new();
        while let Some(header) = reader.next_entry().unwrap() {
            times.push(header.mtime.seconds);
        }
        times
    };
    let clamped = layer_of(None, dir.path(), &options);
    assert_eq!(times(&clamped), [1_500_000_000, 1_000_000_000]);
    let plain = layer_of(None, dir.path(), &DiffOptions::default());
    let mut rewritten = Vec::new();
    rewrite::rewrite_timestamps(&*plain, &mut rewritten, Timestamp::from_seconds(1_500_000_000)).unwrap();
    assert_eq!(rewritten, clamped);
}

#[test]
fn a_layer_ends_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let big = fs::File::create(dir.path().join("big")).unwrap();
    // Longer than anybody waits.
    big.set_len(4 << 40).unwrap();
    let asked = AtomicUsize::new(0);
    let options = DiffOptions {
        stop: Stop::when(move || asked.fetch_add(1, Ordering::Relaxed) >= 5),
        ..DiffOptions::default()
    };
    let none: Option<OwnedFd> = None;
    let stopped = diff(none, open(dir.path()), std::io::sink(), &options);
    assert!(matches!(stopped, Err(DiffError::Stopped)), "{stopped:?}");
}

fn archive(entries: &[(Header, &[u8])]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new());
    for (header, data) in entries {
        let header = Header {
            size_bytes: data.len() as u64,
            mode: 0o755,
            ..header.clone()
        };
        writer.write_header(&header).unwrap();
        std::io::Write::write_all(&mut writer, data).unwrap();
    }
    writer.finish().unwrap()
}

fn file(name: &str) -> (Header, &'static [u8]) {
    (Header::new(EntryKind::Regular, name), b"new")
}

fn whiteout(name: &str) -> (Header, &'static [u8]) {
    (Header::new(EntryKind::Regular, name), b"")
}

fn directory(name: &str) -> (Header, &'static [u8]) {
    (Header::new(EntryKind::Directory, name), b"")
}

#[test]
fn whiteouts_remove_what_is_below_but_not_what_the_layer_brings() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "gone",
        "back",
        "opaque/old",
        "opaque/sub/old",
        "opaque/deep/er/old",
    ] {
        write(dir.path().join(name), "old");
    }
    let layer = archive(&[
        whiteout(".wh.gone"),
        file("back"),
        whiteout(".wh.back"),
        file("opaque/new"),
        file("opaque/deep/er/new"),
        whiteout("opaque/.wh..wh..opq"),
        whiteout(".wh.never-was"),
    ]);
    apply(
        &*layer,
        open(dir.path()),
        &ApplyOptions {
            keep_owner: true,
            ..ApplyOptions::default()
        },
    )
    .unwrap();
    let left: Vec<_> = walk(dir.path())
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    assert_eq!(
        left,
        [
            "back",
            "opaque",
            "opaque/deep",
            "opaque/deep/er",
            "opaque/deep/er/new",
            "opaque/new"
        ]
    );
}

#[test]
fn whiteouts_become_overlay_marks() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
    for name in ["gone", "opaque/old", "replaced", "implied/old", "twice/old"] {
        write(lower.join(name), "old");
    }
    chmod(lower.join("implied"), 0o711);
    set_xattr(lower.join("implied"), "user.note", b"inherited");
    set_time(lower.join("implied"), 1_000_000_000, 7);
    fs::create_dir(&upper).unwrap();
    let layer = archive(&[
        whiteout(".wh.gone"),
        file("opaque/new"),
        whiteout("opaque/.wh..wh..opq"),
        file("implied/new"),
        whiteout(".wh.replaced"),
        directory("replaced/"),
        directory("twice/"),
        whiteout(".wh.twice"),
    ]);
    let options = ApplyOptions {
        whiteouts: Whiteouts::Overlay,
        parents: vec![open(&lower)],
        ..ApplyOptions::default()
    };
    apply(&*layer, open(&upper), &options).unwrap();
    let gone = fs::symlink_metadata(upper.join("gone")).unwrap();
    assert_eq!((gone.mode() & 0o170_000, gone.rdev()), (0o020_000, 0));
    for name in ["opaque", "replaced", "twice"] {
        assert_eq!(
            xattr(upper.join(name), "trusted.overlay.opaque").as_deref(),
            Some(&b"y"[..]),
            "{name}"
        );
    }
    let implied = fs::metadata(upper.join("implied")).unwrap();
    assert_eq!(
        (implied.mode() & 0o7777, implied.mtime(), implied.mtime_nsec()),
        (0o711, 1_000_000_000, 7)
    );
    assert_eq!(
        xattr(upper.join("implied"), "user.note").as_deref(),
        Some(&b"inherited"[..])
    );
    // And the way back: the upper directory says what the layer said.
    let mut out = Vec::new();
    diff_upperdir(
        Some(open(&lower)),
        open(&upper),
        &mut out,
        &DiffOptions::default(),
    )
    .unwrap();
    let expected = [
        ".wh.gone",
        "implied/new",
        "opaque/",
        "opaque/new",
        "opaque/.wh.old",
        "replaced/",
        "twice/",
        "twice/.wh.old",
    ];
    let mut found = names(&out);
    found.retain(|name| name != "implied/");
    let mut sorted = expected.map(str::to_owned).to_vec();
    sorted.sort();
    found.sort();
    assert_eq!(found, sorted);
}

#[test]
fn an_upper_directory_and_two_trees_give_the_same_layer() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|name| dir.path().join(name));
    for path in [&lower, &upper, &work, &merged] {
        fs::create_dir(path).unwrap();
    }
    rich_tree(&lower);
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let options = std::ffi::CString::new(options).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    if let Err(error) = rustix::mount::mount("overlay", &merged, "overlay", flags, &*options) {
        eprintln!("skipped: cannot mount overlays: {error}");
        return;
    }
    fs::remove_file(merged.join("a-b")).unwrap();
    fs::remove_dir_all(merged.join("a")).unwrap();
    write(merged.join("a/fresh"), "2");
    write(merged.join("sticky/y"), "2");
    fs::hard_link(merged.join("sticky/y"), merged.join("sticky/z")).unwrap();
    chmod(merged.join("fifo"), 0o600);
    fs::create_dir(merged.join("empty-dir")).unwrap();
    fs::remove_file(merged.join("umläut/ß")).unwrap();
    let mut fast = Vec::new();
    diff_upperdir(
        Some(open(&lower)),
        open(&upper),
        &mut fast,
        &DiffOptions::default(),
    )
    .unwrap();
    let slow = layer_of(Some(&lower), &merged, &DiffOptions::default());
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    rich_tree(&target);
    apply(&*fast, open(&target), &ApplyOptions::default()).unwrap();
    let unmount = rustix::mount::unmount(&merged, rustix::mount::UnmountFlags::empty());
    let (mut fast, mut slow) = (names(&fast), names(&slow));
    fast.sort();
    slow.sort();
    unmount.unwrap();
    assert_eq!(fast, slow);
    assert!(!target.join("a/file").exists() && target.join("a/fresh").exists());
}

#[test]
fn holes_stay_holes() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::create_dir_all(&source).unwrap();
    fs::create_dir_all(&target).unwrap();
    let file = fs::File::create(source.join("sparse")).unwrap();
    file.set_len(8 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"data", 4 << 20).unwrap();
    let layer = layer_of(None, &source, &DiffOptions::default());
    apply(
        &*layer,
        open(&target),
        &ApplyOptions {
            keep_owner: true,
            ..ApplyOptions::default()
        },
    )
    .unwrap();
    let meta = fs::metadata(target.join("sparse")).unwrap();
    assert_eq!(meta.len(), 8 << 20);
    assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
    assert_eq!(
        fs::read(source.join("sparse")).unwrap(),
        fs::read(target.join("sparse")).unwrap()
    );
}

#[test]
fn a_bound_on_size_holds() {
    let dir = tempfile::tempdir().unwrap();
    let layer = archive(&[file("a"), file("b")]);
    let root: OwnedFd = open(dir.path());
    let options = ApplyOptions {
        limit_bytes: Some(5),
        keep_owner: true,
        ..ApplyOptions::default()
    };
    assert!(matches!(
        apply(&*layer, root.as_fd(), &options),
        Err(layer::ApplyError::TooLarge { limit_bytes: 5 })
    ));
}

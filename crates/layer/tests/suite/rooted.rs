//! Rooted access.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use layer::tree::{Attributes, FileType, Root, Timestamp, at};

use crate::support::*;

fn fixture() -> (tempfile::TempDir, Root) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    write(root.join("etc/passwd"), "root:x:0:0\n");
    write(dir.path().join("secret"), "secret");
    symlink("/etc", root.join("abs")).unwrap();
    symlink("../../../etc", root.join("etc/up")).unwrap();
    symlink("missing/further", root.join("dangling")).unwrap();
    symlink("loop", root.join("loop")).unwrap();
    let handle = Root::open(&root).unwrap();
    (dir, handle)
}

#[test]
fn paths_resolve_as_after_chroot() {
    let (_dir, root) = fixture();
    for (path, expected) in [
        ("/", ""),
        ("", ""),
        ("/etc/passwd", "etc/passwd"),
        ("/abs/passwd", "etc/passwd"),
        ("etc/up/up/passwd", "etc/passwd"),
        ("../../etc/../abs", "etc"),
        ("dangling/x", "missing/further/x"),
        ("none/of/this", "none/of/this"),
        ("abs/../x", "x"),
    ] {
        assert_eq!(
            root.resolve(Path::new(path)).unwrap(),
            PathBuf::from(expected),
            "{path}"
        );
    }
    assert!(root.resolve(Path::new("loop")).is_err());
    assert!(root.resolve(Path::new("etc/passwd/x")).is_err());
    assert!(root.resolve(Path::new("a\0b")).is_err());
    assert!(root.resolve(Path::new(&"a/".repeat(3000))).is_err());
    assert_eq!(
        root.resolve_parent(Path::new("/abs/../abs")).unwrap(),
        Path::new("abs")
    );
}

#[test]
fn reading_is_bounded_and_never_blocks() {
    let (dir, root) = fixture();
    let read = |path: &str, range| root.read_file(Path::new(path), range, 100);
    assert_eq!(read("abs/passwd", None).unwrap(), b"root:x:0:0\n");
    assert_eq!(read("etc/passwd", Some((5, 1))).unwrap(), b"x");
    assert_eq!(read("etc/passwd", Some((8, 1000))).unwrap(), b":0\n");
    assert_eq!(read("etc/passwd", Some((100, u64::MAX))).unwrap(), b"");
    assert!(read("etc", None).is_err());
    assert!(read("../secret", None).unwrap_err().is_not_found());
    write(dir.path().join("root/large"), &"x".repeat(101));
    assert!(read("large", None).is_err());
    mknod(dir.path().join("root/pipe"), FileType::Fifo, 0o600, (0, 0));
    assert!(read("pipe", None).is_err());
}

#[test]
fn stats_have_gos_modes() {
    let (dir, root) = fixture();
    chmod(dir.path().join("root/etc/passwd"), 0o4644);
    chmod(dir.path().join("root/etc"), 0o1777);
    set_time(dir.path().join("root/etc/passwd"), 5, 7);
    let stat = root.stat_file(Path::new("/abs/passwd")).unwrap();
    assert_eq!(
        (stat.path.as_str(), stat.mode, stat.size),
        ("passwd", 1 << 23 | 0o644, 11)
    );
    assert_eq!(stat.mod_time, 5_000_000_007);
    assert_eq!(
        root.stat_file(Path::new("/abs")).unwrap().mode,
        1 << 31 | 1 << 20 | 0o777
    );
    assert_eq!(root.stat_file(Path::new("/")).unwrap().mode & 1 << 31, 1 << 31);
    let listed = root.read_dir(Path::new("/"), None).unwrap();
    let names: Vec<_> = listed.iter().map(|stat| stat.path.as_str()).collect();
    assert_eq!(names, ["abs", "dangling", "etc", "loop"]);
    assert_eq!(
        (listed[0].mode & 1 << 27, listed[0].linkname.as_str()),
        (1 << 27, "/etc")
    );
    let listed = root.read_dir(Path::new("/abs"), Some("p*")).unwrap();
    assert_eq!(listed.len(), 1);
    assert!(root.stat_file(Path::new("/none")).unwrap_err().is_not_found());
}

#[test]
fn editing_stays_inside_and_sets_what_is_asked() {
    let (dir, root) = fixture();
    let here = dir.path().join("root");
    let at = Attributes {
        owner: None,
        time: Some(Timestamp::from_seconds(77)),
    };
    root.mkdir(Path::new("/dangling/deep"), 0o711, true, at).unwrap();
    for path in ["missing", "missing/further", "missing/further/deep"] {
        let meta = fs::metadata(here.join(path)).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.mtime()), (0o711, 77), "{path}");
    }
    root.mkdir(Path::new("/etc"), 0o700, false, at).unwrap();
    root.mkdir(Path::new("/"), 0o700, false, at).unwrap();
    assert!(root.mkdir(Path::new("/etc/passwd"), 0o700, true, at).is_err());
    assert!(
        root.mkdir(Path::new("/q/r"), 0o700, false, at)
            .unwrap_err()
            .is_not_found()
    );
    root.mkfile(Path::new("/abs/new"), b"1", 0o640, at).unwrap();
    let meta = fs::metadata(here.join("etc/new")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.mtime()), (0o640, 77));
    root.mkfile(Path::new("/etc/passwd"), b"x", 0o600, at).unwrap();
    assert_eq!(fs::read_to_string(here.join("etc/passwd")).unwrap(), "x");
    assert!(root.mkfile(Path::new("/etc"), b"x", 0o600, at).is_err());
    root.symlink(Path::new("../../../secret"), Path::new("/abs/s"), at)
        .unwrap();
    assert_eq!(
        fs::read_link(here.join("etc/s")).unwrap(),
        Path::new("../../../secret")
    );
    assert_eq!(fs::symlink_metadata(here.join("etc/s")).unwrap().mtime(), 77);
    assert!(
        root.read_file(Path::new("/abs/s"), None, 100)
            .unwrap_err()
            .is_not_found()
    );
}

#[test]
fn devices_and_pipes_are_not_written_to() {
    let (dir, root) = fixture();
    mknod(dir.path().join("root/pipe"), FileType::Fifo, 0o600, (0, 0));
    assert!(
        root.mkfile(Path::new("/pipe"), b"x", 0o600, Attributes::default())
            .is_err()
    );
    if is_root() {
        mknod(dir.path().join("root/null"), FileType::CharDevice, 0o666, (1, 3));
        assert!(
            root.mkfile(Path::new("/null"), b"x", 0o600, Attributes::default())
                .is_err()
        );
    }
}

#[test]
fn removing_takes_links_and_not_what_they_point_at() {
    let (dir, root) = fixture();
    let here = dir.path().join("root");
    root.remove(Path::new("/abs"), false, false).unwrap();
    assert!(here.join("etc/passwd").exists());
    root.remove(Path::new("/dangling"), false, false).unwrap();
    assert!(
        root.remove(Path::new("/none"), false, false)
            .unwrap_err()
            .is_not_found()
    );
    root.remove(Path::new("/none"), false, true).unwrap();
    root.remove(Path::new("/none/deep"), false, true).unwrap();
    assert!(root.remove(Path::new("/"), false, false).is_err());
    assert!(root.remove(Path::new("/etc/.."), false, true).is_err());
    write(here.join("a1/x"), "");
    write(here.join("a2"), "");
    root.remove(Path::new("/a*"), true, false).unwrap();
    root.remove(Path::new("/a*"), true, false).unwrap();
    assert!(!here.join("a1").exists() && !here.join("a2").exists());
}

#[test]
fn a_tree_of_any_depth_can_be_removed() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    fs::create_dir(&top).unwrap();
    let mut current = open(&top);
    for _ in 0..3000 {
        at::make_dir(&current, Path::new("d"), 0o700).unwrap();
        at::create_file(&current, Path::new("f")).unwrap();
        current = at::open_dir_beneath(&current, Path::new("d")).unwrap();
    }
    drop(current);
    layer::tree::usage(&top, &std::collections::BTreeSet::new()).unwrap();
    let parent = open(dir.path());
    at::remove_all(&parent, Path::new("top")).unwrap();
    assert!(!top.exists());
}

//! Mounts as such.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use snapshot::{Mount, unmount, unmount_below};

use crate::support::*;

fn fixture() -> Option<(tempfile::TempDir, Mount)> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    for sub in ["one", "two", "upper", "work", "point"] {
        fs::create_dir(dir.path().join(sub)).unwrap();
    }
    write(dir.path().join("one/a"), "1");
    write(dir.path().join("two/a"), "2");
    let [one, two, upper, work] = ["one", "two", "upper", "work"].map(|name| dir.path().join(name));
    let mount = Mount::overlay([one.as_path(), two.as_path()], Some((&upper, &work)), &[]);
    if let Err(error) = mount.open() {
        eprintln!("skipped: {error}");
        return None;
    }
    Some((dir, mount))
}

#[test]
fn a_mount_says_what_it_is_made_of() {
    let mount = Mount::overlay(
        [PathBuf::from("/a:b").as_path(), PathBuf::from("/c,d").as_path()],
        Some((&PathBuf::from("/u"), &PathBuf::from("/w"))),
        &["index=off".into()],
    );
    assert_eq!(mount.lower_dirs(), [PathBuf::from("/a:b"), PathBuf::from("/c,d")]);
    assert_eq!(mount.upper_dir(), Some(PathBuf::from("/u").as_path()));
    assert!(!mount.is_read_only());
    assert!(Mount::bind("/x", true).is_read_only());
    assert!(Mount::overlay([], None, &[]).is_read_only());
}

#[test]
fn a_tree_without_a_mount_point_lives_as_long_as_its_descriptor() {
    let Some((dir, mount)) = fixture() else { return };
    let tree = mount.open().unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", tree.as_fd().as_raw_fd()));
    assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "1");
    fs::write(path.join("b"), "new").unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("upper/b")).unwrap(), "new");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!table.contains(dir.path().to_str().unwrap()));
}

#[test]
fn a_dropped_guard_unmounts_even_what_is_in_use() {
    let Some((dir, mount)) = fixture() else { return };
    let point = dir.path().join("point");
    let guard = mount.mount_at(&point).unwrap();
    let held = fs::File::open(guard.path().join("a")).unwrap();
    drop(guard);
    assert!(fs::read_dir(&point).unwrap().next().is_none());
    drop(held);
    let left = mount.mount_at(&point).unwrap().leave();
    assert!(left.join("a").exists());
    unmount(&left).unwrap();
    unmount(&left).unwrap();
    unmount(&dir.path().join("none")).unwrap();
    assert!(!left.join("a").exists());
}

#[test]
fn directories_may_have_any_name_and_length() {
    let Some((dir, _)) = fixture() else { return };
    let odd = dir.path().join("a:b,c\\d=e");
    let long = dir.path().join("n".repeat(200)).join("m".repeat(200));
    for path in [&odd, &long] {
        fs::create_dir_all(path.join("sub")).unwrap();
    }
    let mount = Mount::overlay([odd.as_path(), long.as_path()], None, &[]);
    let guard = mount.mount_at(&dir.path().join("point")).unwrap();
    assert!(guard.path().join("sub").exists());
    assert!(fs::write(guard.path().join("x"), "").is_err());
    guard.unmount().unwrap();
}

#[test]
fn failures_name_the_mount_point() {
    let Some((dir, mount)) = fixture() else { return };
    let error = mount.mount_at(&dir.path().join("none")).unwrap_err();
    assert!(error.to_string().contains("none"), "{error}");
    let error = Mount::bind(dir.path().join("missing"), false)
        .mount_at(&dir.path().join("point"))
        .unwrap_err();
    assert_eq!(error.source.kind(), std::io::ErrorKind::NotFound);
}

#[test]
fn what_a_killed_process_left_mounted_is_found() {
    let Some((dir, mount)) = fixture() else { return };
    let odd = dir.path().join("left behind\\\n");
    fs::create_dir(&odd).unwrap();
    let first = mount.mount_at(&odd).unwrap().leave();
    let other = Mount::bind(dir.path().join("two"), true)
        .mount_at(&odd)
        .unwrap()
        .leave();
    assert_eq!(first, other);
    assert_eq!(unmount_below(dir.path()).unwrap(), 2);
    assert_eq!(unmount_below(dir.path()).unwrap(), 0);
    assert!(!odd.join("a").exists());
}

#[test]
fn too_many_layers_are_told() {
    let Some((dir, _)) = fixture() else { return };
    let layers: Vec<PathBuf> = (0..501)
        .map(|number| dir.path().join(format!("l{number}")))
        .collect();
    for layer in &layers {
        fs::create_dir(layer).unwrap();
    }
    let overlay = |count: usize| Mount::overlay(layers[..count].iter().map(PathBuf::as_path), None, &[]);
    // Kernels before 6.8 take fewer.
    if let Ok(tree) = overlay(500).open() {
        drop(tree);
    }
    for error in [
        overlay(501).open().map(drop).unwrap_err(),
        overlay(501)
            .mount_at(&dir.path().join("point"))
            .map(drop)
            .unwrap_err(),
    ] {
        let reason = error.source.to_string();
        assert!(
            reason.starts_with("501 layers are too many for an overlay, which has 500 at most"),
            "{reason}"
        );
    }
}

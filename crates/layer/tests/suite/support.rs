//! Building trees, describing trees.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use layer::tree::{FileType, Timestamp, at};
use rustix::fs::{CWD, Mode, OFlags};

/// Reports whether this test can set owners and make devices; says so when not.
pub fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

pub fn open(path: &Path) -> OwnedFd {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .unwrap()
}

pub fn write(path: impl AsRef<Path>, content: &str) {
    let path = path.as_ref();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

pub fn chmod(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

pub fn set_time(path: impl AsRef<Path>, seconds: i64, nanoseconds: u32) {
    let time = Timestamp { seconds, nanoseconds };
    at::set_times(CWD, path.as_ref(), Some(time), Some(time)).unwrap();
}

pub fn mknod(path: impl AsRef<Path>, kind: FileType, mode: u32, dev: (u32, u32)) {
    at::make_special(CWD, path.as_ref(), kind, mode, dev).unwrap();
}

pub fn set_xattr(path: impl AsRef<Path>, key: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path.as_ref(), key, value, rustix::fs::XattrFlags::empty()).unwrap();
}

pub fn xattr(path: impl AsRef<Path>, key: &str) -> Option<Vec<u8>> {
    let path = path.as_ref();
    let dir = open(path.parent().unwrap());
    at::xattr(&dir, Path::new(path.file_name().unwrap()), key.as_bytes()).unwrap()
}

/// Gives every path below `root` one time, so that trees can be compared.
pub fn settle(root: &Path, seconds: i64) {
    for path in walk(root).into_iter().rev() {
        set_time(root.join(path), seconds, 0);
    }
}

/// Lists all paths below `root`, parents first.
pub fn walk(root: &Path) -> Vec<PathBuf> {
    fn visit(dir: &Path, prefix: &Path, out: &mut Vec<PathBuf>) {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        for name in names {
            out.push(prefix.join(&name));
            let path = dir.join(&name);
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                visit(&path, &prefix.join(&name), out);
            }
        }
    }
    let mut out = Vec::new();
    visit(root, Path::new(""), &mut out);
    out
}

/// Describes every path below `root` by all that a layer carries.
pub fn describe(root: &Path) -> BTreeMap<String, String> {
    let mut groups: BTreeMap<(u64, u64), String> = BTreeMap::new();
    let mut out = BTreeMap::new();
    for path in walk(root) {
        let full = root.join(&path);
        let meta = fs::symlink_metadata(&full).unwrap();
        let kind = meta.file_type();
        let what = if kind.is_dir() {
            "dir".to_owned()
        } else if kind.is_symlink() {
            format!("link {:?}", fs::read_link(&full).unwrap())
        } else if kind.is_file() {
            format!("file {}", oci::Digest::sha256(fs::read(&full).unwrap()))
        } else if kind.is_fifo() {
            "fifo".to_owned()
        } else {
            format!("special {:x} {:x}", meta.mode() & 0o170_000, meta.rdev())
        };
        let dir = open(full.parent().unwrap());
        let name = Path::new(full.file_name().unwrap());
        let xattrs: Vec<_> = at::xattr_names(&dir, name)
            .unwrap()
            .into_iter()
            .filter(|key| key != b"security.selinux")
            .map(|key| {
                let value = at::xattr(&dir, name, &key).unwrap();
                (String::from_utf8(key).unwrap(), value)
            })
            .collect();
        let shown = String::from_utf8_lossy(path.as_os_str().as_bytes()).into_owned();
        let group = if meta.nlink() > 1 && !meta.is_dir() {
            groups
                .entry((meta.dev(), meta.ino()))
                .or_insert_with(|| shown.clone())
                .clone()
        } else {
            String::new()
        };
        let line = format!(
            "{what} {:o} {}:{} {}.{:09} {xattrs:?} {group}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec()
        );
        out.insert(shown, line);
    }
    out
}

/// Compares two trees and shows only where they differ.
#[track_caller]
pub fn assert_same(expected: &Path, actual: &Path) {
    let (expected, actual) = (describe(expected), describe(actual));
    let mut differences = Vec::new();
    for path in expected.keys().chain(actual.keys()) {
        if expected.get(path) != actual.get(path) {
            differences.push(format!(
                "{path}:\n  {:?}\n  {:?}",
                expected.get(path),
                actual.get(path)
            ));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

//! How the bytes of a file are copied: shared where the file system can, else by the kernel, else by hand.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use layer::copy::copy_tree;
use layer::tree::Root;

use crate::support::*;

const MIB: u64 = 1 << 20;
/// Size of a file that is copied whole.
const SIZE: u64 = 8 * MIB;
/// Size of a file of which [`MIB`] in the middle is no hole.
const SPARSE_SIZE: u64 = 16 * MIB;

/// Makes `from` with a whole file and one with holes, and `to` empty; on the disk, so that all has its place there.
fn make_files(dir: &Path) -> (PathBuf, PathBuf) {
    let (from, to) = (dir.join("from"), dir.join("to"));
    fs::create_dir_all(&from).unwrap();
    fs::create_dir_all(&to).unwrap();
    let bytes: Vec<u8> = (0..u32::try_from(SIZE / 4).unwrap())
        .flat_map(|number| number.to_le_bytes())
        .collect();
    let whole = File::create(from.join("whole")).unwrap();
    whole.write_all_at(&bytes, 0).unwrap();
    let sparse = File::create(from.join("sparse")).unwrap();
    sparse.set_len(SPARSE_SIZE).unwrap();
    sparse
        .write_all_at(&bytes[..usize::try_from(MIB).unwrap()], SPARSE_SIZE / 2)
        .unwrap();
    whole.sync_all().unwrap();
    sparse.sync_all().unwrap();
    (from, to)
}

fn copy(from: &Path, to: &Path) {
    copy_tree(&Root::open(from).unwrap(), &Root::open(to).unwrap()).unwrap();
    for name in ["whole", "sparse"] {
        let read = |dir: &Path| fs::read(dir.join(name)).unwrap();
        assert!(read(from) == read(to), "{name} has other bytes");
    }
    let allocated = fs::metadata(to.join("sparse")).unwrap().blocks() * 512;
    assert!(allocated <= 4 * MIB, "holes became {allocated} bytes");
}

/// A file system in a file, mounted until it is dropped.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    /// Makes one, or says why there can be none.
    fn new(kind: &str) -> Result<Self, String> {
        let dir = tempfile::tempdir().unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().join("at"));
        fs::create_dir(&at).unwrap();
        // xfs wants 300 MiB at least; the file has them as holes.
        File::create(&image).unwrap().set_len(512 * MIB).unwrap();
        run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image))?;
        run(Command::new("mount")
            .args(["-t", kind, "-o", "loop"])
            .arg(&image)
            .arg(&at))?;
        Ok(Self { dir })
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("at")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let unmounted = run(Command::new("umount").arg(self.path()));
        if !std::thread::panicking() {
            unmounted.unwrap();
        }
    }
}

fn run(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{program}: {}", errors.trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn blocks_are_shared_where_the_file_system_can() {
    if !is_root() {
        return;
    }
    if let Err(reason) = run(Command::new("filefrag").arg("-V")) {
        eprintln!("skipped: {reason}");
        return;
    }
    for kind in ["xfs", "btrfs"] {
        let disk = match Disk::new(kind) {
            Ok(disk) => disk,
            Err(reason) => {
                eprintln!("skipped: no {kind} to copy on: {reason}");
                continue;
            }
        };
        let (from, to) = make_files(&disk.path());
        copy(&from, &to);
        for name in ["whole", "sparse"] {
            let extents = extents(&to.join(name));
            assert!(!extents.is_empty(), "{kind}: {name} has no extents");
            for extent in &extents {
                assert!(
                    extent.contains("shared"),
                    "{kind}: {name} has one of its own: {extent}"
                );
            }
        }
        // What is written to the one is not seen in the other.
        let copied = File::options().write(true).open(to.join("whole")).unwrap();
        copied.write_all_at(b"changed", 0).unwrap();
        assert_eq!(&fs::read(from.join("whole")).unwrap()[..4], [0; 4]);
    }
}

/// Where the parts of a file lie, one a line with its flags.
fn extents(file: &Path) -> Vec<String> {
    let shown = run(Command::new("filefrag").args(["-s", "-v"]).arg(file)).unwrap();
    // `   0:        0..    8191:         24..      8215:   8192:             last,shared,eof`
    let is_extent = |line: &&str| {
        line.trim_start()
            .starts_with(|first: char| first.is_ascii_digit())
    };
    shown.lines().filter(is_extent).map(str::to_owned).collect()
}

/// How often this thread had something read, by `read` or by `copy_file_range`; `None` where the kernel does not count.
fn reads() -> Option<u64> {
    let counts = fs::read_to_string("/proc/thread-self/io").ok()?;
    let line = counts.lines().find_map(|line| line.strip_prefix("syscr: "))?;
    line.parse().ok()
}

#[test]
fn the_kernel_copies_what_is_not_shared() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = make_files(dir.path());
    fs::remove_file(from.join("sparse")).unwrap();
    let Some(before) = reads() else {
        eprintln!("skipped: the kernel does not count reads in /proc/thread-self/io");
        return;
    };
    copy_tree(&Root::open(&from).unwrap(), &Root::open(&to).unwrap()).unwrap();
    let count = reads().unwrap() - before;
    assert!(count < 16, "{count} reads for {SIZE} bytes");
    assert!(fs::read(from.join("whole")).unwrap() == fs::read(to.join("whole")).unwrap());
}

#[test]
fn files_are_copied_from_one_file_system_to_another() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm"));
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    let there = match there {
        Ok(there) if device(there.path()) != device(here.path()) => there,
        Ok(_) => return eprintln!("skipped: /dev/shm is no other file system"),
        Err(error) => return eprintln!("skipped: /dev/shm: {error}"),
    };
    let (from, _) = make_files(here.path());
    copy(&from, there.path());
    let back = here.path().join("back");
    fs::create_dir(&back).unwrap();
    copy(there.path(), &back);
}

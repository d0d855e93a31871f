//! Archives that want out, or want the program down.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use layer::tar::{EntryKind, Header, Reader, Writer};
use layer::{ApplyError, ApplyOptions, Stop, Whiteouts, apply};
use proptest::prelude::*;

use crate::support::*;

struct Jail {
    dir: tempfile::TempDir,
}

impl Jail {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        write(dir.path().join("outside/secret"), "untouched");
        Self { dir }
    }

    fn root(&self) -> std::path::PathBuf {
        self.dir.path().join("root")
    }

    fn apply(&self, entries: &[Header]) -> Result<(), ApplyError> {
        let mut writer = Writer::new(Vec::new());
        for header in entries {
            let header = Header {
                mode: 0o755,
                ..header.clone()
            };
            writer.write_header(&header).unwrap();
        }
        let layer = writer.finish().unwrap();
        let done = apply(
            &*layer,
            open(&self.root()),
            &ApplyOptions {
                keep_owner: true,
                ..ApplyOptions::default()
            },
        );
        assert_eq!(
            fs::read_to_string(self.dir.path().join("outside/secret")).unwrap(),
            "untouched"
        );
        assert_eq!(walk(&self.dir.path().join("outside")), [Path::new("secret")]);
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 2);
        done.map(drop)
    }
}

fn file(name: &str) -> Header {
    Header::new(EntryKind::Regular, name)
}

fn link(kind: EntryKind, name: &str, target: &str) -> Header {
    Header {
        link: target.into(),
        ..Header::new(kind, name)
    }
}

#[test]
fn names_stay_inside() {
    for name in [
        "../outside/x",
        "/outside/x",
        "a/../../outside/x",
        "../../../../x",
        "./../outside/./x",
    ] {
        let jail = Jail::new();
        jail.apply(&[file(name)]).unwrap();
        assert!(
            jail.root().join("outside/x").exists() || jail.root().join("x").exists(),
            "{name}"
        );
    }
}

#[test]
fn symbolic_links_lead_inside() {
    for target in [
        "/outside",
        "../outside",
        "../../../outside",
        "/proc/self/cwd",
        "/proc/self/root/outside",
    ] {
        let jail = Jail::new();
        let done = jail.apply(&[link(EntryKind::Symlink, "escape", target), file("escape/secret")]);
        done.unwrap();
    }
    // A link on the host, in the tree before the layer comes.
    let jail = Jail::new();
    symlink(jail.dir.path().join("outside"), jail.root().join("escape")).unwrap();
    jail.apply(&[
        file("escape/secret"),
        file("escape/.wh.secret"),
        file("escape/.wh..wh..opq"),
    ])
    .unwrap();
    // A cycle.
    let jail = Jail::new();
    let cycle = [
        link(EntryKind::Symlink, "a", "b"),
        link(EntryKind::Symlink, "b", "a"),
        file("a/x"),
    ];
    assert!(matches!(jail.apply(&cycle), Err(ApplyError::Io { .. })));
}

#[test]
fn hard_links_lead_inside() {
    for target in ["../outside/secret", "/outside/secret", "escape/secret"] {
        let jail = Jail::new();
        let entries = [
            link(EntryKind::Symlink, "escape", "../outside"),
            link(EntryKind::Hardlink, "x", target),
        ];
        assert!(
            matches!(jail.apply(&entries), Err(ApplyError::Io { .. })),
            "{target}"
        );
    }
    let jail = Jail::new();
    assert!(matches!(
        jail.apply(&[link(EntryKind::Hardlink, "x", "/")]),
        Err(ApplyError::Invalid { .. })
    ));
}

#[test]
fn whiteouts_have_plain_names() {
    for name in [".wh.", ".wh..", ".wh...", "a/.wh.."] {
        let jail = Jail::new();
        assert!(
            matches!(jail.apply(&[file(name)]), Err(ApplyError::Invalid { .. })),
            "{name}"
        );
    }
}

#[test]
fn a_link_swapped_for_a_directory_is_no_way_out() {
    let jail = Jail::new();
    let entries = [
        Header::new(EntryKind::Directory, "d/"),
        file("d/x"),
        link(EntryKind::Symlink, "d", "../outside"),
        file("d/secret"),
        Header::new(EntryKind::Directory, "d/"),
        file("d/y"),
    ];
    jail.apply(&entries).unwrap();
    assert!(jail.root().join("d/y").exists());
}

/// An archive of one file of `size` bytes that are all a hole but the last.
fn sparse(size: u64) -> Vec<u8> {
    let mut data = Vec::new();
    let (length, map) = (size.to_string(), format!("{},1", size - 1));
    let records = [
        ("GNU.sparse.major", "0"),
        ("GNU.sparse.minor", "1"),
        ("GNU.sparse.size", length.as_str()),
        ("GNU.sparse.numblocks", "1"),
        ("GNU.sparse.map", map.as_str()),
    ];
    for (key, value) in records {
        let rest = format!(" {key}={value}\n");
        let length = rest.len() + 2;
        data.extend_from_slice(format!("{length}{rest}").as_bytes());
        assert!((10..100).contains(&length));
    }
    let mut archive = raw_header(b'x', data.len());
    archive.extend_from_slice(&data);
    archive.resize(archive.len().next_multiple_of(512), 0);
    archive.extend_from_slice(&raw_header(b'0', 1));
    archive.push(b'x');
    archive.resize(archive.len().next_multiple_of(512) + 1024, 0);
    archive
}

/// A header that the writer, which knows no sparse files, cannot be asked for.
fn raw_header(kind: u8, size: usize) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..4].copy_from_slice(b"file");
    block[100..107].copy_from_slice(b"0000644");
    block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:07o}").as_bytes());
    block
}

fn applied(archive: &[u8], root: &Path, stop: Stop) -> Result<(), ApplyError> {
    let options = ApplyOptions {
        keep_owner: true,
        stop,
        ..ApplyOptions::default()
    };
    apply(archive, open(root), &options).map(drop)
}

#[test]
fn terabytes_of_nothing_are_not_written() {
    let jail = Jail::new();
    let size = 4 << 40;
    applied(&sparse(size), &jail.root(), Stop::default()).unwrap();
    let stat = fs::metadata(jail.root().join("file")).unwrap();
    assert_eq!(stat.len(), size);
    assert!(stat.blocks() < 1000, "{} blocks", stat.blocks());
    let mut last = [0; 2];
    let file = fs::File::open(jail.root().join("file")).unwrap();
    file.read_exact_at(&mut last, size - 2).unwrap();
    assert_eq!(last, [0, b'x']);
    let error = applied(&sparse(7 << 60), &jail.root(), Stop::default()).unwrap_err();
    assert!(
        matches!(&error, ApplyError::Io { path, .. } if path == "file"),
        "{error:?}"
    );
}

#[test]
fn unpacking_ends_when_told_to() {
    let jail = Jail::new();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let stop = Stop::when(move || count.fetch_add(1, Ordering::Relaxed) >= 3);
    let mut writer = Writer::new(Vec::new());
    for number in 0..10 {
        writer.write_header(&file(&format!("f{number}"))).unwrap();
    }
    let error = applied(&writer.finish().unwrap(), &jail.root(), stop).unwrap_err();
    assert!(matches!(error, ApplyError::Stopped), "{error:?}");
    assert_eq!(fs::read_dir(jail.root()).unwrap().count(), 3);
}

#[test]
fn long_names_are_refused() {
    let jail = Jail::new();
    assert!(matches!(
        jail.apply(&[file(&"a/".repeat(3000))]),
        Err(ApplyError::Invalid { .. })
    ));
    let jail = Jail::new();
    assert!(matches!(
        jail.apply(&[file(&"a".repeat(300))]),
        Err(ApplyError::Io { .. })
    ));
    let jail = Jail::new();
    let deep = "a/".repeat(2000) + "x";
    assert!(matches!(
        jail.apply(&[file(&deep)]),
        Ok(()) | Err(ApplyError::Io { .. })
    ));
}

#[test]
fn the_kernels_marks_cannot_be_forged() {
    let jail = Jail::new();
    let mut header = Header::new(EntryKind::Directory, "d/");
    for key in [
        "trusted.overlay.opaque",
        "user.overlay.opaque",
        "trusted.overlay.redirect",
    ] {
        header.xattrs.insert(key.into(), b"y".to_vec());
    }
    jail.apply(&[header]).unwrap();
    for key in ["trusted.overlay.opaque", "user.overlay.opaque"] {
        assert_eq!(xattr(jail.root().join("d"), key), None);
    }
}

#[test]
fn what_is_cut_short_or_compressed_badly_is_an_error() {
    let mut writer = Writer::new(Vec::new());
    let header = Header {
        size_bytes: 2000,
        ..file("x")
    };
    writer.write_header(&header).unwrap();
    std::io::Write::write_all(&mut writer, &[7; 2000]).unwrap();
    let layer = writer.finish().unwrap();
    let mut packer =
        layer::compress::Packer::new(Vec::new(), layer::compress::Compression::Gzip, None).unwrap();
    std::io::Write::write_all(&mut packer, &layer).unwrap();
    let gzip = packer.finish().unwrap().out;
    for bytes in [
        &layer[..700],
        &layer[..1000],
        &gzip[..gzip.len() - 9],
        &gzip[..20],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let options = ApplyOptions {
            keep_owner: true,
            ..ApplyOptions::default()
        };
        assert!(
            apply(bytes, open(dir.path()), &options).is_err(),
            "{} bytes",
            bytes.len()
        );
    }
}

fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let entry = (
        0..7_usize,
        "[a-c./]{1,8}",
        "[a-c./]{0,8}",
        proptest::collection::vec(any::<u8>(), 0..40),
    );
    let entries = proptest::collection::vec(entry, 1..6);
    let flips = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    (entries, flips).prop_map(|(entries, flips)| {
        let kinds = [
            EntryKind::Regular,
            EntryKind::Hardlink,
            EntryKind::Symlink,
            EntryKind::Directory,
            EntryKind::Fifo,
            EntryKind::Regular,
            EntryKind::Directory,
        ];
        let mut writer = Writer::new(Vec::new());
        for (kind, name, link, data) in entries {
            let kind = kinds[kind];
            let data = if kind == EntryKind::Regular {
                data
            } else {
                Vec::new()
            };
            let header = Header {
                link: link.into(),
                size_bytes: data.len() as u64,
                mode: 0o755,
                ..Header::new(kind, name)
            };
            writer.write_header(&header).unwrap();
            std::io::Write::write_all(&mut writer, &data).unwrap();
        }
        let mut bytes = writer.finish().unwrap();
        for (index, byte) in flips {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        // Give damaged headers a right checksum now and then, so that parsing goes on.
        for block in bytes.chunks_exact_mut(512) {
            if &block[257..262] == b"ustar" {
                block[148..156].fill(b' ');
                let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
                block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            }
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(192) })]

    #[test]
    fn no_archive_gets_out_or_panics(bytes in mutated(), overlay in any::<bool>()) {
        let jail = Jail::new();
        symlink("../outside", jail.root().join("a")).unwrap();
        let whiteouts = if overlay && rustix::process::geteuid().is_root() {
            Whiteouts::Overlay
        } else {
            Whiteouts::Remove
        };
        let limit_bytes = Some(1 << 20);
        let options = ApplyOptions { keep_owner: true, whiteouts, limit_bytes, ..ApplyOptions::default() };
        let _ = apply(&*bytes, open(&jail.root()), &options);
        prop_assert_eq!(fs::read_to_string(jail.dir.path().join("outside/secret")).unwrap(), "untouched");
        prop_assert_eq!(fs::read_dir(jail.dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn reading_noise_ends(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let mut reader = Reader::new(&*bytes);
        while let Ok(Some(_)) = reader.next_entry() {}
    }
}

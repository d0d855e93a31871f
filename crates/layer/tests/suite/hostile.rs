//! Archives that want out, or want the program down.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use layer::tar::{EntryKind, Header, Reader, Writer};
use layer::{ApplyError, ApplyOptions, Whiteouts, apply};
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
    let (gzip, _) = packer.finish().unwrap();
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

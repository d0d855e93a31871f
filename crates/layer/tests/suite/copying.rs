//! Copies as BuildKit's file operation makes them.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use layer::copy::{CopyError, CopyOptions, ModeChange, copy, copy_tree};
use layer::tree::{FileType, Root, Timestamp};

use crate::support::*;

struct Trees {
    dir: tempfile::TempDir,
}

impl Trees {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("from")).unwrap();
        fs::create_dir(dir.path().join("to")).unwrap();
        Self { dir }
    }

    fn from(&self) -> PathBuf {
        self.dir.path().join("from")
    }

    fn to(&self) -> PathBuf {
        self.dir.path().join("to")
    }

    fn copy(&self, source: &str, dest: &str, options: &CopyOptions) -> Result<(), CopyError> {
        let (from, to) = (Root::open(&self.from()).unwrap(), Root::open(&self.to()).unwrap());
        copy(&from, Path::new(source), &to, Path::new(dest), options)
    }

    fn found(&self) -> Vec<String> {
        walk(&self.to())
            .iter()
            .map(|path| path.display().to_string())
            .collect()
    }
}

fn options() -> CopyOptions {
    CopyOptions {
        create_dest_path: true,
        ..CopyOptions::default()
    }
}

#[test]
fn where_things_land() {
    let cases: [(&str, &str, bool, &[&str]); 9] = [
        ("/f", "/x", false, &["x"]),
        ("/f", "/x/", false, &["x", "x/f"]),
        ("/f", "/a/b/x", false, &["a", "a/b", "a/b/x"]),
        ("/f", "/", false, &["f"]),
        ("/d", "/x", false, &["x", "x/g"]),
        ("/d", "/x/", false, &["x", "x/d", "x/d/g"]),
        ("/d", "/", false, &["d", "d/g"]),
        ("/d", "/x", true, &["x", "x/g"]),
        ("/d", "/", true, &["g"]),
    ];
    for (source, dest, dir_contents, expected) in cases {
        let trees = Trees::new();
        write(trees.from().join("f"), "1");
        write(trees.from().join("d/g"), "2");
        trees
            .copy(
                source,
                dest,
                &CopyOptions {
                    dir_contents,
                    ..options()
                },
            )
            .unwrap();
        assert_eq!(trees.found(), expected, "{source} to {dest}");
    }
}

#[test]
fn parents_are_made_only_when_asked_for() {
    let trees = Trees::new();
    write(trees.from().join("f"), "1");
    let error = trees.copy("/f", "/a/b", &CopyOptions::default()).unwrap_err();
    assert!(
        matches!(&error, CopyError::Tree(error) if error.is_not_found()),
        "{error:?}"
    );
    assert!(
        !error.to_string().contains(trees.dir.path().to_str().unwrap()),
        "{error}"
    );
    trees.copy("/f", "/b", &CopyOptions::default()).unwrap();
    assert_eq!(trees.found(), ["b"]);
}

#[test]
fn many_files_are_copied_as_few_are() {
    let trees = Trees::new();
    let root = trees.from().join("d");
    for number in 0..400 {
        let name = format!("{}/{}/file{number}", number % 3, number % 7);
        write(root.join(&name), &name);
        if number % 9 == 0 {
            fs::hard_link(root.join(&name), root.join(format!("0/hard{number}"))).unwrap();
        }
    }
    // The directories, too: whoever still wrote to one that is done would change its time.
    for path in walk(&root).into_iter().rev() {
        set_time(root.join(path), 1_234_567_890, 987_654_321);
    }
    trees.copy("/d", "/", &options()).unwrap();
    assert_same(&trees.from(), &trees.to());
}

#[test]
fn everything_a_file_has_is_copied() {
    if !is_root() {
        return;
    }
    let trees = Trees::new();
    let root = trees.from().join("d");
    write(root.join("file"), "hello");
    chmod(root.join("file"), 0o4711);
    fs::hard_link(root.join("file"), root.join("hard")).unwrap();
    symlink("/nowhere", root.join("soft")).unwrap();
    mknod(root.join("fifo"), FileType::Fifo, 0o600, (0, 0));
    mknod(root.join("char"), FileType::CharDevice, 0o600, (1, 5));
    mknod(root.join("block"), FileType::BlockDevice, 0o600, (7, 1));
    fs::create_dir(root.join("sub")).unwrap();
    set_xattr(root.join("sub"), "user.dir", b"1");
    set_xattr(root.join("file"), "user.file", b"2");
    std::os::unix::fs::lchown(root.join("soft"), Some(7), Some(8)).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(4 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"x", 2 << 20).unwrap();
    for path in walk(&root).into_iter().rev() {
        set_time(root.join(path), 1_234_567_890, 987_654_321);
    }
    trees.copy("/d", "/", &options()).unwrap();
    assert_same(&trees.from(), &trees.to());
    assert!(fs::metadata(trees.to().join("d/sparse")).unwrap().blocks() * 512 < 1 << 20);

    let whole = trees.dir.path().join("whole");
    fs::create_dir(&whole).unwrap();
    copy_tree(&Root::open(&trees.from()).unwrap(), &Root::open(&whole).unwrap()).unwrap();
    assert_same(&trees.from(), &whole);
}

#[test]
fn owner_mode_and_time_are_overridden() {
    if !is_root() {
        return;
    }
    let trees = Trees::new();
    write(trees.from().join("d/f"), "1");
    chmod(trees.from().join("d/f"), 0o640);
    let time = Timestamp::from_seconds(1_000_000);
    let bits = CopyOptions {
        owner: Some((11, 12)),
        time: Some(time),
        mode: Some(ModeChange::Bits(0o2750)),
        ..options()
    };
    trees.copy("/d", "/a/b", &bits).unwrap();
    for (path, mode) in [("a", 0o750), ("a/b", 0o2750), ("a/b/f", 0o2750)] {
        let meta = fs::metadata(trees.to().join(path)).unwrap();
        assert_eq!(
            (meta.uid(), meta.gid(), meta.mtime()),
            (11, 12, 1_000_000),
            "{path}"
        );
        assert_eq!(meta.mode() & 0o7777, mode, "{path}");
    }
    let symbolic = CopyOptions {
        mode: Some(ModeChange::Symbolic("a=rX,u+w".into())),
        ..options()
    };
    trees.copy("/d", "/c", &symbolic).unwrap();
    assert_eq!(fs::metadata(trees.to().join("c")).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(
        fs::metadata(trees.to().join("c/f")).unwrap().mode() & 0o7777,
        0o644
    );
    let invalid = CopyOptions {
        mode: Some(ModeChange::Symbolic("nonsense".into())),
        ..options()
    };
    assert!(matches!(
        trees.copy("/d", "/e", &invalid),
        Err(CopyError::Invalid { what: "mode", .. })
    ));
}

#[test]
fn patterns_choose_and_make_only_the_directories_they_need() {
    let trees = Trees::new();
    for name in [
        "a/b/c.go",
        "a/b/d.txt",
        "a/e/f.txt",
        "g.go",
        "h/i.go",
        "h/keep/j.txt",
    ] {
        write(trees.from().join(name), "1");
    }
    let patterns = CopyOptions {
        include: vec!["**/*.go".into()],
        exclude: vec!["h".into()],
        ..options()
    };
    trees.copy("/", "/", &patterns).unwrap();
    assert_eq!(trees.found(), ["a", "a/b", "a/b/c.go", "g.go"]);
    let trees2 = Trees::new();
    for name in ["h/i.go", "h/keep/j.txt", "x"] {
        write(trees2.from().join(name), "1");
    }
    trees2
        .copy(
            "/",
            "/",
            &CopyOptions {
                exclude: vec!["h".into(), "!h/keep".into()],
                ..options()
            },
        )
        .unwrap();
    assert_eq!(trees2.found(), ["h", "h/keep", "h/keep/j.txt", "x"]);
}

#[test]
fn wildcards_find_their_sources() {
    let trees = Trees::new();
    for name in ["a1/x", "a2/x", "b/x", "a3"] {
        write(trees.from().join(name), "1");
    }
    let wild = CopyOptions {
        allow_wildcard: true,
        ..options()
    };
    trees.copy("/a*", "/", &wild).unwrap();
    assert_eq!(trees.found(), ["a1", "a1/x", "a2", "a2/x", "a3"]);
    trees.copy("/?/x", "/sub/", &wild).unwrap();
    assert!(trees.to().join("sub/x").exists());
    assert!(matches!(
        trees.copy("/q*", "/", &wild),
        Err(CopyError::NoMatch { .. })
    ));
    trees
        .copy(
            "/q*",
            "/",
            &CopyOptions {
                allow_empty_wildcard: true,
                ..wild
            },
        )
        .unwrap();
}

#[test]
fn links_are_kept_or_followed_within_the_root() {
    let trees = Trees::new();
    write(trees.from().join("real/file"), "1");
    write(trees.dir.path().join("secret"), "2");
    symlink("/real", trees.from().join("link")).unwrap();
    symlink("../../secret", trees.from().join("escape")).unwrap();
    trees.copy("/link", "/kept", &options()).unwrap();
    assert_eq!(
        fs::read_link(trees.to().join("kept")).unwrap(),
        Path::new("/real")
    );
    let follow = CopyOptions {
        follow_symlinks: true,
        ..options()
    };
    trees.copy("/link", "/followed", &follow).unwrap();
    assert!(trees.to().join("followed/file").exists());
    assert!(trees.copy("/escape", "/stolen", &follow).is_err());
    // The destination's links stay inside, too.
    symlink("../..", trees.to().join("out")).unwrap();
    trees.copy("/real/file", "/out/x", &options()).unwrap();
    assert!(trees.to().join("x").exists());
    assert!(!trees.dir.path().join("x").exists());
}

#[test]
fn what_is_in_the_way() {
    let trees = Trees::new();
    write(trees.from().join("f"), "1");
    write(trees.from().join("d/x"), "1");
    write(trees.to().join("f/y"), "0");
    write(trees.to().join("d"), "0");
    let into_root = CopyOptions {
        dir_contents: true,
        ..options()
    };
    assert!(matches!(
        trees.copy("/", "/", &into_root),
        Err(CopyError::DirectoryOverFile { .. })
    ));
    let replace = CopyOptions {
        always_replace: true,
        ..into_root
    };
    trees.copy("/", "/", &replace).unwrap();
    assert_eq!(trees.found(), ["d", "d/x", "f"]);
    let trees = Trees::new();
    write(trees.from().join("d/f"), "1");
    write(trees.to().join("d/f/y"), "0");
    assert!(matches!(
        trees.copy("/d", "/", &options()),
        Err(CopyError::FileOverDirectory { .. })
    ));
}

#[test]
fn archives_are_unpacked_when_asked_for() {
    let trees = Trees::new();
    let inner = trees.dir.path().join("inner");
    write(inner.join("p/.wh.literal"), "1");
    let mut packer =
        layer::compress::Packer::new(Vec::new(), layer::compress::Compression::Gzip, None).unwrap();
    layer::diff(
        None::<std::os::fd::OwnedFd>,
        open(&inner),
        &mut packer,
        &layer::DiffOptions::default(),
    )
    .unwrap();
    fs::write(trees.from().join("a.tgz"), packer.finish().unwrap().out).unwrap();
    write(trees.from().join("plain"), "no archive");
    let unpack = CopyOptions {
        unpack: true,
        ..options()
    };
    trees.copy("/a.tgz", "/x", &unpack).unwrap();
    trees.copy("/plain", "/y", &unpack).unwrap();
    assert_eq!(trees.found(), ["x", "x/p", "x/p/.wh.literal", "y"]);
}

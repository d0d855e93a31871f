//! Digests of fixture trees, as BuildKit computes them.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use proptest::prelude::*;

use super::*;

/// Lines of `kind path arguments`; see [`build`].
const TREE: &str = include_str!("testdata/tree.txt");
/// Lines of `path|flags|include|exclude|required|digest`, the last recorded from BuildKit on [`TREE`].
const DIGESTS: &str = include_str!("testdata/digests.txt");

/// Builds the fixture; `None` where this user or file system cannot.
fn build(root: &Path) -> Option<()> {
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
    for line in TREE.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let path = root.join(words[1]);
        let mode = || u32::from_str_radix(words[2], 8).unwrap();
        match words[0] {
            "d" => fs::create_dir(&path).unwrap(),
            "f" => fs::write(&path, words[3]).unwrap(),
            "l" => symlink(words[2], &path).unwrap(),
            "h" => fs::hard_link(root.join(words[2]), &path).unwrap(),
            "p" | "c" => {
                use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
                let (kind, device) = match words[0] {
                    "p" => (FileType::Fifo, 0),
                    _ => (
                        FileType::CharacterDevice,
                        makedev(words[3].parse().unwrap(), words[4].parse().unwrap()),
                    ),
                };
                mknodat(CWD, &path, kind, Mode::RWXU, device).ok()?;
            }
            "o" => std::os::unix::fs::chown(&path, words[2].parse().ok(), words[3].parse().ok()).ok()?,
            _ => {
                let value = match words[2] {
                    "security.capability" => words[3]
                        .as_bytes()
                        .chunks(2)
                        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
                        .collect(),
                    _ => words[3].as_bytes().to_vec(),
                };
                let flags = rustix::fs::XattrFlags::empty();
                // Where SELinux is at home it guards its label; no digest depends on it.
                if rustix::fs::lsetxattr(&path, words[2], &value, flags).is_err()
                    && words[2] != "security.selinux"
                {
                    return None;
                }
            }
        }
        if matches!(words[0], "d" | "f" | "p" | "c") {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode())).unwrap();
        }
    }
    Some(())
}

fn fixture() -> Option<tempfile::TempDir> {
    let dir = tempfile::tempdir().unwrap();
    if !rustix::process::geteuid().is_root() || build(dir.path()).is_none() {
        eprintln!("skipped: needs root, device files and extended attributes");
        return None;
    }
    Some(dir)
}

fn opener(path: &Path) -> impl FnMut() -> io::Result<OwnedFd> {
    let path = path.to_owned();
    move || fs::File::open(&path).map(OwnedFd::from)
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn cases() -> Vec<(Selector, &'static str)> {
    let case = |line: &'static str| {
        let fields: Vec<&str> = line.split('|').collect();
        let selector = Selector {
            path: fields[0].into(),
            wildcard: fields[1].contains('w'),
            follow_links: fields[1].contains('f'),
            include: words(fields[2]),
            exclude: words(fields[3]),
            required: words(fields[4]),
        };
        (selector, fields[5])
    };
    DIGESTS.lines().map(case).collect()
}

fn outcome(result: Result<Digest, ChecksumError>) -> String {
    match result {
        Ok(digest) => digest.hex(),
        Err(ChecksumError::NotFound { .. }) => "absent".into(),
        Err(ChecksumError::TooManyLinks { .. }) => "links".into(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn digests_of_a_fresh_tree_are_buildkits() {
    let Some(dir) = fixture() else { return };
    for (selector, expected) in cases() {
        let got = outcome(ChecksumTree::new().checksum(&mut opener(dir.path()), &selector));
        assert_eq!(got, expected, "{selector:?}");
    }
}

#[test]
fn digests_do_not_depend_on_what_was_asked_before() {
    let Some(dir) = fixture() else { return };
    let (mut forward, mut backward) = (ChecksumTree::new(), ChecksumTree::new());
    for (selector, expected) in cases() {
        assert_eq!(
            outcome(forward.checksum(&mut opener(dir.path()), &selector)),
            expected,
            "{selector:?}"
        );
    }
    for (selector, expected) in cases().into_iter().rev() {
        assert_eq!(
            outcome(backward.checksum(&mut opener(dir.path()), &selector)),
            expected,
            "{selector:?}"
        );
    }
}

#[test]
fn an_encoded_tree_answers_without_the_files() {
    let Some(dir) = fixture() else { return };
    let mut tree = ChecksumTree::new();
    for (selector, _) in cases() {
        let _ = tree.checksum(&mut opener(dir.path()), &selector);
    }
    assert!(tree.is_dirty());
    let bytes = tree.encode();
    assert!(!tree.is_dirty());
    let mut tree = ChecksumTree::decode(&bytes).unwrap();
    let mut refuse = || Err(io::Error::other("the tree was opened"));
    for (selector, expected) in cases() {
        assert_eq!(
            outcome(tree.checksum(&mut refuse, &selector)),
            expected,
            "{selector:?}"
        );
    }
    assert_eq!(tree.encode(), bytes);
}

#[test]
fn a_plain_file_needs_no_walk() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("d")).unwrap();
    fs::write(dir.path().join("d/a"), "a").unwrap();
    fs::write(dir.path().join("d/b"), "b").unwrap();
    let mut tree = ChecksumTree::new();
    let selector = Selector {
        path: "/d/a".into(),
        ..Selector::default()
    };
    tree.checksum(&mut opener(dir.path()), &selector).unwrap();
    assert_eq!(tree.records.len(), 1);
}

#[test]
fn a_link_out_of_the_tree_stays_inside() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("tree")).unwrap();
    fs::write(dir.path().join("secret"), "s").unwrap();
    symlink("../secret", dir.path().join("tree/up")).unwrap();
    symlink("/../../secret", dir.path().join("tree/abs")).unwrap();
    let root = dir.path().join("tree");
    for path in ["/up", "/abs", "/../secret"] {
        let selector = Selector {
            path: path.into(),
            follow_links: true,
            ..Selector::default()
        };
        assert_eq!(
            outcome(ChecksumTree::new().checksum(&mut opener(&root), &selector)),
            "absent",
            "{path}"
        );
    }
}

#[test]
fn nothing_has_a_digest_only_as_a_whole() {
    let all = ChecksumTree::checksum_nothing(&[]).unwrap();
    assert_eq!(all, Digest::sha256(Digest::sha256(b"").to_string()));
    let selector = Selector {
        path: "a".into(),
        ..Selector::default()
    };
    assert!(
        ChecksumTree::checksum_nothing(&[selector])
            .unwrap_err()
            .is_not_found()
    );
}

fn upsert(tree: &mut ChecksumTree, stat: &GoStat, content: &str) -> String {
    let mut hasher = FileHasher::new(stat).unwrap();
    hasher.write_all(content.as_bytes()).unwrap();
    let digest = hasher.finish();
    tree.upsert(stat.path.as_bytes(), stat, digest).unwrap();
    digest.hex()
}

fn stat(path: &str, mode: u32, size: i64) -> GoStat {
    GoStat {
        path: path.into(),
        mode,
        size,
        ..GoStat::default()
    }
}

fn sum(tree: &mut ChecksumTree) -> String {
    let mut refuse = || Err(io::Error::other("the tree was opened"));
    tree.checksum(
        &mut refuse,
        &Selector {
            path: "/".into(),
            ..Selector::default()
        },
    )
    .unwrap()
    .hex()
}

/// Receives a device and a file with special bits and attributes.
fn receive_specials(tree: &mut ChecksumTree) {
    let device = GoStat {
        devmajor: 1,
        devminor: 3,
        ..stat("dev", 1 << 26 | 1 << 21 | 0o600, 0)
    };
    let hashed = upsert(tree, &device, "");
    assert_eq!(
        hashed,
        "85bd76951360c88286c3180c022599ad52bc3dfbbd2779d887da8490374495cf"
    );
    let names = [
        "user.b",
        "user.a",
        "security.selinux",
        "security.capability",
        "system.posix_acl_access",
    ];
    let values = ["2", "1", "q", "cap", "z"];
    let xattrs = names
        .iter()
        .zip(values)
        .map(|(name, value)| (name.to_string(), value.into()))
        .collect();
    let marked = GoStat {
        xattrs,
        ..stat("x", 1 << 23 | 1 << 20 | 0o640, 1)
    };
    let hashed = upsert(tree, &marked, "x");
    assert_eq!(
        hashed,
        "878d311ff25db1e8cc7ab241ddfc296baa1ba05723b83e3f3648e0f40af30919"
    );
}

/// The digests were recorded from BuildKit's `HandleChange` with the same sequence of changes.
#[test]
fn received_changes_give_buildkits_digests() {
    let mut tree = ChecksumTree::new();
    let file = GoStat {
        uid: 5,
        gid: 6,
        ..stat("a/f", 0o644, 3)
    };
    upsert(&mut tree, &stat("a", hash::GO_DIR | 0o755, 0), "");
    let hashed = upsert(&mut tree, &file, "abc");
    assert_eq!(
        hashed,
        "818577bd5b290e913c790631bfb499c60021f7735c91cd4eb58dde57ce5e1f43"
    );
    let link = GoStat {
        linkname: "f".into(),
        ..stat("a/l", hash::GO_SYMLINK | 0o777, 0)
    };
    let hashed = upsert(&mut tree, &link, "");
    assert_eq!(
        hashed,
        "161b21c93680fe9fcde93b47db35001f723c4f19353e1bcbb401c5f136ab9ace"
    );
    upsert(
        &mut tree,
        &GoStat {
            linkname: "a/f".into(),
            ..stat("b", 0o644, 3)
        },
        "",
    );
    receive_specials(&mut tree);
    assert_eq!(
        sum(&mut tree),
        "c2edcff844a8777d4dec50792c3cd5ae88d7371f251e74b28a0f9c7703ba5fd4"
    );

    tree.remove(b"a/l").unwrap();
    upsert(&mut tree, &file, "abd");
    assert_eq!(
        sum(&mut tree),
        "16ecaa676eafc4bcffcce9891342dedb062e3dfefa18c3f2b6e9b4d779ed0e4b"
    );
    upsert(&mut tree, &stat("a", 0o600, 1), "A");
    assert_eq!(
        sum(&mut tree),
        "04d5d5291661c3d668111c87e7a687eee314513406909588be1a2da40ccbf814"
    );
    tree.remove(b"x").unwrap();
    assert_eq!(
        sum(&mut tree),
        "b56da45ff136691d04203b87242f4a5f3cd8c955d1ae1da14087458342f07917"
    );
}

#[test]
fn a_link_received_before_its_source_takes_its_digest() {
    let mut early = ChecksumTree::new();
    upsert(
        &mut early,
        &GoStat {
            linkname: "z".into(),
            ..stat("a", 0o644, 1)
        },
        "",
    );
    upsert(&mut early, &stat("z", 0o644, 1), "z");
    let mut late = ChecksumTree::new();
    upsert(&mut late, &stat("z", 0o644, 1), "z");
    upsert(
        &mut late,
        &GoStat {
            linkname: "z".into(),
            ..stat("a", 0o644, 1)
        },
        "",
    );
    assert_eq!(sum(&mut early), sum(&mut late));
}

#[test]
fn a_label_of_the_host_is_not_content() {
    let plain = stat("f", 0o644, 0);
    let labels = ["security.selinux", "security.ima", "system.posix_acl_default"];
    let xattrs = labels.map(|name| (name.to_owned(), b"v".to_vec())).into();
    let labelled = GoStat {
        mod_time: 7,
        xattrs,
        ..plain.clone()
    };
    assert_eq!(
        FileHasher::new(&plain).unwrap().finish(),
        FileHasher::new(&labelled).unwrap().finish()
    );
    let xattrs = [("security.capability".to_owned(), b"v".to_vec())].into();
    let capable = GoStat {
        xattrs,
        ..plain.clone()
    };
    assert_ne!(
        FileHasher::new(&plain).unwrap().finish(),
        FileHasher::new(&capable).unwrap().finish()
    );
}

#[test]
fn overlong_paths_are_refused() {
    let mut tree = ChecksumTree::new();
    let path = "a/".repeat(3000);
    let digest = Digest::sha256(b"");
    let refused = tree.upsert(path.as_bytes(), &stat("", 0o644, 0), digest);
    assert!(matches!(
        refused,
        Err(ChecksumError::PathTooLong { length: 6000 })
    ));
}

/// One received change: a file with content, a directory, or a removal.
#[derive(Clone, Debug)]
enum Step {
    File(String, u8),
    Dir(String),
    Remove(String),
}

fn step() -> impl Strategy<Value = Step> {
    let path = "[ab](/[ab]){0,2}";
    prop_oneof![
        (path, any::<u8>()).prop_map(|(path, content)| Step::File(path, content)),
        path.prop_map(Step::Dir),
        path.prop_map(Step::Remove),
    ]
}

proptest! {
    /// Whatever the order of changes and of questions in between, the digest is that of the final set of files.
    #[test]
    fn incremental_digests_equal_fresh_ones(steps in prop::collection::vec((step(), any::<bool>()), 1..30)) {
        let mut tree = ChecksumTree::new();
        let mut model: BTreeMap<String, Option<u8>> = BTreeMap::new();
        tree.remove(b"none").unwrap();
        for (step, ask) in steps {
            let (Step::File(path, _) | Step::Dir(path) | Step::Remove(path)) = &step;
            let parent_is_dir = path.rfind('/').is_none_or(|at| matches!(model.get(&path[..at]), Some(None)));
            if !parent_is_dir {
                continue;
            }
            let below = format!("{path}/");
            match step {
                Step::File(path, content) => {
                    upsert(&mut tree, &stat(&path, 0o644, 1), &content.to_string());
                    model.retain(|other, _| !other.starts_with(&below));
                    model.insert(path, Some(content));
                }
                Step::Dir(path) => {
                    upsert(&mut tree, &stat(&path, hash::GO_DIR | 0o755, 0), "");
                    model.insert(path, None);
                }
                Step::Remove(path) => {
                    tree.remove(path.as_bytes()).unwrap();
                    model.retain(|other, _| *other != path && !other.starts_with(&below));
                }
            }
            if ask {
                sum(&mut tree);
                tree = ChecksumTree::decode(&tree.encode()).unwrap();
            }
        }
        let mut fresh = ChecksumTree::new();
        fresh.remove(b"none").unwrap();
        for (path, content) in &model {
            match content {
                Some(content) => upsert(&mut fresh, &stat(path, 0o644, 1), &content.to_string()),
                None => upsert(&mut fresh, &stat(path, hash::GO_DIR | 0o755, 0), ""),
            };
        }
        prop_assert_eq!(sum(&mut tree), sum(&mut fresh));
    }

    #[test]
    fn decoding_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = ChecksumTree::decode(&bytes);
        let _ = ChecksumTree::decode(&[&[1], &bytes[..]].concat());
    }
}

#[test]
fn a_checksum_ends_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    // Longer than anybody waits.
    fs::File::create(dir.path().join("big"))
        .unwrap()
        .set_len(4 << 40)
        .unwrap();
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let stop = Stop::when(move || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) >= 5);
    let mut open = || -> io::Result<OwnedFd> { Ok(fs::File::open(dir.path())?.into()) };
    let stopped = ChecksumTree::new().checksum_all(&mut open, &[], &stop);
    assert!(matches!(stopped, Err(ChecksumError::Stopped)), "{stopped:?}");
}

#[test]
fn a_listing_tells_what_counts_of_each_file() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    fs::create_dir(root.join("d")).unwrap();
    fs::write(root.join("d/a.txt"), "one").unwrap();
    fs::write(root.join("d/b.log"), "log").unwrap();
    fs::set_permissions(root.join("d/a.txt"), fs::Permissions::from_mode(0o640)).unwrap();
    symlink("d/a.txt", root.join("link")).unwrap();
    let open = || -> io::Result<OwnedFd> { Ok(fs::File::open(root)?.into()) };
    let list = |selector: Selector, limit| {
        let mut tree = ChecksumTree::new();
        let selectors = [selector];
        tree.checksum_all(&mut open.clone(), &selectors, &Stop::default())
            .unwrap();
        tree.list(&mut open.clone(), &selectors, limit).unwrap()
    };
    let paths = |listed: &Listed| listed.files.keys().cloned().collect::<Vec<_>>();

    let all = list(Selector::default(), 100);
    assert_eq!(paths(&all), ["", "/d", "/d/a.txt", "/d/b.log", "/link"]);
    assert!(!all.is_cut);
    let file = &all.files["/d/a.txt"];
    assert_eq!(
        (file.kind, file.mode, file.size_bytes),
        (ListedKind::File, 0o640, 3)
    );
    assert_eq!(all.files["/d"].kind, ListedKind::Directory);
    assert_eq!(all.files["/link"].link.as_deref(), Some("d/a.txt"));

    let followed = Selector {
        path: "/link".to_owned(),
        follow_links: true,
        ..Selector::default()
    };
    let followed = list(followed, 100);
    assert_eq!(followed.files["/link"].place, "/d/a.txt");
    let chosen = Selector {
        path: "/d".to_owned(),
        exclude: vec!["*.log".to_owned()],
        ..Selector::default()
    };
    assert_eq!(paths(&list(chosen, 100)), ["/d", "/d/a.txt"]);
    let cut = list(Selector::default(), 2);
    assert_eq!((cut.files.len(), cut.is_cut), (2, true));

    // With other attributes the digest is another; with those that it had, it is the old one unless the bytes changed.
    let had = Attributes {
        mode: 0o640,
        uid: file.uid,
        gid: file.gid,
    };
    fs::set_permissions(root.join("d/a.txt"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_ne!(list(Selector::default(), 100).files["/d/a.txt"].hash, file.hash);
    assert_eq!(hash_as(&mut open.clone(), "/d/a.txt", had).unwrap(), file.hash);
    fs::write(root.join("d/a.txt"), "two").unwrap();
    assert_ne!(hash_as(&mut open.clone(), "/d/a.txt", had).unwrap(), file.hash);
    assert!(hash_as(&mut open.clone(), "/link", had).is_err());
}

#[test]
fn malformed_patterns_are_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "x").unwrap();
    let refusal = |selector: Selector| {
        let error = ChecksumTree::new()
            .checksum(&mut opener(dir.path()), &selector)
            .unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        format!("{error}: {cause}")
    };
    let selector = |path: &str| Selector {
        path: path.to_owned(),
        ..Selector::default()
    };
    let wildcard = Selector {
        wildcard: true,
        ..selector("/f[")
    };
    assert_eq!(
        refusal(wildcard),
        r#"invalid pattern "/f[": syntax error in pattern"#
    );
    let include = Selector {
        include: vec!["a".to_owned(), "[".to_owned()],
        ..selector("/")
    };
    assert_eq!(
        refusal(include),
        "invalid includepatterns: [a []: syntax error in pattern"
    );
    let exclude = Selector {
        exclude: vec!["[".to_owned()],
        ..selector("/")
    };
    assert_eq!(
        refusal(exclude),
        "invalid excludepatterns: [[]: syntax error in pattern"
    );
}

//! Any tree: what a layer carries away, it brings back.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use layer::{ApplyOptions, DiffOptions, apply, diff};
use proptest::prelude::*;

use crate::support::*;

#[derive(Debug, Clone)]
enum Step {
    File(String, String, u32),
    Dir(String, u32),
    Symlink(String, String),
    Link(String, String),
    Remove(String),
    Xattr(String, Vec<u8>),
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec("[abc]|a-b|[.]wx", 1..4).prop_map(|parts| parts.join("/"))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (path(), "[xy]{0,3}", 0..0o1000_u32).prop_map(|(path, data, mode)| Step::File(path, data, mode | 0o400)),
        2 => (path(), 0..0o1000_u32).prop_map(|(path, mode)| Step::Dir(path, mode | 0o700)),
        1 => (path(), path()).prop_map(|(path, target)| Step::Symlink(path, target)),
        1 => (path(), path()).prop_map(|(path, target)| Step::Link(path, target)),
        2 => path().prop_map(Step::Remove),
        1 => (path(), proptest::collection::vec(any::<u8>(), 1..4)).prop_map(|(path, value)| Step::Xattr(path, value)),
    ]
}

/// Carries out what can be; the rest does not matter.
fn run(root: &Path, steps: &[Step]) {
    for step in steps {
        match step {
            Step::File(path, data, mode) => {
                let path = root.join(path);
                let _ = fs::create_dir_all(path.parent().unwrap());
                if !path.is_symlink() && fs::write(&path, data).is_ok() {
                    chmod(&path, *mode);
                }
            }
            Step::Dir(path, mode) => {
                let path = root.join(path);
                if !path.is_symlink() && fs::create_dir_all(&path).is_ok() {
                    chmod(&path, *mode);
                }
            }
            Step::Symlink(path, target) => {
                let _ = symlink(target, root.join(path));
            }
            Step::Link(path, target) => {
                let _ = fs::hard_link(root.join(target), root.join(path));
            }
            Step::Remove(path) => {
                let path = root.join(path);
                if path.is_dir() && !path.is_symlink() {
                    let _ = fs::remove_dir_all(path);
                } else {
                    let _ = fs::remove_file(path);
                }
            }
            Step::Xattr(path, value) => {
                let path = root.join(path);
                if path.exists() && !path.is_symlink() {
                    set_xattr(path, "user.x", value);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    #[test]
    fn applying_a_difference_makes_the_tree(
        base in proptest::collection::vec(step(), 0..12),
        more in proptest::collection::vec(step(), 0..12),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let [lower, upper, target] = ["lower", "upper", "target"].map(|name| dir.path().join(name));
        for root in [&lower, &upper, &target] {
            fs::create_dir(root).unwrap();
            run(root, &base);
            settle(root, 1_000_000_000);
        }
        run(&upper, &more);
        settle(&upper, 1_000_000_000);
        let mut layer = Vec::new();
        diff(Some(open(&lower)), open(&upper), &mut layer, &DiffOptions::default()).unwrap();
        let options = ApplyOptions { keep_owner: true, ..ApplyOptions::default() };
        apply(&*layer, open(&target), &options).unwrap();
        // A layer adds attributes to directories that stay, it cannot take them away.
        let strip = |root: &Path| {
            let mut tree = describe(root);
            for line in tree.values_mut() {
                if line.starts_with("dir") {
                    *line = line.split(" [").next().unwrap().to_owned();
                }
                // Nor does it say that two unchanged names became one file, or one became two.
                *line = line.split("] ").next().unwrap().to_owned();
            }
            tree
        };
        prop_assert_eq!(strip(&upper), strip(&target));
    }
}

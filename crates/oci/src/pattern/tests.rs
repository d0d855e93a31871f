//! Cases whose outcomes are those of the ecosystem's matcher.

use super::*;

fn matches(patterns: &[&str], path: &str) -> bool {
    Matcher::new(patterns).unwrap().matches_or_parent(path).unwrap()
}

#[test]
fn single_patterns() {
    for (pattern, path, want) in [
        ("**", "file", true),
        ("**", "dir/file", true),
        ("**/", "file", true),
        ("**/", "dir/file", true),
        ("**/**", "dir/file", true),
        ("dir/**", "dir/file", true),
        ("dir/**", "dir", false),
        ("dir/**", "dir/dir2/file", true),
        ("**/dir", "dir", true),
        ("**/dir", "dir/file", true),
        ("**/dir2/*", "dir/dir2/file", true),
        ("**/dir2/*", "dir/dir2/dir2/file", true),
        ("**file", "file", true),
        ("**file", "dir/file", true),
        ("**/file", "dir/dir/file", true),
        ("**/file*", "dir/dir/file.txt", true),
        ("**/file*txt", "dir/dir/file.txt", true),
        ("**/**/*.txt", "dir/dir/file.txt", true),
        ("**/**/*.txt2", "dir/dir/file.txt", false),
        ("**/*.txt", "file.txt", true),
        ("a**/*.txt", "a/file.txt", true),
        ("a**/*.txt", "a/dir/dir/file.txt", true),
        ("a/*.txt", "a/dir/file.txt", false),
        ("a/*.txt", "a/file.txt", true),
        ("a[b-d]e", "ae", false),
        ("a[b-d]e", "ace", true),
        ("a[b-d]e", "aae", false),
        ("a[^b-d]e", "aze", true),
        (".*", ".foo", true),
        (".*", "foo", false),
        ("abc.def", "abcdef", false),
        ("abc.def", "abcZdef", false),
        ("abc?def", "abcZdef", true),
        ("abc?def", "abcdef", false),
        (r"a\\", r"a\", true),
        ("**/foo/bar", "foo/bar", true),
        ("**/foo/bar", "dir/foo/bar", true),
        ("abc/**", "abc", false),
        ("abc/**", "abc/def/ghi", true),
        ("**/.foo", "bar/.foo", true),
        ("**/.foo", ".foo", true),
        ("**/.foo", ".foobar", false),
        ("a(b)c/def", "a(b)c/def", true),
        ("a.|)$(}+{bc", "a.|)$(}+{bc", true),
        (
            "dist/*.whl",
            "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl",
            true,
        ),
        ("/foo", "foo", false),
        ("foo/", "foo/bar", true),
        ("*", "a/b/c", true),
        ("foo**", "foobar/x", true),
        ("é?", "éa", true),
    ] {
        assert_eq!(matches(&[pattern], path), want, "{pattern} on {path}");
    }
}

#[test]
fn later_patterns_override_earlier_ones() {
    assert!(!matches(&["*", "!util/docker/web"], "util/docker/web/foo"));
    assert!(matches(
        &["*", "!util/docker/web", "util/docker/web/foo"],
        "util/docker/web/foo"
    ));
    assert!(!matches(&["**", "!README.md"], "README.md"));
    assert!(!matches(&["docs", "!docs/a"], "docs/a/b"));
    assert!(matches(&["!docs", "docs"], "docs/a"));
}

#[test]
fn parent_states_agree_with_whole_paths() {
    let lists: [&[&str]; 5] = [
        &["a", "!a/b/c"],
        &["*", "!a", "a/b"],
        &["**/c", "!a/**"],
        &["a/*/c"],
        &["!x", "b**", "!b/a*", "b/a/c"],
    ];
    for list in lists {
        let matcher = Matcher::new(list).unwrap();
        for one in ["a", "b"] {
            let (hit, top) = matcher.matches_with_parent(one, None).unwrap();
            assert_eq!(hit, matcher.matches_or_parent(one).unwrap());
            for two in ["a", "b"] {
                let path = format!("{one}/{two}");
                let (hit, middle) = matcher.matches_with_parent(&path, Some(&top)).unwrap();
                assert_eq!(hit, matcher.matches_or_parent(&path).unwrap(), "{list:?} {path}");
                let path = format!("{path}/c");
                let (hit, _) = matcher.matches_with_parent(&path, Some(&middle)).unwrap();
                assert_eq!(hit, matcher.matches_or_parent(&path).unwrap(), "{list:?} {path}");
            }
        }
    }
}

#[test]
fn bad_patterns_are_refused() {
    assert_eq!(Matcher::new(["!"]).unwrap_err(), PatternError::BareExclusion);
    for pattern in ["[", "[]", "[^", "a[", "[a-", "[-x]", r"a\"] {
        assert_eq!(
            Matcher::new([pattern]).unwrap_err(),
            PatternError::Syntax,
            "{pattern}"
        );
    }
    assert!(Matcher::new([r"a\c"]).unwrap().matches_or_parent("x").is_err());
}

#[test]
fn globs_are_gos() {
    for (pattern, name, want) in [
        ("abc", "abc", true),
        ("*c", "abc", true),
        ("a*/b", "abc/b", true),
        ("a*/b", "a/c/b", false),
        ("a*b*c*d*e*/f", "axbxcxdxexxx/f", true),
        ("a*b*c*d*e*/f", "axbxcxdxexxx/fff", false),
        ("ab[^e-g]", "abc", true),
        (r"a\*b", "a*b", true),
        ("[a-ζ]*", "α", true),
        ("*[a-ζ]", "A", false),
        ("a?b", "a/b", false),
        ("**", "a/b", false),
    ] {
        assert_eq!(glob_match(pattern, name).unwrap(), want, "{pattern} on {name}");
    }
}

#[test]
fn hostile_patterns_stay_cheap() {
    let pattern = "*a".repeat(2000) + "b";
    assert!(!glob_match(&pattern, "a".repeat(4000)).unwrap());
}

#[test]
fn ignore_files() {
    let file = "\u{feff}# note\n\n  /abs/./x \n!  /y\n  # not a comment\n!\n/\na/../b\r\n";
    assert_eq!(
        read_ignore_file(file.as_bytes()),
        ["abs/x", "!y", "# not a comment", "!", "/", "b"]
    );
}

//! Times as text, and paths as Go cleans them.

use oci::{path, timestamp};
use proptest::prelude::*;

#[test]
fn known_times() {
    assert_eq!(timestamp::format(0, 0), "1970-01-01T00:00:00Z");
    assert_eq!(
        timestamp::format(1_709_208_000, 500_000_000),
        "2024-02-29T12:00:00.5Z"
    );
    assert_eq!(timestamp::format(-1, 0), "1969-12-31T23:59:59Z");
    assert_eq!(
        timestamp::parse("2024-02-29T12:00:00.5Z"),
        Some((1_709_208_000, 500_000_000))
    );
    assert_eq!(
        timestamp::parse("2024-02-29T14:00:00+02:00"),
        Some((1_709_208_000, 0))
    );
    assert_eq!(
        timestamp::parse("2024-02-29T12:00:00.1234567891Z"),
        Some((1_709_208_000, 123_456_789))
    );
    for text in [
        "",
        "2023-02-29T12:00:00Z",
        "2024-13-01T00:00:00Z",
        "2024-01-01 00:00:00Z",
        "2024-01-01T00:00:00",
        "2024-01-01T00:00:00.Z",
    ] {
        assert_eq!(timestamp::parse(text), None, "{text}");
    }
}

#[test]
fn paths_are_cleaned_as_in_go() {
    for (text, want) in [
        ("", "."),
        ("/", "/"),
        ("a/./b//c/..", "a/b"),
        ("../a/../..", "../.."),
        ("/../a", "/a"),
        ("a/../..", ".."),
        ("./", "."),
        ("//a//", "/a"),
    ] {
        assert_eq!(path::clean(text), want, "{text}");
    }
    assert_eq!(path::join(&["/", "", "a/../b"]), "/b");
    assert_eq!(path::join(&["", ""]), "");
    assert_eq!(
        (path::dir("a/b"), path::dir("a"), path::dir("/a")),
        ("a".into(), ".".into(), "/".into())
    );
    assert_eq!(
        (path::base("a/b/"), path::base(""), path::base("//")),
        ("b", ".", "/")
    );
}

proptest! {
    #[test]
    fn times_survive_text(seconds in -60_000_000_000i64..250_000_000_000, nanoseconds in 0u32..1_000_000_000) {
        prop_assert_eq!(timestamp::parse(&timestamp::format(seconds, nanoseconds)), Some((seconds, nanoseconds)));
    }

    #[test]
    fn any_text_is_a_time_or_not(text: String) {
        let _ = timestamp::parse(&text);
    }

    #[test]
    fn cleaning_is_stable(text in "[a./]{0,12}") {
        let cleaned = path::clean(&text);
        prop_assert_eq!(path::clean(&cleaned), cleaned);
    }
}

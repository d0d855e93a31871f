//! References: what people write, the normal form, and the texts of errors.

use oci::{Digest, Reference};
use proptest::prelude::*;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn parse(text: &str) -> Reference {
    text.parse().unwrap_or_else(|err| panic!("{text}: {err}"))
}

#[test]
fn normal_forms() {
    for (text, normal, familiar) in [
        ("alpine", "docker.io/library/alpine", "alpine"),
        ("alpine:3.20", "docker.io/library/alpine:3.20", "alpine:3.20"),
        ("docker.io/alpine", "docker.io/library/alpine", "alpine"),
        ("index.docker.io/alpine", "docker.io/library/alpine", "alpine"),
        ("docker.io/library/alpine", "docker.io/library/alpine", "alpine"),
        ("library/alpine", "docker.io/library/alpine", "alpine"),
        (
            "moby/buildkit:master",
            "docker.io/moby/buildkit:master",
            "moby/buildkit:master",
        ),
        ("docker.io/library/a/b", "docker.io/library/a/b", "library/a/b"),
        ("localhost/x", "localhost/x", "localhost/x"),
        ("localhost:5000/x", "localhost:5000/x", "localhost:5000/x"),
        (
            "127.0.0.1:5000/a/b:c",
            "127.0.0.1:5000/a/b:c",
            "127.0.0.1:5000/a/b:c",
        ),
        ("[fd00::1]:5000/a", "[fd00::1]:5000/a", "[fd00::1]:5000/a"),
        ("ghcr.io/A_b.c/x", "", ""),
        ("Foo/x", "Foo/x", "Foo/x"),
        (
            "xn--7o8h.com/myimage:xn--7o8h.com",
            "xn--7o8h.com/myimage:xn--7o8h.com",
            "xn--7o8h.com/myimage:xn--7o8h.com",
        ),
        ("a__b/c---d.e", "docker.io/a__b/c---d.e", "a__b/c---d.e"),
        ("under_score.com/x", "under_score.com/x", "under_score.com/x"),
    ] {
        if normal.is_empty() {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        } else {
            assert_eq!(parse(text).to_string(), normal);
            assert_eq!(parse(text).familiar(), familiar);
        }
    }
}

#[test]
fn parts() {
    let reference = parse(&format!("reg.example:443/a/b:tag@{DIGEST}"));
    assert_eq!((reference.domain(), reference.path()), ("reg.example:443", "a/b"));
    assert_eq!(reference.tag(), Some("tag"));
    assert_eq!(reference.digest(), Some(&Digest::sha256("")));
    assert_eq!(
        reference.clone().without_tag().to_string(),
        format!("reg.example:443/a/b@{DIGEST}")
    );
    assert_eq!(
        reference.without_tag_and_digest().with_default_tag().to_string(),
        "reg.example:443/a/b:latest"
    );
    assert_eq!(parse(&format!("a@{DIGEST}")).with_default_tag().tag(), None);
    assert!(parse("a").with_tag("-x").is_err());
}

#[test]
fn error_texts() {
    for (text, want) in [
        ("", "invalid reference format"),
        ("a b", "invalid reference format"),
        ("a:", "invalid reference format"),
        ("a@sha256:00", "invalid reference format"),
        ("-a", "invalid reference format"),
        ("a/", "invalid reference format"),
        ("a..b", "invalid reference format"),
        ("a___b", "invalid reference format"),
        ("https://a/b", "invalid reference format"),
        (
            "Alpine",
            "invalid reference format: repository name (library/Alpine) must be lowercase",
        ),
        (
            "a.io/B:c",
            "invalid reference format: repository name (B) must be lowercase",
        ),
        (
            &DIGEST[7..],
            &format!(
                "invalid repository name ({}), cannot specify 64-byte hexadecimal strings",
                &DIGEST[7..]
            ),
        ),
        (
            &format!("a@sha256:{}", "0".repeat(40)),
            "invalid checksum digest length",
        ),
        (
            &format!("a@sha256:{}", "A".repeat(64)),
            "invalid checksum digest format",
        ),
        (
            &format!("a@foo:{}", "0".repeat(40)),
            "unsupported digest algorithm",
        ),
        (
            &format!("a.io/{}", "a".repeat(256)),
            "repository name must not be more than 255 characters",
        ),
        (&format!("a:{}", "b".repeat(129)), "invalid reference format"),
    ] {
        assert_eq!(text.parse::<Reference>().unwrap_err().to_string(), want, "{text}");
    }
}

proptest! {
    #[test]
    fn normal_forms_are_stable(text in "([a-z0-9.:]{1,8}/)?[a-z0-9._/-]{1,12}(:[a-zA-Z0-9._-]{1,6})?") {
        if let Ok(reference) = text.parse::<Reference>() {
            prop_assert_eq!(parse(&reference.to_string()), reference.clone());
            if !reference.domain().is_empty() {
                prop_assert_eq!(parse(&reference.familiar()), reference);
            }
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text: String) {
        let _ = text.parse::<Reference>();
    }
}

#[test]
fn exact_references_get_nothing_added() {
    let exact = |text: &str| {
        Reference::parse_exact(text)
            .map(|found| found.to_string())
            .map_err(|err| err.to_string())
    };
    let digested = format!("s/a:b@{DIGEST}");
    for good in ["alpine", "a/b:c", digested.as_str(), "sha256:aa"] {
        assert_eq!(exact(good), Ok(good.to_owned()));
    }
    let at_nothing = format!("@{DIGEST}");
    for (bad, wanted) in [
        ("", "repository name must have at least one component"),
        ("a//b", "invalid reference format"),
        ("a:!", "invalid reference format"),
        (at_nothing.as_str(), "invalid reference format"),
        ("s@sha256:1", "invalid reference format"),
        ("Store", "repository name must be lowercase"),
    ] {
        assert_eq!(exact(bad), Err(wanted.to_owned()), "{bad}");
    }
    assert_eq!(Reference::parse_exact(&digested).unwrap().name(), "s/a");
}

//! The one way to write a source's identifier, which is the one that policies are about.

use llb::pb;
use oci::Reference;

use super::git;

/// Returns a source's canonical identifier. What cannot be understood stays as it is: it is refused when it is used.
///
/// Images are written out in full. Git repositories are `git://host/path#ref:subdir`, whatever way leads to them; the
/// host and path are those of what is really fetched.
pub fn canonical(op: &pb::SourceOp) -> String {
    let found = match op.identifier.split_once("://") {
        Some(("docker-image", name)) => Reference::parse(name)
            .ok()
            .map(|reference| format!("docker-image://{}", reference.with_default_tag())),
        Some((scheme @ ("docker-image+blob" | "oci-layout+blob"), name)) => Reference::parse(name)
            .ok()
            .map(|reference| format!("{scheme}://{reference}")),
        Some(("git", _)) => git::canonical_identifier(op),
        _ => None,
    };
    found.unwrap_or_else(|| op.identifier.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_name_for_a_source() {
        let name = |identifier: &str, attrs: &[(&str, &str)]| {
            let attrs = attrs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect();
            canonical(&pb::SourceOp {
                identifier: identifier.to_owned(),
                attrs,
            })
        };
        for (written, found) in [
            (
                "docker-image://alpine",
                "docker-image://docker.io/library/alpine:latest",
            ),
            ("git://h/a/../b.git#main:../d/", "git://h/b.git#main:d"),
            ("git://git@h:b.git", "git://h/b.git"),
            ("git://ssh://git@h:22/b.git#:d", "git://h:22/b.git#:d"),
            ("https://h/a/../b", "https://h/a/../b"),
            ("local://context", "local://context"),
            ("docker-image://A", "docker-image://A"),
        ] {
            assert_eq!(name(written, &[]), found);
        }
        let full = [("git.fullurl", "https://user:secret@evil/x.git")];
        assert_eq!(name("git://good/x.git#v1", &full), "git://evil/x.git#v1");
    }
}

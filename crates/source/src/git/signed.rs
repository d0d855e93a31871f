//! Signatures of commits and tags.

use build::error::{BuildError, ErrorKind};
use build::meta::GitMeta;
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

use crate::signature::{self, Terms};

/// What SSH signatures of Git are made for.
const NAMESPACE: &str = "git";
/// How the signature at the end of a tag begins.
const TAG_SIGNATURES: [&[u8]; 2] = [b"-----BEGIN PGP SIGNATURE-----", b"-----BEGIN SSH SIGNATURE-----"];

/// By what a source's commit must be signed.
#[derive(Clone, Debug, Default)]
pub(super) struct Demand {
    /// OpenPGP keys in armor, or an SSH key.
    pub public_key: String,
    /// Refuse keys that have expired since they signed.
    pub reject_expired: bool,
    /// The ref must be an annotated tag, and that must be signed.
    pub requires_tag: bool,
    /// The commit must be signed, whether or not a tag is.
    pub ignores_tag: bool,
}

impl Demand {
    /// Checks what a remote's ref points to, whose objects have been fetched.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] for what is not signed as demanded.
    pub fn check(&self, found: &GitMeta, now: std::time::SystemTime) -> Result<(), BuildError> {
        let terms = Terms {
            now,
            reject_expired: self.reject_expired,
        };
        if !self.ignores_tag && !found.tag_object.is_empty() {
            check_hash("tag", &found.tag_object, &found.checksum)?;
            let (signed, signature) = split_tag(&found.tag_object);
            match self.check_signature(signed, signature.as_deref(), terms) {
                Err(error) if self.requires_tag => return Err(error),
                Err(_) => {}
                Ok(()) => return Ok(()),
            }
        }
        if self.requires_tag {
            return Err(denied("signed tag required but no signed tag found"));
        }
        let commit = if found.commit_checksum.is_empty() {
            &found.checksum
        } else {
            &found.commit_checksum
        };
        check_hash("commit", &found.commit_object, commit)?;
        let (signed, signature) = split_commit(&found.commit_object, commit.len() == 64);
        self.check_signature(&signed, signature.as_deref(), terms)
    }

    fn check_signature(
        &self,
        signed: &[u8],
        signature: Option<&str>,
        terms: Terms,
    ) -> Result<(), BuildError> {
        let signature = signature.ok_or_else(|| denied("git object is not signed"))?;
        signature::verify(signed, signature, &self.public_key, NAMESPACE, terms)
            .map_err(|error| BuildError::from_source(ErrorKind::Denied, error))
    }
}

fn denied(text: &str) -> BuildError {
    BuildError::new(ErrorKind::Denied, text)
}

/// Checks that an object is the one of a name.
fn check_hash(kind: &str, object: &[u8], name: &str) -> Result<(), BuildError> {
    let algorithm = if name.len() == 64 {
        &SHA256
    } else {
        &SHA1_FOR_LEGACY_USE_ONLY
    };
    let mut context = Context::new(algorithm);
    context.update(format!("{kind} {}\0", object.len()).as_bytes());
    context.update(object);
    let hash = context.finish();
    let hex: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    if hex == name {
        return Ok(());
    }
    let text = format!("{kind} object checksum verification failed: expected {name}, got {hex}");
    Err(BuildError::internal(text))
}

/// What is signed of a commit, and the signature: a header of its own for each format of names.
fn split_commit(object: &[u8], is_sha256: bool) -> (Vec<u8>, Option<String>) {
    let wanted: &[u8] = if is_sha256 { b"gpgsig-sha256 " } else { b"gpgsig " };
    let (mut signed, mut signature) = (Vec::new(), Vec::new());
    let (mut in_signature, mut is_wanted) = (false, false);
    let mut lines = object.split_inclusive(|byte| *byte == b'\n');
    for line in lines.by_ref() {
        if line == b"\n" {
            signed.extend_from_slice(line);
            break;
        }
        let is_continued = in_signature && line.starts_with(b" ");
        if !is_continued {
            in_signature = line.starts_with(b"gpgsig ") || line.starts_with(b"gpgsig-sha256 ");
            is_wanted = line.starts_with(wanted);
        }
        if !in_signature {
            signed.extend_from_slice(line);
        } else if is_wanted {
            let skipped = if is_continued { 1 } else { wanted.len() };
            signature.extend_from_slice(line.get(skipped..).unwrap_or_default());
        }
    }
    lines.for_each(|line| signed.extend_from_slice(line));
    let signature = (!signature.is_empty()).then(|| String::from_utf8_lossy(&signature).into_owned());
    (signed, signature)
}

/// What is signed of a tag, and the signature, which is its end.
fn split_tag(object: &[u8]) -> (&[u8], Option<String>) {
    let mut start = None;
    let mut at = 0;
    for line in object.split_inclusive(|byte| *byte == b'\n') {
        if TAG_SIGNATURES.iter().any(|mark| line.starts_with(mark)) {
            start = Some(at);
        }
        at += line.len();
    }
    match start.and_then(|start| object.split_at_checked(start)) {
        Some((signed, signature)) => (signed, Some(String::from_utf8_lossy(signature).into_owned())),
        None => (object, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_taken_out_of_commits() {
        let object = b"tree 1\ngpgsig -----BEGIN X-----\n \n abc\n -----END X-----\ngpgsig-sha256 other\n more\nencoding y\n\ngpgsig text\n";
        let (signed, signature) = split_commit(object, false);
        assert_eq!(signed, b"tree 1\nencoding y\n\ngpgsig text\n");
        assert_eq!(
            signature.as_deref(),
            Some("-----BEGIN X-----\n\nabc\n-----END X-----\n")
        );
        assert_eq!(split_commit(object, true).1.as_deref(), Some("other\nmore\n"));
        assert_eq!(split_commit(b"tree 1\n\ngpgsig x\n", false).1, None);
    }

    #[test]
    fn signatures_are_the_end_of_tags() {
        let object = b"object 1\n\ntext\n-----BEGIN PGP SIGNATURE-----\nx\n";
        let (signed, signature) = split_tag(object);
        assert_eq!(signed, b"object 1\n\ntext\n");
        assert_eq!(signature.as_deref(), Some("-----BEGIN PGP SIGNATURE-----\nx\n"));
        assert_eq!(
            split_tag(b"object 1\n\ntext\n"),
            (&b"object 1\n\ntext\n"[..], None)
        );
    }

    #[test]
    fn an_object_is_checked_against_its_name() {
        // `git hash-object -t commit --literally` of an empty file.
        assert!(check_hash("commit", b"", "dcf5b16e76cce7425d0beaef62d79a7d10fce1f5").is_ok());
        assert!(check_hash("commit", b"x", "dcf5b16e76cce7425d0beaef62d79a7d10fce1f5").is_err());
    }
}

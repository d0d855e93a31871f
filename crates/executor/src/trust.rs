//! A certificate authority that a container's programs trust for the time of a run: appended to the image's own bundle of
//! authorities and taken out again.
//!
//! Programs may replace the bundle meanwhile (installing certificates does), so a file mounted over it would be in their
//! way. What they made of it stays; only the part between our marks is removed.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{FileType, OFlags, Timespec, Timestamps};
use serde::{Deserialize, Serialize};

use crate::tree;

/// Where the usual distributions keep the bundle.
const BUNDLES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// BuildKit's marks.
const BEGIN: &str = "# buildkit proxy CA begin\n";
const END: &str = "# buildkit proxy CA end\n";
const MAX_BUNDLE_BYTES: u64 = 10 << 20;

/// What was added to a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Trusted {
    bundle: String,
    added: String,
    /// Times of the file before and after: access and modification, in seconds and nanoseconds.
    before: [(i64, i64); 2],
    after: (i64, i64),
}

/// Opens a bundle to be changed; `None` if it is no file.
fn open(root: BorrowedFd<'_>, bundle: &str) -> io::Result<Option<File>> {
    // Nothing but a file is ever opened for real.
    let found = tree::open_in_root(root, bundle, OFlags::PATH)?;
    let stat = rustix::fs::fstat(&found)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    File::options().read(true).write(true).open(path).map(Some)
}

fn times(file: &File) -> io::Result<[(i64, i64); 2]> {
    let stat = rustix::fs::fstat(file)?;
    let nanoseconds = |value| i64::try_from(value).unwrap_or(0);
    Ok([
        (stat.st_atime, nanoseconds(stat.st_atime_nsec)),
        (stat.st_mtime, nanoseconds(stat.st_mtime_nsec)),
    ])
}

fn read(file: &mut File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(MAX_BUNDLE_BYTES + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > MAX_BUNDLE_BYTES) {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it exceeds {MAX_BUNDLE_BYTES} bytes"),
        ));
    }
    Ok(bytes)
}

/// Adds a certificate in PEM to the bundle of a root file system; `None` if there is no bundle.
pub(crate) fn add(root: BorrowedFd<'_>, certificate: &str) -> io::Result<Option<Trusted>> {
    for bundle in BUNDLES {
        let mut file = match open(root, bundle) {
            Ok(Some(file)) => file,
            Ok(None) => continue,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                continue;
            }
            Err(error) => return Err(error),
        };
        let before = times(&file)?;
        let old = read(&mut file)?;
        let gap = if old.is_empty() || old.ends_with(b"\n") {
            "\n"
        } else {
            "\n\n"
        };
        let added = format!("{gap}{BEGIN}{}\n{END}", certificate.trim_end());
        file.seek(SeekFrom::End(0))?;
        file.write_all(added.as_bytes())?;
        return Ok(Some(Trusted {
            bundle: (*bundle).to_owned(),
            added,
            before,
            after: times(&file)?[1],
        }));
    }
    Ok(None)
}

/// Takes a certificate out again; a bundle that was not changed otherwise gets its times back. A bundle that is gone is no
/// error.
pub(crate) fn remove(root: BorrowedFd<'_>, trusted: &Trusted) -> io::Result<()> {
    let mut file = match open(root, &trusted.bundle) {
        Ok(Some(file)) => file,
        Ok(None) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let is_untouched = times(&file)?[1] == trusted.after;
    let bytes = read(&mut file)?;
    let Some(kept) = without(&bytes, trusted.added.as_bytes()) else {
        return Ok(());
    };
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&kept)?;
    file.set_len(u64::try_from(kept.len()).map_err(io::Error::other)?)?;
    if is_untouched {
        let time = |(seconds, nanoseconds): (i64, i64)| Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        };
        let times = Timestamps {
            last_access: time(trusted.before[0]),
            last_modification: time(trusted.before[1]),
        };
        rustix::fs::futimens(file.as_fd(), &times)?;
    }
    Ok(())
}

/// Leaves out what was added, or, if a program rearranged the bundle, at least the certificate.
fn without(bytes: &[u8], added: &[u8]) -> Option<Vec<u8>> {
    let find = |part: &[u8]| bytes.windows(part.len()).position(|window| window == part);
    let certificate = std::str::from_utf8(added).ok()?;
    let certificate = certificate.trim_start().strip_prefix(BEGIN)?.strip_suffix(END)?;
    let (start, len) = [added, certificate.as_bytes()]
        .into_iter()
        .find_map(|part| Some((find(part)?, part.len())))?;
    let mut kept = bytes.get(..start)?.to_vec();
    kept.extend_from_slice(bytes.get(start + len..)?);
    Some(kept)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::path::Path;

    use super::*;

    const PEM: &str = "-----BEGIN CERTIFICATE-----\nours\n-----END CERTIFICATE-----\n";

    fn root(path: &Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    fn tree(bundle: &str, content: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(bundle);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        (directory, path)
    }

    #[test]
    fn a_bundle_is_as_before_afterwards() {
        for content in ["", "theirs\n", "theirs"] {
            let (directory, path) = tree("etc/ssl/cert.pem", content);
            let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
            let root = root(directory.path());
            let trusted = add(root.as_fd(), PEM).unwrap().unwrap();
            let changed = std::fs::read_to_string(&path).unwrap();
            assert!(
                changed.contains("# buildkit proxy CA begin\n-----BEGIN"),
                "{changed}"
            );
            assert!(changed.starts_with(content));
            remove(root.as_fd(), &trusted).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
            assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), modified);
        }
    }

    #[test]
    fn what_programs_made_of_it_stays() {
        let (directory, path) = tree("etc/ssl/certs/ca-certificates.crt", "theirs\n");
        let root = root(directory.path());
        let trusted = add(root.as_fd(), PEM).unwrap().unwrap();
        let grown = std::fs::read_to_string(&path).unwrap() + "more\n";
        std::fs::write(&path, grown).unwrap();
        remove(root.as_fd(), &trusted).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "theirs\nmore\n");
        // Only the certificate was taken over into a new bundle.
        std::fs::write(&path, format!("new\n{PEM}end\n")).unwrap();
        remove(root.as_fd(), &trusted).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new\nend\n");
        std::fs::remove_file(&path).unwrap();
        remove(root.as_fd(), &trusted).unwrap();
    }

    #[test]
    fn links_stay_inside_and_only_files_are_opened() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("etc/ssl/certs")).unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::os::unix::fs::symlink(outside.path(), directory.path().join("etc/ssl/cert.pem")).unwrap();
        let root = root(directory.path());
        assert_eq!(add(root.as_fd(), PEM).unwrap(), None);
        std::fs::remove_file(directory.path().join("etc/ssl/cert.pem")).unwrap();
        std::fs::create_dir(directory.path().join("etc/ssl/cert.pem")).unwrap();
        assert_eq!(add(root.as_fd(), PEM).unwrap(), None);
        assert_eq!(std::fs::read(outside.path()).unwrap(), b"");
    }
}

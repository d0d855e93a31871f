//! Paths in images of another operating system than ours.

use oci::path;

use crate::text::quote;

/// Why a path is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OsPathError {
    #[error("No relative path specified in {}", quote(.0))]
    OnlyDrive(String),
    #[error("UNC paths are not supported")]
    Unc,
    #[error("The specified path is not on the system drive (C:)")]
    Drive,
    #[error("removing drive letter: {0}")]
    Normalizing(#[source] Box<OsPathError>),
}

fn is_windows(os: &str) -> bool {
    os == "windows"
}

/// Turns the system's separators into slashes.
pub(crate) fn to_slash(path: &str, os: &str) -> String {
    if is_windows(os) {
        path.replace('\\', "/")
    } else {
        path.to_owned()
    }
}

fn from_slash(path: &str, os: &str) -> String {
    if is_windows(os) {
        path.replace('/', "\\")
    } else {
        path.to_owned()
    }
}

/// Removes the drive letter of a Windows path, which must be the system's drive, and cleans it. Other systems' paths stay.
pub(crate) fn remove_drive(text: &str, os: &str, keep_slash: bool) -> Result<String, OsPathError> {
    if !is_windows(os) {
        return Ok(text.to_owned());
    }
    if text.len() == 2 && text.ends_with(':') {
        return Err(OsPathError::OnlyDrive(text.to_owned()));
    }
    if to_slash(text, os).starts_with("//") {
        return Err(OsPathError::Unc);
    }
    let rest = match text.split_once(':') {
        None => text,
        Some((drive, rest)) if drive.eq_ignore_ascii_case("c") => rest,
        Some(_) => return Err(OsPathError::Drive),
    };
    let slashed = to_slash(rest, os);
    let mut cleaned = path::clean(&slashed);
    if keep_slash && cleaned.len() > 1 && slashed.ends_with('/') {
        cleaned.push('/');
    }
    Ok(cleaned)
}

/// Tells whether a path begins at the root of an image.
pub(crate) fn is_absolute(path: &str, os: &str) -> bool {
    remove_drive(path, os, false).is_ok_and(|path| path.starts_with('/'))
}

/// Makes a path absolute, with slashes and without drive; `keep_slash` keeps `/` and `/.` at its end.
pub(crate) fn normalize(parent: &str, path: &str, os: &str, keep_slash: bool) -> Result<String, OsPathError> {
    let original = to_slash(path, os);
    let parent = to_slash(parent, os);
    let without_drive = |path: &str| {
        remove_drive(path, os, keep_slash).map_err(|error| OsPathError::Normalizing(Box::new(error)))
    };
    let parent = without_drive(if parent.is_empty() { "/" } else { &parent })?;
    let parent = if is_absolute(&parent, os) {
        parent
    } else {
        path::join(&["/", &parent])
    };
    let mut path = without_drive(if original.is_empty() { &parent } else { &original })?;
    if !is_absolute(&path, os) {
        path = path::join(&[&parent, &path]);
    }
    if keep_slash {
        if original.ends_with('/') && !path.ends_with('/') {
            path.push('/');
        } else if original.ends_with("/.") {
            if path != "/" {
                path.push('/');
            }
            path.push('.');
        }
    }
    Ok(to_slash(&path, os))
}

/// Makes a working directory absolute, with the system's separators.
pub(crate) fn normalize_workdir(current: &str, dir: &str, os: &str) -> Result<String, OsPathError> {
    normalize(current, dir, os, false).map(|dir| from_slash(&dir, os))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalizes() {
        let normal = |parent, path| normalize(parent, path, "linux", true).unwrap();
        assert_eq!(normal("/a", "b/"), "/a/b/");
        assert_eq!(normal("/a", "./"), "/a/");
        assert_eq!(normal("/a", "b/."), "/a/b/.");
        assert_eq!(normal("a", "b"), "/a/b");
        assert_eq!(normal("/a", "/b/../c"), "/b/../c");
        assert_eq!(normalize("/a", "C:\\x\\y\\", "windows", true).unwrap(), "/x/y/");
        assert_eq!(
            normalize("/a", "D:\\x", "windows", true),
            Err(OsPathError::Normalizing(Box::new(OsPathError::Drive)))
        );
        assert_eq!(normalize_workdir("\\a", "b", "windows").unwrap(), "\\a\\b");
    }
}

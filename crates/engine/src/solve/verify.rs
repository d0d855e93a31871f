//! Whether a result has the platforms that were asked for. What differs is a warning, not an error.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use export::platforms::{self, PLATFORMS_KEY};
use oci::Platform;

use crate::bridge::BuildResult;
use crate::error::BuildError;

/// The frontend's option that names platforms, separated by commas.
const PLATFORM_OPT: &str = "platform";

/// Compares a result with what its frontend was asked for; returns warnings of one line.
///
/// # Errors
/// A user error for a result whose metadata makes no sense.
pub(super) fn check_platforms<R>(
    opts: &BTreeMap<String, String>,
    result: &BuildResult<R>,
) -> Result<Vec<String>, BuildError> {
    if !result.metadata.contains_key(PLATFORMS_KEY) {
        if !result.refs.is_empty() {
            return Err(BuildError::user(
                "build result contains multiple refs without platforms mapping",
            ));
        }
        if result.single.is_none() {
            return Ok(Vec::new());
        }
    }
    let wanted = match requested(opts) {
        Ok(wanted) => wanted,
        Err(warnings) => return Ok(warnings),
    };
    compare(&wanted, &result.metadata, !result.refs.is_empty()).map(|warning| warning.into_iter().collect())
}

/// The platforms that were asked for, or what is wrong with them.
fn requested(opts: &BTreeMap<String, String>) -> Result<Vec<Platform>, Vec<String>> {
    let Some(text) = opts.get(PLATFORM_OPT) else {
        return Ok(vec![Platform::host()]);
    };
    let (mut wanted, mut seen, mut warnings) = (Vec::new(), BTreeSet::new(), Vec::new());
    for name in text.split(',') {
        match Platform::parse(name) {
            Ok(platform) => {
                let platform = platform.normalized();
                if !seen.insert(platform.format_all()) {
                    warnings.push(format!("Duplicate platform result requested {name:?}"));
                }
                wanted.push(platform);
            }
            Err(error) => warnings.push(format!("Invalid platform result requested {name:?}: {error}")),
        }
    }
    if warnings.is_empty() {
        Ok(wanted)
    } else {
        Err(warnings)
    }
}

fn compare(
    wanted: &[Platform],
    metadata: &BTreeMap<String, Bytes>,
    is_map: bool,
) -> Result<Option<String>, BuildError> {
    let found: Vec<Platform> = platforms::platforms(metadata)?
        .into_iter()
        .map(|entry| entry.platform)
        .collect();
    if let ([wanted], [found]) = (wanted, found.as_slice()) {
        // A version that nobody asked for is no difference.
        let mut alike = found.clone();
        if wanted.os_version.is_empty() {
            alike.os_version.clear();
        }
        let differs = alike.format_all() != wanted.format_all();
        return Ok(differs.then(|| {
            format!(
                "Requested platform {:?} does not match result platform {:?}",
                wanted.format_all(),
                found.format_all()
            )
        }));
    }
    if !is_map && wanted.len() > 1 {
        return Ok(Some(
            "Multiple platforms requested but result is not multi-platform".to_owned(),
        ));
    }
    let (wanted, found) = (names(wanted), names(&found));
    Ok((wanted != found).then(|| {
        format!(
            "Requested platforms {} do not match result platforms {}",
            wanted.join(","),
            found.join(",")
        )
    }))
}

fn names(platforms: &[Platform]) -> Vec<String> {
    let mut names: Vec<String> = platforms.iter().map(Platform::format_all).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(wanted: Option<&str>, found: &[&str]) -> Vec<String> {
        let opts = wanted.map(|wanted| (PLATFORM_OPT.to_owned(), wanted.to_owned()));
        let mut result = BuildResult::default();
        if found.is_empty() {
            result.single = Some(());
        } else {
            let mut entries = Vec::new();
            for name in found {
                result.refs.insert((*name).to_owned(), Some(()));
                let (os, architecture) = name.split_once('/').unwrap();
                entries.push(format!(
                    r#"{{"ID":"{name}","Platform":{{"os":"{os}","architecture":"{architecture}"}}}}"#
                ));
            }
            let text = format!(r#"{{"Platforms":[{}]}}"#, entries.join(","));
            result.metadata.insert(PLATFORMS_KEY.to_owned(), text.into());
        }
        check_platforms(&opts.into_iter().collect(), &result).unwrap()
    }

    #[test]
    fn what_was_not_asked_for_is_told() {
        let both = ["linux/amd64", "linux/arm64"];
        assert!(warnings(None, &[]).is_empty());
        assert!(warnings(Some("linux/amd64,linux/arm64"), &both).is_empty());
        assert!(warnings(Some("linux/arm64,linux/x86_64"), &both).is_empty());
        let told = warnings(Some("linux/amd64,linux/arm64"), &[]);
        assert_eq!(
            told,
            ["Multiple platforms requested but result is not multi-platform"]
        );
        let told = warnings(Some("linux/s390x"), &both);
        let text = "Requested platforms linux/s390x do not match result platforms linux/amd64,linux/arm64";
        assert_eq!(told, [text]);
        let told = warnings(Some("linux/s390x"), &["linux/arm64"]);
        let text = r#"Requested platform "linux/s390x" does not match result platform "linux/arm64""#;
        assert_eq!(told, [text]);
        let told = warnings(Some("linux/arm64,linux/arm64"), &both);
        assert_eq!(told, [r#"Duplicate platform result requested "linux/arm64""#]);
    }

    #[test]
    fn refs_need_platforms() {
        let mut result = BuildResult::default();
        result.refs.insert("x".to_owned(), Some(()));
        assert!(check_platforms(&BTreeMap::new(), &result).is_err());
        assert!(
            check_platforms(&BTreeMap::new(), &BuildResult::<()>::default())
                .unwrap()
                .is_empty()
        );
    }
}

//! Annotations of indexes, manifests and their descriptors, by platform.
//!
//! Keys are `annotation[-<where>][\[platform\]].<key>`, as attributes and as a result's metadata.

use std::collections::BTreeMap;

use build::error::BuildError;
use oci::Platform;

type Pairs = BTreeMap<String, String>;

/// Annotations of one platform, or of all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlatformAnnotations {
    /// Of the index.
    pub index: Pairs,
    /// Of the index's descriptor.
    pub index_descriptor: Pairs,
    /// Of manifests.
    pub manifest: Pairs,
    /// Of manifests' descriptors.
    pub manifest_descriptor: Pairs,
}

/// Annotations by platform as formatted with all its parts; the empty key is for all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Annotations(BTreeMap<String, PlatformAnnotations>);

impl Annotations {
    /// Takes a key if it is an annotation's; `false` if not.
    pub fn read(&mut self, key: &str, value: &str) -> Result<bool, BuildError> {
        let Some((place, platform, name)) = split(key) else {
            return Ok(false);
        };
        let platform = if platform.is_empty() {
            String::new()
        } else {
            Platform::parse(platform)
                .map_err(|error| BuildError::user(error.to_string()))?
                .format_all()
        };
        let of = self.0.entry(platform).or_default();
        let pairs = match place {
            "" | "manifest" => &mut of.manifest,
            "manifest-descriptor" => &mut of.manifest_descriptor,
            "index" => &mut of.index,
            "index-descriptor" => &mut of.index_descriptor,
            other => return Err(BuildError::user(format!("unrecognized annotation type {other}"))),
        };
        pairs.insert(name.to_owned(), value.to_owned());
        Ok(true)
    }

    /// Adds annotations, replacing those of the same name.
    pub fn merge(&mut self, other: Self) {
        for (platform, theirs) in other.0 {
            let mine = self.0.entry(platform).or_default();
            mine.index.extend(theirs.index);
            mine.index_descriptor.extend(theirs.index_descriptor);
            mine.manifest.extend(theirs.manifest);
            mine.manifest_descriptor.extend(theirs.manifest_descriptor);
        }
    }

    /// Lists the platforms named.
    pub fn platforms(&self) -> impl Iterator<Item = &str> {
        self.0
            .keys()
            .map(String::as_str)
            .filter(|platform| !platform.is_empty())
    }

    /// Whether anything but manifests is annotated.
    pub fn needs_oci_types(&self) -> bool {
        self.0.values().any(|of| {
            !(of.index.is_empty() && of.index_descriptor.is_empty() && of.manifest_descriptor.is_empty())
        })
    }

    /// The annotations that apply to a platform; those of the index are always all.
    pub fn of(&self, platform: Option<&Platform>) -> PlatformAnnotations {
        let mut all = PlatformAnnotations::default();
        for of in self.0.values() {
            all.index.extend(of.index.clone());
            all.index_descriptor.extend(of.index_descriptor.clone());
        }
        let named = platform.map(Platform::format_all);
        for key in std::iter::once("").chain(named.as_deref()) {
            if let Some(of) = self.0.get(key) {
                all.manifest.extend(of.manifest.clone());
                all.manifest_descriptor.extend(of.manifest_descriptor.clone());
            }
        }
        all
    }
}

/// Splits a key into place, platform and name.
fn split(key: &str) -> Option<(&str, &str, &str)> {
    let rest = key.strip_prefix("annotation")?;
    let (place, rest) = match rest.strip_prefix('-') {
        Some(rest) => {
            let end = rest.find(|c: char| !(c.is_ascii_lowercase() || c == '-'))?;
            rest.split_at_checked(end)
                .filter(|(place, _)| !place.is_empty())?
        }
        None => ("", rest),
    };
    let (platform, rest) = match rest.strip_prefix('[') {
        Some(rest) => {
            let (platform, rest) = rest.split_once(']')?;
            let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '/' | '-');
            if platform.is_empty() || !platform.chars().all(valid) {
                return None;
            }
            (platform, rest)
        }
        None => ("", rest),
    };
    let name = rest.strip_prefix('.')?;
    (!name.is_empty() && !name.contains(char::is_whitespace)).then_some((place, platform, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_split() {
        assert_eq!(split("annotation.a.b"), Some(("", "", "a.b")));
        assert_eq!(split("annotation-index.a"), Some(("index", "", "a")));
        assert_eq!(
            split("annotation-manifest-descriptor[linux/arm64].a"),
            Some(("manifest-descriptor", "linux/arm64", "a"))
        );
        for key in [
            "annotation",
            "annotation.",
            "annotations.a",
            "annotation[].a",
            "annotation-.a",
            "annotation.a b",
        ] {
            assert_eq!(split(key), None, "{key}");
        }
    }

    #[test]
    fn platforms_add_to_the_common_ones() {
        let mut annotations = Annotations::default();
        for (key, value) in [
            ("annotation.a", "1"),
            ("annotation[linux/amd64].b", "2"),
            ("annotation[linux/arm64].b", "3"),
            ("annotation-index.c", "4"),
        ] {
            assert!(annotations.read(key, value).unwrap());
        }
        let of = annotations.of(Some(&Platform::new("linux", "amd64")));
        assert_eq!(
            of.manifest,
            Pairs::from([("a".into(), "1".into()), ("b".into(), "2".into())])
        );
        assert_eq!(of.index.len(), 1);
        assert_eq!(annotations.of(None).manifest.len(), 1);
        assert!(annotations.needs_oci_types());
        assert!(annotations.read("annotation-layer.a", "1").is_err());
    }
}

//! `index.json` of an OCI layout directory: names and tags of what is in it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Annotation with an image's full name.
const IMAGE_NAME: &str = "io.containerd.image.name";
/// Annotation with a tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Why an index cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The file cannot be read or written.
    #[error("could not access {path}: {source}")]
    Access {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another program is changing the index.
    #[error("could not lock {path}")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The file is no index.
    #[error("could not unmarshal {path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

/// Under which name a manifest is put into an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// An image's full name.
    Image(String),
    /// A tag alone.
    Tag(String),
}

/// An entry of an index; parts that are not known here are kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// The manifest's digest.
    pub digest: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Index {
    #[serde(default, rename = "schemaVersion")]
    schema_version: i64,
    #[serde(default, rename = "mediaType")]
    media_type: String,
    #[serde(default)]
    manifests: Vec<Manifest>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

fn read(path: &Path) -> Result<Option<Index>, IndexError> {
    match std::fs::read(path) {
        Ok(text) if text.is_empty() => Ok(None),
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| IndexError::Parse {
                path: path.to_owned(),
                source,
            }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(IndexError::Access {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Finds a manifest by name or tag.
///
/// # Errors
/// [`IndexError`] when the index cannot be read.
pub fn find(layout: &Path, tag: &str) -> Result<Option<Manifest>, IndexError> {
    let index = read(&layout.join("index.json"))?.unwrap_or_default();
    let by = |annotation: &str| {
        index.manifests.iter().find(|manifest| {
            manifest
                .annotations
                .get(annotation)
                .is_some_and(|name| name == tag)
        })
    };
    Ok(by(IMAGE_NAME).or_else(|| by(REF_NAME)).cloned())
}

/// Returns the digests of all manifests in an index.
///
/// # Errors
/// [`IndexError`] when the index cannot be read.
pub fn digests(layout: &Path) -> Result<Vec<String>, IndexError> {
    let index = read(&layout.join("index.json"))?.unwrap_or_default();
    Ok(index
        .manifests
        .into_iter()
        .map(|manifest| manifest.digest)
        .collect())
}

/// Puts a manifest into an index under the names; entries of the same names are replaced.
///
/// # Errors
/// [`IndexError`] when another program holds the index' lock, or it cannot be read or written.
pub fn put(layout: &Path, manifest: &Manifest, names: &[Name]) -> Result<(), IndexError> {
    let path = layout.join("index.json");
    let access = |path: &Path| {
        let path = path.to_owned();
        move |source| IndexError::Access { path, source }
    };
    let lock_path = layout.join("index.json.lock");
    let lock = lock(&lock_path)?;
    let layout_path = layout.join("oci-layout");
    std::fs::write(&layout_path, r#"{"imageLayoutVersion":"1.0.0"}"#).map_err(access(&layout_path))?;
    let mut index = read(&path)?.unwrap_or_default();
    if index.schema_version == 0 {
        index.schema_version = 2;
    }
    if index.media_type.is_empty() {
        "application/vnd.oci.image.index.v1+json".clone_into(&mut index.media_type);
    }
    for name in names {
        let (image, tag) = match name {
            Name::Image(name) => (Some(name.clone()), tag_of(name)),
            Name::Tag(tag) => (None, tag.clone()),
        };
        index.manifests.retain(|known| {
            known.annotations.get(REF_NAME) != Some(&tag)
                || known.annotations.get(IMAGE_NAME) != image.as_ref()
        });
        let mut entry = manifest.clone();
        entry
            .annotations
            .extend(image.map(|image| (IMAGE_NAME.to_owned(), image)));
        entry.annotations.insert(REF_NAME.to_owned(), tag);
        index.manifests.push(entry);
    }
    if names.is_empty() {
        index.manifests.push(manifest.clone());
    }
    let text = serde_json::to_vec(&index).map_err(|source| IndexError::Parse {
        path: path.clone(),
        source,
    })?;
    write_atomically(&path, &text).map_err(access(&path))?;
    drop(lock);
    // The lock was on the file, so a leftover of it holds nobody up.
    let _ = std::fs::remove_file(&lock_path);
    Ok(())
}

fn lock(path: &Path) -> Result<File, IndexError> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(|source| IndexError::Access {
            path: path.to_owned(),
            source,
        })?;
    file.try_lock().map_err(|_| IndexError::Locked {
        path: path.to_owned(),
    })?;
    Ok(file)
}

/// Writes a file beside its place and renames it there.
///
/// # Errors
/// When the directory cannot be written.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.{}", crate::ids::new_id()));
    let written = std::fs::write(&new, bytes).and_then(|()| std::fs::rename(&new, path));
    if written.is_err() {
        // What was written is of no use to anybody.
        let _ = std::fs::remove_file(&new);
    }
    written
}

/// Takes the tag or digest out of an image's name; a name without one stands for itself.
fn tag_of(name: &str) -> String {
    if let Some((_, digest)) = name.split_once('@') {
        return digest.to_owned();
    }
    let last = name.rsplit('/').next().unwrap_or(name);
    match last.split_once(':') {
        Some((_, tag)) => tag.to_owned(),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(digest: &str) -> Manifest {
        serde_json::from_str(&format!(r#"{{"mediaType":"m","digest":"{digest}","size":3}}"#)).unwrap()
    }

    #[test]
    fn entries_of_a_name_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let image = || Name::Image("docker.io/library/x:v1".to_owned());
        put(
            dir.path(),
            &manifest("sha256:a"),
            &[Name::Tag("latest".to_owned()), image()],
        )
        .unwrap();
        put(dir.path(), &manifest("sha256:b"), &[image()]).unwrap();
        assert_eq!(find(dir.path(), "latest").unwrap().unwrap().digest, "sha256:a");
        assert_eq!(
            find(dir.path(), "docker.io/library/x:v1")
                .unwrap()
                .unwrap()
                .digest,
            "sha256:b"
        );
        assert_eq!(find(dir.path(), "v1").unwrap().unwrap().digest, "sha256:b");
        assert_eq!(digests(dir.path()).unwrap(), ["sha256:a", "sha256:b"]);
        let text = std::fs::read_to_string(dir.path().join("index.json")).unwrap();
        assert!(
            text.contains("\"size\":3") && text.contains("\"schemaVersion\":2"),
            "{text}"
        );
        assert!(dir.path().join("oci-layout").exists() && !dir.path().join("index.json.lock").exists());
    }

    #[test]
    fn a_missing_index_is_empty_and_a_broken_one_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(find(dir.path(), "x").unwrap().is_none());
        std::fs::write(dir.path().join("index.json"), "{").unwrap();
        assert!(matches!(find(dir.path(), "x"), Err(IndexError::Parse { .. })));
    }

    #[test]
    fn tags_are_taken_from_names() {
        assert_eq!(tag_of("localhost:5000/a/b:c"), "c");
        assert_eq!(tag_of("localhost:5000/a"), "localhost:5000/a");
        assert_eq!(tag_of("a@sha256:x"), "sha256:x");
    }
}

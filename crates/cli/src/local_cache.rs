//! Caches in directories of this machine: the daemon reads and writes their blobs through the session, the index is
//! ours.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use base64::Engine as _;

use crate::failure::Failure;
use crate::oci_index::{self, Manifest, Name};
use crate::spec::{CacheEntry, go_bool};

/// The caches of a build, those of directories prepared.
#[derive(Clone, Debug, Default)]
pub struct LocalCaches {
    /// Caches to export to.
    pub exports: Vec<CacheEntry>,
    /// Caches to import from; those in directories that have nothing are left out.
    pub imports: Vec<CacheEntry>,
    /// Directories by the name under which the daemon asks for them.
    pub stores: BTreeMap<String, PathBuf>,
    targets: Vec<Target>,
}

#[derive(Clone, Debug)]
struct Target {
    dir: PathBuf,
    tag: String,
    reset: bool,
}

/// Prepares the caches.
///
/// # Errors
/// For a missing directory option, or a directory that cannot be made.
pub fn prepare(exports: &[CacheEntry], imports: &[CacheEntry]) -> Result<LocalCaches, Failure> {
    let mut caches = LocalCaches::default();
    for entry in exports {
        match entry.kind.as_str() {
            "local" => caches.add_target(entry)?,
            "registry" if attr(entry, "ref").is_none() => {
                return Err(Failure::new("registry cache exporter requires ref"));
            }
            _ => {}
        }
        caches.exports.push(entry.clone());
    }
    for entry in imports {
        match entry.kind.as_str() {
            "local" => caches.add_origin(entry)?,
            "registry" if attr(entry, "ref").is_none() => {
                return Err(Failure::new("registry cache importer requires ref"));
            }
            _ => caches.imports.push(entry.clone()),
        }
    }
    Ok(caches)
}

fn attr<'a>(entry: &'a CacheEntry, name: &str) -> Option<&'a str> {
    entry
        .attrs
        .get(name)
        .map(String::as_str)
        .filter(|value| !value.is_empty())
}

impl LocalCaches {
    fn add_target(&mut self, entry: &CacheEntry) -> Result<(), Failure> {
        let dest = attr(entry, "dest").ok_or_else(|| Failure::new("local cache exporter requires dest"))?;
        std::fs::create_dir_all(dest).map_err(|error| Failure::new(format!("mkdir {dest}: {error}")))?;
        let reset = match entry.attrs.get("reset") {
            Some(reset) => go_bool(reset)
                .map_err(|error| Failure::from(error).context("failed to parse reset attribute"))?,
            None => false,
        };
        let tag = entry
            .attrs
            .get("tag")
            .cloned()
            .unwrap_or_else(|| "latest".to_owned());
        self.stores.insert(format!("local:{dest}"), PathBuf::from(dest));
        self.targets.push(Target {
            dir: PathBuf::from(dest),
            tag,
            reset,
        });
        Ok(())
    }

    /// Takes a directory in if it has the cache that is asked for; without it the build is merely slower.
    fn add_origin(&mut self, entry: &CacheEntry) -> Result<(), Failure> {
        let src = attr(entry, "src").ok_or_else(|| Failure::new("local cache importer requires src"))?;
        let dir = Path::new(src);
        let digest = match attr(entry, "digest") {
            Some(digest) => digest.to_owned(),
            None => {
                let tag = entry.attrs.get("tag").map_or("latest", String::as_str);
                match oci_index::find(dir, tag) {
                    Ok(Some(manifest)) => manifest.digest,
                    Ok(None) => {
                        let message = "local cache import skipped: no digest found for tag";
                        tracing::warn!(dir = src, tag, "{message}");
                        return Ok(());
                    }
                    Err(error) => {
                        tracing::warn!(dir = src, %error, "local cache import skipped");
                        return Ok(());
                    }
                }
            }
        };
        if !blob_path(dir, &digest).is_some_and(|blob| blob.exists()) {
            tracing::warn!(
                dir = src,
                digest,
                "local cache import skipped: digest unavailable"
            );
            return Ok(());
        }
        self.stores.insert(format!("local:{src}"), dir.to_owned());
        let mut entry = entry.clone();
        entry.attrs.insert("digest".to_owned(), digest);
        self.imports.push(entry);
        Ok(())
    }

    /// Writes the indices after the daemon has exported.
    ///
    /// # Errors
    /// When the daemon's answer cannot be read or an index cannot be written.
    pub fn finish(&self, response: &BTreeMap<String, String>) -> Result<(), Failure> {
        if let Some(descriptor) = response
            .get("cache.manifest")
            .filter(|descriptor| !descriptor.is_empty())
        {
            let manifest: Manifest = serde_json::from_str(descriptor)
                .map_err(|error| Failure::new(format!("unreadable cache.manifest: {error}")))?;
            for target in &self.targets {
                oci_index::put(&target.dir, &manifest, &[Name::Tag(target.tag.clone())])
                    .map_err(|error| Failure::new(error.to_string()))?;
            }
        }
        for target in self.targets.iter().filter(|target| target.reset) {
            if let Err(error) = remove_unreferenced(&target.dir) {
                tracing::warn!(dir = %target.dir.display(), %error, "failed to reset cache store");
            }
        }
        Ok(())
    }
}

fn blob_path(dir: &Path, digest: &str) -> Option<PathBuf> {
    let digest: oci::Digest = digest.parse().ok()?;
    Some(
        dir.join("blobs")
            .join(digest.algorithm().to_string())
            .join(digest.hex()),
    )
}

/// Decodes a descriptor as exporters answer it: JSON in base64.
///
/// # Errors
/// When it is neither.
pub fn decode_descriptor(text: &str) -> Result<Manifest, Failure> {
    let unreadable = |error: String| Failure::new(format!("unreadable containerimage.descriptor: {error}"));
    let json = base64::engine::general_purpose::STANDARD
        .decode(text)
        .map_err(|error| unreadable(error.to_string()))?;
    serde_json::from_slice(&json).map_err(|error| unreadable(error.to_string()))
}

/// Removes blobs that no manifest of the index leads to.
fn remove_unreferenced(dir: &Path) -> Result<(), Failure> {
    let to_failure = |error: oci_index::IndexError| Failure::new(error.to_string());
    let mut waiting = oci_index::digests(dir).map_err(to_failure)?;
    let mut referenced = BTreeSet::new();
    while let Some(digest) = waiting.pop() {
        let Some(path) = blob_path(dir, &digest) else {
            continue;
        };
        if referenced.insert(digest) {
            let is_small = std::fs::metadata(&path).is_ok_and(|found| found.len() < 32 << 20);
            let json = if is_small { std::fs::read(&path).ok() } else { None };
            let json = json.and_then(|json| serde_json::from_slice::<serde_json::Value>(&json).ok());
            json.iter().for_each(|json| children(json, &mut waiting));
        }
    }
    let algorithms = std::fs::read_dir(dir.join("blobs"))?;
    for algorithm in algorithms {
        let algorithm = algorithm?;
        for blob in std::fs::read_dir(algorithm.path())? {
            let blob = blob?;
            let name = format!(
                "{}:{}",
                algorithm.file_name().to_string_lossy(),
                blob.file_name().to_string_lossy()
            );
            if !referenced.contains(&name) {
                std::fs::remove_file(blob.path())?;
            }
        }
    }
    Ok(())
}

fn children(manifest: &serde_json::Value, out: &mut Vec<String>) {
    let lists = ["manifests", "layers"]
        .iter()
        .filter_map(|key| manifest[*key].as_array())
        .flatten();
    let digests = lists
        .chain(manifest.get("config"))
        .filter_map(|entry| entry["digest"].as_str());
    out.extend(digests.map(str::to_owned));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: &str, attrs: &[(&str, &str)]) -> CacheEntry {
        let attrs = attrs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        CacheEntry {
            kind: kind.to_owned(),
            attrs,
        }
    }

    fn blob(dir: &Path, bytes: &[u8]) -> String {
        let digest = oci::Digest::sha256(bytes);
        let path = blob_path(dir, &digest.to_string()).unwrap();
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
        digest.to_string()
    }

    #[test]
    fn an_export_can_be_imported() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        let export = entry("local", &[("dest", path), ("reset", "true")]);
        let import = entry("local", &[("src", path)]);
        let caches = prepare(std::slice::from_ref(&export), std::slice::from_ref(&import)).unwrap();
        assert!(caches.imports.is_empty() && caches.stores.contains_key(&format!("local:{path}")));
        let layer = blob(dir.path(), b"layer");
        let manifest = blob(
            dir.path(),
            format!(r#"{{"layers":[{{"digest":"{layer}"}}]}}"#).as_bytes(),
        );
        let garbage = blob(dir.path(), b"garbage");
        let descriptor = format!(r#"{{"mediaType":"m","digest":"{manifest}","size":1}}"#);
        caches
            .finish(&BTreeMap::from([("cache.manifest".to_owned(), descriptor)]))
            .unwrap();
        let caches = prepare(&[], &[import]).unwrap();
        assert_eq!(caches.imports[0].attrs["digest"], manifest);
        assert!(blob_path(dir.path(), &layer).unwrap().exists());
        assert!(!blob_path(dir.path(), &garbage).unwrap().exists());
    }

    #[test]
    fn places_are_required() {
        for (kind, message) in [
            ("local", "local cache exporter requires dest"),
            ("registry", "registry cache exporter requires ref"),
        ] {
            assert_eq!(
                prepare(&[entry(kind, &[])], &[]).unwrap_err().to_string(),
                message
            );
        }
        assert!(
            prepare(&[], &[entry("local", &[("src", "/nonexistent")])])
                .unwrap()
                .imports
                .is_empty()
        );
    }
}

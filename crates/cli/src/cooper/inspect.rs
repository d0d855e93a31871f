//! `cooper cache inspect`: what a cache in a directory or a registry holds, and what of it cannot be restored.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oci::{Descriptor, Digest, Index, Manifest, media_type};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{Registries, RemoteCache};
use crate::docker_config::DockerConfig;
use crate::failure::Failure;
use crate::oci_index;

/// Documents larger than this are refused.
const MAX_BYTES: u64 = 64 << 20;
/// Images of an index that are looked at.
const MAX_IMAGES: usize = 256;
/// Annotation of what is attached to an image.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

/// A cache's configuration, as far as it is shown.
#[derive(Debug, Default, Deserialize)]
struct Config {
    #[serde(default, deserialize_with = "oci::json::nullable")]
    layers: Vec<Layer>,
    #[serde(default, deserialize_with = "oci::json::nullable")]
    records: Vec<Record>,
}

#[derive(Debug, Deserialize)]
struct Layer {
    #[serde(default)]
    blob: String,
    #[serde(default)]
    parent: i64,
}

#[derive(Debug, Deserialize)]
struct Record {
    #[serde(default)]
    digest: String,
    #[serde(default, deserialize_with = "oci::json::nullable")]
    layers: Vec<Top>,
    #[serde(default, deserialize_with = "oci::json::nullable")]
    chains: Vec<Chain>,
    #[serde(default, deserialize_with = "oci::json::nullable")]
    inputs: Vec<Vec<Input>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Top {
    layer: i64,
    #[serde(default)]
    created_at: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Chain {
    #[serde(default, deserialize_with = "oci::json::nullable")]
    layers: Vec<i64>,
    #[serde(default)]
    created_at: String,
}

#[derive(Debug, Deserialize)]
struct Input {
    #[serde(default)]
    selector: String,
    link: i64,
}

/// The parts of an image's configuration that make an inline cache.
#[derive(Debug, Deserialize)]
struct ImageConfig {
    #[serde(default, rename = "moby.buildkit.cache.v0")]
    cache: Option<String>,
}

/// A cache that was read.
#[derive(Debug)]
struct Cache {
    kind: String,
    digest: Digest,
    config: Config,
    /// Sizes in bytes of the blobs that are described.
    sizes: BTreeMap<String, u64>,
    /// What is wrong with blobs, by digest.
    broken: BTreeMap<String, String>,
}

/// Describes the cache in a directory, in which `tag` names one of several, or in a registry.
///
/// # Errors
/// When there is none, or it cannot be read.
pub async fn inspect(
    cache: &str,
    tag: &str,
    insecure: bool,
    registries: &dyn Registries,
) -> Result<String, Failure> {
    let dir = Path::new(cache);
    let (place, root) = if dir.is_dir() {
        let found = oci_index::find(dir, tag).map_err(|error| Failure::new(error.to_string()))?;
        let Some(manifest) = found else {
            let text = format!("{} has no cache with the tag {tag:?}", dir.display());
            return Err(Failure::new(text));
        };
        (Place::Dir(dir), manifest.digest)
    } else {
        let accounts = DockerConfig::load().map_err(|error| Failure::new(error.to_string()))?;
        let opened = registries.open(cache, insecure, accounts).await?;
        let root = opened.root();
        (Place::Registry(opened), root)
    };
    let digest: Digest = root
        .parse()
        .map_err(|error| Failure::new(format!("invalid digest {root:?}: {error}")))?;
    let caches = read(&place, digest).await?;
    Ok(caches.iter().map(describe).collect::<Vec<_>>().join("\n"))
}

/// Where a cache's documents are.
enum Place<'a> {
    Dir(&'a Path),
    Registry(Box<dyn RemoteCache>),
}

impl Place<'_> {
    async fn manifest(&self, digest: &Digest) -> Result<Vec<u8>, Failure> {
        match self {
            Self::Dir(dir) => read_file(dir, digest),
            Self::Registry(cache) => cache.manifest(&digest.to_string()).await,
        }
    }

    async fn document<T: DeserializeOwned>(&self, descriptor: &Descriptor) -> Result<T, Failure> {
        let bytes = match self {
            Self::Dir(dir) => read_file(dir, &descriptor.digest)?,
            Self::Registry(cache) => {
                cache
                    .blob(&descriptor.digest.to_string(), descriptor.size)
                    .await?
            }
        };
        serde_json::from_slice(&bytes)
            .map_err(|error| Failure::new(format!("{}: {error}", descriptor.digest)))
    }

    /// Says what is wrong with a layer, if something is.
    async fn trouble(&self, layer: &Descriptor) -> Result<Option<String>, Failure> {
        let size = match self {
            Self::Dir(dir) => std::fs::metadata(blob_path(dir, &layer.digest))
                .ok()
                .map(|file| file.len()),
            Self::Registry(cache) => cache.size(&layer.digest.to_string()).await?,
        };
        Ok(match size {
            None => Some("is missing".to_owned()),
            Some(size) if size != layer.size => Some(format!("has {size} bytes instead of {}", layer.size)),
            Some(_) => None,
        })
    }
}

fn blob_path(dir: &Path, digest: &Digest) -> PathBuf {
    let text = digest.to_string();
    let (algorithm, hex) = text.split_once(':').unwrap_or(("", &text));
    dir.join("blobs").join(algorithm).join(hex)
}

fn read_file(dir: &Path, digest: &Digest) -> Result<Vec<u8>, Failure> {
    let path = blob_path(dir, digest);
    let failed = |error: &dyn std::fmt::Display| Failure::new(format!("{}: {error}", path.display()));
    let size = std::fs::metadata(&path).map_err(|error| failed(&error))?.len();
    if size > MAX_BYTES {
        return Err(failed(&format!("more than {MAX_BYTES} bytes")));
    }
    let bytes = std::fs::read(&path).map_err(|error| failed(&error))?;
    if Digest::of(digest.algorithm(), &bytes) != *digest {
        return Err(failed(&"other bytes than its digest's"));
    }
    Ok(bytes)
}

fn parsed<T: DeserializeOwned>(json: serde_json::Value) -> Result<T, Failure> {
    serde_json::from_value(json).map_err(|error| Failure::new(error.to_string()))
}

/// Reads a cache, or those of the images of an index.
async fn read(place: &Place<'_>, digest: Digest) -> Result<Vec<Cache>, Failure> {
    let json = read_json(place, &digest).await?;
    if json.get("manifests").is_none() {
        let manifest: Manifest = parsed(json)?;
        return Ok(vec![
            cache(place, digest, manifest.config, manifest.layers).await?,
        ]);
    }
    let index: Index = parsed(json)?;
    let is_config = |entry: &Descriptor| entry.media_type == media_type::BUILDKIT_CACHE_CONFIG;
    let (mut configs, others): (Vec<_>, Vec<_>) = index.manifests.into_iter().partition(is_config);
    if let Some(config) = configs.pop() {
        return Ok(vec![cache(place, digest, config, others).await?]);
    }
    let mut caches = Vec::new();
    for image in others.iter().take(MAX_IMAGES) {
        if image.annotations.contains_key(REFERENCE_TYPE) {
            continue;
        }
        let json = read_json(place, &image.digest).await?;
        if json.get("manifests").is_none() {
            let manifest: Manifest = parsed(json)?;
            caches.extend(
                cache(place, image.digest, manifest.config, manifest.layers)
                    .await
                    .ok(),
            );
        }
    }
    if caches.is_empty() {
        let text = format!("{digest} is an index of images without a cache in them");
        return Err(Failure::new(text));
    }
    Ok(caches)
}

async fn read_json(place: &Place<'_>, digest: &Digest) -> Result<serde_json::Value, Failure> {
    let bytes = place.manifest(digest).await?;
    serde_json::from_slice(&bytes).map_err(|error| Failure::new(format!("{digest}: {error}")))
}

async fn cache(
    place: &Place<'_>,
    digest: Digest,
    descriptor: Descriptor,
    layers: Vec<Descriptor>,
) -> Result<Cache, Failure> {
    let (kind, config) = if descriptor.media_type == media_type::BUILDKIT_CACHE_CONFIG {
        ("cache", place.document(&descriptor).await?)
    } else {
        let image = place.document(&descriptor).await?;
        ("inline cache of image", inline(image, &descriptor, &layers)?)
    };
    let sizes = layers.iter().map(|layer| (layer.digest.to_string(), layer.size));
    let sizes = sizes.collect();
    let mut broken = BTreeMap::new();
    for layer in &layers {
        let why = place.trouble(layer).await?;
        broken.extend(why.map(|why| (layer.digest.to_string(), why)));
    }
    Ok(Cache {
        kind: kind.to_owned(),
        digest,
        config,
        sizes,
        broken,
    })
}

/// The records in an image's configuration; their layers are the image's.
fn inline(image: ImageConfig, config: &Descriptor, layers: &[Descriptor]) -> Result<Config, Failure> {
    let Some(text) = image.cache else {
        let text = format!("image {} has no cache in it", config.digest);
        return Err(Failure::new(text));
    };
    let records = STANDARD
        .decode(text)
        .map_err(|error| Failure::new(format!("inline cache of {}: {error}", config.digest)))?;
    let mut parent = -1;
    let layers = layers.iter().map(|layer| {
        let read = Layer {
            blob: layer.digest.to_string(),
            parent,
        };
        parent += 1;
        read
    });
    Ok(Config {
        layers: layers.collect(),
        records: serde_json::from_slice(&records).map_err(|error| Failure::new(error.to_string()))?,
    })
}

fn at<T>(list: &[T], index: i64) -> Option<&T> {
    list.get(usize::try_from(index).ok()?)
}

impl Cache {
    /// A layer and all below it, topmost first.
    ///
    /// # Errors
    /// With why the layer cannot be had.
    fn chain(&self, top: i64) -> Result<Vec<&str>, String> {
        let mut blobs = Vec::new();
        let mut next = top;
        while next != -1 {
            let layer =
                at(&self.config.layers, next).ok_or_else(|| format!("layer {next} does not exist"))?;
            if blobs.len() > self.config.layers.len() {
                return Err(format!("layer {top} stands on itself"));
            }
            blobs.push(self.check(layer)?);
            next = layer.parent;
        }
        Ok(blobs)
    }

    fn list(&self, layers: &[i64]) -> Result<Vec<&str>, String> {
        let layer = |index: &i64| {
            let layer = at(&self.config.layers, *index);
            self.check(layer.ok_or_else(|| format!("layer {index} does not exist"))?)
        };
        layers.iter().map(layer).collect()
    }

    fn check<'a>(&self, layer: &'a Layer) -> Result<&'a str, String> {
        if let Some(why) = self.broken.get(&layer.blob) {
            return Err(format!("layer {} {why}", layer.blob));
        }
        if !self.sizes.contains_key(&layer.blob) {
            return Err(format!("layer {} is not described", layer.blob));
        }
        Ok(&layer.blob)
    }

    /// The results of a record: when it was made and the layers, or why they cannot be had.
    fn results<'a>(&'a self, record: &'a Record) -> Vec<(&'a str, Result<Vec<&'a str>, String>)> {
        let tops = record
            .layers
            .iter()
            .map(|top| (top.created_at.as_str(), self.chain(top.layer)));
        let chains = record
            .chains
            .iter()
            .map(|chain| (chain.created_at.as_str(), self.list(&chain.layers)));
        tops.chain(chains).collect()
    }
}

/// The text that is printed: layers, records, and what cannot be restored.
fn describe(cache: &Cache) -> String {
    let mut out = String::new();
    let blobs: BTreeSet<&str> = cache
        .config
        .layers
        .iter()
        .map(|layer| layer.blob.as_str())
        .collect();
    let size: u64 = blobs.iter().filter_map(|blob| cache.sizes.get(*blob)).sum();
    let with_results = cache
        .config
        .records
        .iter()
        .filter(|record| cache.results(record).iter().any(|(_, layers)| layers.is_ok()));
    let count = with_results.count();
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "{} {}\n{} records, {count} with a result; {} layers in {} blobs of {size} bytes\n\nLayers:",
        cache.kind,
        cache.digest,
        cache.config.records.len(),
        cache.config.layers.len(),
        blobs.len(),
    );
    for (index, layer) in cache.config.layers.iter().enumerate() {
        let size = cache
            .sizes
            .get(&layer.blob)
            .map_or("?".to_owned(), ToString::to_string);
        let below = if layer.parent == -1 {
            String::new()
        } else {
            format!(" on {}", layer.parent)
        };
        let _ = writeln!(out, "{index:>5}  {}  {size} bytes{below}", layer.blob);
    }
    let _ = writeln!(out, "\nRecords:");
    let mut lost = Vec::new();
    for (index, record) in cache.config.records.iter().enumerate() {
        describe_record(cache, index, record, &mut out, &mut lost);
    }
    if !lost.is_empty() {
        let _ = writeln!(out, "\nCannot be restored:");
        for text in lost {
            let _ = writeln!(out, "  {text}");
        }
    }
    out
}

fn describe_record(cache: &Cache, index: usize, record: &Record, out: &mut String, lost: &mut Vec<String>) {
    let _ = writeln!(out, "{index:>5}  {}", record.digest);
    for (number, links) in record.inputs.iter().enumerate() {
        let links: Vec<String> = links
            .iter()
            .map(|input| {
                if at(&cache.config.records, input.link).is_none() {
                    lost.push(format!(
                        "record {index}: input {number} is record {}, which does not exist",
                        input.link
                    ));
                }
                match input.selector.as_str() {
                    "" => input.link.to_string(),
                    selector => format!("{} ({selector})", input.link),
                }
            })
            .collect();
        let _ = writeln!(out, "         input {number}: {}", links.join(", "));
    }
    for (created_at, layers) in cache.results(record) {
        match layers {
            Ok(layers) => {
                let size: u64 = layers.iter().filter_map(|blob| cache.sizes.get(*blob)).sum();
                let _ = writeln!(
                    out,
                    "         result: {} layers, {size} bytes, {created_at}",
                    layers.len()
                );
            }
            Err(why) => lost.push(format!("record {index} {}: {why}", record.digest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Later;
    use super::*;

    fn put(dir: &Path, bytes: &[u8]) -> Descriptor {
        let descriptor = Descriptor::of_bytes("x/y", bytes);
        let path = blob_path(dir, &descriptor.digest);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
        descriptor
    }

    /// Two steps on each other; the upper one's layer is described but not there.
    fn cache(dir: &Path) {
        let (lower, mut upper) = (put(dir, b"lower"), put(dir, b"upper!"));
        std::fs::remove_file(blob_path(dir, &upper.digest)).unwrap();
        upper.media_type = "x/z".to_owned();
        let (first, second) = (Digest::sha256("first"), Digest::sha256("second"));
        let config = format!(
            r#"{{"layers":[{{"blob":"{}","parent":-1}},{{"blob":"{}"}}],"records":[
                {{"digest":"{first}","layers":[{{"layer":0,"createdAt":"2024-01-01T00:00:00Z"}}]}},
                {{"digest":"{second}","layers":[{{"layer":1}}],"inputs":[[{{"link":0,"selector":"sel"}},{{"link":9}}]]}}]}}"#,
            lower.digest, upper.digest
        );
        let mut config = put(dir, config.as_bytes());
        config.media_type = media_type::BUILDKIT_CACHE_CONFIG.to_owned();
        let manifest = put(
            dir,
            &serde_json::to_vec(&Manifest::new(config, vec![lower, upper])).unwrap(),
        );
        let index = format!(
            r#"{{"manifests":[{{"digest":"{}","annotations":{{"org.opencontainers.image.ref.name":"latest"}}}}]}}"#,
            manifest.digest
        );
        std::fs::write(dir.join("index.json"), index).unwrap();
    }

    /// A registry of one cache, whose blobs are in a directory.
    struct Fake(PathBuf, String);

    impl Registries for Fake {
        fn open<'a>(
            &'a self,
            name: &'a str,
            insecure: bool,
            _: DockerConfig,
        ) -> Later<'a, Box<dyn RemoteCache>> {
            assert_eq!((name, insecure), ("example.com/cache:1", true));
            let found = Fake(self.0.clone(), self.1.clone());
            Box::pin(async { Ok(Box::new(found) as Box<dyn RemoteCache>) })
        }
    }

    impl RemoteCache for Fake {
        fn root(&self) -> String {
            self.1.clone()
        }

        fn manifest<'a>(&'a self, digest: &'a str) -> Later<'a, Vec<u8>> {
            Box::pin(async { read_file(&self.0, &digest.parse().unwrap()) })
        }

        fn blob<'a>(&'a self, digest: &'a str, _: u64) -> Later<'a, Vec<u8>> {
            self.manifest(digest)
        }

        fn size<'a>(&'a self, digest: &'a str) -> Later<'a, Option<u64>> {
            let path = blob_path(&self.0, &digest.parse().unwrap());
            Box::pin(async move { Ok(std::fs::metadata(path).ok().map(|file| file.len())) })
        }
    }

    fn run(cache: &str, tag: &str, registries: &dyn Registries) -> Result<String, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(inspect(cache, tag, true, registries))
    }

    #[test]
    fn what_is_lost_is_named() {
        let dir = tempfile::tempdir().unwrap();
        cache(dir.path());
        let root = oci_index::find(dir.path(), "latest").unwrap().unwrap().digest;
        let fake = Fake(dir.path().to_owned(), root);
        let text = run(&dir.path().to_string_lossy(), "latest", &fake).unwrap();
        assert_eq!(run("example.com/cache:1", "latest", &fake).unwrap(), text);
        assert!(
            text.contains("2 records, 1 with a result; 2 layers in 2 blobs of 11 bytes"),
            "{text}"
        );
        assert!(
            text.contains("result: 1 layers, 5 bytes, 2024-01-01T00:00:00Z"),
            "{text}"
        );
        assert!(text.contains("input 0: 0 (sel), 9"), "{text}");
        let (_, lost) = text.split_once("Cannot be restored:").unwrap();
        assert!(
            lost.contains(&format!("layer {} is missing", Digest::sha256("upper!"))),
            "{lost}"
        );
        assert!(
            lost.contains("record 1: input 0 is record 9, which does not exist"),
            "{lost}"
        );
        let error = run(&dir.path().to_string_lossy(), "other", &fake)
            .unwrap_err()
            .to_string();
        assert!(error.contains("no cache with the tag \"other\""), "{error}");
    }

    #[test]
    fn layers_on_themselves_are_no_trouble() {
        let config =
            r#"{"layers":[{"blob":"a","parent":1},{"blob":"a"}],"records":[{"layers":[{"layer":0}]}]}"#;
        let cache = Cache {
            kind: "cache".to_owned(),
            digest: Digest::sha256("x"),
            config: serde_json::from_str(config).unwrap(),
            sizes: BTreeMap::from([("a".to_owned(), 1)]),
            broken: BTreeMap::new(),
        };
        assert!(describe(&cache).contains("stands on itself"));
    }
}

//! From a reference to the manifest and configuration for a platform.

use build::error::{BuildError, ErrorKind};
use bytes::Bytes;
use oci::{
    Descriptor, Digest, ImageConfig, Index, Manifest, Platform, PlatformMatcher, Reference, media_type,
};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::documents::{Documents, encode};
use super::reader::DocumentReader;

/// Indexes within indexes are followed this deep.
const MAX_DEPTH: usize = 4;

/// An image of one platform.
#[derive(Clone, Debug)]
pub struct ResolvedImage {
    /// The reference that was asked for.
    pub reference: Reference,
    /// What it resolved to: the index if there is one.
    pub root: Descriptor,
    /// The platform's manifest.
    pub manifest: Manifest,
    /// The configuration's bytes.
    pub config: Bytes,
    /// Digests of the uncompressed layers, one per layer of the manifest.
    pub diff_ids: Vec<Digest>,
    /// Index, manifest and configuration as read.
    pub documents: Vec<(Descriptor, Bytes)>,
}

impl ResolvedImage {
    /// Encodes the documents for storage.
    pub(super) fn encode_documents(&self) -> Vec<u8> {
        encode(
            self.documents
                .iter()
                .map(|(descriptor, bytes)| (descriptor, bytes)),
        )
    }
}

/// Resolves a reference for a platform, reading what `documents` does not have.
pub(super) async fn resolve_image(
    documents: &Documents,
    reader: &dyn DocumentReader,
    reference: &Reference,
    platform: &Platform,
) -> Result<ResolvedImage, BuildError> {
    let known = reference
        .digest()
        .and_then(|digest| documents.get(&reference.name(), digest));
    let mut descriptor = match known {
        Some((descriptor, _)) => descriptor,
        None => reader.resolve(reference).await?,
    };
    let mut reading = Reading {
        documents,
        reader,
        reference,
        read: Vec::new(),
    };
    let mut root = None;
    for _ in 0..MAX_DEPTH {
        let bytes = reading.manifest(&descriptor).await?;
        descriptor.media_type = kind_of(&descriptor, &bytes)?;
        reading.keep(&descriptor, &bytes);
        let root = root.get_or_insert_with(|| descriptor.clone());
        if media_type::is_index(&descriptor.media_type) {
            let index: Index = parse(&descriptor, &bytes)?;
            descriptor = choose(index, platform)?;
            continue;
        }
        let manifest: Manifest = parse(&descriptor, &bytes)?;
        check_config(&manifest.config)?;
        let config = reading.config(&manifest.config).await?;
        reading.keep(&manifest.config, &config);
        let diff_ids = diff_ids(&manifest, &config)?;
        return Ok(ResolvedImage {
            reference: reference.clone(),
            root: root.clone(),
            manifest,
            config,
            diff_ids,
            documents: reading.read,
        });
    }
    Err(BuildError::user(format!(
        "{reference}: indexes are nested more than {MAX_DEPTH} deep"
    )))
}

struct Reading<'a> {
    documents: &'a Documents,
    reader: &'a dyn DocumentReader,
    reference: &'a Reference,
    read: Vec<(Descriptor, Bytes)>,
}

impl Reading<'_> {
    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes, BuildError> {
        match self.known(descriptor) {
            Some(bytes) => Ok(bytes),
            None => self.reader.manifest(self.reference, descriptor).await,
        }
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes, BuildError> {
        match self.known(descriptor) {
            Some(bytes) => Ok(bytes),
            None => self.reader.config(self.reference, descriptor).await,
        }
    }

    fn known(&self, descriptor: &Descriptor) -> Option<Bytes> {
        self.documents
            .get(&self.reference.name(), &descriptor.digest)
            .map(|(_, bytes)| bytes)
    }

    fn keep(&mut self, descriptor: &Descriptor, bytes: &Bytes) {
        let repository = self.reference.name();
        self.documents.put(
            &repository,
            descriptor.digest,
            &descriptor.media_type,
            bytes.clone(),
        );
        self.read.push((descriptor.clone(), bytes.clone()));
    }
}

/// What a document is, by its own words where they do not contradict its content: the server's word is not enough, as
/// a document that can be read in two ways could pass for something else.
pub fn kind_of(descriptor: &Descriptor, bytes: &Bytes) -> Result<String, BuildError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Shape {
        media_type: Option<String>,
        config: Option<IgnoredAny>,
        layers: Option<IgnoredAny>,
        manifests: Option<IgnoredAny>,
    }
    if descriptor.media_type == media_type::DOCKER_SCHEMA1 {
        return Err(BuildError::new(
            ErrorKind::Conflict,
            "support Docker Image manifest version 2, schema 1 has been removed. \
             More information at https://docs.docker.com/go/deprecated-image-specs/",
        ));
    }
    let shape: Shape = parse(descriptor, bytes)?;
    let is_manifest = shape.config.is_some() || shape.layers.is_some();
    if is_manifest && shape.manifests.is_some() {
        return Err(BuildError::user(format!(
            "{}: invalid ambiguous manifest and manifest list",
            descriptor.digest
        )));
    }
    let fits = |kind: &str| {
        if is_manifest {
            media_type::is_manifest(kind)
        } else {
            media_type::is_index(kind)
        }
    };
    match shape
        .media_type
        .filter(|kind| media_type::is_manifest(kind) || media_type::is_index(kind))
    {
        Some(own) if fits(&own) => Ok(own),
        Some(own) => Err(BuildError::user(format!(
            "{}: mediaType {own} in manifest does not match manifest contents",
            descriptor.digest
        ))),
        None if fits(&descriptor.media_type) => Ok(descriptor.media_type.clone()),
        None if is_manifest => Ok(media_type::DOCKER_MANIFEST.to_owned()),
        None => Ok(media_type::DOCKER_MANIFEST_LIST.to_owned()),
    }
}

fn parse<'a, T: Deserialize<'a>>(descriptor: &Descriptor, bytes: &'a Bytes) -> Result<T, BuildError> {
    serde_json::from_slice(bytes)
        .map_err(|error| BuildError::user(format!("failed to parse {}: {error}", descriptor.digest)))
}

/// The best match for a platform; entries that do not name one match any, last.
fn choose(index: Index, platform: &Platform) -> Result<Descriptor, BuildError> {
    let matcher = PlatformMatcher::only(platform);
    let rank = |descriptor: &Descriptor| match &descriptor.platform {
        Some(platform) => matcher.rank(platform),
        None => Some(usize::MAX),
    };
    let ranked = index
        .manifests
        .into_iter()
        .filter_map(|descriptor| Some((rank(&descriptor)?, descriptor)));
    match ranked.min_by_key(|(rank, _)| *rank) {
        Some((_, descriptor)) => Ok(descriptor),
        None => Err(BuildError::new(
            ErrorKind::NotFound,
            "no match for platform in manifest: not found",
        )),
    }
}

/// Refuses what is in registries beside images: its configuration would not be read as one.
fn check_config(config: &Descriptor) -> Result<(), BuildError> {
    let kind = config.media_type.as_str();
    let is_known =
        media_type::is_config(kind) || [media_type::LEGACY_CONFIG, media_type::IN_TOTO].contains(&kind);
    if is_known {
        return Ok(());
    }
    Err(BuildError::user(format!(
        "encountered unknown type {kind}; children may not be fetched"
    )))
}

fn diff_ids(manifest: &Manifest, config: &Bytes) -> Result<Vec<Digest>, BuildError> {
    let config: ImageConfig = serde_json::from_slice(config)
        .map_err(|error| BuildError::user(format!("failed to parse image config: {error}")))?;
    let diff_ids = config.rootfs.diff_ids;
    if diff_ids.len() != manifest.layers.len() {
        return Err(BuildError::user(format!(
            "mismatched image rootfs and manifest layers: {} diffIDs, {} layers",
            diff_ids.len(),
            manifest.layers.len()
        )));
    }
    Ok(diff_ids)
}

//! An image's attestations and their signatures, for whoever decides whether to trust the image.

use std::collections::BTreeMap;

use build::error::{BuildError, ErrorKind};
use build::meta::AttestationChain;
use bytes::Bytes;
use oci::{Descriptor, Digest, Index, Manifest, Platform, PlatformMatcher, Reference, media_type};
use registry::Client;

use super::registry_error;

const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
const REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";
const PREDICATE_TYPE: &str = "in-toto.io/predicate-type";
/// Artifact types of signatures, the preferred one first.
const SIGNATURES: [&str; 2] = [
    "application/vnd.dev.sigstore.bundle.v0.3+json",
    "application/vnd.dev.cosign.artifact.sig.v1+json",
];

/// Collects the chain of an image; `None` for one that is no OCI index. `predicates` are the types of attestations whose
/// bytes are wanted.
pub(super) async fn collect(
    client: &Client,
    reference: &Reference,
    root: &Descriptor,
    platform: &Platform,
    predicates: &[String],
) -> Result<Option<AttestationChain>, BuildError> {
    if root.media_type != media_type::OCI_INDEX {
        return Ok(None);
    }
    let mut collecting = Collecting {
        client,
        reference,
        blobs: BTreeMap::new(),
    };
    let index: Index = parse(root, &collecting.manifest(root).await?)?;
    let image = choose(&index, platform)?;
    let mut chain = AttestationChain {
        root: root.digest,
        image_manifest: Some(image),
        attestation_manifest: None,
        signature_manifests: Vec::new(),
        blobs: BTreeMap::new(),
    };
    let wanted = image.to_string();
    let attestation = index.manifests.iter().find(|manifest| {
        let is = |key: &str, value: &str| manifest.annotations.get(key).is_some_and(|found| found == value);
        is(REFERENCE_TYPE, "attestation-manifest") && is(REFERENCE_DIGEST, &wanted)
    });
    if let Some(attestation) = attestation {
        chain.attestation_manifest = Some(attestation.digest);
        let manifest: Manifest = parse(attestation, &collecting.manifest(attestation).await?)?;
        for layer in &manifest.layers {
            let kind = layer.annotations.get(PREDICATE_TYPE);
            if kind.is_some_and(|kind| predicates.contains(kind)) {
                collecting.blob(layer).await?;
            }
        }
        if let Some(signature) = collecting.signature(&attestation.digest).await? {
            chain.signature_manifests.push(signature.digest);
            let manifest: Manifest = parse(&signature, &collecting.manifest(&signature).await?)?;
            for layer in &manifest.layers {
                collecting.blob(layer).await?;
            }
        }
    }
    chain.blobs = collecting.blobs;
    Ok(Some(chain))
}

struct Collecting<'a> {
    client: &'a Client,
    reference: &'a Reference,
    blobs: BTreeMap<Digest, (Descriptor, Bytes)>,
}

impl Collecting<'_> {
    async fn manifest(&mut self, descriptor: &Descriptor) -> Result<Bytes, BuildError> {
        let bytes = self
            .client
            .manifest(self.reference, descriptor)
            .await
            .map_err(registry_error)?;
        self.blobs
            .insert(descriptor.digest, (descriptor.clone(), bytes.clone()));
        Ok(bytes)
    }

    async fn blob(&mut self, descriptor: &Descriptor) -> Result<(), BuildError> {
        let bytes = self
            .client
            .fetch_bytes(self.reference, descriptor)
            .await
            .map_err(registry_error)?;
        self.blobs.insert(descriptor.digest, (descriptor.clone(), bytes));
        Ok(())
    }

    /// The manifest of a signature of the attestations; one in the preferred format if there are several.
    async fn signature(&self, attestation: &Digest) -> Result<Option<Descriptor>, BuildError> {
        // Not filtered by the registry: some cannot filter for two types.
        let found = self
            .client
            .referrers(self.reference, attestation, None)
            .await
            .map_err(registry_error)?;
        let rank = |kind: &str| SIGNATURES.iter().position(|known| *known == kind);
        let ranked = found
            .into_iter()
            .filter_map(|one| Some((rank(&one.artifact_type)?, one)));
        Ok(ranked.min_by_key(|(rank, _)| *rank).map(|(_, one)| one))
    }
}

fn choose(index: &Index, platform: &Platform) -> Result<Digest, BuildError> {
    let matcher = PlatformMatcher::only(platform);
    let rank = |manifest: &Descriptor| match &manifest.platform {
        Some(platform) => matcher.rank(platform),
        None => Some(usize::MAX),
    };
    let manifests = index
        .manifests
        .iter()
        .filter(|manifest| media_type::is_manifest(&manifest.media_type));
    let ranked = manifests.filter_map(|manifest| Some((rank(manifest)?, manifest.digest)));
    match ranked.min_by_key(|(rank, _)| *rank) {
        Some((_, digest)) => Ok(digest),
        None => {
            let text = format!("no manifest for platform {}: not found", platform.format_all());
            Err(BuildError::new(ErrorKind::NotFound, text))
        }
    }
}

fn parse<'a, T: serde::Deserialize<'a>>(descriptor: &Descriptor, bytes: &'a Bytes) -> Result<T, BuildError> {
    serde_json::from_slice(bytes)
        .map_err(|error| BuildError::user(format!("failed to parse {}: {error}", descriptor.digest)))
}

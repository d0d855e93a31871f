//! What sources are asked for and what they resolve to, on the wire: frontends ask so, and clients that decide on sources.

use api::pb::gateway as pb;
use api::pb::gateway::checksum_request::ChecksumAlgo;
use api::pb::pb as llb_pb;
use bytes::Bytes;
use engine::BuildError;
use engine::bridge::{AttestationChain, MetaRequest, SourceMeta};
use oci::{Algorithm, Descriptor, Digest, Platform};

use crate::services::timestamp;

/// Reads a platform.
pub(crate) fn platform(platform: llb_pb::Platform) -> Platform {
    Platform {
        os: platform.os,
        architecture: platform.architecture,
        variant: platform.variant,
        os_version: platform.os_version,
        os_features: platform.os_features,
    }
}

/// Reads a question about a source.
///
/// # Errors
/// For a question without a source, or for a checksum that is not known.
pub(crate) fn meta_request(
    request: pb::ResolveSourceMetaRequest,
) -> Result<(llb_pb::SourceOp, MetaRequest), BuildError> {
    let source = request
        .source
        .ok_or_else(|| BuildError::user("source is required"))?;
    let image = request.image.unwrap_or_default();
    let checksum = request.http.and_then(|http| http.checksum_request);
    let checksum = checksum.map(checksum_request).transpose()?;
    let meta = MetaRequest {
        platform: request.platform.map(platform),
        resolve_mode: request.resolve_mode,
        log_name: request.log_name,
        layout_store: None,
        no_config: image.no_config,
        attestation_chain: image.attestation_chain,
        resolve_attestations: image.resolve_attestations,
        return_object: request.git.is_some_and(|git| git.return_object),
        checksum,
        source_policies: request.source_policies,
    };
    Ok((source, meta))
}

fn descriptor(descriptor: Descriptor) -> pb::Descriptor {
    pb::Descriptor {
        media_type: descriptor.media_type,
        digest: descriptor.digest.to_string(),
        size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
        annotations: descriptor.annotations,
    }
}

fn chain(chain: AttestationChain) -> pb::AttestationChain {
    let text = |digest: Option<Digest>| digest.map(|digest| digest.to_string()).unwrap_or_default();
    let blobs = chain.blobs.into_iter().map(|(digest, (found, data))| {
        (
            digest.to_string(),
            pb::Blob {
                descriptor: Some(descriptor(found)),
                data,
            },
        )
    });
    pb::AttestationChain {
        root: chain.root.to_string(),
        image_manifest: text(chain.image_manifest),
        attestation_manifest: text(chain.attestation_manifest),
        signature_manifests: chain
            .signature_manifests
            .iter()
            .map(ToString::to_string)
            .collect(),
        blobs: blobs.collect(),
    }
}

/// Writes what is known of a source.
pub(crate) fn meta_response(meta: SourceMeta) -> pb::ResolveSourceMetaResponse {
    let image = meta.image.map(|image| pb::ResolveSourceImageResponse {
        digest: image.digest.to_string(),
        config: image.config,
        attestation_chain: image.attestations.map(chain),
    });
    let git = meta.git.map(|git| pb::ResolveSourceGitResponse {
        checksum: git.checksum,
        r#ref: git.reference,
        commit_checksum: git.commit_checksum,
        commit_object: git.commit_object,
        tag_object: git.tag_object,
    });
    let http = meta.http.map(|http| pb::ResolveSourceHttpResponse {
        checksum: http.digest.to_string(),
        filename: http.filename,
        last_modified: http.last_modified.map(timestamp),
        checksum_response: http
            .checksum
            .map(|(digest, suffix)| pb::ChecksumResponse { digest, suffix }),
    });
    pb::ResolveSourceMetaResponse {
        source: Some(meta.op),
        image,
        git,
        http,
    }
}

fn checksum_request(wanted: pb::ChecksumRequest) -> Result<(Algorithm, Bytes), BuildError> {
    let algorithm = match ChecksumAlgo::try_from(wanted.algo) {
        Ok(ChecksumAlgo::Sha256) => Algorithm::Sha256,
        Ok(ChecksumAlgo::Sha384) => Algorithm::Sha384,
        Ok(ChecksumAlgo::Sha512) => Algorithm::Sha512,
        Err(_) => {
            return Err(BuildError::user(format!(
                "unsupported checksum algorithm {}",
                wanted.algo
            )));
        }
    };
    Ok((algorithm, wanted.suffix))
}

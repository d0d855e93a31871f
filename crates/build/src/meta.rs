//! The port through which a bridge asks sources what they resolve to, without fetching them, and what clients are asked of
//! that.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use llb::pb;
use llb::sourcepolicy::Policy;
use oci::{Descriptor, Digest, Platform};
use tokio_util::sync::CancellationToken;

use crate::error::BuildError;
use crate::job::Job;
use crate::progress::VertexProgress;
use crate::session::SessionGroup;

/// What to find out about a source.
#[derive(Clone, Debug, Default)]
pub struct MetaRequest {
    /// The platform for images; `None`: the host's.
    pub platform: Option<Platform>,
    /// `default`, `pull`, `local`; empty is `default`.
    pub resolve_mode: String,
    /// Name of the vertex that is shown meanwhile; empty: made of the identifier.
    pub log_name: String,
    /// For `oci-layout://`: the session and store that have the image; session empty: the job's own.
    pub layout_store: Option<(String, String)>,
    /// Leave out an image's config.
    pub no_config: bool,
    /// Collect the image's attestation chain.
    pub attestation_chain: bool,
    /// Predicate types of attestations whose blobs are wanted.
    pub resolve_attestations: Vec<String>,
    /// Return a git source's commit and tag objects.
    pub return_object: bool,
    /// Checksum an HTTP source in another way as well: algorithm and suffix.
    pub checksum: Option<(oci::Algorithm, Bytes)>,
    /// Source policies beyond those of the job.
    pub source_policies: Vec<Policy>,
}

/// What a source resolves to.
#[derive(Clone, Debug, Default)]
pub struct SourceMeta {
    /// The source, as policies changed it.
    pub op: pb::SourceOp,
    /// For images.
    pub image: Option<ImageMeta>,
    /// For git.
    pub git: Option<GitMeta>,
    /// For HTTP.
    pub http: Option<HttpMeta>,
}

/// An image's identity and config.
#[derive(Clone, Debug)]
pub struct ImageMeta {
    /// What the reference resolved to: the index's digest if it is one.
    pub digest: Digest,
    /// The config's bytes; empty if not wanted.
    pub config: Bytes,
    /// The attestation chain, if wanted.
    pub attestations: Option<AttestationChain>,
}

/// How an image's attestations are reached.
#[derive(Clone, Debug)]
pub struct AttestationChain {
    /// The index.
    pub root: Digest,
    /// The platform's manifest.
    pub image_manifest: Option<Digest>,
    /// The manifest of its attestations.
    pub attestation_manifest: Option<Digest>,
    /// Manifests of signatures.
    pub signature_manifests: Vec<Digest>,
    /// Bytes of the above and of wanted attestations.
    pub blobs: BTreeMap<Digest, (Descriptor, Bytes)>,
}

/// A git source's identity.
#[derive(Clone, Debug, Default)]
pub struct GitMeta {
    /// What the ref points to: a commit, or an annotated tag.
    pub checksum: String,
    /// The full name of the ref.
    pub reference: String,
    /// The commit, when `checksum` is a tag.
    pub commit_checksum: String,
    /// The commit object's bytes, if wanted.
    pub commit_object: Bytes,
    /// The tag object's bytes, if wanted.
    pub tag_object: Bytes,
}

/// An HTTP source's identity.
#[derive(Clone, Debug)]
pub struct HttpMeta {
    /// Checksum of the body.
    pub digest: Digest,
    /// Name under which it would be stored.
    pub filename: String,
    /// When the server says it changed.
    pub last_modified: Option<SystemTime>,
    /// The other checksum, if wanted, and its suffix.
    pub checksum: Option<(String, Bytes)>,
}

/// Under what a source is asked.
#[derive(Clone, Debug)]
pub struct MetaContext {
    /// The build.
    pub job: Arc<Job>,
    /// Its sessions.
    pub sessions: SessionGroup,
    /// The vertex that is shown meanwhile.
    pub progress: VertexProgress,
    /// Fires when the answer is not needed any more.
    pub cancel: CancellationToken,
}

/// Resolves sources. Implemented by the engine's sources.
#[async_trait]
pub trait SourceResolver: Send + Sync + fmt::Debug {
    /// Finds out what a source resolves to. Policies were applied to `op` already.
    async fn resolve_meta(
        &self,
        ctx: &MetaContext,
        op: pb::SourceOp,
        request: &MetaRequest,
    ) -> Result<SourceMeta, BuildError>;
}

/// What a client is asked.
#[derive(Clone, Debug, Default)]
pub struct PolicyQuestion {
    /// The platform for which the source is used, if the definition names one.
    pub platform: Option<pb::Platform>,
    /// The source, and what the client asked to know of it.
    pub source: SourceMeta,
}

/// What a client answers.
#[derive(Clone, Debug)]
pub enum PolicyAnswer {
    /// The source may be used.
    Allow,
    /// It may not.
    Deny {
        /// The client's reasons, for people.
        messages: Vec<String>,
    },
    /// Another is to be used, if it may be.
    Convert(pb::SourceOp),
    /// The client wants to know more before it decides.
    Ask {
        /// The source, unchanged.
        op: pb::SourceOp,
        /// What it wants to know.
        request: Box<MetaRequest>,
    },
}

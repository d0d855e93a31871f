//! Contracts of exporters: what they are asked, what they are given, what they leave to be done.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use oci::Descriptor;
use tokio_util::sync::CancellationToken;

use crate::error::BuildError;
use crate::job::Job;
use crate::op::ResultRef;
use crate::progress::VertexProgress;
use crate::result::BuildResult;
use crate::session::SessionGroup;

/// An exporter as the client asks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExporterRequest {
    /// Its type, e.g. `image`.
    pub kind: String,
    /// Its attributes.
    pub attrs: BTreeMap<String, String>,
}

/// What an exporter is given: the build's refs, evaluated.
pub type ExportSource = BuildResult<ResultRef>;

/// Under what an exporter works.
#[derive(Clone, Debug)]
pub struct ExportContext {
    /// The build.
    pub job: Arc<Job>,
    /// Its sessions.
    pub sessions: SessionGroup,
    /// The vertex that is shown meanwhile, e.g. `exporting to image`.
    pub progress: VertexProgress,
    /// Fires when the export is not wanted any more.
    pub cancel: CancellationToken,
    /// Makes the inline cache of the exported image, if one was asked for.
    pub inline_cache: Option<Arc<dyn InlineCache>>,
}

/// Makes cache records that fit into an image's config.
#[async_trait]
pub trait InlineCache: Send + Sync + fmt::Debug {
    /// Returns the value of `moby.buildkit.cache.v0` for a platform's key (empty for the only ref), given the layers
    /// that the image will have; `None`, with a warning, when nothing can be cached.
    async fn records(
        &self,
        progress: &VertexProgress,
        key: &str,
        layers: &[Descriptor],
    ) -> Result<Option<Bytes>, BuildError>;

    /// What the build's response says of the records that were made: what was left out, as cache exporters list it.
    ///
    /// # Errors
    /// When it cannot be written as JSON.
    fn responses(&self) -> Result<Vec<BTreeMap<String, String>>, BuildError>;
}

/// Makes instances of one kind of exporter.
pub trait Exporter: Send + Sync + fmt::Debug {
    /// Checks the attributes and makes an instance. `id` is the exporter's index in the request.
    fn resolve(
        &self,
        id: usize,
        attrs: BTreeMap<String, String>,
    ) -> Result<Arc<dyn ExporterInstance>, BuildError>;
}

/// One exporter of one build.
#[async_trait]
pub trait ExporterInstance: Send + Sync + fmt::Debug {
    /// The name of the vertex that is shown meanwhile, e.g. `exporting to image`.
    fn name(&self) -> &str;

    /// Exports. What can run beside other exports (a push) is left to [`Exported::finalize`].
    async fn export(&self, ctx: &ExportContext, source: &ExportSource) -> Result<Exported, BuildError>;
}

/// The rest of an export, done beside those of the other exporters and the cache exporters.
#[async_trait]
pub trait Finalize: Send {
    /// Completes the export. If it is dropped instead, the export is incomplete but leaks nothing.
    async fn finalize(self: Box<Self>, ctx: &ExportContext) -> Result<BTreeMap<String, String>, BuildError>;
}

/// What an exporter did.
#[derive(Default)]
pub struct Exported {
    /// Entries of the build's response, e.g. `containerimage.digest`.
    pub response: BTreeMap<String, String>,
    /// What remains to be done.
    pub finalize: Option<Box<dyn Finalize>>,
    /// The exported image, for the build history.
    pub descriptor: Option<Descriptor>,
    /// Holds the exported image's blobs.
    pub held: Option<HeldBlobs>,
}

impl fmt::Debug for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exported")
            .field("response", &self.response)
            .field("descriptor", &self.descriptor)
            .finish_non_exhaustive()
    }
}

/// Holds the blobs of what was exported until its last clone is dropped.
#[derive(Clone, Debug)]
pub struct HeldBlobs {
    _pin: Arc<Mutex<cache::Pin>>,
}

impl HeldBlobs {
    /// Shares a pin, to which its maker may still add.
    pub fn new(pin: Arc<Mutex<cache::Pin>>) -> Self {
        Self { _pin: pin }
    }
}

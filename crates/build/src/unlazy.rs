//! The port that brings a lazy ref's bytes here.

use std::fmt;

use async_trait::async_trait;
use oci::Digest;
use tokio_util::sync::CancellationToken;

use crate::cache_import::ImportContext;
use crate::error::{BuildError, ErrorKind};
use crate::export::ExportContext;
use crate::op::{OpContext, ResultRef};
use crate::progress::VertexProgress;
use crate::session::SessionGroup;

/// For whom bytes are fetched: where to show it, whose credentials to use, when to stop.
#[derive(Clone, Debug)]
pub struct FetchContext {
    /// The vertex under which transfers are shown.
    pub progress: VertexProgress,
    /// The clients whose credentials may be used.
    pub sessions: SessionGroup,
    /// Fires when the bytes are not wanted any more.
    pub cancel: CancellationToken,
    /// The sources behind the inputs of a step, in the order of the inputs: what is fetched of theirs is shown there.
    pub sources: Vec<Option<VertexProgress>>,
}

impl FetchContext {
    /// Makes the context of work that is not for the inputs of a step.
    pub fn new(progress: VertexProgress, sessions: SessionGroup, cancel: CancellationToken) -> Self {
        Self {
            progress,
            sessions,
            cancel,
            sources: Vec::new(),
        }
    }

    /// Returns the context for one input of a step alone.
    pub fn for_input(ctx: &OpContext, input: usize) -> Self {
        Self {
            sources: ctx.sources().get(input).cloned().into_iter().collect(),
            ..Self::from(ctx)
        }
    }
}

impl From<&OpContext> for FetchContext {
    fn from(ctx: &OpContext) -> Self {
        Self {
            sources: ctx.sources().to_vec(),
            ..Self::new(ctx.progress().clone(), ctx.sessions(), ctx.cancel().clone())
        }
    }
}

impl From<&ImportContext> for FetchContext {
    fn from(ctx: &ImportContext) -> Self {
        Self::new(ctx.progress.clone(), ctx.sessions.clone(), ctx.cancel.clone())
    }
}

impl From<&ExportContext> for FetchContext {
    fn from(ctx: &ExportContext) -> Self {
        Self::new(ctx.progress.clone(), ctx.sessions.clone(), ctx.cancel.clone())
    }
}

/// A blob that a place turned out not to have whole, although it was to be had there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LostBlob {
    /// The blob.
    pub digest: Digest,
    /// The place's name, without credentials.
    pub place: String,
    /// What went wrong there.
    pub reason: String,
}

/// Fetches what lazy refs lack. Concurrent calls for the same ref share the work.
#[async_trait]
pub trait Unlazy: Send + Sync + fmt::Debug {
    /// Fetches the missing blobs of a ref and all it stands on, without unpacking them.
    async fn fetch(&self, ctx: &FetchContext, reference: &cache::ImmutableRef) -> Result<(), BuildError>;

    /// Makes the ref's snapshot: fetches what is missing and unpacks it.
    async fn unpack(&self, ctx: &FetchContext, reference: &cache::ImmutableRef) -> Result<(), BuildError>;

    /// Whether all that the ref lacks can be had, as far as that can be told without fetching it.
    async fn is_reachable(
        &self,
        ctx: &FetchContext,
        reference: &cache::ImmutableRef,
    ) -> Result<bool, BuildError>;

    /// Lists what could not be had so far for these sessions. Such a blob counts as absent from its place for them.
    fn lost(&self, sessions: &SessionGroup) -> Vec<LostBlob>;
}

/// Makes the snapshots of all inputs of a step, at once.
///
/// # Errors
/// The first failure. When an input's bytes cannot be had, or are others than they should be, the error names it: what
/// came from a cache is then made anew.
pub async fn unpack_all(
    unlazy: &dyn Unlazy,
    ctx: &FetchContext,
    inputs: &[ResultRef],
) -> Result<(), BuildError> {
    let lazy = inputs
        .iter()
        .enumerate()
        .filter_map(|(index, input)| Some((index, input.get()?)));
    let unpacked = lazy
        .filter(|(_, reference)| reference.is_lazy())
        .map(|(index, reference)| async move {
            let source = ctx.sources.get(index).and_then(Option::as_ref);
            let _shown = source.map(VertexProgress::resume);
            let ctx = FetchContext {
                progress: source.unwrap_or(&ctx.progress).clone(),
                sources: Vec::new(),
                ..ctx.clone()
            };
            unlazy
                .unpack(&ctx, reference)
                .await
                .map_err(|error| match error.kind() {
                    // Neither says anything of the bytes.
                    ErrorKind::Canceled | ErrorKind::Internal => error,
                    _ => error.with_lost_input(index),
                })
        });
    futures_util::future::try_join_all(unpacked).await.map(drop)
}

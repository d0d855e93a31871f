//! One `Solve` from request to response: frontend or definition, results, exporters, cache exporters.

mod choose;
mod exports;
mod renewal;
mod run;
mod verify;

use std::fmt;

use async_trait::async_trait;
use build::cache_export::{
    CacheEntry, CacheExportSource, CacheExporter, CacheGraph, CacheLink, CacheLinkSource, StoredResults,
};
use bytes::Bytes;

use crate::bridge::{Bridge, BuildResult};
use crate::error::BuildError;

pub use build::cache_export::CacheExporterFactory;
pub use build::export::{
    ExportContext, ExportSource, Exported, Exporter, ExporterInstance, ExporterRequest, Finalize, HeldBlobs,
    InlineCache,
};
pub use run::{SolveRequest, SolveResponse, parse_entitlement};

/// Changes a result between build and export: attaches provenance, runs scanners.
#[async_trait]
pub trait ResultProcessor: Send + Sync + fmt::Debug {
    /// Returns the result that is to be exported. Its new refs may be lazy.
    async fn process(
        &self,
        bridge: &Bridge,
        request: &SolveRequest,
        result: BuildResult,
    ) -> Result<BuildResult, BuildError>;

    /// Returns what is to be remembered of the result rather than attached to it.
    async fn remember(
        &self,
        bridge: &Bridge,
        request: &SolveRequest,
        result: &BuildResult,
    ) -> Result<Vec<Statement>, BuildError> {
        let _ = (bridge, request, result);
        Ok(Vec::new())
    }
}

/// What is stated about a part of a result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statement {
    /// The part: a platform's key; empty for a result that is a single ref.
    pub key: String,
    /// The type of the predicate, a URL.
    pub predicate_type: String,
    /// The predicate as JSON.
    pub predicate: Bytes,
}

//! A build's results as exporters take them, and what is done when they turn out to lack layers.
//!
//! A result that was found in a cache is lazy: a layer that proves to be gone or damaged when an exporter reads it is
//! noticed after its step counted as cached. Then the result is forgotten, the steps that made it run, and the export
//! goes on with what they yield.

use std::collections::BTreeSet;
use std::sync::Arc;

use build::unlazy::LostBlob;
use oci::Digest;

use super::run::{Plan, cache_source, export_source, split_inline, warn};
use crate::bridge::{BuildResult, in_vertex};
use crate::engine::Engine;
use crate::error::BuildError;
use crate::job::Job;
use crate::session::SessionGroup;
use crate::solve::{CacheExportSource, CacheExporter, ExportSource, InlineCache};

/// The vertex that is shown while results are made anew.
const VERTEX: &str = "making results anew whose layers cannot be had";

/// What exporters are given.
pub(super) struct Sources {
    /// How often results were made anew before.
    pub generation: usize,
    /// For exporters.
    pub export: ExportSource,
    /// For cache exporters, if there are any.
    pub cache: Option<CacheExportSource>,
    /// Makes the inline cache, if one is asked for.
    pub inline: Option<Arc<dyn InlineCache>>,
    /// The cache exporters that export on their own.
    pub cache_exporters: Vec<Arc<dyn CacheExporter>>,
}

struct State {
    current: Arc<Sources>,
    /// What was lost and acted upon.
    seen: BTreeSet<LostBlob>,
}

/// The present [`Sources`] of one build.
pub(super) struct Renewal<'a> {
    engine: &'a Engine,
    job: &'a Arc<Job>,
    plan: &'a Plan,
    result: &'a BuildResult,
    sessions: SessionGroup,
    state: tokio::sync::Mutex<State>,
}

impl<'a> Renewal<'a> {
    /// Collects what exporters are given of a result.
    ///
    /// # Errors
    /// Those of refs that were not evaluated.
    pub async fn start(
        engine: &'a Engine,
        job: &'a Arc<Job>,
        plan: &'a Plan,
        result: &'a BuildResult,
        sessions: SessionGroup,
    ) -> Result<Self, BuildError> {
        let current = Arc::new(collect(engine, job, plan, result, 0).await?);
        let state = State {
            current,
            seen: BTreeSet::new(),
        };
        Ok(Self {
            engine,
            job,
            plan,
            result,
            sessions,
            state: tokio::sync::Mutex::new(state),
        })
    }

    /// Returns what exporters are given now.
    pub async fn current(&self) -> Arc<Sources> {
        Arc::clone(&self.state.lock().await.current)
    }

    /// Returns newer sources than those of a generation, with which an export failed; makes them if layers were lost since
    /// the last time. `None`: there is nothing to try again with.
    ///
    /// # Errors
    /// Those of the steps that run for it.
    pub async fn newer(&self, generation: usize) -> Result<Option<Arc<Sources>>, BuildError> {
        let mut state = self.state.lock().await;
        if state.current.generation > generation {
            return Ok(Some(Arc::clone(&state.current)));
        }
        let lost = self.engine.services().unlazy.lost(&self.sessions);
        let new: Vec<LostBlob> = lost
            .iter()
            .filter(|blob| !state.seen.contains(blob))
            .cloned()
            .collect();
        if new.is_empty() {
            return Ok(None);
        }
        let digests: Arc<BTreeSet<Digest>> = Arc::new(lost.iter().map(|blob| blob.digest).collect());
        state.seen.extend(lost);
        if !self.renew(&new, &digests).await? {
            return Ok(None);
        }
        let next = state.current.generation + 1;
        let collected = Box::pin(collect(self.engine, self.job, self.plan, self.result, next));
        state.current = Arc::new(collected.await?);
        Ok(Some(Arc::clone(&state.current)))
    }

    /// Makes anew what lacks lost layers; returns whether any result is another one now.
    async fn renew(&self, new: &[LostBlob], lost: &Arc<BTreeSet<Digest>>) -> Result<bool, BuildError> {
        let jobs = std::slice::from_ref(self.job);
        let renewing = in_vertex(jobs, VERTEX, "", |progress, _| async move {
            let texts: Vec<String> = new.iter().map(told).collect();
            warn(&progress, &texts);
            let renewals = self.result.all_refs().map(|reference| reference.renew(lost));
            let renewed = futures_util::future::try_join_all(renewals).await?;
            Ok(renewed.contains(&true))
        });
        let renewed = Box::pin(renewing).await;
        renewed.map_err(|error: BuildError| match error.is_canceled() {
            true => error,
            false => error.context("a result whose layers cannot be had cannot be made anew"),
        })
    }
}

fn told(blob: &LostBlob) -> String {
    let LostBlob {
        digest,
        place,
        reason,
    } = blob;
    let mut text = format!("layer {digest} of a cached result cannot be had");
    if !reason.contains(place) {
        text.push_str(" from ");
        text.push_str(place);
    }
    text.push_str(": ");
    text.push_str(reason);
    text
}

async fn collect(
    engine: &Engine,
    job: &Arc<Job>,
    plan: &Plan,
    result: &BuildResult,
    generation: usize,
) -> Result<Sources, BuildError> {
    let cache = if plan.cache_exporters.is_empty() {
        None
    } else {
        Some(cache_source(engine, job, result).await?)
    };
    let export = export_source(result.clone()).await?;
    let (inline, cache_exporters) = split_inline(plan, cache.as_ref());
    Ok(Sources {
        generation,
        export,
        cache,
        inline,
        cache_exporters,
    })
}

//! Runs the exporters of a build, each shown as a vertex. An export that fails for want of layers is tried again with
//! results that were made anew.

use std::collections::BTreeMap;
use std::sync::Arc;

use build::cache_export::CacheExported;
use tokio_util::sync::CancellationToken;

use super::renewal::{Renewal, Sources};
use super::run::{Plan, warn};
use crate::bridge::in_vertex;
use crate::error::BuildError;
use crate::job::Job;
use crate::progress::VertexProgress;
use crate::session::SessionGroup;
use crate::solve::{CacheExportSource, CacheExporter, ExportContext, Exported, ExporterInstance, Finalize};

/// What exporters of one build share.
pub(super) struct Exports<'a> {
    pub job: &'a Arc<Job>,
    pub plan: &'a Plan,
    pub sessions: SessionGroup,
    pub renewal: Renewal<'a>,
    /// Keeps the vertices of builds apart.
    pub prefix: String,
}

/// An export whose rest is not done yet.
pub(super) struct Begun<'a> {
    exporter: &'a Arc<dyn ExporterInstance>,
    pub exported: Exported,
    sources: Arc<Sources>,
}

/// Where an export is shown, and what ends it.
struct Shown {
    progress: VertexProgress,
    cancel: CancellationToken,
}

impl<'a> Exports<'a> {
    fn context(&self, shown: &Shown, sources: &Sources) -> ExportContext {
        ExportContext {
            job: Arc::clone(self.job),
            sessions: self.sessions.clone(),
            progress: shown.progress.clone(),
            cancel: shown.cancel.clone(),
            inline_cache: sources.inline.clone(),
        }
    }

    /// Shows warnings about the result that no exporter's vertex can show.
    pub async fn show_warnings(&self) -> Result<(), BuildError> {
        let warnings = &self.plan.warnings;
        if warnings.is_empty() || !self.plan.exporters.is_empty() {
            return Ok(());
        }
        let jobs = std::slice::from_ref(self.job);
        let id = format!("{}-verify", self.prefix);
        in_vertex(jobs, "Verifying build result", &id, |progress, _| async move {
            warn(&progress, warnings);
            Ok(())
        })
        .await
    }

    /// Runs all exporters, up to what they leave to be done beside the others.
    pub async fn begin(&self) -> Result<Vec<Begun<'a>>, BuildError> {
        let jobs = std::slice::from_ref(self.job);
        let runs = self.plan.exporters.iter().enumerate().map(|(index, exporter)| {
            let id = format!("{}-export-{index}", self.prefix);
            async move {
                in_vertex(jobs, exporter.name(), &id, |progress, cancel| async move {
                    if index == 0 {
                        warn(&progress, &self.plan.warnings);
                    }
                    let sources = self.renewal.current().await;
                    self.export(exporter, &Shown { progress, cancel }, sources).await
                })
                .await
            }
        });
        futures_util::future::try_join_all(runs).await
    }

    async fn export(
        &self,
        exporter: &'a Arc<dyn ExporterInstance>,
        shown: &Shown,
        mut sources: Arc<Sources>,
    ) -> Result<Begun<'a>, BuildError> {
        loop {
            let ctx = self.context(shown, &sources);
            match exporter.export(&ctx, &sources.export).await {
                Ok(exported) => {
                    return Ok(Begun {
                        exporter,
                        exported,
                        sources,
                    });
                }
                Err(error) => sources = self.newer(&sources, error).await?,
            }
        }
    }

    /// What to try again with after an error; the error itself if there is nothing.
    async fn newer(&self, sources: &Sources, error: BuildError) -> Result<Arc<Sources>, BuildError> {
        if error.is_canceled() {
            return Err(error);
        }
        let newer = Box::pin(self.renewal.newer(sources.generation)).await?;
        newer.ok_or(error)
    }

    /// Does what exporters left to be done.
    pub async fn finish(&self, begun: Vec<Begun<'a>>) -> Result<Vec<Begun<'a>>, BuildError> {
        let runs = begun
            .into_iter()
            .enumerate()
            .map(|(index, mut begun)| async move {
                let Some(rest) = begun.exported.finalize.take() else {
                    return Ok(begun);
                };
                let jobs = std::slice::from_ref(self.job);
                let id = format!("{}-export-{index}", self.prefix);
                in_vertex(jobs, begun.exporter.name(), &id, |progress, cancel| {
                    self.finish_one(begun, rest, Shown { progress, cancel })
                })
                .await
            });
        futures_util::future::try_join_all(runs).await
    }

    async fn finish_one(
        &self,
        mut begun: Begun<'a>,
        rest: Box<dyn Finalize>,
        shown: Shown,
    ) -> Result<Begun<'a>, BuildError> {
        let mut rest = Some(rest);
        let current = self.renewal.current().await;
        if current.generation > begun.sources.generation {
            // Another exporter found that layers are lost. Nothing of this one is sent yet: all are of the same result.
            begun = Box::pin(self.export(begun.exporter, &shown, current)).await?;
            rest = begun.exported.finalize.take();
        }
        while let Some(finalize) = rest.take() {
            match finalize.finalize(&self.context(&shown, &begun.sources)).await {
                Ok(response) => begun.exported.response.extend(response),
                Err(error) => {
                    let sources = self.newer(&begun.sources, error).await?;
                    begun = Box::pin(self.export(begun.exporter, &shown, sources)).await?;
                    rest = begun.exported.finalize.take();
                }
            }
        }
        Ok(begun)
    }

    /// Runs the cache exporters that export on their own; returns what each tells.
    pub async fn caches(&self) -> Result<Vec<BTreeMap<String, String>>, BuildError> {
        let sources = self.renewal.current().await;
        let Some(cache) = &sources.cache else {
            return Ok(Vec::new());
        };
        let jobs = std::slice::from_ref(self.job);
        let generation = sources.generation;
        let runs = sources.cache_exporters.iter().enumerate().map(|(index, exporter)| {
            let id = format!("{}-cache-{index}", self.prefix);
            let source = cache.clone();
            async move {
                let exported = in_vertex(jobs, exporter.name(), &id, |progress, cancel| async move {
                    let shown = Shown { progress, cancel };
                    self.cache(&**exporter, &shown, source, generation).await
                });
                match exported.await {
                    Err(error) if exporter.ignores_errors() && !error.is_canceled() => {
                        tracing::warn!(%error, exporter = exporter.name(), "a failed cache export is ignored");
                        Ok(BTreeMap::new())
                    }
                    other => other,
                }
            }
        });
        futures_util::future::try_join_all(runs).await
    }

    async fn cache(
        &self,
        exporter: &dyn CacheExporter,
        shown: &Shown,
        mut source: CacheExportSource,
        mut generation: usize,
    ) -> Result<BTreeMap<String, String>, BuildError> {
        loop {
            let sources = self.renewal.current().await;
            let ctx = self.context(shown, &sources);
            match exporter.export(&ctx, &source).await? {
                CacheExported::Done(response) => return Ok(response),
                CacheExported::Lacking => match Box::pin(self.renewal.newer(generation)).await {
                    Ok(Some(newer)) => {
                        generation = newer.generation;
                        source = newer.cache.clone().unwrap_or(source);
                    }
                    Err(error) if error.is_canceled() => return Err(error),
                    // What failed is shown. A cache without some results is better than none; nothing is left but to
                    // tell of them.
                    Ok(None) | Err(_) => source.renewable = false,
                },
            }
        }
    }
}

//! The effects themselves, as futures.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use oci::Digest;
use solver::{CacheMap, Dep, FoundKey, Query, StoreId, StoredResult};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::driver::ImportContext;
use crate::driver::imports::{ImportSlot, arrived};
use crate::driver::records::{LocalRecords, from_nanoseconds};
use crate::error::{BuildError, FailedOp, Subject};
use crate::op::{self, Op, OpContext, ResultRef};
use crate::unlazy::{FetchContext, Unlazy};

/// How long cancelled work may take to end cleanly.
const CANCEL_GRACE: Duration = Duration::from_secs(10);

/// What an effect ended with.
pub(crate) enum Answer {
    Map(CacheMap),
    Keys(Vec<Vec<FoundKey>>),
    Checksum(Option<Digest>),
    Loaded(Option<(ResultRef, SystemTime)>),
    Executed(Vec<Option<ResultRef>>),
    Failed(BuildError),
    Lost(BuildError),
    Canceled,
}

/// Runs work until it ends, or until some time after it was cancelled.
pub(crate) async fn cancellable(cancel: CancellationToken, work: impl Future<Output = Answer>) -> Answer {
    let given_up = async {
        cancel.cancelled().await;
        tokio::time::sleep(CANCEL_GRACE).await;
    };
    tokio::select! {
        biased;
        answer = work => answer,
        () = given_up => Answer::Canceled,
    }
}

fn failed(error: BuildError, cancel: &CancellationToken) -> Answer {
    if cancel.is_cancelled() || error.is_canceled() {
        Answer::Canceled
    } else if error.lost_inputs().is_empty() {
        Answer::Failed(error)
    } else {
        Answer::Lost(error)
    }
}

/// Asks the op how it is identified. Shown only for sources, where it can take long.
pub(crate) async fn cache_map(op: Arc<dyn Op>, ctx: OpContext, round: u32) -> Answer {
    let shown = ctx.vertex().inputs.is_empty() && op.shows_cache_map();
    if shown {
        ctx.progress().started(false);
    }
    let outcome = op.cache_map(&ctx, round).await;
    // What is let go of because nobody needs it any more has not gone wrong; a client that cancels does not see this.
    let error = outcome.as_ref().err().filter(|_| !ctx.cancel().is_cancelled());
    if shown || error.is_some() {
        if !shown {
            ctx.progress().started(false);
        }
        ctx.progress().completed(false, error.map(ToString::to_string));
    }
    match outcome {
        Ok(map) => Answer::Map(solver_map(map)),
        Err(error) => {
            let error = error.context("failed to load cache key");
            failed(name_op(error, &ctx, &[], None), ctx.cancel())
        }
    }
}

fn solver_map(map: op::CacheMap) -> CacheMap {
    let deps = map.deps.into_iter().map(|dep| Dep {
        selector: dep.selector,
        content: dep.content,
    });
    CacheMap {
        digests: map.digests,
        more: map.more,
        ephemeral: map.ephemeral,
        deps: deps.collect(),
    }
}

/// Checksums what the op reads of an input. Shown only when it fails.
pub(crate) async fn checksum(op: Arc<dyn Op>, ctx: OpContext, input: usize, reference: ResultRef) -> Answer {
    match op.content_digest(&ctx, input, &reference).await {
        Ok(digest) => Answer::Checksum(digest),
        Err(error) => {
            let error = error
                .rename_lost_inputs(input)
                .context("failed to compute cache key");
            let error = name_op(error, &ctx, &[reference], Some(Subject::ContentOf(input)));
            let answer = failed(error.clone(), ctx.cancel());
            if matches!(answer, Answer::Failed(_)) {
                ctx.progress().started(false);
                ctx.progress().completed(false, Some(error.to_string()));
            }
            answer
        }
    }
}

/// Executes the op, when it is its turn.
pub(crate) async fn exec(
    op: Arc<dyn Op>,
    ctx: OpContext,
    inputs: Vec<ResultRef>,
    limit: Option<Arc<Semaphore>>,
) -> Answer {
    let limit = limit.filter(|_| op.is_limited());
    let turn = match limit {
        None => None,
        Some(limit) => tokio::select! {
            biased;
            () = ctx.cancel().cancelled() => return Answer::Canceled,
            turn = limit.acquire_owned() => turn.ok(),
        },
    };
    ctx.progress().started(false);
    let outcome = op.exec(&ctx, &inputs).await;
    drop(turn);
    ctx.progress()
        .completed(false, outcome.as_ref().err().map(ToString::to_string));
    match outcome {
        Ok(outputs) => Answer::Executed(outputs),
        Err(error) => failed(name_op(error, &ctx, &inputs, None), ctx.cancel()),
    }
}

/// Tells the client which op failed and on what, unless the op told it itself.
fn name_op(error: BuildError, ctx: &OpContext, inputs: &[ResultRef], subject: Option<Subject>) -> BuildError {
    error.with_failed_op(FailedOp {
        op: Some(Arc::clone(&ctx.vertex().op)),
        description: ctx.vertex().metadata.description.clone(),
        subject,
        inputs: inputs.to_vec(),
        mounts: Vec::new(),
    })
}

/// Where a stored result is loaded from.
pub(crate) enum LoadFrom {
    Local(LocalRecords, Arc<dyn Unlazy>, FetchContext),
    Imported(ImportSlot, ImportContext),
}

/// Loads a stored result; whatever goes wrong, it is as good as gone.
pub(crate) async fn load_stored(from: LoadFrom, stored: StoredResult) -> Option<ResultRef> {
    match from {
        LoadFrom::Local(records, unlazy, ctx) => {
            let loading = AbortOnDropHandle::new(tokio::task::spawn_blocking(move || records.load(&stored)));
            let loaded = tokio::select! {
                biased;
                loaded = loading => loaded.ok().flatten()?,
                // Left waiting for a thread, it would take a hold when all builds may be over, as a surprise to whoever prunes.
                () = ctx.cancel.cancelled() => return None,
            };
            // A lazy result of an earlier build may be where this one does not get to.
            let is_reachable = match loaded.get() {
                Some(reference) => unlazy.is_reachable(&ctx, reference).await.unwrap_or(false),
                None => true,
            };
            is_reachable.then_some(loaded)
        }
        LoadFrom::Imported(mut slot, ctx) => {
            let cache = arrived(&mut slot).await?;
            let loaded = cache.load(&ctx, &stored).await;
            loaded.unwrap_or_else(|error| {
                tracing::debug!(%error, result = %stored.result, "an imported result cannot be loaded");
                None
            })
        }
    }
}

/// Loads a vertex's result.
pub(crate) async fn load(ctx: OpContext, from: LoadFrom, stored: StoredResult) -> Answer {
    let created_at = from_nanoseconds(stored.created_at_ns);
    let loaded = load_stored(from, stored).await;
    if ctx.cancel().is_cancelled() {
        return Answer::Canceled;
    }
    if loaded.is_some() {
        ctx.progress().started(true);
        ctx.progress().completed(true, None);
    }
    Answer::Loaded(loaded.map(|reference| (reference, created_at)))
}

/// Asks stores of which some are still on their way.
pub(crate) async fn query(
    local: LocalRecords,
    slots: Vec<(StoreId, ImportSlot)>,
    queries: Vec<Query>,
) -> Answer {
    let mut caches = Vec::with_capacity(slots.len());
    for (store, mut slot) in slots {
        caches.push((store, arrived(&mut slot).await));
    }
    let answer = |query: &Query| match query.store() {
        StoreId::LOCAL => local.answer(query),
        store => {
            let cache = caches
                .iter()
                .find(|(known, _)| *known == store)
                .and_then(|(_, cache)| cache.as_ref());
            cache.map(|cache| cache.answer(query)).unwrap_or_default()
        }
    };
    Answer::Keys(queries.iter().map(answer).collect())
}

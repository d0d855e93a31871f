//! A lazily evaluated result of a definition.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use llb::pb;
use llb::sourcepolicy::Policy;
use oci::Digest;
use tokio::sync::Mutex;

use crate::bridge::files::FileReader;
use crate::bridge::{Bridge, BuildRefId, CacheOption, FileRange};
use crate::driver::{Evaluated, StepProvenance};
use crate::error::{BuildError, SourceRange};
use crate::op::ResultRef;
use crate::session::FileStat;

struct Inner {
    id: BuildRefId,
    bridge: Bridge,
    definition: pb::Definition,
    cache_imports: Vec<CacheOption>,
    policies: Vec<Policy>,
    outcome: Mutex<Option<Result<Evaluated, BuildError>>>,
}

/// What a definition yields, computed when it is first needed. Cheap to clone; valid until its job ends.
#[derive(Clone)]
pub struct BuildRef(Arc<Inner>);

impl BuildRef {
    pub(super) fn new(
        bridge: Bridge,
        definition: pb::Definition,
        cache_imports: Vec<CacheOption>,
        policies: Vec<Policy>,
    ) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        // Clients take the id for opaque; it must only differ from those that an earlier daemon gave out.
        let salt = std::process::id();
        let text =
            oci::Digest::sha256(format!("{salt} {number} {:?}", std::time::SystemTime::now()).as_bytes())
                .hex();
        let id = BuildRefId(text.chars().take(25).collect());
        let outcome = Mutex::new(None);
        Self(Arc::new(Inner {
            id,
            bridge,
            definition,
            cache_imports,
            policies,
            outcome,
        }))
    }

    /// Returns the name by which a client outside the process means this ref.
    pub fn id(&self) -> &BuildRefId {
        &self.0.id
    }

    /// Returns the definition.
    pub fn definition(&self) -> &pb::Definition {
        &self.0.definition
    }

    /// Returns the bridge on which it is built.
    pub fn bridge(&self) -> &Bridge {
        &self.0.bridge
    }

    /// Computes the result, once; callers at the same time share the work. A failure is kept, a cancellation is not.
    ///
    /// # Errors
    /// The failed step's, with the places in the frontend's text that the definition names for it.
    pub async fn evaluate(&self) -> Result<Evaluated, BuildError> {
        let mut outcome = self.0.outcome.lock().await;
        if let Some(known) = outcome.as_ref() {
            return known.clone();
        }
        let computed = Box::pin(self.compute()).await;
        if let Ok(evaluated) = &computed {
            let found = (self.0.id.clone(), evaluated.edge);
            self.0.bridge.note(|trail| trail.evaluated.push(found));
        }
        if computed.as_ref().err().is_none_or(|error| !error.is_canceled()) {
            *outcome = Some(computed.clone());
        }
        computed
    }

    /// Makes the result anew if it, or one behind it, lacks blobs that are lost; returns whether it is another one now.
    /// What was not computed, or failed, stays as it is.
    ///
    /// # Errors
    /// Those of the steps that run for it.
    pub(crate) async fn renew(&self, lost: &Arc<BTreeSet<Digest>>) -> Result<bool, BuildError> {
        let mut outcome = self.0.outcome.lock().await;
        let Some(Ok(known)) = outcome.as_ref() else {
            return Ok(false);
        };
        let bridge = &self.0.bridge;
        let driver = bridge.engine().driver()?;
        let renewing = driver.renew(bridge.owner(), known.edge, Arc::clone(lost));
        let renewed = Box::pin(renewing).await?;
        let id = |result: &ResultRef| result.get().map(|reference| reference.id().clone());
        let differs = id(&known.result) != id(&renewed.result);
        *outcome = Some(Ok(renewed));
        Ok(differs)
    }

    async fn compute(&self) -> Result<Evaluated, BuildError> {
        let bridge = &self.0.bridge;
        let prepared = bridge
            .prepare(&self.0.definition, &self.0.cache_imports, &self.0.policies)
            .await?;
        let built = bridge
            .engine()
            .driver()?
            .build(bridge.owner(), prepared.graph)
            .await;
        built.map_err(|error| {
            let Some(vertex) = error.vertex().copied() else {
                return error;
            };
            let ranges: Vec<SourceRange> = prepared
                .checked
                .locations(&vertex)
                .into_iter()
                .map(|(source, location)| SourceRange {
                    source: source.clone(),
                    ranges: location.ranges.clone(),
                })
                .collect();
            error.with_sources(ranges)
        })
    }

    /// Computes the result and returns its ref.
    ///
    /// # Errors
    /// As [`Self::evaluate`].
    pub async fn result(&self) -> Result<ResultRef, BuildError> {
        Ok(self.evaluate().await?.result)
    }

    /// Returns what the ops behind the result contributed to its provenance, inputs first.
    ///
    /// # Errors
    /// As [`Self::evaluate`].
    pub async fn provenance(&self) -> Result<Vec<StepProvenance>, BuildError> {
        let edge = self.evaluate().await?.edge;
        self.0.bridge.engine().driver()?.provenance(edge).await
    }

    /// Opens the result for reading. What turns out to lack layers is made anew.
    async fn reader(&self) -> Result<FileReader, BuildError> {
        let bridge = &self.0.bridge;
        let mut seen = BTreeSet::new();
        loop {
            let result = self.result().await?;
            let error = match FileReader::of_ref(bridge, &result).await {
                Err(error) if !error.is_canceled() => error,
                other => return other,
            };
            let lost = bridge.engine().services.unlazy.lost(&bridge.sessions());
            let digests: BTreeSet<Digest> = lost.iter().map(|blob| blob.digest).collect();
            let before = seen.len();
            seen.extend(lost);
            if seen.len() == before || !self.renew(&Arc::new(digests)).await? {
                return Err(error);
            }
        }
    }

    /// Reads a file of the result, at most 16 MiB of it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] and others of the file, or as [`Self::evaluate`].
    pub async fn read_file(&self, path: &str, range: FileRange) -> Result<bytes::Bytes, BuildError> {
        self.reader().await?.read_file(path, range).await
    }

    /// Lists a directory of the result; `include` is a pattern of names, empty for all.
    ///
    /// # Errors
    /// As [`Self::read_file`].
    pub async fn read_dir(&self, path: &str, include: &str) -> Result<Vec<FileStat>, BuildError> {
        self.reader().await?.read_dir(path, include).await
    }

    /// Returns the attributes of a file of the result.
    ///
    /// # Errors
    /// As [`Self::read_file`].
    pub async fn stat_file(&self, path: &str) -> Result<FileStat, BuildError> {
        self.reader().await?.stat_file(path).await
    }
}

impl fmt::Debug for BuildRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BuildRef").field(&self.0.id).finish()
    }
}

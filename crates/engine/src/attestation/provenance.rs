//! Attaches provenance to a result.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use export::platforms::{ExportPlatform, platforms};
use oci::{Descriptor, Platform};
use solver::{StoreId, StoredResult};

use super::build_config::{BuildConfig, source_text};
use super::capture::{Capture, for_platform};
use super::predicate::Predicate;
use super::{INLINE_ONLY_KEY, REASON_KEY, flag, wanted};
use crate::bridge::{
    Attestation, AttestationKind, Bridge, BuildRef, BuildRefId, BuildResult, LateStatement, StatementContent,
    Trail,
};
use crate::error::BuildError;
use crate::op::ResultRef;
use crate::solve::{ResultProcessor, SolveRequest, Statement};

const PREDICATE_V1: &str = "https://slsa.dev/provenance/v1";
const PREDICATE_V02: &str = "https://slsa.dev/provenance/v0.2";

/// Attaches provenance where the client wants it.
#[derive(Clone, Debug, Default)]
pub struct ProvenanceProcessor {
    environment: BTreeMap<String, serde_json::Value>,
}

impl ProvenanceProcessor {
    /// Makes a processor that adds entries to what every document says of where the build ran.
    pub fn new(environment: BTreeMap<String, serde_json::Value>) -> Self {
        Self { environment }
    }
}

#[async_trait]
impl ResultProcessor for ProvenanceProcessor {
    async fn process(
        &self,
        bridge: &Bridge,
        request: &SolveRequest,
        mut result: BuildResult,
    ) -> Result<BuildResult, BuildError> {
        let Some(attrs) = wanted(&request.frontend_opts)?.provenance else {
            return Ok(result);
        };
        let all = platforms(&result.metadata)?;
        let subjects = all.iter().filter_map(|entry| {
            let reference = result.find(&entry.id)?.clone();
            Some((entry.id.clone(), Some(&entry.platform), reference))
        });
        let subjects = subjects.collect();
        let statements = self.statements(bridge, &result, &all, subjects, &attrs);
        for (key, statement) in statements.await? {
            result.attestations.entry(key).or_default().push(statement);
        }
        Ok(result)
    }

    async fn remember(
        &self,
        bridge: &Bridge,
        request: &SolveRequest,
        result: &BuildResult,
    ) -> Result<Vec<Statement>, BuildError> {
        let mut attrs = BTreeMap::from([("mode".to_owned(), "max".to_owned())]);
        let wanted = wanted(&request.frontend_opts)?.provenance.unwrap_or_default();
        if let Some(id) = wanted.get("builder-id") {
            attrs.insert("builder-id".to_owned(), id.clone());
        }
        // The history also tells of results that no exporter would take.
        let all = platforms(&result.metadata).unwrap_or_default();
        let platform_of = |key: &str| all.iter().find(|entry| entry.id == key);
        let single = result.single.iter();
        let single = single.map(|reference| (String::new(), None, reference.clone()));
        let keyed = result.refs.iter().filter_map(|(key, reference)| {
            let platform = platform_of(key).map(|entry| &entry.platform);
            Some((key.clone(), platform, reference.clone()?))
        });
        let subjects = single.chain(keyed).collect();
        let statements = self.statements(bridge, result, &all, subjects, &attrs);
        let mut stated = Vec::new();
        for (key, attestation) in statements.await? {
            if let Some(content) = &attestation.content {
                stated.push(Statement {
                    key,
                    predicate_type: attestation.predicate_type,
                    predicate: content.read().await?,
                });
            }
        }
        Ok(stated)
    }
}

/// A ref of a result with its key, and its platform if it is known.
type Subject<'a> = (String, Option<&'a Platform>, BuildRef);

impl ProvenanceProcessor {
    /// Makes the provenance of refs of a result.
    async fn statements(
        &self,
        bridge: &Bridge,
        result: &BuildResult,
        all: &[ExportPlatform],
        subjects: Vec<Subject<'_>>,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Vec<(String, Attestation<BuildRef>)>, BuildError> {
        let trail = bridge.trail();
        let all_platforms: Vec<Platform> = all.iter().map(|entry| entry.platform.clone()).collect();
        let direct: Vec<BuildRefId> = result
            .all_refs()
            .map(|reference| reference.id().clone())
            .collect();
        let stating = Stating {
            bridge,
            trail: &trail,
            attrs,
            processor: self,
        };
        let mut statements = Vec::with_capacity(subjects.len());
        for (key, platform, reference) in subjects {
            let mut images = all_images(&trail);
            if let Some(platform) = platform.filter(|_| result.refs.len() > 1) {
                images = for_platform(images, platform, &all_platforms);
            }
            let mut capture = Capture::default();
            capture.add_steps(&reference.provenance().await?);
            add_others(&mut capture, bridge, &trail, &direct).await?;
            capture.add_resolved(&images);
            capture.finish();
            statements.push((key, stating.state(&reference, &capture)?));
        }
        Ok(statements)
    }
}

/// All images that any frontend of the build resolved.
fn all_images(trail: &Trail) -> Vec<crate::bridge::ResolvedImage> {
    let nested = trail.nested.iter().flat_map(all_images);
    trail.images.iter().cloned().chain(nested).collect()
}

/// Refs that were evaluated on the way, e.g. the one with the Dockerfile.
fn all_evaluated(trail: &Trail) -> Vec<(BuildRefId, solver::EdgeId)> {
    let nested = trail.nested.iter().flat_map(all_evaluated);
    trail.evaluated.iter().cloned().chain(nested).collect()
}

async fn add_others(
    capture: &mut Capture,
    bridge: &Bridge,
    trail: &Trail,
    direct: &[BuildRefId],
) -> Result<(), BuildError> {
    for (id, edge) in all_evaluated(trail) {
        if !direct.contains(&id) {
            capture.add_steps(&bridge.engine().driver()?.provenance(edge).await?);
        }
    }
    Ok(())
}

/// The innermost frontend whose bridge built a ref.
fn maker<'a>(trail: &'a Trail, id: &BuildRefId) -> Option<&'a Trail> {
    let nested = trail.nested.iter().find_map(|nested| maker(nested, id));
    nested.or_else(|| Some(trail).filter(|trail| trail.built.contains(id)))
}

/// Says which materials are missing, as BuildKit does.
fn incomplete(capture: &Capture) -> String {
    let mut text = "provenance materials are incomplete\n\nThe build requested complete provenance materials, but not all \
                    dependencies could be captured."
        .to_owned();
    if !capture.locals.is_empty() {
        text.push_str("\n\nUncaptured local sources:");
    }
    for name in &capture.locals {
        let name = if name.is_empty() { "<unnamed>" } else { name };
        text.push_str(&format!("\n  - {name}\n    reason: local_source"));
    }
    if !capture.unpinned.is_empty() {
        text.push_str("\n\nUncaptured requests:");
    }
    for request in &capture.unpinned {
        let name = [&request.name, &request.op, &request.uri]
            .into_iter()
            .find(|name| !name.is_empty());
        let name = name.map_or("", String::as_str);
        let (method, uri, reason) = (&request.method, &request.uri, request.reason);
        text.push_str(&format!(
            "\n  - {name}\n    method: {method}\n    url: {uri}\n    reason: {reason}"
        ));
    }
    text
}

/// Who asked for a statement, and how.
struct Stating<'a> {
    bridge: &'a Bridge,
    trail: &'a Trail,
    attrs: &'a BTreeMap<String, String>,
    processor: &'a ProvenanceProcessor,
}

impl Stating<'_> {
    fn attr(&self, key: &str) -> Option<&str> {
        self.attrs.get(key).map(String::as_str)
    }

    fn flag(&self, key: &str) -> Result<bool, BuildError> {
        let Some(value) = self.attr(key) else {
            return Ok(false);
        };
        flag(value).ok_or_else(|| BuildError::user(format!("failed to parse {key} flag {value:?}")))
    }

    fn predicate(&self, reference: &BuildRef, capture: &Capture) -> Result<Predicate, BuildError> {
        let asked = maker(self.trail, reference.id()).and_then(|trail| trail.asked.as_deref());
        let mut predicate = Predicate::new(capture, asked);
        predicate.environment.clone_from(&self.processor.environment);
        if self.flag("complete-materials")? && !predicate.has_all_materials() {
            return Err(BuildError::user(incomplete(capture)));
        }
        predicate.reproducible = self.flag("reproducible")?;
        self.attr("builder-id")
            .unwrap_or_default()
            .clone_into(&mut predicate.builder_id);
        if let Some(job) = self.bridge.jobs().first() {
            predicate.invocation_id = job.unique_id();
            predicate.started_on = oci::timestamp::from_system(job.started_at());
        }
        match self.attr("mode").unwrap_or("max") {
            "min" => predicate.scrub(),
            "max" | "full" => {
                let config = BuildConfig::new(reference.definition())?;
                predicate.metadata.source = source_text(reference.definition(), &config)?;
                predicate.config = Some(config);
            }
            mode => return Err(BuildError::user(format!("invalid mode {mode:?}"))),
        }
        Ok(predicate)
    }

    fn state(&self, reference: &BuildRef, capture: &Capture) -> Result<Attestation<BuildRef>, BuildError> {
        let is_v02 = self.attr("version") == Some("v0.2");
        let late = LateProvenance {
            bridge: self.bridge.clone(),
            reference: reference.clone(),
            predicate: self.predicate(reference, capture)?,
            is_v02,
        };
        let inline_only = self.attr("inline-only").and_then(flag).unwrap_or(false);
        let metadata = [
            (REASON_KEY.to_owned(), Bytes::from_static(b"provenance")),
            (INLINE_ONLY_KEY.to_owned(), Bytes::from(inline_only.to_string())),
        ];
        Ok(Attestation {
            kind: AttestationKind::InToto,
            metadata: metadata.into(),
            reference: None,
            path: self.attr("filename").unwrap_or("provenance.json").to_owned(),
            content: Some(StatementContent::Late(Arc::new(late))),
            predicate_type: if is_v02 { PREDICATE_V02 } else { PREDICATE_V1 }.to_owned(),
            subjects: Vec::new(),
        })
    }
}

/// Provenance that still lacks the layers that exporters make.
#[derive(Debug)]
struct LateProvenance {
    bridge: Bridge,
    reference: BuildRef,
    predicate: Predicate,
    is_v02: bool,
}

#[async_trait]
impl LateStatement for LateProvenance {
    async fn write(&self) -> Result<Bytes, BuildError> {
        let mut predicate = self.predicate.clone();
        if let Some(config) = &self.predicate.config {
            predicate.metadata.layers = layers(&self.bridge, &self.reference, config).await?;
        }
        predicate.finished_on = oci::timestamp::from_system(SystemTime::now());
        let content = if self.is_v02 {
            oci::json::to_vec_indent(&predicate.to_v02(), "  ")
        } else {
            oci::json::to_vec_indent(&predicate.to_v1(), "  ")
        };
        content
            .map(Bytes::from)
            .map_err(|error| BuildError::internal(format!("write provenance: {error}")))
    }
}

/// The layers that steps are known to consist of, by step and output.
async fn layers(
    bridge: &Bridge,
    reference: &BuildRef,
    config: &BuildConfig,
) -> Result<BTreeMap<String, Vec<Vec<Descriptor>>>, BuildError> {
    let edge = reference.evaluate().await?.edge;
    let exported = bridge.engine().driver()?.export(vec![edge]).await?;
    let mut layers: BTreeMap<String, Vec<Vec<Descriptor>>> = BTreeMap::new();
    for (entry, result) in exported.graph.entries.iter().zip(&exported.results) {
        let Some(step) = config.digests.get(&entry.vertex) else {
            continue;
        };
        let chain = match result {
            Some((result, _)) => blob_chain(result),
            None => cached(bridge, &entry.stored).await?.as_ref().and_then(blob_chain),
        };
        let Some(chain) = chain else {
            continue;
        };
        layers
            .entry(format!("{step}:{}", entry.output))
            .or_default()
            .push(chain);
    }
    Ok(layers)
}

/// What the local cache has of a step that the build did not need to load.
async fn cached(bridge: &Bridge, stored: &[StoredResult]) -> Result<Option<ResultRef>, BuildError> {
    let driver = bridge.engine().driver()?;
    for stored in stored.iter().filter(|stored| stored.key.store == StoreId::LOCAL) {
        if let Some(found) = driver.load_stored(stored.clone(), bridge.jobs()).await? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The blobs of a ref, if all of its layers have one.
fn blob_chain(result: &ResultRef) -> Option<Vec<Descriptor>> {
    let blobs = result.get()?.blob_chain()?;
    (!blobs.is_empty()).then_some(blobs)
}

//! Attaches provenance to a result.

use std::collections::BTreeMap;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use oci::{Descriptor, Platform};

use super::build_config::{BuildConfig, source_text};
use super::capture::{Capture, for_platform};
use super::predicate::Predicate;
use super::{INLINE_ONLY_KEY, REASON_KEY, flag, wanted};
use crate::bridge::{Attestation, AttestationKind, Bridge, BuildRef, BuildRefId, BuildResult, Trail};
use crate::error::BuildError;
use crate::export::platforms::platforms;
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
        for (id, statement) in self.state_all(bridge, &result, &attrs).await? {
            result.attestations.entry(id).or_default().push(statement);
        }
        Ok(result)
    }

    async fn remember(
        &self,
        bridge: &Bridge,
        request: &SolveRequest,
        result: &BuildResult,
    ) -> Result<Vec<Statement>, BuildError> {
        let mut attrs = wanted(&request.frontend_opts)?.provenance.unwrap_or_default();
        attrs.retain(|key, _| key == "builder-id");
        attrs.insert("mode".to_owned(), "max".to_owned());
        let stated = self.state_all(bridge, result, &attrs).await?.into_iter();
        let is_single = result.refs.is_empty();
        Ok(stated
            .map(|(id, statement)| Statement {
                key: if is_single { String::new() } else { id },
                predicate_type: statement.predicate_type,
                predicate: statement.content.unwrap_or_default(),
            })
            .collect())
    }
}

impl ProvenanceProcessor {
    /// States where each part of a result comes from, by the part's key.
    async fn state_all(
        &self,
        bridge: &Bridge,
        result: &BuildResult,
        attrs: &BTreeMap<String, String>,
    ) -> Result<Vec<(String, Attestation<BuildRef>)>, BuildError> {
        let trail = bridge.trail();
        let all = platforms(&result.metadata)?;
        let all_platforms: Vec<Platform> = all.iter().map(|entry| entry.platform.clone()).collect();
        let direct: Vec<BuildRefId> = result
            .all_refs()
            .map(|reference| reference.id().clone())
            .collect();
        let mut statements = Vec::new();
        for entry in &all {
            let Some(reference) = result.find(&entry.id).cloned() else {
                continue;
            };
            let mut images = all_images(&trail);
            if result.refs.len() > 1 {
                images = for_platform(images, &entry.platform, &all_platforms);
            }
            let mut capture = Capture::default();
            capture.add_steps(&reference.provenance().await?);
            add_others(&mut capture, bridge, &trail, &direct).await?;
            capture.add_resolved(&images);
            capture.finish();
            let statement = Box::pin(state(
                bridge,
                &reference,
                &capture,
                &trail,
                attrs,
                &self.environment,
            ));
            statements.push((entry.id.clone(), statement.await?));
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

async fn state(
    bridge: &Bridge,
    reference: &BuildRef,
    capture: &Capture,
    trail: &Trail,
    attrs: &BTreeMap<String, String>,
    environment: &BTreeMap<String, serde_json::Value>,
) -> Result<Attestation<BuildRef>, BuildError> {
    let attr = |key: &str| attrs.get(key).map(String::as_str);
    let parsed = |key: &str| -> Result<bool, BuildError> {
        let Some(value) = attr(key) else { return Ok(false) };
        flag(value).ok_or_else(|| BuildError::user(format!("failed to parse {key} flag {value:?}")))
    };
    let request = maker(trail, reference.id()).and_then(|trail| trail.frontend.as_ref());
    let mut predicate = Predicate::new(capture, request);
    predicate.environment.clone_from(environment);
    if parsed("complete-materials")? && !predicate.has_all_materials() {
        return Err(BuildError::user("provenance materials are incomplete"));
    }
    predicate.reproducible = parsed("reproducible")?;
    attr("builder-id")
        .unwrap_or_default()
        .clone_into(&mut predicate.builder_id);
    if let Some(job) = bridge.jobs().first() {
        predicate.invocation_id = job.unique_id();
        predicate.started_on = oci::timestamp::from_system(job.started_at());
    }
    match attr("mode").unwrap_or("max") {
        "min" => predicate.scrub(),
        "max" | "full" => {
            let config = BuildConfig::new(reference.definition())?;
            predicate.metadata.source = source_text(reference.definition(), &config)?;
            predicate.metadata.layers = layers(bridge, reference, &config).await?;
            predicate.config = Some(config);
        }
        mode => return Err(BuildError::user(format!("invalid mode {mode:?}"))),
    }
    predicate.finished_on = oci::timestamp::from_system(SystemTime::now());
    let (predicate_type, content) = match attr("version") {
        Some("v0.2") => (PREDICATE_V02, oci::json::to_vec_indent(&predicate.to_v02(), "  ")),
        _ => (PREDICATE_V1, oci::json::to_vec_indent(&predicate.to_v1(), "  ")),
    };
    let content = content.map_err(|error| BuildError::internal(format!("write provenance: {error}")))?;
    let inline_only = attr("inline-only").and_then(flag).unwrap_or(false);
    let metadata = [
        (REASON_KEY.to_owned(), Bytes::from_static(b"provenance")),
        (INLINE_ONLY_KEY.to_owned(), Bytes::from(inline_only.to_string())),
    ];
    Ok(Attestation {
        kind: AttestationKind::InToto,
        metadata: metadata.into(),
        reference: None,
        path: attr("filename").unwrap_or("provenance.json").to_owned(),
        content: Some(Bytes::from(content)),
        predicate_type: predicate_type.to_owned(),
        subjects: Vec::new(),
    })
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
        let Some(chain) = result.as_ref().and_then(|(result, _)| blob_chain(result)) else {
            continue;
        };
        layers
            .entry(format!("{step}:{}", entry.output))
            .or_default()
            .push(chain);
    }
    Ok(layers)
}

/// The blobs of a ref, if all of its layers have one.
fn blob_chain(result: &ResultRef) -> Option<Vec<Descriptor>> {
    let chain = result.get()?.layer_chain();
    let blobs = chain.iter().map(|layer| layer.blobs().into_iter().next());
    let blobs: Option<Vec<Descriptor>> = blobs.collect();
    blobs.filter(|blobs| !blobs.is_empty())
}

//! The definition behind a result as provenance writes it: numbered steps instead of digests.

use std::collections::BTreeMap;

use llb::pb;
use oci::Digest;
use prost::Message as _;
use serde::Serialize;

use super::capture::redact;
use crate::error::{BuildError, ErrorKind};

/// The steps of a definition.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct BuildConfig {
    #[serde(rename = "llbDefinition", skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<BuildStep>,
    #[serde(rename = "digestMapping", skip_serializing_if = "BTreeMap::is_empty")]
    pub digests: BTreeMap<Digest, String>,
}

/// One op.
#[derive(Clone, Debug, Serialize)]
pub(super) struct BuildStep {
    pub id: String,
    pub op: pb::Op,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<String>,
}

/// The frontend's text.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SourceText {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub locations: BTreeMap<String, pb::Locations>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub infos: Vec<SourceFile>,
}

/// One file of the frontend's text.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SourceFile {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub filename: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub language: String,
    #[serde(with = "llb::json::base64", skip_serializing_if = "bytes::Bytes::is_empty")]
    pub data: bytes::Bytes,
    #[serde(flatten)]
    pub config: BuildConfig,
}

impl BuildConfig {
    /// Numbers the ops of a definition, inputs first.
    ///
    /// # Errors
    /// For a definition that is none.
    pub(super) fn new(definition: &pb::Definition) -> Result<Self, BuildError> {
        let mut ops: BTreeMap<Digest, pb::Op> = BTreeMap::new();
        let mut last = None;
        for bytes in &definition.def {
            let op = pb::Op::decode(bytes.as_ref());
            let op = op.map_err(|error| {
                BuildError::from_source(ErrorKind::User, error).context("failed to parse llb proto op")
            })?;
            let digest = Digest::sha256(bytes);
            ops.insert(digest, op);
            last = Some(digest);
        }
        let Some(last) = last else {
            return Ok(Self::default());
        };
        let order = order(&ops, last)?;
        let digests: BTreeMap<Digest, String> = order
            .iter()
            .enumerate()
            .map(|(index, digest)| (*digest, format!("step{index}")))
            .collect();
        let steps = order.iter().map(|digest| {
            let mut op = ops[digest].clone();
            let inputs = op.inputs.iter().map(|input| {
                let step = input
                    .digest
                    .parse()
                    .ok()
                    .and_then(|digest: Digest| digests.get(&digest));
                format!("{}:{}", step.map_or("", String::as_str), input.index)
            });
            let inputs = inputs.collect();
            op.inputs.clear();
            if let Some(pb::op::Op::Source(source)) = &mut op.op {
                publish(source);
            }
            BuildStep {
                id: digests[digest].clone(),
                op,
                inputs,
            }
        });
        Ok(Self {
            steps: steps.collect(),
            digests,
        })
    }
}

/// Leaves out of a source what is only of the client, and masks credentials.
fn publish(source: &mut pb::SourceOp) {
    source
        .attrs
        .retain(|key, _| !matches!(key.as_str(), "local.session" | "local.unique"));
    source.identifier = redact(&source.identifier);
    if let Some(url) = source.attrs.get_mut(llb::attr::FULL_REMOTE_URL) {
        *url = redact(url);
    }
}

/// All ops that `last` needs, each after its inputs.
fn order(ops: &BTreeMap<Digest, pb::Op>, last: Digest) -> Result<Vec<Digest>, BuildError> {
    let mut order = Vec::with_capacity(ops.len());
    let mut visited = std::collections::BTreeSet::new();
    let mut open = vec![(last, false)];
    while let Some((digest, inputs_done)) = open.pop() {
        if inputs_done {
            order.push(digest);
            continue;
        }
        if !visited.insert(digest) {
            continue;
        }
        let op = ops
            .get(&digest)
            .ok_or_else(|| BuildError::user(format!("failed to find input {digest}")))?;
        open.push((digest, true));
        for input in op.inputs.iter().rev() {
            let missing = || BuildError::user(format!("failed to find input {}", input.digest));
            open.push((input.digest.parse().map_err(|_| missing())?, false));
        }
    }
    Ok(order)
}

/// The frontend's text behind a definition, by steps.
///
/// # Errors
/// For definitions in it that are none.
pub(super) fn source_text(
    definition: &pb::Definition,
    config: &BuildConfig,
) -> Result<Option<SourceText>, BuildError> {
    let Some(source) = definition
        .source
        .as_ref()
        .filter(|source| !source.infos.is_empty())
    else {
        return Ok(None);
    };
    let mut infos = Vec::with_capacity(source.infos.len());
    for info in &source.infos {
        let config = info
            .definition
            .as_ref()
            .map(BuildConfig::new)
            .transpose()?
            .unwrap_or_default();
        let (filename, language, data) = (info.filename.clone(), info.language.clone(), info.data.clone());
        infos.push(SourceFile {
            filename,
            language,
            data,
            config,
        });
    }
    let locations = source.locations.iter().filter_map(|(digest, locations)| {
        let step = config.digests.get(&digest.parse::<Digest>().ok()?)?;
        Some((step.clone(), locations.clone()))
    });
    Ok(Some(SourceText {
        locations: locations.collect(),
        infos,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_without_credentials() {
        let mut source = pb::SourceOp {
            identifier: "https://me:secret@host/file".to_owned(),
            attrs: std::collections::BTreeMap::from([
                (
                    llb::attr::FULL_REMOTE_URL.to_owned(),
                    "https://token@host/a.git".to_owned(),
                ),
                ("local.session".to_owned(), "s".to_owned()),
            ]),
        };
        publish(&mut source);
        assert_eq!(source.identifier, "https://xxxxx:xxxxx@host/file");
        assert_eq!(
            source.attrs[llb::attr::FULL_REMOTE_URL],
            "https://xxxxx@host/a.git"
        );
        assert_eq!(source.attrs.len(), 1);
    }

    #[test]
    fn steps_are_numbered_from_their_inputs() {
        let base = llb::State::image("alpine", llb::ImageOptions::default());
        let state = base.run(["true"]).done().root();
        let definition = state.marshal(&llb::MarshalOptions::default()).unwrap();
        let config = BuildConfig::new(&definition).unwrap();
        let inputs: Vec<_> = config.steps.iter().map(|step| step.inputs.clone()).collect();
        assert_eq!(
            inputs,
            [vec![], vec!["step0:0".to_owned()], vec!["step1:0".to_owned()]]
        );
        assert_eq!(config.digests.len(), 3);
        assert!(config.steps.iter().all(|step| step.op.inputs.is_empty()));
        assert!(
            BuildConfig::new(&pb::Definition::default())
                .unwrap()
                .steps
                .is_empty()
        );
    }
}

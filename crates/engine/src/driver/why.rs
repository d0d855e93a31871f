//! Why a step is executed: what identified it when it ran before, and what of that differs now.
//!
//! Every executed step leaves a description beside its record: the op's digest, a short hash of each of its fields, and
//! the records by which its inputs were found. Values are not kept, so that none can leak; it is enough to say which
//! field changed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use cache::RecordDescription;
use oci::Digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use solver::NewRecord;

use crate::op::VertexSpec;

/// Fields of an op that are described; the rest counts through the op's digest alone.
const MAX_FIELDS: usize = 1_000;
/// Earlier runs that are compared.
const COMPARED: usize = 8;
/// Differences that are told.
const TOLD: usize = 4;

/// What identified a step when it ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Described {
    op: String,
    fields: BTreeMap<String, String>,
    inputs: Vec<DescribedInput>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DescribedInput {
    name: String,
    records: BTreeSet<String>,
}

/// Hashes the leaves of a JSON document, by path.
fn leaves(path: &str, value: &Value, fields: &mut BTreeMap<String, String>) {
    if fields.len() >= MAX_FIELDS {
        return;
    }
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}.{name}")
                };
                leaves(&path, member, fields);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                leaves(&format!("{path}[{index}]"), item, fields);
            }
        }
        leaf => {
            let hash: String = Digest::sha256(leaf.to_string()).hex().chars().take(16).collect();
            fields.insert(path.to_owned(), hash);
        }
    }
}

fn described(spec: &VertexSpec, record: &NewRecord) -> Described {
    let mut fields = BTreeMap::new();
    let mut op = spec.op.as_ref().clone();
    op.inputs.clear();
    leaves("", &serde_json::to_value(&op).unwrap_or_default(), &mut fields);
    let names = spec.input_names.iter();
    let inputs = names.enumerate().map(|(number, name)| DescribedInput {
        name: name.clone(),
        records: record
            .links
            .iter()
            .filter(|link| link.input == number)
            .map(|link| format!("{} {:?}", link.parent, link.selector))
            .collect(),
    });
    let op = record.links.first().map_or(record.record.0, |link| link.op);
    Described {
        op: op.to_string(),
        fields,
        inputs: inputs.collect(),
    }
}

/// What runs of the same step have in common although something differs: the place in the Dockerfile if the name tells
/// one (`[stage 2/4] RUN …`), else the name.
fn group(spec: &VertexSpec) -> String {
    let place = spec.name.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let place = place.map_or(spec.name.as_str(), |(place, _)| place);
    let platform = spec
        .op
        .platform
        .as_ref()
        .map(|platform| (&platform.os, &platform.architecture));
    Digest::sha256(format!("{place} {platform:?}")).hex()
}

/// Describes an executed step for later runs.
pub(super) fn describe(
    spec: &VertexSpec,
    record: &NewRecord,
    created_at: SystemTime,
) -> Option<RecordDescription> {
    let json = serde_json::to_vec(&described(spec, record)).ok()?;
    Some(RecordDescription {
        group: group(spec),
        json,
        created_at,
    })
}

/// What differs between two runs, as texts.
fn differences(now: &Described, before: &Described) -> Vec<String> {
    let mut told = Vec::new();
    for (number, input) in now.inputs.iter().enumerate() {
        let known = before.inputs.get(number);
        if known.is_none_or(|known| known.records.is_disjoint(&input.records)) {
            told.push(format!("what it takes from \"{}\" changed", input.name));
        }
    }
    if now.op != before.op {
        let names = now
            .fields
            .keys()
            .chain(before.fields.keys())
            .collect::<BTreeSet<_>>();
        let changed: Vec<&str> = names
            .into_iter()
            .filter(|name| now.fields.get(*name) != before.fields.get(*name))
            .map(String::as_str)
            .collect();
        match changed.as_slice() {
            [] => told.push("what it resolves to changed".to_owned()),
            changed => told.push(format!(
                "its definition changed: {}",
                changed[..changed.len().min(TOLD)].join(", ")
            )),
        }
    }
    told
}

/// Says in one sentence why a step is executed although earlier runs may be remembered.
pub(super) fn explain(records: &cache::Records, spec: &VertexSpec, record: Option<&NewRecord>) -> String {
    if spec.metadata.ignore_cache {
        return "the build ignores the cache for it".to_owned();
    }
    let Some(record) = record else {
        return "an input has no lasting identity, such as a directory that is used as a whole".to_owned();
    };
    let now = described(spec, record);
    let before = records.described(&group(spec), COMPARED).unwrap_or_default();
    let before = before.iter().filter_map(|(id, description)| {
        let described: Described = serde_json::from_slice(&description.json).ok()?;
        Some((id, differences(&now, &described)))
    });
    match before.min_by_key(|(_, differences)| differences.len()) {
        None => "no earlier run is remembered".to_owned(),
        Some((id, differences)) if differences.is_empty() => {
            let has_result = records.results(id).is_ok_and(|results| !results.is_empty());
            let why = if has_result {
                "could not be loaded"
            } else {
                "was removed from the cache"
            };
            format!("it ran before with the same inputs, but the result {why}")
        }
        Some((_, differences)) => differences[..differences.len().min(TOLD)].join("; "),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use llb::pb;
    use solver::{Link, RecordId};

    use super::*;

    fn spec(arg: &str) -> VertexSpec {
        let meta = pb::Meta {
            args: vec!["sh".to_owned(), arg.to_owned()],
            ..pb::Meta::default()
        };
        let exec = pb::ExecOp {
            meta: Some(meta),
            ..pb::ExecOp::default()
        };
        VertexSpec {
            op: Arc::new(pb::Op {
                op: Some(pb::op::Op::Exec(exec)),
                ..pb::Op::default()
            }),
            name: format!("[build 2/3] RUN {arg}"),
            input_names: vec!["[build 1/3] FROM alpine".to_owned()],
            ..VertexSpec::default()
        }
    }

    fn record(op: &str, parent: &str) -> NewRecord {
        let parent = RecordId(Digest::sha256(parent));
        let link = Link {
            parent,
            input: 0,
            op: Digest::sha256(op),
            output: 0,
            selector: None,
        };
        NewRecord {
            record: RecordId(Digest::sha256("child")),
            links: vec![link],
            result: None,
        }
    }

    #[test]
    fn the_changed_field_is_named_without_its_value() {
        let (before, now) = (
            described(&spec("old"), &record("a", "p")),
            described(&spec("secret"), &record("b", "p")),
        );
        let told = differences(&now, &before);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains("meta.args[1]"), "{told:?}");
        let json = serde_json::to_string(&now).unwrap();
        assert!(!json.contains("secret"), "{json}");
        assert_eq!(group(&spec("old")), group(&spec("secret")));
    }

    #[test]
    fn the_changed_input_is_named() {
        let (before, now) = (
            described(&spec("x"), &record("a", "p")),
            described(&spec("x"), &record("a", "q")),
        );
        assert_eq!(
            differences(&now, &before),
            ["what it takes from \"[build 1/3] FROM alpine\" changed"]
        );
        assert!(differences(&now, &now).is_empty());
    }
}

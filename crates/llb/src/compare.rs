//! What differs between two definitions: which steps are the same, and which fields of the others changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use oci::Digest;
use serde_json::Value;

use crate::{Graph, Vertex};

/// The difference between two definitions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Difference {
    /// How many vertices are the same.
    pub same: usize,
    /// Vertices that have a counterpart with other fields; those that differ only through their inputs are left out.
    pub changed: Vec<Change>,
    /// Vertices only the first definition has, by name.
    pub removed: Vec<(Digest, String)>,
    /// Vertices only the second definition has, by name.
    pub added: Vec<(Digest, String)>,
}

/// A vertex that changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Its name in the second definition.
    pub name: String,
    /// Its digest in the first definition.
    pub before: Digest,
    /// Its digest in the second definition.
    pub after: Digest,
    /// The fields that differ, by their JSON path, with both values; `null` where there is none.
    pub fields: Vec<(String, Value, Value)>,
}

/// Compares two graphs from their results upwards: vertices reached by the same inputs are counterparts.
pub fn compare(before: &Graph, after: &Graph) -> Difference {
    let digests = |graph: &Graph| {
        graph
            .vertices()
            .iter()
            .map(|vertex| vertex.digest)
            .collect::<BTreeSet<_>>()
    };
    let (old, new) = (digests(before), digests(after));
    let mut out = Difference {
        same: old.intersection(&new).count(),
        ..Difference::default()
    };
    let pairs = pair(before, after);
    let (mut paired_old, mut paired_new) = (BTreeSet::new(), BTreeSet::new());
    for (one, two) in pairs {
        let (one, two) = (&before.vertices()[one], &after.vertices()[two]);
        paired_old.insert(one.digest);
        paired_new.insert(two.digest);
        let fields = fields(one, two);
        if !fields.is_empty() {
            out.changed.push(Change {
                name: two.name.clone(),
                before: one.digest,
                after: two.digest,
                fields,
            });
        }
    }
    let alone = |graph: &Graph, other: &BTreeSet<Digest>, paired: &BTreeSet<Digest>| {
        let alone = graph
            .vertices()
            .iter()
            .filter(|v| !other.contains(&v.digest) && !paired.contains(&v.digest));
        alone.map(|vertex| (vertex.digest, vertex.name.clone())).collect()
    };
    out.removed = alone(before, &new, &paired_old);
    out.added = alone(after, &old, &paired_new);
    out
}

/// Walks both graphs from their results; returns counterparts of the same kind, in topological order of the second.
fn pair(before: &Graph, after: &Graph) -> Vec<(usize, usize)> {
    let kind = |vertex: &Vertex| vertex.op.op.as_ref().map(std::mem::discriminant);
    let mut pairs = BTreeMap::new();
    let mut used = BTreeSet::new();
    let mut pending = vec![(before.root().vertex, after.root().vertex)];
    while let Some((one, two)) = pending.pop() {
        let (a, b) = (&before.vertices()[one], &after.vertices()[two]);
        if a.digest == b.digest || kind(a) != kind(b) || pairs.contains_key(&two) || !used.insert(one) {
            continue;
        }
        pairs.insert(two, one);
        pending.extend(
            a.inputs
                .iter()
                .zip(&b.inputs)
                .map(|(one, two)| (one.vertex, two.vertex)),
        );
    }
    pairs.into_iter().map(|(two, one)| (one, two)).collect()
}

fn fields(one: &Vertex, two: &Vertex) -> Vec<(String, Value, Value)> {
    let value = |vertex: &Vertex| {
        let mut op = vertex.op.clone();
        for input in &mut op.inputs {
            input.digest.clear();
        }
        serde_json::to_value(&op).unwrap_or_default()
    };
    let mut out = Vec::new();
    diff_values("", value(one), value(two), &mut out);
    out
}

fn diff_values(path: &str, one: Value, two: Value, out: &mut Vec<(String, Value, Value)>) {
    let join = |key: &str| {
        if path.is_empty() {
            key.to_owned()
        } else {
            format!("{path}.{key}")
        }
    };
    match (one, two) {
        (one, two) if one == two => {}
        (Value::Object(mut one), Value::Object(mut two)) => {
            let keys: BTreeSet<String> = one.keys().chain(two.keys()).cloned().collect();
            for key in keys {
                let (one, two) = (
                    one.remove(&key).unwrap_or_default(),
                    two.remove(&key).unwrap_or_default(),
                );
                diff_values(&join(&key), one, two, out);
            }
        }
        (Value::Array(one), Value::Array(two)) if one.len() == two.len() => {
            for (at, (one, two)) in one.into_iter().zip(two).enumerate() {
                diff_values(&join(&at.to_string()), one, two, out);
            }
        }
        (one, two) => out.push((path.to_owned(), one, two)),
    }
}

/// Renders a difference: `~` for what changed, `-` for what is gone, `+` for what is new.
pub fn to_text(difference: &Difference) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{} same", difference.same);
    for change in &difference.changed {
        let _ = writeln!(
            out,
            "~ {}\n    {} -> {}",
            change.name, change.before, change.after
        );
        for (path, before, after) in &change.fields {
            let _ = writeln!(out, "    {path}: {before} -> {after}");
        }
    }
    for (sign, vertices) in [('-', &difference.removed), ('+', &difference.added)] {
        for (digest, name) in vertices {
            let _ = writeln!(out, "{sign} {name}\n    {digest}");
        }
    }
    out
}

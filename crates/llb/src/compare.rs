//! What differs between two definitions: which steps are the same, and which fields of the others changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use oci::Digest;
use serde_json::Value;

use crate::pb::Op;
use crate::{Edge, Graph, Vertex, encode_op};

/// The difference between two definitions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Difference {
    /// How many vertices are the same.
    pub same: usize,
    /// Vertices that have a counterpart with other fields, in topological order; those that differ only through what
    /// their inputs are made of are left out.
    pub changed: Vec<Change>,
    /// Vertices only the first definition has, by name, in topological order.
    pub removed: Vec<(Digest, String)>,
    /// Vertices only the second definition has, by name, in topological order.
    pub added: Vec<(Digest, String)>,
}

impl Difference {
    /// Tells whether both definitions describe the same graph.
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.removed.is_empty() && self.added.is_empty()
    }
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
    /// The fields that differ, by their JSON path, with both values; `null` where there is none. `inputs.N` is an input
    /// that comes from another vertex, by name.
    pub fields: Vec<(String, Value, Value)>,
}

/// Compares two graphs.
///
/// Counterparts are, in this order: vertices of the same digest; those that differ in their inputs only; those of the
/// same kind that are reached by the same inputs of counterparts, or that are both the result.
pub fn compare(before: &Graph, after: &Graph) -> Difference {
    let pairs = Pairs::new(before, after);
    let mut out = Difference::default();
    for (at, vertex) in after.vertices().iter().enumerate() {
        let name = || name_of(vertex);
        match pairs.old.get(&at) {
            None => out.added.push((vertex.digest, name())),
            Some(old) => {
                let one = &before.vertices()[*old];
                let mut fields = Vec::new();
                if one.digest != vertex.digest {
                    diff_values("", value_of(one), value_of(vertex), &mut fields);
                    fields.extend(pairs.moved_inputs(*old, at));
                }
                let ignored = (one.metadata.ignore_cache, vertex.metadata.ignore_cache);
                if ignored.0 != ignored.1 {
                    fields.push(("ignore_cache".to_owned(), ignored.0.into(), ignored.1.into()));
                }
                if one.digest == vertex.digest && fields.is_empty() {
                    out.same += 1;
                } else if !fields.is_empty() {
                    out.changed.push(Change {
                        name: name(),
                        before: one.digest,
                        after: vertex.digest,
                        fields,
                    });
                }
            }
        }
    }
    let paired: BTreeSet<usize> = pairs.old.values().copied().collect();
    let alone = before.vertices().iter().enumerate();
    out.removed = alone
        .filter(|(at, _)| !paired.contains(at))
        .map(|(_, vertex)| (vertex.digest, name_of(vertex)))
        .collect();
    out
}

/// What a vertex is called: as its client says, or by what it does.
fn name_of(vertex: &Vertex) -> String {
    match vertex.metadata.description.get("llb.customname") {
        Some(name) if !name.is_empty() => name.clone(),
        _ => vertex.name.clone(),
    }
}

/// Which vertices of two graphs are counterparts.
struct Pairs<'a> {
    before: &'a Graph,
    after: &'a Graph,
    /// The first graph's vertex for one of the second.
    old: BTreeMap<usize, usize>,
    /// The second graph's vertex for one of the first.
    new: BTreeMap<usize, usize>,
}

impl<'a> Pairs<'a> {
    fn new(before: &'a Graph, after: &'a Graph) -> Self {
        let mut pairs = Self {
            before,
            after,
            old: BTreeMap::new(),
            new: BTreeMap::new(),
        };
        pairs.by_key(|vertex| vertex.digest);
        pairs.by_key(|vertex| {
            let mut op = vertex.op.clone();
            op.inputs.iter_mut().for_each(|input| input.digest.clear());
            Digest::sha256(encode_op(&op))
        });
        pairs.by_place();
        pairs
    }

    fn add(&mut self, old: usize, new: usize) {
        self.old.insert(new, old);
        self.new.insert(old, new);
    }

    /// Pairs what has the same key, in topological order.
    fn by_key(&mut self, key: impl Fn(&Vertex) -> Digest) {
        let mut unpaired: BTreeMap<Digest, Vec<usize>> = BTreeMap::new();
        for (at, vertex) in self.before.vertices().iter().enumerate().rev() {
            if !self.new.contains_key(&at) {
                unpaired.entry(key(vertex)).or_default().push(at);
            }
        }
        for (at, vertex) in self.after.vertices().iter().enumerate() {
            if !self.old.contains_key(&at)
                && let Some(old) = unpaired.get_mut(&key(vertex)).and_then(Vec::pop)
            {
                self.add(old, at);
            }
        }
    }

    /// Pairs what stands at the same place below a pair, from the results upwards.
    fn by_place(&mut self) {
        let (before, after) = (self.before, self.after);
        let kind = |vertex: &Vertex| vertex.op.op.as_ref().map(std::mem::discriminant);
        self.pair_if_free(before.root().vertex, after.root().vertex, kind);
        for new in (0..after.vertices().len()).rev() {
            let Some(old) = self.old.get(&new).copied() else {
                continue;
            };
            let inputs = before.vertices()[old].inputs.iter();
            for (one, two) in inputs.zip(&after.vertices()[new].inputs) {
                self.pair_if_free(one.vertex, two.vertex, kind);
            }
        }
    }

    fn pair_if_free<K: PartialEq>(&mut self, old: usize, new: usize, kind: impl Fn(&Vertex) -> K) {
        let alike = kind(&self.before.vertices()[old]) == kind(&self.after.vertices()[new]);
        if alike && !self.new.contains_key(&old) && !self.old.contains_key(&new) {
            self.add(old, new);
        }
    }

    /// Returns the inputs of a pair that come from vertices which are no counterparts.
    fn moved_inputs(&self, old: usize, new: usize) -> Vec<(String, Value, Value)> {
        let (one, two) = (
            &self.before.vertices()[old].inputs,
            &self.after.vertices()[new].inputs,
        );
        let mut out = Vec::new();
        for at in 0..one.len().max(two.len()) {
            let (one, two) = (one.get(at), two.get(at));
            let counterpart = two.and_then(|edge| Some((*self.old.get(&edge.vertex)?, edge.output)));
            if one.map(|edge| (edge.vertex, edge.output)) == counterpart {
                continue;
            }
            let name = |graph: &Graph, edge: &Edge| match edge.output {
                0 => name_of(graph.vertex(*edge)),
                output => format!("{}, output {output}", name_of(graph.vertex(*edge))),
            };
            out.push((
                format!("inputs.{at}"),
                one.map(|edge| name(self.before, edge)).into(),
                two.map(|edge| name(self.after, edge)).into(),
            ));
        }
        out
    }
}

/// Returns the operation without its inputs.
fn value_of(vertex: &Vertex) -> Value {
    let op = Op {
        inputs: Vec::new(),
        ..vertex.op.clone()
    };
    serde_json::to_value(op).unwrap_or_default()
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
        (Value::Array(one), Value::Array(two)) => diff_lists(&join, one, two, out),
        (one, two) => out.push((path.to_owned(), one, two)),
    }
}

/// Compares lists: what both begin and end with is left out, the rest is compared one by one.
fn diff_lists(
    join: &dyn Fn(&str) -> String,
    mut one: Vec<Value>,
    mut two: Vec<Value>,
    out: &mut Vec<(String, Value, Value)>,
) {
    let mut at = 0;
    if one.len() != two.len() {
        let same = |(a, b): &(&Value, &Value)| a == b;
        at = one.iter().zip(&two).take_while(same).count();
        one.drain(..at);
        two.drain(..at);
        let behind = one.iter().rev().zip(two.iter().rev()).take_while(same).count();
        one.truncate(one.len() - behind);
        two.truncate(two.len() - behind);
    }
    let count = one.len().max(two.len());
    one.resize(count, Value::Null);
    two.resize(count, Value::Null);
    for (offset, (one, two)) in one.into_iter().zip(two).enumerate() {
        diff_values(&join(&(at + offset).to_string()), one, two, out);
    }
}

/// Renders a difference: `~` for what changed, `-` for what is gone, `+` for what is new.
pub fn to_text(difference: &Difference) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{} same, {} changed, {} removed, {} added",
        difference.same,
        difference.changed.len(),
        difference.removed.len(),
        difference.added.len()
    );
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

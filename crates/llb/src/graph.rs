//! Reading a definition: from a client's bytes to vertices whose parts and indices can be relied on.

use std::collections::BTreeMap;

use bytes::Bytes;
use oci::Digest;
use prost::Message as _;

use crate::pb::{Definition, Location, Op, OpMetadata, Source, SourceInfo};
use crate::{OpError, encode_op, op_name, validate};

/// Most operations a definition may have.
pub const MAX_OPS: usize = 100_000;
/// Most bytes one operation may have.
pub const MAX_OP_BYTES: usize = 16 << 20;
/// Most bytes all operations of a definition may have.
pub const MAX_TOTAL_BYTES: usize = 256 << 20;
/// Most inputs one operation may have.
pub const MAX_INPUTS: usize = 10_000;

/// Why a definition is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GraphError {
    /// There is nothing in it.
    #[error("invalid empty definition")]
    Empty,
    /// There are too few operations to have both a result and a pointer to it.
    #[error("invalid LLB with {0} vertexes")]
    TooSmall(usize),
    /// A bound is passed.
    #[error("invalid LLB: {what} exceed {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// Bytes that are no operation.
    #[error("failed to parse llb proto op")]
    Decode(#[source] prost::DecodeError),
    /// The last operation does not point to the result.
    #[error("invalid LLB with no inputs on last vertex")]
    NoRoot,
    /// An input is not in the definition, or is not the digest of anything.
    #[error("invalid missing input digest {0}")]
    MissingInput(String),
    /// An operation is reached from itself.
    #[error("invalid LLB with a cycle through {0}")]
    Cycle(Digest),
    /// An input asks for an output that its operation does not have.
    #[error("invalid input {input} output index {index}")]
    Output {
        /// Position among the inputs.
        input: usize,
        /// The output asked for.
        index: i64,
    },
    /// An operation is bad by itself.
    #[error(transparent)]
    Op(#[from] OpError),
}

/// One output of a vertex.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Edge {
    /// Position of the vertex in [`Graph::vertices`].
    pub vertex: usize,
    /// Which of its outputs.
    pub output: usize,
}

/// A checked operation.
#[derive(Clone, Debug)]
pub struct Vertex {
    /// Digest of `raw`: the identity of the vertex.
    pub digest: Digest,
    /// The operation as the client encoded it.
    pub raw: Bytes,
    /// The operation.
    pub op: Op,
    /// Inputs in the order of `op.inputs`; each precedes this vertex.
    pub inputs: Vec<Edge>,
    /// How many outputs the operation has.
    pub outputs: usize,
    /// What is said about the vertex without being part of its identity.
    pub metadata: OpMetadata,
    /// What the vertex is called where its metadata gives no name.
    pub name: String,
}

impl Vertex {
    /// Returns the platform the operation asks for, as written.
    pub fn platform(&self) -> Option<oci::Platform> {
        self.op.platform.as_ref().map(oci::Platform::from)
    }
}

/// A checked definition. Vertices are in topological order, and each is needed for the result.
#[derive(Clone, Debug)]
pub struct Graph {
    vertices: Vec<Vertex>,
    root: Edge,
    source: Source,
}

impl Graph {
    /// Checks a definition. Operations that the result does not need are dropped.
    pub fn load(definition: &Definition) -> Result<Self, GraphError> {
        let ops = decode(definition)?;
        let last = definition.def.last().ok_or(GraphError::Empty)?;
        let last = &ops[&Digest::sha256(last)].0;
        let target = last.inputs.first().ok_or(GraphError::NoRoot)?;
        let start = lookup(&ops, &target.digest)?;
        let order = sort(&ops, start)?;
        let mut positions = BTreeMap::new();
        let mut vertices: Vec<Vertex> = Vec::with_capacity(order.len());
        for digest in order {
            let (op, raw) = &ops[&digest];
            let outputs = validate::validate(op)?;
            let mut inputs = Vec::with_capacity(op.inputs.len());
            for (at, input) in op.inputs.iter().enumerate() {
                let from: usize = positions[&lookup(&ops, &input.digest)?];
                inputs.push(edge(&vertices, from, at, input.index)?);
            }
            let metadata = definition
                .metadata
                .get(&digest.to_string())
                .cloned()
                .unwrap_or_default();
            let name = op_name(op, |input| {
                inputs
                    .get(input)
                    .map(|edge: &Edge| vertices[edge.vertex].name.as_str())
            });
            positions.insert(digest, vertices.len());
            vertices.push(Vertex {
                digest,
                raw: raw.clone(),
                op: op.clone(),
                inputs,
                outputs,
                metadata,
                name,
            });
        }
        let root = edge(&vertices, positions[&start], 0, target.index)?;
        Ok(Self {
            vertices,
            root,
            source: definition.source.clone().unwrap_or_default(),
        })
    }

    /// Returns the vertices; inputs precede what they are inputs of.
    pub fn vertices(&self) -> &[Vertex] {
        &self.vertices
    }

    /// Returns the vertex behind an edge of this graph.
    pub fn vertex(&self, edge: Edge) -> &Vertex {
        &self.vertices[edge.vertex]
    }

    /// Returns the result.
    pub const fn root(&self) -> Edge {
        self.root
    }

    /// Finds a vertex by its digest.
    pub fn find(&self, digest: &Digest) -> Option<usize> {
        self.vertices.iter().position(|vertex| vertex.digest == *digest)
    }

    /// Returns where in which source file a vertex comes from. Bad file indices are skipped.
    pub fn locations(&self, digest: &Digest) -> Vec<(&SourceInfo, &Location)> {
        let Some(locations) = self.source.locations.get(&digest.to_string()) else {
            return Vec::new();
        };
        let file = |location: &Location| {
            self.source
                .infos
                .get(usize::try_from(location.source_index).ok()?)
        };
        locations
            .locations
            .iter()
            .filter_map(|location| Some((file(location)?, location)))
            .collect()
    }

    /// Gives some vertices another identity than that of their operation, and renews the digests of all that depends on
    /// them: the digest of a marked vertex is that of its operation followed by `mark`. The operations stay. To be called
    /// after [`Graph::rewrite`], which does not know of marks.
    pub fn mark(&mut self, mark: &[u8], mut is_marked: impl FnMut(&Vertex) -> bool) {
        for at in 0..self.vertices.len() {
            let vertex = &self.vertices[at];
            let inputs: Vec<String> = vertex
                .inputs
                .iter()
                .map(|edge| self.vertices[edge.vertex].digest.to_string())
                .collect();
            let is_moved = vertex
                .op
                .inputs
                .iter()
                .zip(&inputs)
                .any(|(input, digest)| input.digest != *digest);
            let is_marked = is_marked(vertex);
            if !is_marked && !is_moved {
                continue;
            }
            let vertex = &mut self.vertices[at];
            for (input, digest) in vertex.op.inputs.iter_mut().zip(inputs) {
                input.digest = digest;
            }
            if is_moved {
                vertex.raw = encode_op(&vertex.op);
            }
            let mut identity = vertex.raw.to_vec();
            if is_marked {
                identity.extend_from_slice(mark);
            }
            let digest = Digest::sha256(&identity);
            let old = std::mem::replace(&mut vertex.digest, digest).to_string();
            if let Some(locations) = self.source.locations.remove(&old) {
                self.source.locations.insert(digest.to_string(), locations);
            }
        }
    }

    /// Replaces operations, as policies do, and renews the digests of what was replaced and of all that depends on it.
    ///
    /// `replace` is asked once for every vertex; `None` keeps the operation. The inputs of a replacement are ignored:
    /// the graph keeps its shape. Source locations follow their vertices.
    pub fn rewrite<E: From<OpError>>(
        &mut self,
        mut replace: impl FnMut(&Vertex) -> Result<Option<Op>, E>,
    ) -> Result<(), E> {
        for at in 0..self.vertices.len() {
            let replacement = replace(&self.vertices[at])?;
            let moved = self.vertices[at].inputs.iter().zip(&self.vertices[at].op.inputs);
            let moved =
                moved.map(|(edge, input)| self.vertices[edge.vertex].digest.to_string() != input.digest);
            if replacement.is_none() && !moved.into_iter().any(|moved| moved) {
                continue;
            }
            let mut op = replacement.unwrap_or_else(|| self.vertices[at].op.clone());
            op.inputs = self.vertices[at].op.inputs.clone();
            for (input, edge) in op.inputs.iter_mut().zip(&self.vertices[at].inputs) {
                input.digest = self.vertices[edge.vertex].digest.to_string();
            }
            let outputs = validate::validate(&op)?;
            let raw = encode_op(&op);
            let digest = Digest::sha256(&raw);
            let inputs = &self.vertices[at].inputs;
            let name = op_name(&op, |input| {
                inputs
                    .get(input)
                    .map(|edge| self.vertices[edge.vertex].name.as_str())
            });
            if let Some(locations) = self
                .source
                .locations
                .remove(&self.vertices[at].digest.to_string())
            {
                self.source.locations.insert(digest.to_string(), locations);
            }
            let vertex = &mut self.vertices[at];
            (vertex.op, vertex.raw, vertex.digest, vertex.name) = (op, raw, digest, name);
            vertex.outputs = vertex.outputs.max(outputs);
        }
        Ok(())
    }
}

type Ops = BTreeMap<Digest, (Op, Bytes)>;

fn decode(definition: &Definition) -> Result<Ops, GraphError> {
    if definition.def.is_empty() {
        return Err(GraphError::Empty);
    }
    let too_large = |what, limit| Err(GraphError::TooLarge { what, limit });
    if definition.def.len() > MAX_OPS {
        return too_large("operations", MAX_OPS);
    }
    if definition.def.iter().map(Bytes::len).sum::<usize>() > MAX_TOTAL_BYTES {
        return too_large("bytes of all operations", MAX_TOTAL_BYTES);
    }
    let mut ops = Ops::new();
    for raw in &definition.def {
        if raw.len() > MAX_OP_BYTES {
            return too_large("bytes of an operation", MAX_OP_BYTES);
        }
        let op = Op::decode(raw.clone()).map_err(GraphError::Decode)?;
        if op.inputs.len() > MAX_INPUTS {
            return too_large("inputs of an operation", MAX_INPUTS);
        }
        ops.insert(Digest::sha256(raw), (op, raw.clone()));
    }
    if ops.len() < 2 {
        return Err(GraphError::TooSmall(ops.len()));
    }
    Ok(ops)
}

fn lookup(ops: &Ops, text: &str) -> Result<Digest, GraphError> {
    let missing = || GraphError::MissingInput(text.to_owned());
    let digest: Digest = text.parse().map_err(|_| missing())?;
    if ops.contains_key(&digest) {
        Ok(digest)
    } else {
        Err(missing())
    }
}

/// Returns what `start` needs, inputs first, without recursion: chains are as long as a client likes.
fn sort(ops: &Ops, start: Digest) -> Result<Vec<Digest>, GraphError> {
    let mut order = Vec::new();
    // Present: seen. True: all inputs are in `order`, and so is the operation itself.
    let mut done = BTreeMap::from([(start, false)]);
    let mut path = vec![(start, 0)];
    while let Some((digest, next)) = path.last_mut() {
        let digest = *digest;
        let Some(input) = ops[&digest].0.inputs.get(*next) else {
            order.push(digest);
            done.insert(digest, true);
            path.pop();
            continue;
        };
        *next += 1;
        let input = lookup(ops, &input.digest)?;
        match done.get(&input) {
            Some(true) => {}
            Some(false) => return Err(GraphError::Cycle(input)),
            None => {
                done.insert(input, false);
                path.push((input, 0));
            }
        }
    }
    Ok(order)
}

fn edge(vertices: &[Vertex], vertex: usize, input: usize, index: i64) -> Result<Edge, GraphError> {
    match usize::try_from(index) {
        Ok(output) if output < vertices[vertex].outputs => Ok(Edge { vertex, output }),
        _ => Err(GraphError::Output { input, index }),
    }
}

//! From states to a definition: every vertex is encoded once, inputs first.

mod ops;
mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use oci::{Digest, Platform, ReferenceError};
use prost::Message as _;

use super::constraints::merge_metadata;
use super::vertex::{Kind, Output, Vertex};
use super::{Constraints, SourceLocation, State};
use crate::caps;
use crate::pb::{Definition, Input, Op, OpMetadata, WorkerConstraints};

use sources::Sources;

/// Why a state cannot be marshaled. The texts are the Go client's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MarshalError {
    /// An image reference is bad.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A blob is named by a tag.
    #[error("tagged image reference not allowed for blob reference")]
    TaggedBlob,
    /// A blob is named without a digest.
    #[error("checksum required in blob reference")]
    BlobWithoutDigest,
    /// A source has no name.
    #[error("source identifier can't be empty")]
    NoIdentifier,
    /// A command has no words.
    #[error("arguments are required")]
    NoArgs,
    /// A command has no working directory.
    #[error("working directory is required")]
    NoDir,
    /// A filesystem in memory has a source.
    #[error("tmpfs mounts must use scratch")]
    TmpfsSource,
    /// A file operation does nothing.
    #[error("action is required")]
    NoAction,
    /// A passthrough does not pass the state itself on.
    #[error("passthrough must have at least one output")]
    NoOutput,
    /// A passthrough has no name.
    #[error("passthrough requires an id")]
    NoId,
}

/// What holds for a whole definition.
#[derive(Clone, Debug)]
pub struct MarshalOptions {
    /// Platform of operations that name none.
    pub platform: Platform,
    /// Filters that a worker must match.
    pub worker_constraints: Vec<String>,
    /// Metadata of every vertex.
    pub metadata: OpMetadata,
    /// Identity of local files that name no session; unique to one build.
    pub local_unique_id: String,
    /// Capabilities of the daemon; unset when unknown.
    pub caps: Option<BTreeSet<String>>,
}

impl Default for MarshalOptions {
    /// The host's platform, and nothing else.
    fn default() -> Self {
        Self {
            platform: Platform::host(),
            worker_constraints: Vec::new(),
            metadata: OpMetadata::default(),
            local_unique_id: String::new(),
            caps: None,
        }
    }
}

impl State {
    /// Encodes the state and all it needs. The empty filesystem marshals to an empty definition.
    pub fn marshal(&self, options: &MarshalOptions) -> Result<Definition, MarshalError> {
        let Some(output) = self.output.as_ref().and_then(Output::resolved) else {
            return Ok(Definition::default());
        };
        let mut marshaler = Marshaler::new(options);
        marshaler.add(&output)?;
        marshaler.finish(&output)
    }

    /// Returns the digest of the vertex behind the state, once marshaled with `options`; `None` for the empty filesystem.
    pub fn digest(&self, options: &MarshalOptions) -> Result<Option<Digest>, MarshalError> {
        let Some(output) = self.output.as_ref().and_then(Output::resolved) else {
            return Ok(None);
        };
        let mut marshaler = Marshaler::new(options);
        marshaler.add(&output)?;
        Ok(marshaler
            .done
            .get(&Key::of(&output.vertex))
            .map(|(digest, _)| *digest))
    }
}

/// Identity of a vertex in memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Vertex(usize),
    Imported(usize, Digest),
}

impl Key {
    fn of(vertex: &Arc<Vertex>) -> Self {
        match &vertex.kind {
            Kind::Imported { set, digest } => Self::Imported(Arc::as_ptr(set).addr(), *digest),
            _ => Self::Vertex(Arc::as_ptr(vertex).addr()),
        }
    }
}

/// An encoded operation with what goes beside it.
struct Encoded {
    raw: Bytes,
    metadata: OpMetadata,
    locations: Vec<SourceLocation>,
}

struct Marshaler<'a> {
    options: &'a MarshalOptions,
    /// Digests, and how they are written.
    done: BTreeMap<Key, (Digest, String)>,
    seen: BTreeSet<Digest>,
    def: Vec<Bytes>,
    metadata: BTreeMap<String, OpMetadata>,
    sources: Sources,
}

impl<'a> Marshaler<'a> {
    fn new(options: &'a MarshalOptions) -> Self {
        Self {
            options,
            done: BTreeMap::new(),
            seen: BTreeSet::new(),
            def: Vec::new(),
            metadata: BTreeMap::new(),
            sources: Sources::default(),
        }
    }

    /// Encodes a vertex behind all its inputs, without recursion: chains are as long as a Dockerfile.
    fn add(&mut self, output: &Output) -> Result<(), MarshalError> {
        let mut path = vec![(Arc::clone(&output.vertex), output.vertex.inputs().into_iter())];
        while let Some((vertex, inputs)) = path.last_mut() {
            let next = inputs.next().map(|input| input.resolved());
            match next {
                Some(None) => {}
                Some(Some(input)) if self.done.contains_key(&Key::of(&input.vertex)) => {}
                Some(Some(input)) => {
                    let inputs = input.vertex.inputs().into_iter();
                    path.push((input.vertex, inputs));
                }
                None => {
                    let vertex = Arc::clone(vertex);
                    path.pop();
                    self.encode(&vertex)?;
                }
            }
        }
        Ok(())
    }

    fn encode(&mut self, vertex: &Arc<Vertex>) -> Result<(), MarshalError> {
        let Encoded {
            raw,
            metadata,
            locations,
        } = self.encode_vertex(vertex)?;
        let digest = Digest::sha256(&raw);
        let name = digest.to_string();
        let entry = self.metadata.entry(name.clone()).or_default();
        *entry = merge_metadata(std::mem::take(entry), metadata);
        self.sources.add(name.clone(), locations);
        self.done.insert(Key::of(vertex), (digest, name));
        if self.seen.insert(digest) {
            self.def.push(raw);
        }
        Ok(())
    }

    /// Adds the operation that points to the result.
    fn finish(mut self, output: &Output) -> Result<Definition, MarshalError> {
        let raw = Op {
            inputs: vec![self.input(output)],
            ..Op::default()
        }
        .encode_to_vec();
        let digest = Digest::sha256(&raw).to_string();
        self.def.push(raw.into());
        let mut root = self.metadata.remove(&digest).unwrap_or_default();
        let mut names = vec![caps::CONSTRAINTS, caps::PLATFORM];
        for metadata in self.metadata.values() {
            let present = [
                (metadata.ignore_cache, caps::META_IGNORE_CACHE),
                (!metadata.description.is_empty(), caps::META_DESCRIPTION),
                (metadata.export_cache.is_some(), caps::META_EXPORT_CACHE),
            ];
            names.extend(
                present
                    .into_iter()
                    .filter_map(|(present, cap)| present.then_some(cap)),
            );
        }
        root.caps = names.into_iter().map(|cap| (cap.to_owned(), true)).collect();
        self.metadata.insert(digest, root);
        let source = self.sources.marshal(self.options)?;
        Ok(Definition {
            def: self.def,
            metadata: self.metadata,
            source: Some(source),
        })
    }

    /// Returns the encoded form of an input; its vertex has been encoded.
    fn input(&self, output: &Output) -> Input {
        let output = output.resolved().unwrap_or_else(|| output.clone());
        let digest = self
            .done
            .get(&Key::of(&output.vertex))
            .map(|(_, name)| name.clone())
            .unwrap_or_default();
        Input {
            digest,
            index: output.index,
        }
    }

    /// Returns an operation without its kind, and the metadata beside it.
    fn constrained(&self, constraints: Constraints) -> (Op, OpMetadata) {
        let platform = constraints.platform.as_ref().unwrap_or(&self.options.platform);
        let filters = self.options.worker_constraints.iter().cloned();
        let op = Op {
            platform: Some(platform.into()),
            constraints: Some(WorkerConstraints {
                filter: filters.chain(constraints.worker_constraints).collect(),
            }),
            ..Op::default()
        };
        (
            op,
            merge_metadata(self.options.metadata.clone(), constraints.metadata),
        )
    }
}

//! A vertex while it is active: what all its edges share.

use std::collections::{BTreeMap, BTreeSet};

use oci::Digest;

use crate::arena::{EdgeId, VertexId};
use crate::core::Failure;
use crate::record::StoreId;
use crate::{EffectId, JobId, ResultId};

/// How a vertex's results are identified.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheMap {
    /// Digests of the op without its inputs, each of which identifies it; the first is the primary one. Only a vertex
    /// without inputs has use for more than one.
    pub digests: Vec<Digest>,
    /// Whether a further round yields further digests.
    pub more: bool,
    /// The digests mean nothing outside this run: nothing is stored under them.
    pub ephemeral: bool,
    /// One per input; missing ones are default.
    pub deps: Vec<Dep>,
}

/// How an input counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dep {
    /// What is read of the input.
    pub selector: Option<Digest>,
    /// Whether a checksum of what is read identifies the input as well.
    pub content: bool,
}

/// Whether the cache map is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapState {
    Unknown,
    Asked(EffectId),
    Known,
}

/// Whether an input's content checksum is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContentState {
    Unknown,
    Asked(EffectId),
    Known(Option<Digest>),
}

/// Whether the op was executed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ExecState {
    Idle,
    Running(EffectId),
    /// Outputs are owned here and released with the vertex.
    Done(Vec<Option<ResultId>>),
}

/// An active vertex.
#[derive(Debug)]
pub(crate) struct Vertex<E> {
    pub digest: Digest,
    pub ignore_cache: bool,
    pub export: Option<bool>,
    pub inputs: Vec<(VertexId, usize)>,
    /// Stores to ask besides the local one.
    pub stores: BTreeSet<StoreId>,
    /// Jobs that share the vertex. Every input's set includes it.
    pub jobs: BTreeSet<JobId>,
    /// Vertices that this one's op builds; they have at least this one's jobs.
    pub children: BTreeSet<VertexId>,
    /// Vertices whose op builds this one.
    pub parents: BTreeSet<VertexId>,
    pub edges: BTreeMap<usize, EdgeId>,
    pub map: MapState,
    /// How often the cache map was answered.
    pub rounds: u32,
    pub more: bool,
    pub ephemeral: bool,
    pub digests: Vec<Digest>,
    pub deps: Vec<Dep>,
    pub content: Vec<ContentState>,
    pub exec: ExecState,
    /// Why it failed, and the jobs that saw it fail. Another job tries again.
    pub failure: Option<(Failure<E>, BTreeSet<JobId>)>,
}

impl<E> Vertex<E> {
    pub(crate) fn new(digest: Digest, ignore_cache: bool, inputs: Vec<(VertexId, usize)>) -> Self {
        let content = vec![ContentState::Unknown; inputs.len()];
        Self {
            digest,
            ignore_cache,
            export: None,
            inputs,
            stores: BTreeSet::new(),
            jobs: BTreeSet::new(),
            children: BTreeSet::new(),
            parents: BTreeSet::new(),
            edges: BTreeMap::new(),
            map: MapState::Unknown,
            rounds: 0,
            more: false,
            ephemeral: false,
            digests: Vec::new(),
            deps: Vec::new(),
            content,
            exec: ExecState::Idle,
            failure: None,
        }
    }

    /// The op's primary digest. Only when the map is known.
    pub(crate) fn op_digest(&self) -> Digest {
        self.digests[0]
    }

    /// The content checksum of an input, once it is known and there is one.
    pub(crate) fn content_of(&self, input: usize) -> Option<Digest> {
        match self.content[input] {
            ContentState::Known(digest) => digest,
            ContentState::Unknown | ContentState::Asked(_) => None,
        }
    }

    /// Whether nothing more can become known about an input's content.
    pub(crate) fn is_content_known(&self, input: usize) -> bool {
        matches!(self.content[input], ContentState::Known(_))
    }

    /// Takes over what a cache map says. `false`: it identifies nothing.
    pub(crate) fn learn(&mut self, map: CacheMap) -> bool {
        for digest in map.digests {
            if !self.digests.contains(&digest) && (self.inputs.is_empty() || self.digests.is_empty()) {
                self.digests.push(digest);
            }
        }
        self.rounds += 1;
        self.more = map.more && self.inputs.is_empty();
        self.ephemeral |= map.ephemeral;
        self.deps = map.deps;
        self.deps.resize(self.inputs.len(), Dep::default());
        self.map = MapState::Known;
        !self.digests.is_empty()
    }
}

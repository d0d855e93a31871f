//! An edge while its vertex is active, and what is asked of the outside on its behalf.

use std::collections::{BTreeMap, BTreeSet};

use crate::arena::{EdgeId, VertexId};
use crate::core::Outcome;
use crate::record::{Key, NewRecord, Query, RecordId, StoredResult};
use crate::twins::Question;
use crate::{BuildId, EffectId, ResultId};

/// How far an edge is wanted, or how much of it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Not at all.
    #[default]
    None,
    /// All keys that follow from definitions.
    Fast,
    /// All keys that can be known without the edge's own result, including those of its inputs' content.
    Slow,
    /// The result.
    Result,
}

/// A request to the outside. Those with an `effect` must be answered exactly once, also after [`Effect::Cancel`].
#[derive(Clone, Debug, PartialEq)]
pub enum Effect<E> {
    /// Ask the op how it is identified. Answer: `MapReady`, `Failed`, `Canceled`.
    CacheMap {
        /// To be answered.
        effect: EffectId,
        /// The vertex.
        vertex: VertexId,
        /// How often it was asked before.
        round: u32,
    },
    /// Ask stores for records. Answer: `KeysFound`, with one list per query. Cannot fail and is not cancelled.
    Query {
        /// To be answered.
        effect: EffectId,
        /// On behalf of this vertex.
        vertex: VertexId,
        /// The questions.
        queries: Vec<Query>,
    },
    /// Checksum what the op reads of an input. Answer: `Checksummed`, `Failed`, `Canceled`.
    Checksum {
        /// To be answered.
        effect: EffectId,
        /// The vertex.
        vertex: VertexId,
        /// The input's number.
        input: usize,
        /// The input's result.
        result: ResultId,
    },
    /// Load a stored result. Answer: `Loaded`, `Failed` (taken as gone), `Canceled`.
    Load {
        /// To be answered.
        effect: EffectId,
        /// The vertex.
        vertex: VertexId,
        /// Its output.
        output: usize,
        /// What to load.
        stored: StoredResult,
    },
    /// Execute the op. Answer: `Executed`, `Failed`, `Canceled`.
    Exec {
        /// To be answered.
        effect: EffectId,
        /// The vertex.
        vertex: VertexId,
        /// The inputs' results.
        inputs: Vec<ResultId>,
        /// The record that the result will have and the links to it, for those who ask why nothing was found; `None` when
        /// the step cannot be remembered.
        record: Option<NewRecord>,
    },
    /// Remember a record in the local store. Later queries must see it.
    Save {
        /// The vertex that it is of.
        vertex: VertexId,
        /// The record.
        record: NewRecord,
    },
    /// Forget a stored result: it cannot be had any more.
    Forget {
        /// What is gone.
        stored: StoredResult,
    },
    /// Nobody needs the answer of this effect any more. It is answered nevertheless.
    Cancel {
        /// The effect.
        effect: EffectId,
    },
    /// Let go of a result.
    Release {
        /// The result.
        result: ResultId,
    },
    /// A build is over.
    Finished {
        /// The build.
        build: BuildId,
        /// How it ended.
        outcome: Outcome<E>,
    },
}

/// A build's result. Valid until the job is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Built {
    /// The edge, from which the steps behind it can be exported.
    pub edge: EdgeId,
    /// The result; still owned by the solver.
    pub result: ResultId,
}

/// What an edge is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EdgeState {
    /// Looking for keys.
    Seeking,
    /// Loading a result.
    Loading { effect: EffectId, stored: StoredResult },
    /// Waiting for the vertex's execution, which other vertices find by this record.
    Executing { record: Option<RecordId> },
    /// Waiting for an equal step of another vertex.
    AwaitingTwin { record: RecordId },
    /// Has its result. `owned`: released with the edge, else with the vertex.
    Done { result: ResultId, owned: bool },
}

/// From how many inputs on an edge waits for all of them before it decides anew.
const WIDE: usize = 32;

/// One input of an edge.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// The input.
    pub edge: EdgeId,
    /// How far this edge wants it.
    pub want: Level,
    /// How many of the input's keys were asked for.
    pub keys_asked: usize,
    /// Whether the content's key was asked for.
    pub content_asked: bool,
    /// The records found through this input. There may be as many as the input ever had users.
    pub matched: BTreeSet<Key>,
}

/// An edge of an active vertex.
#[derive(Debug)]
pub(crate) struct Edge {
    pub vertex: VertexId,
    pub output: usize,
    /// Edges that have this one as the input of that number.
    pub users: BTreeSet<(EdgeId, usize)>,
    /// How many users want it how far.
    pub wants: [usize; 4],
    pub builds: BTreeSet<BuildId>,
    /// In order of the vertex's inputs; made when the edge is first wanted.
    pub slots: Vec<Slot>,
    /// How many inputs are wanted further than they are.
    pub unsettled: usize,
    pub state: EdgeState,
    /// How much is known.
    pub reached: Level,
    /// Queries on the way.
    pub queries: usize,
    /// How many of the vertex's digests were asked for (no inputs only).
    pub digests_asked: usize,
    /// Through how many inputs records were found, of those found through some.
    pub matches: BTreeMap<Key, usize>,
    /// Records found through all inputs: what users look for.
    pub keys: Vec<Key>,
    /// Those of them whose results are to be asked for.
    pub unasked: BTreeSet<Key>,
    /// Results not tried yet.
    pub results: Vec<StoredResult>,
    /// Results ever found.
    pub results_seen: BTreeSet<StoredResult>,
    /// What the result was loaded from.
    pub loaded: Option<StoredResult>,
    /// The local record that stands for the edge.
    pub record: Option<RecordId>,
    /// What the local store was asked.
    pub questions: Vec<Question>,
    /// Something was saved that answers one of them: the local store is asked again.
    pub stale: bool,
    /// In the worklist.
    pub queued: bool,
}

impl Edge {
    pub(crate) fn new(vertex: VertexId, output: usize) -> Self {
        Self {
            vertex,
            output,
            users: BTreeSet::new(),
            wants: [0; 4],
            builds: BTreeSet::new(),
            slots: Vec::new(),
            unsettled: 0,
            state: EdgeState::Seeking,
            reached: Level::None,
            queries: 0,
            digests_asked: 0,
            matches: BTreeMap::new(),
            keys: Vec::new(),
            unasked: BTreeSet::new(),
            results: Vec::new(),
            results_seen: BTreeSet::new(),
            loaded: None,
            record: None,
            questions: Vec::new(),
            stale: false,
            queued: false,
        }
    }

    /// Whether a change of one input is no reason to look at them all: that would take time quadratic in their number.
    pub(crate) fn is_patient(&self) -> bool {
        self.unsettled > 0 && self.slots.len() > WIDE
    }

    /// How far anyone wants the edge.
    pub(crate) fn demand(&self) -> Level {
        if !self.builds.is_empty() || self.wants[3] > 0 {
            Level::Result
        } else if self.wants[2] > 0 {
            Level::Slow
        } else if self.wants[1] > 0 {
            Level::Fast
        } else {
            Level::None
        }
    }

    /// The result, once there is one.
    pub(crate) fn result(&self) -> Option<ResultId> {
        match self.state {
            EdgeState::Done { result, .. } => Some(result),
            _ => None,
        }
    }

    /// Takes the best result that was not tried: what is local first, then the newest.
    pub(crate) fn take_best(&mut self) -> Option<StoredResult> {
        let best = (0..self.results.len()).min_by(|a, b| {
            let (a, b) = (&self.results[*a], &self.results[*b]);
            let newest = b.created_at_ns.cmp(&a.created_at_ns);
            a.key.store.cmp(&b.key.store).then(newest).then_with(|| a.cmp(b))
        })?;
        Some(self.results.swap_remove(best))
    }
}

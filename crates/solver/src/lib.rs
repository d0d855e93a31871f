//! Decides what a build has to do: which edges are looked up, loaded, or executed, and in which order.
//!
//! Purpose: given graphs of vertices and a stream of answers, emit the *effects* that bring every wanted edge to its
//! result with the least work: keys are derived from the op and its inputs' records, a record found by them is loaded,
//! and only what no record answers is executed. Work that several builds want is done once.
//!
//! Non-goals: no IO, no clock, no threads, no knowledge of what an op does. The same inputs in the same order always
//! give the same effects.
//!
//! Invariants:
//! - each effect is answered exactly once, also a cancelled one;
//! - an edge that is wanted beyond what it reached waits for an effect, for an input that it wants further, or for an
//!   equal step that runs elsewhere;
//! - every result that was handed in is released exactly once, when the last job that shares its vertex is closed;
//! - of steps that are the same one runs and the others wait for it; what is saved is seen at once by those who asked;
//! - a vertex is executed to the end at most once, unless what it yielded is said to be gone;
//! - an input is shared by all jobs that share its users;
//! - a step that ignores the cache finds no record and lends its users no key to find one.
//!
//! Start at [`Solver`]: [`Solver::handle`], [`Solver::poll_effect`], [`Solver::poll_event`]. How records are linked is
//! described in [`record`].
#![forbid(unsafe_code)]

mod answers;
mod arena;
mod check;
mod core;
mod edge;
mod export;
mod finish;
mod lifetime;
mod plan;
mod remember;
mod renew;
mod twins;
mod vertex;

pub mod record;

pub use arena::{EdgeId, VertexId};
pub use core::{Event, Failure, Input, Outcome, Owner, Solver, VertexDef};
pub use edge::{Built, Effect};
pub use export::{ExportEntry, ExportGraph, ExportLink, ExportSource};
pub use record::{FoundKey, Key, Link, MemoryRecords, NewRecord, Query, RecordId, StoreId, StoredResult};
pub use vertex::{CacheMap, Dep};

/// Names a job: whatever shares one lifetime of vertices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// Names one wish for an edge's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BuildId(pub u64);

/// Names an effect; its answer carries the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EffectId(pub u64);

/// Names a result that is held outside until [`Effect::Release`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResultId(pub u64);

//! Refs, solver records, pins and garbage collection: what is cached, who holds it, and when it goes.
//!
//! Purpose: a [`Store`] ties a [`content::Store`] and a [`snapshot::Snapshotter`] together with the one metadata database
//! of a state directory. A *ref* is a root file system known by a snapshot, by layer blobs, or by both; a *record* says
//! that a solver key has a ref as its result.
//!
//! Invariants:
//! - whatever a handle ([`ImmutableRef`], [`MutableRef`], [`Pin`]) holds is never collected;
//! - after `kill -9` at any instant the next open refers to nothing that is missing; what nobody refers to is swept then;
//! - nothing is deleted from disk before the deletion of its metadata is durable;
//! - memory is the truth while the store is open, the database trails it in order: one writer, grouped commits, and no
//!   flush on the path of a build step;
//! - a record whose ref is gone is not returned.
//!
//! Non-goals: fetching blobs (the engine's; [`ImmutableRef::missing_blobs`] says what), deciding cache keys (the solver's).
//!
//! Start at [`Store`].
#![forbid(unsafe_code)]

mod chain;
mod clock;
mod db;
mod describe;
mod dump;
mod error;
mod filter;
mod gc;
mod graph;
mod handle;
mod mutable;
mod open;
mod pin;
mod prune;
mod record;
mod row;
mod space;
mod state;
mod store;
mod types;
mod unpack;
mod usage;
mod verify;

pub use describe::{Described, RecordDescription};
pub use dump::dump;
pub use error::{DiffIdMismatch, FilterError, OpenError, StoreError};
pub use gc::{DiskSpace, DiskStat, GcLimits, PruneOptions, default_policies};
pub use handle::{ImmutableRef, MutableRef};
pub use open::{Recovered, StateLock};
pub use pin::Pin;
pub use record::{Batch, CacheResult, Link, Records};
pub use store::{Backend, StorageFactory, Store, StoreOptions, Ticket};
pub use types::{
    LayerBlob, MissingBlob, Parents, Provider, RecordType, RefId, RefIdError, RefOptions, RefStat,
};
pub use usage::{UsageOptions, UsageRecord};
pub use verify::Finding;

//! The verified blob store: bytes by digest, on disk.
//!
//! A blob is one immutable file `blobs/<algorithm>/<hex>`. It gets there through an *ingest*: a file that grows under a
//! caller's reference key, survives a restart, and becomes a blob only when its digest and size are verified.
//!
//! Invariants:
//! - a file below `blobs/` is complete, has the digest its name says, and is on stable storage;
//! - a blob committed with [`Durability::Deferred`] is readable at once from `pending/` and moves to `blobs/` in
//!   [`Store::sync`]; `pending/` is emptied when a store opens, so after a crash nothing half written is ever found;
//! - nobody ever writes to a blob: replacing means deleting and ingesting again.
//!
//! Non-goals: reference counting, garbage collection, media types, networks. The `cache` crate decides what stays.
//!
//! Start at [`Store`].
#![forbid(unsafe_code)]

mod blob;
mod error;
mod ingest;
mod store;

pub use blob::{Blob, BlobReader, VerifiedReader};
pub use error::{StoreError, VerifyError, WriteError};
pub use ingest::{IngestStat, Writer};
pub use store::{BlobStat, Durability, Flush, STALE_INGEST, Store};

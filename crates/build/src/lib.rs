//! What the parts of a build share: the build itself, its progress, its clients, its refs, its error, and the contracts
//! between the engine and the ops, sources, exporters and caches that it drives.
//!
//! Purpose: let the parts know each other by contract alone. An op is an [`op::Op`], an exporter an
//! [`export::ExporterInstance`], a cache elsewhere a [`cache_import::ImportedCache`]; what they need of a build reaches them
//! as a context: [`op::OpContext`], [`export::ExportContext`], [`unlazy::FetchContext`].
//!
//! Non-goals: no source, op, exporter or cache of its own; no solver's loop, no frontend; no gRPC types.
//!
//! Invariants: an error's kind is given once; progress never waits for who watches it; a value that is resolved for a
//! build is resolved once; every queue is bounded.
//!
//! Start at [`op::Op`] and [`job::Job`].
#![forbid(unsafe_code)]

pub mod agent;
pub mod blocking;
pub mod cache_export;
pub mod cache_import;
pub mod error;
pub mod explanation;
pub mod export;
pub mod job;
pub mod meta;
pub mod name;
pub mod op;
pub mod progress;
pub mod result;
pub mod session;
pub mod trace;
pub mod unlazy;

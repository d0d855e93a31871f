//! LLB, the language builds are written in: a graph of operations whose encoded bytes are their identity.
//!
//! Purpose: read definitions from clients and refuse bad ones ([`Graph::load`]), write definitions with the same bytes
//! as the Go client for the same construction ([`State`]), encode single operations ([`encode_op`]), print and compare
//! definitions ([`dump`], [`compare`]).
//!
//! Non-goals: running anything, resolving names, any IO.
//!
//! Invariants: a [`Vertex`] of a loaded [`Graph`] has an operation with all its required parts, every input index in it
//! is within its inputs, every enum has a known value, and every input comes before it. Its digest is that of the bytes
//! the client sent. Two equal constructions marshal to equal bytes.
//!
//! Start at [`Graph`] for consuming and at [`State`] for producing.
#![forbid(unsafe_code)]

pub mod attr;
pub mod caps;
pub mod compare;
pub mod dump;
mod encode;
mod git_url;
mod graph;
pub mod json;
mod name;
pub mod pb;
mod quote;
pub mod sourcepolicy;
mod state;
mod validate;

pub use encode::{encode_op, op_digest};
pub use git_url::{GitUrl, GitUrlError};
pub use graph::{Edge, Graph, GraphError, MAX_INPUTS, MAX_OP_BYTES, MAX_OPS, MAX_TOTAL_BYTES, Vertex};
pub use name::op_name;
pub use quote::quote;
pub use state::{
    CacheSharing, Chown, Constraints, CopyOptions, DEFAULT_PATH_UNIX, DEFAULT_PATH_WINDOWS, Deferred,
    ExecState, FileActions, FileSource, GitOptions, HttpOptions, ImageBlobOptions, ImageOptions,
    LocalOptions, MarshalError, MarshalOptions, MkdirOptions, MkfileOptions, Mount, OciLayoutOptions, Owner,
    ProxyEnv, ResolveMode, RmOptions, Run, Secret, SourceLocation, SourceMap, Ssh, State, SymlinkOptions,
    default_path, diff, merge,
};
pub use validate::OpError;

//! Trees and layers: file system trees in, OCI layer tars out, and back.
//!
//! Everything works on directory descriptors handed in by the caller; a path from outside (a tar entry, an LLB file
//! operation, a gateway request) is resolved below that descriptor by the kernel (`openat2`) and cannot name anything
//! outside of it, whatever symbolic links lie in the tree and whoever swaps them meanwhile.
//!
//! - [`tar`]: reading hostile archives, writing byte for byte as Go's `archive/tar` does;
//! - [`apply`]: a layer onto a tree; [`diff`], [`diff_upperdir`]: what changed, as a layer; [`changes`] and
//!   [`changes_upperdir`]: the same as calls;
//! - [`compress`]: gzip, eStargz and zstd both ways, [`compress::Packer`] for blobs and their diffIDs;
//! - [`rewrite`]: timestamps of an existing layer;
//! - [`tree`]: the rooted primitives; [`copy`]: copying trees as BuildKit's file operation does;
//! - [`checksum`]: BuildKit's content digests of trees.
//!
//! Non-goals: knowing snapshots, mounts, images or registries.
//!
//! Invariants: output depends on the tree alone, not on directory order, thread count or host; nothing is read or
//! written outside the given descriptors; sizes taken from input are bounded before they are used.
//!
//! Start at [`apply`] and [`diff`].
#![forbid(unsafe_code)]

mod apply;
mod changes;
pub mod checksum;
pub mod compress;
pub mod copy;
mod diff;
pub mod rewrite;
mod stop;
pub mod tar;
pub mod tree;

pub use apply::{Applied, ApplyError, ApplyOptions, Whiteouts, apply};
pub use changes::{Change, ChangeKind, Visit, changes, changes_upperdir};
pub use diff::{DiffError, DiffOptions, diff, diff_upperdir};
pub use stop::Stop;

//! Snapshots: root file systems that are prepared on a parent, changed through a mount, and committed for ever.
//!
//! The life of a snapshot: [`prepare`](Snapshotter::prepare) makes an *active* snapshot on a committed parent (or on
//! nothing); whoever mounts [`mounts`](Snapshotter::mounts) changes it; [`commit`](Snapshotter::commit) turns it into a
//! *committed* one under a new name, which nobody ever writes again and on which others can be prepared. A *view* is a
//! read-only look at a committed snapshot that keeps it from being removed.
//!
//! Invariants:
//! - the directory layout is the whole state: what exists after a crash is what a rename completed; there is no second
//!   database to disagree with (see [`layout`](self#layout));
//! - a committed snapshot's directory is never written again;
//! - a snapshot with children is not removed;
//! - commit costs a few system calls and no flush; [`Snapshotter::sync`] makes all earlier commits durable at once.
//!
//! Non-goals: reference counting and garbage collection (the `cache` crate's), pulling layers, networks.
//!
//! Start at [`Snapshotter`]; [`Overlay`] and [`Native`] implement it, [`Mount`] is what they hand out,
//! [`apply_layer`] and [`diff_layer`] move OCI layers in and out.
//!
//! # Layout
//!
//! ```text
//! <root>/active/<key>/{fs,work,parent}    prepared; `parent` is a symbolic link whose text is the parent's name
//! <root>/view/<key>/{fs?,parent}          read-only views
//! <root>/committed/<name>/{fs,parent}     immutable
//! <root>/trash/<n>                        being removed; emptied when the root is opened
//! <root>/new/<n>                          being created; emptied when the root is opened
//! ```
#![forbid(unsafe_code)]

mod error;
mod key;
mod layers;
mod layout;
mod merge;
mod mount;
mod native;
mod overlay;
mod snapshotter;

pub use error::{MountError, SnapshotError};
pub use key::{KeyError, SnapshotKey};
pub use layers::{LayerError, apply_layer, diff_layer};
pub use mount::{Mount, MountGuard, MountedTree, unmount, unmount_below};
pub use native::Native;
pub use overlay::{Overlay, OverlayOptions};
pub use snapshotter::{Diff, Kind, SnapshotStat, Snapshotter, Storage, Swept, Usage};

//! Runs processes in containers: one specification generator, and two runtimes that carry it out.
//!
//! [`Executor`] is the type to start at: [`Executor::run`] runs one container to its end, [`Executor::start`] hands out
//! a [`Container`] into which further processes can be put. A [`RunRequest`] says *what* runs; how it is confined
//! (capabilities, seccomp, masked paths, device rules, limits) is decided in `spec` and nowhere else.
//!
//! The embedded runtime is a supervisor: our own binary, executed again before it has any thread, single-threaded,
//! connected by a `SOCK_SEQPACKET` pair. The daemon itself never forks. The supervisor's children build the container
//! from the inside: all mounts, the root included, are made in the container's own mount namespace, so the host's
//! mount table is never touched and nothing can leak from it. When the daemon goes, the supervisor sees its socket
//! close, kills every container and ends.
//!
//! Invariants:
//! - a path inside a root file system is only ever resolved relative to a descriptor of it (`openat2`);
//! - no descriptor but the three of stdio reaches a container's process;
//! - an exit is reported after every process of the container is gone and its mounts with them;
//! - mount points made for a run are removed after it, times of their directories restored.
//!
//! A container that asks for no network in particular gets what [`NetworkChoice`] says: the host's, or a namespace of its own
//! that is connected to a bridge or by CNI plugins. One behind a proxy ([`ProxyNetwork`]) has nothing but a loopback device, on
//! which the proxy listens. A container holds its namespace to its end, whichever runtime runs it.
//!
//! Devices of the host beyond the usual come from specifications ([`DeviceRegistry`]) and reach a container as part of its
//! request; what they change goes through the same generator.
//!
//! Non-goals: images, snapshots, caches, which step runs when. Unsafe code lives in `sys` only.
//!
//! A binary that embeds this crate calls [`supervisor_main`] before anything else in `main`.
#![deny(unsafe_code)]

mod binary;
mod capability;
mod cdi;
mod container;
mod embedded;
mod error;
mod executor;
mod hosts;
mod label;
mod network;
mod request;
mod resolv_conf;
mod runtime;
mod spec;
mod supervisor;
#[expect(unsafe_code, reason = "the kernel's interfaces that nobody wraps")]
mod sys;
mod telemetry;
mod tree;
mod trust;
mod user;

pub use cdi::{DeviceEdits, DeviceFileError, DeviceListing, DeviceRegistry, Devices};
pub use container::{Container, ContainerProcess, Pty};
pub use error::{ExecutorError, RunError};
pub use executor::{DnsConfig, Executor, ExecutorConfig, RuntimeChoice};
pub use label::LabelConfig;
pub use network::{BridgeConfig, CniConfig, Egress, NetworkChoice, NetworkError, ProxyNetwork};
pub use request::{
    ContainerId, ContainerIdError, ContainerMount, ExitStatus, FileSource, HostAddress, MountSource, Network,
    Process, Resources, Root, RunRequest, Security, Stdio, Ulimit,
};
pub use supervisor::supervisor_main;
pub use telemetry::TraceSocket;

/// Has the allocator keep half as many heaps as there are cores, at least two, instead of eight for each: what a build
/// frees in one of them is of no use to the next one in another. For programs with long lives, before they work.
pub fn limit_heaps() {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    sys::limit_heaps(i32::try_from(cores / 2).unwrap_or(i32::MAX).max(2));
}

/// Gives memory that is free back to the kernel, which the allocator does by itself only at the end of a heap. For programs
/// with long lives, when they rest.
pub fn trim_heaps() {
    sys::trim_heaps();
}

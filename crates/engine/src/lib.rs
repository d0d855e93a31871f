//! Drives builds: jobs, ops, sources, exporters, frontends.
#![forbid(unsafe_code)]

pub mod session;

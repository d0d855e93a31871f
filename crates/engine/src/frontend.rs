//! Frontends that are built in.

pub mod dockerfile;
mod newest;

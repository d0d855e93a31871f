//! Frontends: the one for Dockerfiles is built in, the one for images runs them.

pub mod dockerfile;
pub mod gateway;
mod newest;

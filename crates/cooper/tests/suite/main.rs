//! The binary under each of its names, without a network: images are scratch.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod daemon;
mod embedded;
mod program;

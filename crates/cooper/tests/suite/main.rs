//! The binary under each of its names, without a network: images are scratch.

mod daemon;
mod embedded;
mod program;

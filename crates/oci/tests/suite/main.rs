//! The vocabulary's texts and bytes.

mod digests;
mod documents;
mod references;
mod times;

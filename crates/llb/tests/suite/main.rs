//! Definitions: the Go client's bytes, hostile input, printing and comparing.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod go_client;
mod graph;
mod print;

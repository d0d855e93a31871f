//! Definitions: the Go client's bytes, hostile input, printing and comparing.

mod go_client;
mod graph;
mod print;

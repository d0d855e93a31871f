//! The binary: chooses a personality by the name it was called by.
#![forbid(unsafe_code)]
fn main() {}

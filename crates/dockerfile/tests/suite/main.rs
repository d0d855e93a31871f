//! Tests of the frontend from the outside.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod devices;
mod drive;
mod fuzz;
mod golden;
mod hostile;
mod utf8;

//! Tests of the solver through its public interface.
#![expect(clippy::unwrap_used, reason = "a failing test says where")]

mod bench;
mod random;
mod scenarios;
mod simulator;

//! Tests of the solver through its public interface.
#![expect(clippy::unwrap_used, reason = "a failing test says where")]

mod bench;
mod overlap;
mod random;
mod scale;
mod scenarios;
mod script;
mod simulator;
mod tiny;

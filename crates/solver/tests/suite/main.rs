//! Tests of the solver through its public interface.

mod bench;
mod random;
mod scenarios;
mod simulator;

//! The store from outside: refs, records, garbage collection, crashes.
#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![expect(clippy::print_stderr, reason = "a skipped test says so")]

mod collect;
mod crash;
mod faults;
mod fixture;
mod overlay;
mod parallel;
mod power;
mod records;
mod refs;

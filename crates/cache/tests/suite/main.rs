//! The store from outside: refs, records, garbage collection, crashes.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod collect;
mod crash;
mod fixture;
mod records;
mod refs;

//! The store from outside: refs, records, garbage collection, crashes.

mod collect;
mod crash;
mod fixture;
mod records;
mod refs;

//! Sources through whole builds: an engine with the real worker, servers on the loopback, a client of the test's own.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod git;
mod http;
mod local;
mod server;
mod world;

//! Sources through whole builds: an engine with the real worker, servers on the loopback, a client of the test's own.

mod git;
mod http;
mod local;
mod server;
mod world;

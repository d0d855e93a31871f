//! The client against the registry of `testkit`, and against a real one where it is installed.
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails by panicking and says why it is skipped"
)]

mod auth;
mod fetch;
mod hosts;
mod pace;
mod push;
mod real;
mod resolve;

use std::time::Duration;

use registry::{Client, ClientOptions, HostsConfig};

/// A client that does not wait long.
fn client() -> Client {
    client_with(HostsConfig::default())
}

fn client_with(hosts: HostsConfig) -> Client {
    let options = ClientOptions {
        backoff: Duration::from_millis(1),
        idle_timeout: Duration::from_secs(5),
        upload_chunk_bytes: 1 << 20,
        ..ClientOptions::default()
    };
    Client::with_options(hosts, options)
}

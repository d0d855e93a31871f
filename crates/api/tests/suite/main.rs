//! Both ends of a session over a real socket, and file transfers through it.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod daemon;
mod files;
mod session;

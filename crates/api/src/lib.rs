//! BuildKit's gRPC protocols: wire types, stubs, the transport of sessions, file transfer and typed errors.
//!
//! Purpose: everything that both ends of a connection must agree on. The daemon dials the services that a client hosts
//! ([`session::SessionConn`]), a client hosts them ([`session::SessionHost`]); files move by [`fsutil`]; errors carry
//! their details by [`errors`].
//!
//! Non-goals: what the services do. The daemon and the command line implement the generated traits.
//!
//! Invariants: package, service and field names are BuildKit's, bit for bit. Nothing that comes in is larger than
//! [`transport::MAX_MESSAGE_BYTES`]; every task ends with the connection it serves; paths that come in are resolved
//! below a directory handle. Messages that hold secrets do not print them.
//!
//! Start at [`pb`] for the messages and at [`session`] for connections.
#![forbid(unsafe_code)]

pub mod bounds;
pub mod errors;
pub mod file_send;
pub mod fsutil;
pub mod pb;
pub mod session;
pub mod transport;

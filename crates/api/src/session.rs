//! Sessions: a connection from the daemon back to its client, inside of a stream that the client opened.
//!
//! The client calls `Control.Session` with headers that say who it is and what it offers; the bytes of the stream are an
//! HTTP/2 connection on which the client is the server.

mod accept;
mod headers;
mod host;
pub mod methods;

pub use accept::{SessionConn, SessionConnError};
pub use headers::{decode_lists, encode_lists};
pub use host::{SessionHost, SessionHostError};

/// Header with the ID of the session.
pub const HEADER_ID: &str = "x-docker-expose-session-uuid";
/// Header with a name for people; no longer used by clients.
pub const HEADER_NAME: &str = "x-docker-expose-session-name";
/// Header with the key under which the client's directories are kept between builds.
pub const HEADER_SHARED_KEY: &str = "x-docker-expose-session-sharedkey";
/// Header that repeats once for every method the client offers.
pub const HEADER_METHOD: &str = "x-docker-expose-session-grpc-method";

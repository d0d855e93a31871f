//! BuildKit's gRPC protocols: wire types, stubs, the transport of sessions, file transfer and typed errors.
#![forbid(unsafe_code)]

pub mod pb;

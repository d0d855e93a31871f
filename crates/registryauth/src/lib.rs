//! How registries and their token servers are talked to, by the daemon and by its clients alike.
//!
//! [`token`] makes a token server's requests and reads its answers; [`tls`] makes TLS settings of files.
//!
//! Non-goals: connections, and decisions. Nothing here sends a request, keeps a token or chooses an account.
#![forbid(unsafe_code)]

pub mod tls;
pub mod token;

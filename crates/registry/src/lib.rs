//! A client for OCI distribution registries: resolve, fetch and push, with authentication, mirrors and retries.
//!
//! Start at [`Client`]. A client shares connections with its clones; [`Client::with_credentials`] gives a view with
//! its own credentials and its own token cache, so one build's tokens never serve another's.
//!
//! Non-goals: storing blobs (callers feed streams to and from their own store), choosing a platform, unpacking.
//!
//! Invariants:
//! - Nothing a server sends is trusted: manifests are bounded and checked against their digest, blob streams end in an
//!   error unless their bytes match, error bodies and token responses are bounded.
//! - Every request ends: connecting, waiting for headers, reading and uploading have time limits, retries are counted.
//! - Dropping a future or stream cancels its request; no task is detached.
//! - `Authorization` goes only to the host (and port) it was made for, never along a redirect to another.
#![forbid(unsafe_code)]

mod auth;
mod challenge;
mod client;
mod config;
mod credentials;
mod endpoint;
mod error;
mod fetch;
mod pace;
mod push;
mod referrers;
mod request;
mod resolve;
mod scope;
mod tls;
mod upload;
mod web;

pub use client::Client;
pub use config::{ClientOptions, HostConfig, HostsConfig, KeyPair};
pub use credentials::{Anonymous, BasicCredentials, Credentials, CredentialsError, Token, TokenRequest};
pub use error::{ConfigError, RegistryError, ServerMessage};
pub use fetch::BlobStream;
pub use push::{BlobSource, ByteStream, BytesSource, PushBlob, PushOutcome};
pub use resolve::is_unknown_host;
pub use web::{web_client, web_client_without_redirects};

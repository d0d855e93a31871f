//! An HTTP proxy for the steps of builds: it asks whether each request may be made, and notes what was fetched.
//!
//! [`Proxy::serve`] is the place to start: it serves the connections of one container. What a container asks for by HTTPS is
//! seen too, as the proxy answers in the server's name with a certificate of its own [`Authority`], which the container
//! has to trust. How servers are reached ([`Dial`]) and which requests are allowed ([`Policy`]) is the caller's business.
//!
//! Invariants:
//! - nothing is sent to a server before the policy allowed it;
//! - credentials in URLs are neither noted nor shown to the policy;
//! - what is noted as fetched was passed on to its end, and is named by the checksum of exactly those bytes;
//! - connections, certificates kept and notes are bounded; dropping the serving future ends everything.
//!
//! Non-goals: caching, HTTP/2, tunnels for anything but TLS.
#![forbid(unsafe_code)]

mod authority;
mod body;
mod forward;
mod record;
mod serve;

pub use authority::{Authority, AuthorityError};
pub use record::{Incomplete, Material, Record, Request};
pub use serve::{Dial, Policy, Proxy, Refused};

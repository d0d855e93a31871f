//! The gRPC services of the daemon.

pub mod archive;
pub mod bridge;
pub mod caps;
mod containers;
pub mod content;
pub mod control;
pub mod explain;
pub mod explanations;
pub mod failure;
pub mod frontends;
pub mod history;
mod history_filter;
mod otlp;
mod progress;
mod results;
mod spans;
pub mod traces;

use std::pin::Pin;

use futures_util::Stream;
use tonic::Status;

use progress::system_time;
pub(crate) use progress::timestamp;

/// Answers of a streaming call.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

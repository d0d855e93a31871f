//! The daemon's side of a session.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::{HEADER_ID, HEADER_METHOD, HEADER_NAME, HEADER_SHARED_KEY};
use crate::pb::control::BytesMessage;
use crate::transport::{MessageIo, TransportError, Watched, connect_over};

/// Most methods a client may announce.
const MAX_METHODS: usize = 1024;
/// Header by which a client asks to be checked more often than usual, in milliseconds.
const HEADER_HEALTH: &str = "x-buildkit-session-health-custom-timeout";

/// How a client's health is watched.
#[derive(Clone, Copy, Debug)]
struct HealthLimits {
    interval: Duration,
    timeout: Duration,
    failures: u32,
}

impl HealthLimits {
    fn of(metadata: &MetadataMap) -> Self {
        let wanted = metadata
            .get(HEADER_HEALTH)
            .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        match wanted.filter(|wanted| *wanted > 0) {
            // No less than a second, or a busy machine looks like a dead one.
            Some(wanted) => {
                let span = Duration::from_millis(wanted).max(Duration::from_secs(1));
                Self {
                    interval: span,
                    timeout: span,
                    failures: 1,
                }
            }
            None => Self {
                interval: Duration::from_secs(5),
                timeout: Duration::from_secs(15),
                failures: 2,
            },
        }
    }
}

/// Why a session could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SessionConnError {
    /// The client did not say who it is.
    #[error("missing header {HEADER_ID}")]
    NoId,
    /// The client announced too much.
    #[error("session offers more than {MAX_METHODS} methods")]
    TooManyMethods,
    /// The connection inside of the stream failed.
    #[error("failed to create grpc client")]
    Transport(#[from] TransportError),
}

/// A connected client. Dropping it and all clones of `channel` closes the connection.
#[derive(Clone, Debug)]
pub struct SessionConn {
    /// ID the client chose.
    pub id: String,
    /// Name for people; mostly empty.
    pub name: String,
    /// Key under which the client's directories are kept between builds.
    pub shared_key: String,
    /// gRPC client of the services that the client hosts.
    pub channel: Channel,
    methods: BTreeSet<String>,
    health: HealthLimits,
    close: CancellationToken,
    closed: CancellationToken,
}

impl SessionConn {
    /// Connects to the services of the client that opened a stream; `metadata` are the headers of its call.
    pub async fn accept<S>(
        metadata: &MetadataMap,
        incoming: S,
        outgoing: mpsc::Sender<Result<BytesMessage, Status>>,
    ) -> Result<Self, SessionConnError>
    where
        S: Stream<Item = Result<BytesMessage, Status>> + Send + Unpin + 'static,
    {
        let first = |key| {
            metadata
                .get(key)
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
                .to_owned()
        };
        let id = first(HEADER_ID);
        if id.is_empty() {
            return Err(SessionConnError::NoId);
        }
        let methods = metadata
            .get_all(HEADER_METHOD)
            .iter()
            .filter_map(|value| value.to_str().ok());
        let methods: BTreeSet<String> = methods.map(str::to_lowercase).take(MAX_METHODS + 1).collect();
        if methods.len() > MAX_METHODS {
            return Err(SessionConnError::TooManyMethods);
        }
        let (close, closed) = (CancellationToken::new(), CancellationToken::new());
        let io = Watched::new(MessageIo::new(incoming, outgoing), close.clone(), closed.clone());
        let channel = connect_over(io).await?;
        let (name, shared_key) = (first(HEADER_NAME), first(HEADER_SHARED_KEY));
        Ok(Self {
            id,
            name,
            shared_key,
            channel,
            methods,
            health: HealthLimits::of(metadata),
            close,
            closed,
        })
    }

    /// Tells whether the client offers a method, by its gRPC path in any case.
    pub fn supports(&self, method: &str) -> bool {
        self.methods.contains(&method.to_lowercase())
    }

    /// Returns a token that is cancelled when the connection is gone.
    pub fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }

    /// Closes the connection; calls in progress fail.
    pub fn close(&self) {
        self.close.cancel();
    }

    /// Waits until the connection is gone, or until the client no longer answers; says why.
    ///
    /// A client without a health service is taken to be alive as long as it is connected.
    pub async fn watch(&self) -> &'static str {
        let mut client = HealthClient::new(self.channel.clone());
        let mut ticks = interval(self.health.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failures = 0;
        loop {
            tokio::select! {
                () = self.closed.cancelled() => return "connection closed",
                _ = ticks.tick() => {}
            }
            let check = timeout(self.health.timeout, client.check(HealthCheckRequest::default()));
            let answer = tokio::select! {
                () = self.closed.cancelled() => return "connection closed",
                answer = check => answer,
            };
            match answer {
                Ok(Err(status)) if status.code() != tonic::Code::Unimplemented => failures += 1,
                Ok(_) => failures = 0,
                Err(_) => failures += 1,
            }
            if failures >= self.health.failures {
                return "health checks failed";
            }
        }
    }
}

//! The client's side of a session.

use tokio::sync::mpsc;
use tonic::metadata::MetadataValue;
use tonic::service::RoutesBuilder;
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::{HEADER_ID, HEADER_METHOD, HEADER_NAME, HEADER_SHARED_KEY, methods};
use crate::pb::control::control_client::ControlClient;
use crate::transport::{MessageIo, TransportError, gathered, serve_over};

/// Messages on their way to the daemon.
const OUTGOING: usize = 32;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionHostError {
    /// ID, key or name cannot be sent in a header.
    #[error("invalid header {header}")]
    Header {
        /// Which one.
        header: &'static str,
    },
    /// The daemon did not accept the session.
    #[error("failed to dial gRPC: {}", .0.message())]
    Refused(#[source] Box<Status>),
    /// The connection failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// Services offered to a daemon.
///
/// Build `services` with `tonic::service::Routes::builder()`; a health service is added. Stubs decode 4 MiB a message
/// unless told otherwise: use [`crate::transport::MAX_MESSAGE_BYTES`].
#[derive(Debug)]
pub struct SessionHost {
    /// ID of the session, unique.
    pub id: String,
    /// Name for people; may be empty.
    pub name: String,
    /// Key under which the daemon keeps this client's directories between builds.
    pub shared_key: String,
    /// Paths of the methods offered, see [`methods`].
    pub methods: Vec<&'static str>,
    /// The services.
    pub services: RoutesBuilder,
}

impl SessionHost {
    /// Opens the session and serves it until the daemon closes it. Dropping the future closes the session.
    pub async fn run(self, mut control: ControlClient<Channel>) -> Result<(), SessionHostError> {
        let Self {
            id,
            name,
            shared_key,
            methods: offered,
            mut services,
        } = self;
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let mut request = Request::new(gathered(messages));
        let headers = [
            (HEADER_ID, &id),
            (HEADER_NAME, &name),
            (HEADER_SHARED_KEY, &shared_key),
        ];
        for (header, value) in headers {
            let value =
                MetadataValue::try_from(value.as_str()).map_err(|_| SessionHostError::Header { header })?;
            request.metadata_mut().insert(header, value);
        }
        for method in offered.iter().chain(methods::HEALTH) {
            request
                .metadata_mut()
                .append(HEADER_METHOD, MetadataValue::from_static(method));
        }
        let (_, health) = tonic_health::server::health_reporter();
        services.add_service(health);
        let refused = |status| SessionHostError::Refused(Box::new(status));
        let incoming = control.session(request).await.map_err(refused)?.into_inner();
        serve_over(services.routes(), MessageIo::new(incoming, outgoing)).await?;
        Ok(())
    }
}

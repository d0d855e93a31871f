//! What clients decide during a build: whether a source may be used, and what becomes of a result.

use std::collections::BTreeMap;

use api::pb::exporter::exporter_client::ExporterClient;
use api::pb::policysession::check_policy_response::Result as Answer;
use api::pb::policysession::policy_verifier_client::PolicyVerifierClient;
use api::pb::sourcepolicy::PolicyAction;
use api::pb::{exporter, policysession as policy};
use api::session::methods;
use api::transport::MAX_MESSAGE_BYTES;
use bytes::Bytes;
use engine::bridge::{PolicyAnswer, PolicyQuestion};
use engine::session::SessionError;
use engine::solve::ExporterRequest;
use tonic::{Code, Status};

use super::connection::Connection;
use crate::meta::{meta_request, meta_response};

fn refused(message: impl Into<String>) -> SessionError {
    SessionError::Refused {
        message: message.into(),
    }
}

fn decision(decision: policy::DecisionResponse) -> Result<PolicyAnswer, SessionError> {
    match PolicyAction::try_from(decision.action) {
        Ok(PolicyAction::Allow) => Ok(PolicyAnswer::Allow),
        Ok(PolicyAction::Deny) => Ok(PolicyAnswer::Deny {
            messages: decision
                .deny_messages
                .into_iter()
                .map(|deny| deny.message)
                .collect(),
        }),
        Ok(PolicyAction::Convert) => decision
            .update
            .map(PolicyAnswer::Convert)
            .ok_or_else(|| refused("convert action requires updated source")),
        Err(_) => Err(refused(format!("unknown policy action {}", decision.action))),
    }
}

fn answer(response: policy::CheckPolicyResponse) -> Result<PolicyAnswer, SessionError> {
    match response.result {
        Some(Answer::Decision(made)) => decision(made),
        Some(Answer::Request(request)) => {
            let (op, request) = meta_request(request).map_err(|error| refused(error.to_string()))?;
            let request = Box::new(request);
            Ok(PolicyAnswer::Ask { op, request })
        }
        None => Err(refused("no decision in policy response")),
    }
}

/// Whether a client says that it has no part in a decision.
fn is_abstention(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unimplemented)
}

impl Connection {
    pub(super) async fn ask_policy(&self, question: &PolicyQuestion) -> Result<PolicyAnswer, SessionError> {
        let method = methods::CHECK_POLICY;
        self.require(method)?;
        let request = policy::CheckPolicyRequest {
            platform: question.platform.clone(),
            source: Some(meta_response(question.source.clone())),
            ..Default::default()
        };
        let mut client = PolicyVerifierClient::new(self.channel())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let response = self.call(method, "", client.check_policy(request)).await?;
        answer(response.into_inner())
    }

    pub(super) async fn ask_exporters(
        &self,
        metadata: &BTreeMap<String, Bytes>,
        refs: Vec<String>,
    ) -> Result<Vec<ExporterRequest>, SessionError> {
        let method = methods::FIND_EXPORTERS;
        if !self.supports_method(method) {
            return Ok(Vec::new());
        }
        let request = exporter::FindExportersRequest {
            metadata: metadata.clone(),
            refs,
        };
        let mut client = ExporterClient::new(self.channel())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let call = async {
            match client.find_exporters(request).await {
                Err(status) if is_abstention(&status) => Ok(Vec::new()),
                response => Ok(response?.into_inner().exporters),
            }
        };
        let found = self.call(method, "", call).await?.into_iter();
        Ok(found
            .map(|wanted| ExporterRequest {
                kind: wanted.r#type,
                attrs: wanted.attrs,
            })
            .collect())
    }

    pub(super) async fn tell_exported(
        &self,
        response: &BTreeMap<String, String>,
    ) -> Result<(), SessionError> {
        let method = methods::FINALIZE_EXPORT;
        if !self.supports_method(method) {
            return Ok(());
        }
        let request = exporter::FinalizeExportRequest {
            exporter_response: response.clone(),
        };
        let mut client = ExporterClient::new(self.channel()).max_encoding_message_size(MAX_MESSAGE_BYTES);
        let call = async {
            match client.finalize_export(request).await {
                Err(status) if is_abstention(&status) => Ok(()),
                response => response.map(drop),
            }
        };
        self.call(method, "", call).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use api::pb::control::BytesMessage;
    use api::pb::exporter::exporter_server::{Exporter, ExporterServer};
    use api::pb::policysession::policy_verifier_server::{PolicyVerifier, PolicyVerifierServer};
    use api::session::{HEADER_ID, HEADER_METHOD, SessionConn};
    use api::transport::{MessageIo, serve_over};
    use futures_util::StreamExt as _;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;
    use tokio_util::task::{AbortOnDropHandle, TaskTracker};
    use tonic::metadata::MetadataMap;
    use tonic::{Request, Response};

    use super::*;

    /// A client that denies, chooses one exporter, and remembers what it is told.
    #[derive(Clone, Default)]
    struct Client {
        asked: Arc<Mutex<Vec<policy::CheckPolicyRequest>>>,
        told: Arc<Mutex<BTreeMap<String, String>>>,
        abstains: bool,
    }

    #[tonic::async_trait]
    impl PolicyVerifier for Client {
        async fn check_policy(
            &self,
            request: Request<policy::CheckPolicyRequest>,
        ) -> Result<Response<policy::CheckPolicyResponse>, Status> {
            self.asked.lock().unwrap().push(request.into_inner());
            Ok(Response::new(decided(PolicyAction::Deny as i32)))
        }
    }

    #[tonic::async_trait]
    impl Exporter for Client {
        async fn find_exporters(
            &self,
            request: Request<exporter::FindExportersRequest>,
        ) -> Result<Response<exporter::FindExportersResponse>, Status> {
            if self.abstains {
                return Err(Status::unavailable("no"));
            }
            let attrs = request
                .into_inner()
                .refs
                .into_iter()
                .map(|id| ("ref".to_owned(), id));
            let exporters = vec![exporter::ExporterRequest {
                r#type: "oci".to_owned(),
                attrs: attrs.collect(),
            }];
            Ok(Response::new(exporter::FindExportersResponse { exporters }))
        }

        async fn finalize_export(
            &self,
            request: Request<exporter::FinalizeExportRequest>,
        ) -> Result<Response<exporter::FinalizeExportResponse>, Status> {
            if self.abstains {
                return Err(Status::unimplemented("no"));
            }
            let response = request.into_inner().exporter_response;
            let is_wrong = response.contains_key("wrong");
            *self.told.lock().unwrap() = response;
            if is_wrong {
                return Err(Status::unknown("not so"));
            }
            Ok(Response::new(exporter::FinalizeExportResponse {}))
        }
    }

    /// Connects a client that announces some of its methods.
    async fn connect(client: &Client, methods: &[&str]) -> (Connection, AbortOnDropHandle<()>) {
        let (to_client, from_daemon) = mpsc::channel(8);
        let (to_daemon, from_client) = mpsc::channel::<BytesMessage>(8);
        let mut routes = tonic::service::Routes::builder();
        routes.add_service(PolicyVerifierServer::new(client.clone()));
        routes.add_service(ExporterServer::new(client.clone()));
        let io = MessageIo::new(ReceiverStream::new(from_daemon), to_daemon);
        let serving = tokio::spawn(async move {
            // It ends with the test.
            let _ = serve_over(routes.routes(), io).await;
        });
        let mut headers = MetadataMap::new();
        headers.insert(HEADER_ID, "client".parse().unwrap());
        for method in methods {
            headers.append(HEADER_METHOD, method.parse().unwrap());
        }
        let incoming = ReceiverStream::new(from_client).map(Ok);
        let inner = SessionConn::accept(&headers, incoming, to_client).await.unwrap();
        (
            Connection::new(inner, TaskTracker::new()),
            AbortOnDropHandle::new(serving),
        )
    }

    #[tokio::test]
    async fn clients_are_asked_in_their_own_words() {
        let client = Client::default();
        let (connection, _serving) = connect(
            &client,
            &[
                methods::CHECK_POLICY,
                methods::FIND_EXPORTERS,
                methods::FINALIZE_EXPORT,
            ],
        )
        .await;
        let mut question = PolicyQuestion::default();
        question.source.op.identifier = "docker-image://docker.io/library/alpine:latest".to_owned();
        let answer = connection.ask_policy(&question).await.unwrap();
        assert!(matches!(answer, PolicyAnswer::Deny { messages } if messages == ["no"]));
        let asked = client.asked.lock().unwrap().clone();
        let source = asked[0].source.clone().unwrap();
        assert_eq!(source.source.unwrap().identifier, question.source.op.identifier);
        assert!(source.image.is_none());

        let found = connection
            .ask_exporters(&BTreeMap::new(), vec!["id".to_owned()])
            .await
            .unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].kind.as_str(), found[0].attrs["ref"].as_str()),
            ("oci", "id")
        );
        let response = |key: &str| BTreeMap::from([(key.to_owned(), "x".to_owned())]);
        connection.tell_exported(&response("right")).await.unwrap();
        assert_eq!(*client.told.lock().unwrap(), response("right"));
        let error = connection.tell_exported(&response("wrong")).await.unwrap_err();
        assert_eq!(error.to_string(), "not so");
    }

    #[tokio::test]
    async fn who_chooses_nothing_is_no_obstacle_but_who_cannot_allow_does_not() {
        let client = Client {
            abstains: true,
            ..Client::default()
        };
        for announced in [&[methods::FIND_EXPORTERS, methods::FINALIZE_EXPORT][..], &[]] {
            let (connection, _serving) = connect(&client, announced).await;
            let found = connection
                .ask_exporters(&BTreeMap::new(), Vec::new())
                .await
                .unwrap();
            assert!(found.is_empty());
            connection.tell_exported(&BTreeMap::new()).await.unwrap();
            let unasked = connection.ask_policy(&PolicyQuestion::default()).await;
            assert!(matches!(unasked, Err(SessionError::Unsupported { .. })));
        }
    }

    fn decided(action: i32) -> policy::CheckPolicyResponse {
        policy::CheckPolicyResponse {
            result: Some(Answer::Decision(policy::DecisionResponse {
                action,
                deny_messages: vec![policy::DenyMessage {
                    message: "no".to_owned(),
                }],
                update: None,
            })),
        }
    }

    #[test]
    fn only_a_decision_to_allow_allows() {
        assert!(matches!(
            answer(decided(PolicyAction::Allow as i32)),
            Ok(PolicyAnswer::Allow)
        ));
        match answer(decided(PolicyAction::Deny as i32)) {
            Ok(PolicyAnswer::Deny { messages }) => assert_eq!(messages, ["no"]),
            other => panic!("{other:?}"),
        }
        for action in [PolicyAction::Convert as i32, 9] {
            assert!(answer(decided(action)).is_err());
        }
        assert!(answer(policy::CheckPolicyResponse::default()).is_err());
    }

    #[test]
    fn a_checksum_that_is_not_known_is_not_another() {
        let request = api::pb::gateway::ResolveSourceMetaRequest {
            source: Some(api::pb::pb::SourceOp::default()),
            http: Some(api::pb::gateway::ResolveSourceHttpRequest {
                checksum_request: Some(api::pb::gateway::ChecksumRequest {
                    algo: 99,
                    suffix: Bytes::new(),
                }),
            }),
            ..Default::default()
        };
        let error = answer(policy::CheckPolicyResponse {
            result: Some(Answer::Request(request)),
        });
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("unsupported checksum algorithm")
        );
    }
}

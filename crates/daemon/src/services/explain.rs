//! `cooper.v1.Explain`: why the steps of a build ran.

use std::sync::Arc;
use std::time::SystemTime;

use api::pb::control::BuildHistoryRecord;
use api::pb::explain as pb;
use api::pb::explain::explain_server::{Explain, ExplainServer};
use api::transport::MAX_MESSAGE_BYTES;
use engine::Engine;
use engine::explanation::Explanation;
use engine::job::JobId;
use engine::progress::ExplanationSubscription;
use futures_util::{StreamExt as _, stream};
use tonic::{Request, Response, Status};

use super::explanations::{Explanations, explanation, is_telling};
use super::failure::lookup_status;
use super::history::History;
use super::{Answers, system_time};

/// The build that was started last.
const LATEST: &str = "latest";
/// Explanations in one message.
const PER_MESSAGE: usize = 256;

/// What the service works with.
#[derive(Clone, Debug)]
pub struct ExplainService {
    /// Builds that run.
    pub engine: Engine,
    /// Builds that are remembered.
    pub history: History,
    /// What is kept of them.
    pub explanations: Explanations,
}

impl ExplainService {
    /// Makes the gRPC service.
    pub fn server(self) -> ExplainServer<Self> {
        ExplainServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Finds the record of a build.
    fn find(&self, wanted: &str) -> Result<BuildHistoryRecord, Status> {
        let record = |id: &str| {
            let (events, _) = self.history.listen(id, false);
            events.into_iter().next_back().and_then(|event| event.record)
        };
        if wanted.is_empty() {
            return Err(Status::invalid_argument("the request names no build"));
        }
        if let Some(found) = record(wanted) {
            return Ok(found);
        }
        match wanted {
            LATEST => record("").ok_or_else(|| Status::not_found("no build is remembered")),
            _ => Err(Status::not_found(format!("no build {wanted} is remembered"))),
        }
    }

    async fn read(&self, id: &str) -> Result<Option<pb::KeptExplanations>, Status> {
        let (explanations, id) = (self.explanations.clone(), id.to_owned());
        let kept = tokio::task::spawn_blocking(move || explanations.read(&id)).await;
        let kept = kept.map_err(|_| Status::internal("the work was aborted"))?;
        kept.map_err(|error| Status::unknown(engine::error::chain_text(&error)))
    }

    async fn kept(&self, record: BuildHistoryRecord) -> Result<Vec<pb::Explanation>, Status> {
        match self.read(&record.r#ref).await? {
            Some(kept) => Ok(kept.explanations),
            None if self.explanations.may_be_forgotten(ended(&record)) => Err(Status::not_found(format!(
                "why steps of build {} ran is not known any more: it is kept for the newest builds only",
                record.r#ref
            ))),
            None => Ok(Vec::new()),
        }
    }
}

fn ended(record: &BuildHistoryRecord) -> SystemTime {
    match &record.completed_at {
        Some(at) => system_time(Some(at)),
        None => SystemTime::now(),
    }
}

fn message(id: &str, explanations: Vec<pb::Explanation>) -> pb::ExplanationsResponse {
    pb::ExplanationsResponse {
        r#ref: id.to_owned(),
        explanations,
    }
}

fn messages(id: &str, explanations: Vec<pb::Explanation>) -> Vec<Result<pb::ExplanationsResponse, Status>> {
    // There is one at least: it tells which build is meant.
    let mut all = vec![Ok(message(id, Vec::new()))];
    let pieces = explanations.chunks(PER_MESSAGE);
    all.extend(pieces.map(|piece| Ok(message(id, piece.to_vec()))));
    all
}

fn converted(found: &[Arc<Explanation>]) -> Vec<pb::Explanation> {
    found.iter().map(|found| explanation(found)).collect()
}

/// Follows a build that runs.
fn follow(id: String, subscription: ExplanationSubscription) -> Answers<pb::ExplanationsResponse> {
    let first = stream::iter(messages(&id, Vec::new()));
    let later = stream::unfold(subscription, |mut subscription| async {
        let found = subscription.next().await?;
        Some((found, subscription))
    });
    let later =
        later.flat_map(move |found| stream::iter(messages(&id, converted(&found)).into_iter().skip(1)));
    Box::pin(first.chain(later))
}

#[tonic::async_trait]
impl Explain for ExplainService {
    type ExplanationsStream = Answers<pb::ExplanationsResponse>;

    async fn explanations(
        &self,
        request: Request<pb::ExplanationsRequest>,
    ) -> Result<Response<Self::ExplanationsStream>, Status> {
        let request = request.into_inner();
        let job = JobId(request.r#ref.clone());
        if request.wait && self.engine.job_progress(&job).is_none() {
            // Waits for some seconds.
            let begun = self.engine.status(&job).await;
            begun.map_err(|error| lookup_status(&error))?;
        }
        if request.wait
            && let Some(progress) = self.engine.job_progress(&job)
        {
            let answers = follow(request.r#ref, progress.follow_explanations());
            return Ok(Response::new(answers));
        }
        let record = match self.find(&request.r#ref) {
            Ok(record) => record,
            // The history may remember fewer builds than are explained.
            Err(unknown) => {
                let kept = self.read(&request.r#ref).await?.ok_or(unknown)?;
                let found = messages(&kept.r#ref, kept.explanations);
                return Ok(Response::new(Box::pin(stream::iter(found))));
            }
        };
        let id = record.r#ref.clone();
        if let Some(progress) = self.engine.job_progress(&JobId(id.clone())) {
            if record.completed_at.is_none() {
                return Ok(Response::new(follow(id, progress.follow_explanations())));
            }
            let found = progress.explanations();
            let found = if is_telling(&found) {
                converted(&found)
            } else {
                Vec::new()
            };
            return Ok(Response::new(Box::pin(stream::iter(messages(&id, found)))));
        }
        let kept = self.kept(record).await?;
        Ok(Response::new(Box::pin(stream::iter(messages(&id, kept)))))
    }
}

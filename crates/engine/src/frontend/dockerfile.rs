//! The built-in Dockerfile frontend: drives the pure conversion and gives it what it asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::UNIX_EPOCH;

use ::dockerfile::{
    Answer, AnswerError, AttestationOutcome, BuildOutcome, Conversion, Failure, FailureKind, FilesNeed,
    Forward, ImageAnswer, ImageConfigNeed, Need, Outcome, Request, SourceAnswer, SourceMetadataNeed, Step,
    Warning,
};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::join_all;
use llb::pb;
use oci::Platform;

use crate::bridge::{
    Attestation, AttestationKind, Bridge, BridgeRequest, BuildRef, BuildResult, CacheOption, FileRange,
    Frontend, FrontendRequest, MetaRequest, WarnOptions,
};
use crate::error::{BuildError, ErrorKind, SourceRange};
use crate::frontend::{gateway, newest};

/// Most rounds of needs and answers: a Dockerfile needs its own text, its ignore file, its images and their contexts.
pub(super) const MAX_ROUNDS: usize = 64;

/// Name under which clients ask for this frontend.
pub const NAME: &str = "dockerfile.v0";

/// The frontend `dockerfile.v0`.
#[derive(Clone, Debug)]
pub struct DockerfileFrontend {
    platforms: Vec<Platform>,
    capabilities: BTreeSet<String>,
}

impl DockerfileFrontend {
    /// Makes the frontend for a worker that runs these platforms, the preferred one first, and understands these LLB
    /// capabilities.
    pub fn new(platforms: Vec<Platform>, capabilities: BTreeSet<String>) -> Self {
        Self {
            platforms,
            capabilities,
        }
    }
}

#[async_trait]
impl Frontend for DockerfileFrontend {
    async fn solve(&self, bridge: &Bridge, request: FrontendRequest) -> Result<BuildResult, BuildError> {
        let session = bridge
            .sessions()
            .ids()
            .first()
            .map(|id| id.0.clone())
            .unwrap_or_default();
        let mut run = Run::new(bridge);
        let mut conversion = Conversion::new(Request {
            options: request.opts,
            session_id: session,
            inputs: request.inputs,
            llb_capabilities: self.capabilities.clone(),
            worker_platforms: self.platforms.clone(),
        });
        let mut answers = Vec::new();
        for _ in 0..MAX_ROUNDS {
            let step = conversion
                .step(std::mem::take(&mut answers))
                .map_err(|failure| run.failed(*failure))?;
            match step {
                Step::Needs(needs) => answers = run.answer(needs).await,
                Step::Done(outcome) => return run.finish(*outcome).await,
            }
        }
        Err(BuildError::internal(
            "the Dockerfile's conversion does not come to an end",
        ))
    }
}

/// One run of the frontend.
pub(super) struct Run<'a> {
    bridge: &'a Bridge,
    /// Errors of answers, by their token.
    causes: Vec<BuildError>,
}

impl<'a> Run<'a> {
    pub(super) fn new(bridge: &'a Bridge) -> Self {
        Self {
            bridge,
            causes: Vec::new(),
        }
    }

    /// Answers needs at the same time.
    pub(super) async fn answer(&mut self, needs: Vec<Need>) -> Vec<Answer> {
        let bridge = self.bridge;
        let answered = join_all(needs.into_iter().map(|need| answer(bridge, need))).await;
        answered.into_iter().map(|found| self.answer_of(found)).collect()
    }

    fn answer_of(&mut self, found: Result<Found, BuildError>) -> Answer {
        match found {
            Ok(Found::Answer(answer)) => answer,
            Ok(Found::Files(files)) => Answer::Files(
                files
                    .into_iter()
                    .map(|file| file.map_err(|error| self.cause(error)))
                    .collect(),
            ),
            Err(error) => Answer::Failed(self.cause(error)),
        }
    }

    fn cause(&mut self, error: BuildError) -> AnswerError {
        let message = error.to_string();
        self.causes.push(error);
        AnswerError {
            message,
            token: u64::try_from(self.causes.len() - 1).unwrap_or(u64::MAX),
        }
    }

    /// Shows the warnings of a failure and turns it into an error, of the same cause if an answer was it.
    pub(super) fn failed(&self, failure: Failure) -> BuildError {
        self.warn(failure.warnings);
        let cause = failure
            .cause
            .and_then(|token| usize::try_from(token).ok())
            .and_then(|at| self.causes.get(at));
        let mut error = match cause {
            Some(cause) => cause.clone().with_message(failure.message),
            None => BuildError::new(ErrorKind::User, failure.message),
        };
        error = match failure.kind {
            FailureKind::User => error,
            FailureKind::UnsupportedSubrequest(name) => error.with_unsupported_subrequest(name),
            FailureKind::UnsupportedCapability(name) => error.with_unsupported_capability(name),
        };
        error.with_sources(failure.sources.into_iter().map(source_range))
    }

    fn warn(&self, warnings: Vec<Warning>) {
        for warning in warnings {
            let place = source_range(warning.source);
            let options = WarnOptions {
                level: warning.level,
                source: Some(place.source),
                ranges: place.ranges,
                detail: warning.detail.into_iter().map(Bytes::from).collect(),
                url: warning.url,
            };
            self.bridge.warn(warning.vertex, &warning.short, options);
        }
    }

    async fn finish(self, outcome: Outcome) -> Result<BuildResult, BuildError> {
        match outcome {
            Outcome::Build(build) => self.build(build).await,
            Outcome::Metadata(found) => {
                self.warn(found.warnings);
                Ok(BuildResult {
                    metadata: bytes_map(found.metadata),
                    ..BuildResult::default()
                })
            }
            Outcome::Forward(forward) => self.forward(forward).await,
        }
    }

    async fn build(self, outcome: BuildOutcome) -> Result<BuildResult, BuildError> {
        self.warn(outcome.warnings);
        let imports: Vec<CacheOption> = outcome
            .cache_imports
            .into_iter()
            .map(|import| CacheOption {
                kind: import.kind,
                attrs: import.attributes,
            })
            .collect();
        let mut result = BuildResult {
            metadata: bytes_map(outcome.metadata),
            ..BuildResult::default()
        };
        for platform in outcome.results {
            let reference = solve(self.bridge, platform.definition, &imports).await?;
            if outcome.multi_platform {
                result.refs.insert(platform.id.clone(), reference);
            } else {
                result.single = reference;
            }
            let mut attestations = Vec::with_capacity(platform.attestations.len());
            for attestation in platform.attestations {
                attestations.push(attest(self.bridge, attestation, &imports).await?);
            }
            if !attestations.is_empty() {
                result.attestations.insert(platform.id, attestations);
            }
        }
        Ok(result)
    }

    async fn forward(self, forward: Forward) -> Result<BuildResult, BuildError> {
        let request = BridgeRequest {
            frontend: gateway::NAME.to_owned(),
            frontend_opts: forward.options,
            frontend_inputs: forward.inputs,
            ..BridgeRequest::default()
        };
        Box::pin(self.bridge.solve(request)).await.map_err(|error| {
            if !error.sources().is_empty() {
                return error;
            }
            let error = match forward.error_prefix {
                Some(prefix) => error.context(prefix),
                None => error,
            };
            error.with_sources(forward.source.map(source_range))
        })
    }
}

async fn solve(
    bridge: &Bridge,
    definition: pb::Definition,
    imports: &[CacheOption],
) -> Result<Option<BuildRef>, BuildError> {
    let request = BridgeRequest {
        definition: Some(definition),
        cache_imports: imports.to_vec(),
        ..BridgeRequest::default()
    };
    Ok(Box::pin(bridge.solve(request)).await?.single)
}

async fn attest(
    bridge: &Bridge,
    attestation: AttestationOutcome,
    imports: &[CacheOption],
) -> Result<Attestation<BuildRef>, BuildError> {
    Ok(Attestation {
        kind: AttestationKind::Bundle,
        metadata: bytes_map(attestation.metadata),
        reference: solve(bridge, attestation.definition, imports).await?,
        path: String::new(),
        content: None,
        predicate_type: attestation.predicate_type,
        subjects: Vec::new(),
    })
}

/// What was found for a need.
enum Found {
    Answer(Answer),
    Files(Vec<Result<Vec<u8>, BuildError>>),
}

async fn answer(bridge: &Bridge, need: Need) -> Result<Found, BuildError> {
    match need {
        Need::ImageConfig(need) => image_config(bridge, need).await.map(Found::Answer),
        Need::Files(need) => files(bridge, need).await.map(Found::Files),
        Need::SourceMetadata(need) => source_metadata(bridge, need).await.map(Found::Answer),
        Need::NewestInArchive(need) => newest_in_archive(bridge, need).await.map(Found::Answer),
    }
}

async fn image_config(bridge: &Bridge, need: ImageConfigNeed) -> Result<Answer, BuildError> {
    let scheme = if need.store.is_some() {
        "oci-layout://"
    } else {
        "docker-image://"
    };
    let op = pb::SourceOp {
        identifier: format!("{scheme}{}", need.reference),
        ..pb::SourceOp::default()
    };
    let request = MetaRequest {
        platform: need.platform,
        resolve_mode: need.resolve_mode,
        log_name: need.log_name,
        layout_store: need.store.map(|store| (store.session_id, store.store_id)),
        ..MetaRequest::default()
    };
    let meta = bridge.resolve_image_config(op, &request).await?;
    let Some(reference) = meta.op.identifier.strip_prefix(scheme) else {
        return Ok(Answer::Redirected {
            updated: meta.op.identifier,
        });
    };
    let image = meta
        .image
        .ok_or_else(|| BuildError::internal(format!("{reference} has no image metadata")))?;
    Ok(Answer::Image(ImageAnswer {
        reference: reference.to_owned(),
        digest: Some(image.digest),
        config: image.config.to_vec(),
    }))
}

async fn files(bridge: &Bridge, need: FilesNeed) -> Result<Vec<Result<Vec<u8>, BuildError>>, BuildError> {
    let request = BridgeRequest {
        definition: Some(need.definition),
        evaluate: true,
        ..BridgeRequest::default()
    };
    let result = Box::pin(bridge.solve(request)).await?;
    let reference = result
        .single
        .ok_or_else(|| BuildError::user("the context is empty"))?;
    let range = FileRange {
        offset: 0,
        length: need.limit.unwrap_or(0),
    };
    let mut files = Vec::with_capacity(need.paths.len());
    for path in &need.paths {
        files.push(reference.read_file(path, range).await.map(|bytes| bytes.to_vec()));
    }
    Ok(files)
}

async fn newest_in_archive(bridge: &Bridge, need: FilesNeed) -> Result<Answer, BuildError> {
    let request = BridgeRequest {
        definition: Some(need.definition),
        evaluate: true,
        ..BridgeRequest::default()
    };
    let result = Box::pin(bridge.solve(request)).await?;
    let (Some(reference), Some(path)) = (result.single, need.paths.into_iter().next()) else {
        return Ok(Answer::Time(None));
    };
    let result = reference.result().await?;
    let found = tokio::task::spawn_blocking(move || newest::modified_s(result, &path)).await;
    found
        .map_err(|error| BuildError::internal(format!("archive: {error}")))?
        .map(Answer::Time)
}

async fn source_metadata(bridge: &Bridge, need: SourceMetadataNeed) -> Result<Answer, BuildError> {
    let request = MetaRequest {
        log_name: need.log_name,
        return_object: need.return_object,
        ..MetaRequest::default()
    };
    let meta = bridge.resolve_source_meta(need.source, &request).await?;
    let modified = meta.http.as_ref().and_then(|http| http.last_modified);
    let last_modified_s = modified
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .and_then(|since| i64::try_from(since.as_secs()).ok());
    let commit_object = meta
        .git
        .map(|git| git.commit_object.to_vec())
        .filter(|object| !object.is_empty());
    Ok(Answer::Source(SourceAnswer {
        commit_object,
        last_modified_s,
    }))
}

fn source_range(place: ::dockerfile::SourceRange) -> SourceRange {
    let position = |position: ::dockerfile::Position| {
        let (line, character) = (i32::try_from(position.line), i32::try_from(position.character));
        Some(pb::Position {
            line: line.unwrap_or(i32::MAX),
            character: character.unwrap_or(i32::MAX),
        })
    };
    let ranges = place.ranges.into_iter();
    let ranges = ranges
        .map(|range| pb::Range {
            start: position(range.start),
            end: position(range.end),
        })
        .collect();
    SourceRange {
        source: place.source,
        ranges,
    }
}

fn bytes_map(metadata: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Bytes> {
    metadata
        .into_iter()
        .map(|(key, value)| (key, Bytes::from(value)))
        .collect()
}

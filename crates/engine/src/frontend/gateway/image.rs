//! The image of a frontend: a named context of that name, or what a registry has.

use ::dockerfile::{ContextLookup, ContextStep, Request};
use llb::{ImageOptions, MarshalOptions, State, pb};
use oci::{Digest, ImageConfig};

use super::{Abilities, parse};
use crate::bridge::{Bridge, FrontendRequest, MetaRequest};
use crate::error::{BuildError, ErrorKind};
use crate::frontend::dockerfile::{MAX_ROUNDS, Run};

/// The record type of what is fetched for frontends.
const RECORD_TYPE: &str = "frontend";

/// An image that is to be run.
#[derive(Debug)]
pub(super) struct FrontendImage {
    /// Its tree.
    pub definition: pb::Definition,
    /// Its manifest, if it is known.
    pub digest: Option<Digest>,
    /// Its configuration; empty for a tree that is no image.
    pub config: ImageConfig,
}

/// Finds the image that `source` names.
///
/// # Errors
/// Those of contexts and registries.
pub(super) async fn find(
    bridge: &Bridge,
    request: &FrontendRequest,
    source: &str,
    abilities: &Abilities,
) -> Result<FrontendImage, BuildError> {
    if let Some(found) = named(bridge, request, source, abilities).await? {
        return Ok(found);
    }
    let reference = parse(source)?.with_default_tag();
    let op = pb::SourceOp {
        identifier: format!("docker-image://{reference}"),
        ..pb::SourceOp::default()
    };
    let meta = bridge.resolve_image_config(op, &MetaRequest::default()).await?;
    let identifier = &meta.op.identifier;
    let resolved = identifier.strip_prefix("docker-image://");
    let (Some(resolved), Some(image)) = (resolved, meta.image) else {
        return Err(BuildError::user(format!(
            "{identifier} is no image that a frontend can be run from"
        )));
    };
    let config: ImageConfig = serde_json::from_slice(&image.config).map_err(|error| {
        BuildError::from_source(ErrorKind::User, error)
            .context(format!("failed to read the configuration of frontend {source}"))
    })?;
    let pinned = parse(resolved)?.with_digest(image.digest).to_string();
    let options = ImageOptions {
        record_type: RECORD_TYPE.to_owned(),
        ..ImageOptions::default()
    };
    let definition = State::image(&pinned, options).marshal(&MarshalOptions::default());
    Ok(FrontendImage {
        definition: definition.map_err(|error| BuildError::from_source(ErrorKind::Internal, error))?,
        digest: Some(image.digest),
        config,
    })
}

/// Looks for a named context that replaces the image.
async fn named(
    bridge: &Bridge,
    request: &FrontendRequest,
    source: &str,
    abilities: &Abilities,
) -> Result<Option<FrontendImage>, BuildError> {
    if !request.opts.keys().any(|key| key.starts_with("context:")) {
        return Ok(None);
    }
    let sessions = bridge.sessions();
    let request = Request {
        options: request.opts.clone(),
        session_id: sessions.ids().first().map(|id| id.0.clone()).unwrap_or_default(),
        inputs: request.inputs.clone(),
        llb_capabilities: abilities.capabilities.clone(),
        worker_platforms: abilities.platforms.clone(),
    };
    let mut run = Run::new(bridge);
    let mut lookup = ContextLookup::new(request, source);
    let mut answers = Vec::new();
    for _ in 0..MAX_ROUNDS {
        let step = lookup
            .step(std::mem::take(&mut answers))
            .map_err(|failure| run.failed(*failure))?;
        match step {
            ContextStep::Needs(needs) => answers = run.answer(needs).await,
            ContextStep::Done(found) => {
                return Ok(found.map(|found| FrontendImage {
                    definition: found.definition,
                    digest: None,
                    config: found.config.unwrap_or_default(),
                }));
            }
        }
    }
    Err(BuildError::internal(
        "the search for a frontend's image does not come to an end",
    ))
}

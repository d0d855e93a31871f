//! Whether a source may be used: policies decide, then the clients that want to be asked.
//!
//! A client may first ask for what is known of the source, may allow it, deny it with words for people, or name another
//! source in its place, which is then decided on from the start. Whatever goes wrong on the way, the source is not used.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use llb::pb;
use oci::Digest;

use super::policy::policy_error;
use super::{Bridge, PolicyAnswer, PolicyQuestion, PolicySet, SourceMeta};
use crate::error::{BuildError, ErrorKind};
use crate::session::SessionId;

/// How often clients are asked about one source, in whatever it is converted to as well.
const MAX_QUESTIONS: usize = 10;
/// Sources of one definition that are decided on at once.
const MAX_AT_ONCE: usize = 64;

/// A source under the name that policies know.
#[derive(Clone, Debug)]
struct Named {
    op: pb::SourceOp,
    written: String,
    canonical: String,
}

impl Named {
    fn new(mut op: pb::SourceOp) -> Self {
        let canonical = source::canonical(&op);
        let written = std::mem::replace(&mut op.identifier, canonical.clone());
        Self {
            op,
            written,
            canonical,
        }
    }

    /// The source to use. A canonical name leaves out by which protocol and as whom a repository is reached.
    fn usable(&self) -> pb::SourceOp {
        let mut op = self.op.clone();
        if op.identifier == self.canonical && op.identifier.starts_with("git://") {
            op.identifier.clone_from(&self.written);
        }
        op
    }
}

/// Questions that may still be put to clients about one source.
#[derive(Debug)]
struct Patience(usize);

impl Patience {
    fn spend(&mut self) -> Result<(), BuildError> {
        self.0 = self
            .0
            .checked_sub(1)
            .ok_or_else(|| BuildError::user("too many policy requests"))?;
        Ok(())
    }
}

impl Bridge {
    /// The clients that want to decide on sources, once each.
    pub(super) fn policy_sessions(&self) -> BTreeSet<SessionId> {
        let jobs = self.jobs();
        let sessions = jobs
            .iter()
            .filter_map(|job| job.settings().policy_session.clone());
        sessions.collect()
    }

    /// Decides on the sources of a definition; returns the ops to use in place of those that are changed.
    pub(super) async fn decide_on_graph(
        &self,
        policies: &PolicySet,
        graph: &llb::Graph,
    ) -> Result<BTreeMap<Digest, pb::Op>, BuildError> {
        if policies.is_empty() && self.policy_sessions().is_empty() {
            return Ok(BTreeMap::new());
        }
        let sources = graph.vertices().iter().filter_map(|vertex| match &vertex.op.op {
            Some(pb::op::Op::Source(source)) => Some((vertex.digest, &vertex.op, source)),
            _ => None,
        });
        let decisions = sources.map(|(digest, op, source)| async move {
            let decided = self.decide(policies, op.platform.clone(), source.clone());
            let decided = Box::pin(decided)
                .await
                .map_err(|error| error.context("error evaluating the source policy"))?;
            let is_changed = decided != *source && decided != Named::new(source.clone()).op;
            let changed = is_changed.then(|| pb::Op {
                op: Some(pb::op::Op::Source(decided)),
                ..op.clone()
            });
            Ok::<_, BuildError>(changed.map(|op| (digest, op)))
        });
        let decisions: Vec<_> = decisions.collect();
        let decided = stream::iter(decisions).buffer_unordered(MAX_AT_ONCE);
        let decided: Vec<_> = decided.try_collect().await?;
        Ok(decided.into_iter().flatten().collect())
    }

    /// Decides on a source; returns the one to use.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] when it may not be used; those of policies, of clients and of what they ask about.
    pub(super) async fn decide(
        &self,
        policies: &PolicySet,
        platform: Option<pb::Platform>,
        source: pb::SourceOp,
    ) -> Result<pb::SourceOp, BuildError> {
        let sessions = self.policy_sessions();
        let mut patience = Patience(MAX_QUESTIONS);
        let mut source = Named::new(source);
        'changed: loop {
            policies.apply(&mut source.op).map_err(policy_error)?;
            for session in &sessions {
                let other = self
                    .ask(session, platform.clone(), &source, &mut patience)
                    .await?;
                if let Some(other) = other {
                    let renamed = Named::new(other);
                    // What is written for the same repository still says how to reach it.
                    source = if renamed.canonical == source.canonical {
                        Named {
                            op: renamed.op,
                            ..source
                        }
                    } else {
                        renamed
                    };
                    continue 'changed;
                }
            }
            return Ok(source.usable());
        }
    }

    /// Asks one client; returns the source that it wants instead.
    async fn ask(
        &self,
        session: &SessionId,
        platform: Option<pb::Platform>,
        source: &Named,
        patience: &mut Patience,
    ) -> Result<Option<pb::SourceOp>, BuildError> {
        let client = self.sessions().get(session).await?;
        let mut question = PolicyQuestion {
            platform,
            source: SourceMeta {
                op: source.op.clone(),
                ..SourceMeta::default()
            },
        };
        loop {
            patience.spend()?;
            match client.check_policy(&question).await? {
                PolicyAnswer::Allow => return Ok(None),
                PolicyAnswer::Convert(other) => return Ok(Some(other)),
                PolicyAnswer::Deny { messages } => {
                    let text = format!(
                        "source {:?} not allowed by policy: action DENY",
                        source.op.identifier
                    );
                    return Err(BuildError::new(ErrorKind::Denied, text).with_deny_messages(messages));
                }
                PolicyAnswer::Ask { op, request } => {
                    is_unchanged(&source.op, &op)?;
                    let found = Box::pin(self.find_meta(source.usable(), &request)).await;
                    question.source = found.map_err(|error| {
                        error.context("error resolving source metadata from policy request")
                    })?;
                    question.source.op = op;
                }
            }
        }
    }
}

/// Checks that a client asks about the source that it was asked about.
fn is_unchanged(source: &pb::SourceOp, asked: &pb::SourceOp) -> Result<(), BuildError> {
    if asked.identifier != source.identifier {
        return Err(BuildError::user(format!(
            "policy requested different source identifier: {:?} != {:?}",
            asked.identifier, source.identifier
        )));
    }
    if asked.attrs != source.attrs {
        return Err(BuildError::user("policy requested different source attrs"));
    }
    Ok(())
}

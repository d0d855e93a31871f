//! Blobs that their places turned out not to have, for as long as the sessions last that tried.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use build::error::{BuildError, ErrorKind};
use build::session::{SessionGroup, SessionId};
use build::unlazy::{FetchContext, LostBlob};
use cache::Provider;
use oci::Digest;

/// Blobs that are remembered; sessions that ended tell nothing any more.
const MAX_LOST: usize = 4096;

/// A blob at a place, as one session found it.
type Tried = (SessionId, Digest, Provider);

/// What was tried in vain, and why.
#[derive(Debug, Default)]
pub(super) struct LostBlobs(Mutex<BTreeMap<Tried, String>>);

/// The sessions for which something is tried; work for none of them is told apart as well.
fn sessions(group: &SessionGroup) -> impl Iterator<Item = SessionId> {
    let nobody = group.ids().is_empty().then(|| SessionId(String::new()));
    group.ids().iter().cloned().chain(nobody)
}

impl LostBlobs {
    /// Notes that a place does not give a blob. What says nothing of the place is ignored.
    pub(super) fn note(&self, ctx: &FetchContext, place: &Provider, digest: &Digest, error: &BuildError) {
        if matches!(error.kind(), ErrorKind::Canceled | ErrorKind::Internal) {
            return;
        }
        let mut lost = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lost.len() >= MAX_LOST {
            lost.clear();
        }
        for session in sessions(&ctx.sessions) {
            lost.insert((session, *digest, place.clone()), error.to_string());
        }
    }

    /// Whether one of the sessions tried in vain to have a blob from a place.
    pub(super) fn contains(&self, ctx: &FetchContext, place: &Provider, digest: &Digest) -> bool {
        let lost = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sessions(&ctx.sessions).any(|session| lost.contains_key(&(session, *digest, place.clone())))
    }

    /// Lists what the sessions tried in vain.
    pub(super) fn of(&self, group: &SessionGroup) -> Vec<LostBlob> {
        let lost = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = Vec::new();
        for session in sessions(group) {
            let own = lost.iter().filter(|((of, ..), _)| *of == session);
            found.extend(own.map(|((_, digest, place), reason)| LostBlob {
                digest: *digest,
                place: place.locator.clone(),
                reason: reason.clone(),
            }));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use build::progress::VertexProgress;
    use tokio_util::sync::CancellationToken;

    use super::*;

    #[derive(Debug)]
    struct NoSessions;

    #[async_trait::async_trait]
    impl build::session::Sessions for NoSessions {
        async fn get(
            &self,
            id: &SessionId,
        ) -> Result<std::sync::Arc<dyn build::session::Session>, build::session::SessionError> {
            Err(build::session::SessionError::NoSession {
                id: id.0.clone(),
                reason: String::new(),
            })
        }

        fn try_get(&self, _: &SessionId) -> Option<std::sync::Arc<dyn build::session::Session>> {
            None
        }
    }

    fn context(ids: &[&str]) -> FetchContext {
        let ids: Vec<SessionId> = ids.iter().map(|id| SessionId((*id).to_owned())).collect();
        let progress = VertexProgress::new(Digest::sha256("v"), String::new(), Vec::new(), None);
        let sessions = SessionGroup::new(std::sync::Arc::new(NoSessions), ids);
        FetchContext::new(progress, sessions, CancellationToken::new())
    }

    fn place(name: &str) -> Provider {
        Provider {
            scheme: "registry".to_owned(),
            locator: name.to_owned(),
        }
    }

    #[test]
    fn what_one_session_tried_in_vain_counts_for_it_alone() {
        let (lost, digest) = (LostBlobs::default(), Digest::sha256("blob"));
        let gone = BuildError::new(ErrorKind::NotFound, "not found");
        lost.note(&context(&["a", "b"]), &place("here"), &digest, &gone);
        assert!(lost.contains(&context(&["b"]), &place("here"), &digest));
        assert!(lost.contains(&context(&["c", "a"]), &place("here"), &digest));
        for (ids, at, digest) in [
            (&["c"][..], "here", digest),
            (&[][..], "here", digest),
            (&["a"][..], "there", digest),
            (&["a"][..], "here", Digest::sha256("other")),
        ] {
            assert!(!lost.contains(&context(ids), &place(at), &digest), "{ids:?} {at}");
        }
        let told = lost.of(&context(&["a"]).sessions);
        assert_eq!(
            (told.len(), told[0].place.as_str(), told[0].reason.as_str()),
            (1, "here", "not found")
        );
        lost.note(&context(&[]), &place("here"), &digest, &gone);
        assert!(lost.contains(&context(&[]), &place("here"), &digest));
    }

    #[test]
    fn what_says_nothing_of_the_place_is_not_noted() {
        let (lost, digest) = (LostBlobs::default(), Digest::sha256("blob"));
        for error in [BuildError::canceled(), BuildError::internal("no space left")] {
            lost.note(&context(&["a"]), &place("here"), &digest, &error);
        }
        assert!(!lost.contains(&context(&["a"]), &place("here"), &digest));
    }
}

//! Why vertices ran, beside what they show.

use std::sync::Arc;

use tokio::sync::watch;

use super::{JobProgress, VertexProgress};
use crate::explanation::Explanation;

/// Explanations kept per job.
const MAX_EXPLANATIONS: usize = 20_000;

impl JobProgress {
    /// Tells why a vertex runs; more than 20,000 are dropped.
    pub fn explain(&self, explanation: Arc<Explanation>) {
        let mut state = self.lock();
        if state.closed || state.explanations.len() >= MAX_EXPLANATIONS {
            return;
        }
        state.explanations.push(explanation);
        drop(state);
        self.0.changed.send_modify(|version| *version += 1);
    }

    /// Returns why vertices ran so far, in the order in which that was found out.
    pub fn explanations(&self) -> Vec<Arc<Explanation>> {
        self.lock().explanations.clone()
    }

    /// Follows the explanations from the first on.
    pub fn follow_explanations(&self) -> ExplanationSubscription {
        ExplanationSubscription {
            shared: self.clone(),
            read: 0,
            changed: self.0.changed.subscribe(),
        }
    }
}

impl VertexProgress {
    /// Tells why the vertex runs, also to jobs that join later.
    pub fn explain(&self, explanation: Explanation) {
        let explanation = Arc::new(explanation);
        let mut this = self.lock();
        for job in &this.jobs {
            job.explain(Arc::clone(&explanation));
        }
        this.explanation = Some(explanation);
    }
}

/// Follows one build's explanations.
#[derive(Debug)]
pub struct ExplanationSubscription {
    shared: JobProgress,
    read: usize,
    changed: watch::Receiver<u64>,
}

impl ExplanationSubscription {
    /// Waits for further ones; `None` when the build is over and all were read. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Vec<Arc<Explanation>>> {
        loop {
            self.changed.borrow_and_update();
            let (new, closed) = {
                let state = self.shared.lock();
                (state.explanations[self.read..].to_vec(), state.closed)
            };
            if !new.is_empty() {
                self.read += new.len();
                return Some(new);
            }
            if closed {
                return None;
            }
            self.changed.changed().await.ok()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use oci::Digest;

    use super::*;
    use crate::explanation::Reason;

    #[test]
    fn who_joins_late_is_told_as_well() {
        let vertex = Digest::sha256("v");
        let progress = VertexProgress::new(vertex, "RUN x".to_owned(), Vec::new(), None);
        let (early, late) = (JobProgress::new(), JobProgress::new());
        progress.attach(&early);
        let mut following = early.follow_explanations();
        assert!(following.next().now_or_never().is_none());
        let explanation = Explanation {
            vertex,
            name: "RUN x".to_owned(),
            reason: Reason::NeverBuilt,
            compared_at: None,
            changes: Vec::new(),
            omitted: 0,
        };
        progress.explain(explanation.clone());
        progress.attach(&late);
        for job in [&early, &late] {
            assert_eq!(job.explanations(), [Arc::new(explanation.clone())]);
        }
        assert_eq!(following.next().now_or_never().unwrap().unwrap().len(), 1);
        assert!(following.next().now_or_never().is_none());
        early.close();
        assert_eq!(following.next().now_or_never(), Some(None));
    }
}

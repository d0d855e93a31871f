//! A build whose frontend is the client itself: its calls are forwarded to the job's bridge.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use llb::pb;
use tokio::sync::watch;

use crate::bridge::{Bridge, BuildRef, BuildRefId, BuildResult, lock};
use crate::error::BuildError;

type Returned = Option<Result<BuildResult, BuildError>>;

/// The client's side of a build. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Forwarder {
    bridge: Bridge,
    inputs: Arc<BTreeMap<String, pb::Definition>>,
    refs: Arc<Mutex<BTreeMap<BuildRefId, BuildRef>>>,
    returned: Arc<watch::Sender<Returned>>,
}

impl Forwarder {
    pub(crate) fn new(bridge: Bridge, inputs: BTreeMap<String, pb::Definition>) -> Self {
        let (returned, _) = watch::channel(None);
        Self {
            bridge,
            inputs: Arc::new(inputs),
            refs: Arc::default(),
            returned: Arc::new(returned),
        }
    }

    /// Returns the job's bridge.
    pub fn bridge(&self) -> &Bridge {
        &self.bridge
    }

    /// Returns the definitions that the client gave as inputs.
    pub fn inputs(&self) -> &BTreeMap<String, pb::Definition> {
        &self.inputs
    }

    /// Remembers a ref, so that the client can name it later.
    pub fn keep(&self, reference: &BuildRef) {
        lock(&self.refs).insert(reference.id().clone(), reference.clone());
    }

    /// Finds a ref that the client names.
    pub fn find(&self, id: &BuildRefId) -> Option<BuildRef> {
        lock(&self.refs).get(id).cloned()
    }

    /// Ends the frontend's part with a result or an error. Only the first call counts.
    pub fn return_result(&self, result: Result<BuildResult, BuildError>) {
        self.returned.send_if_modified(|returned| {
            let first = returned.is_none();
            if first {
                *returned = Some(result);
            }
            first
        });
    }

    /// Waits for the client's result.
    pub(crate) async fn returned(&self) -> Result<BuildResult, BuildError> {
        let mut returned = self.returned.subscribe();
        match returned.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or_else(|| Err(BuildError::canceled())),
            Err(_) => Err(BuildError::canceled()),
        }
    }
}

//! A build whose frontend is the client itself: its calls are forwarded to the job's bridge.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex};

use llb::pb;
use tokio::sync::watch;

use crate::bridge::{Bridge, BuildContainer, BuildRef, BuildRefId, BuildResult, ContainerRequest, lock};
use crate::error::{BuildError, ErrorKind, FailedOp};
use crate::op::ResultRef;

type Returned = Option<Result<BuildResult, BuildError>>;

/// The client's containers by its names of them.
#[derive(Debug, Default)]
struct Containers {
    known: BTreeMap<String, BuildContainer>,
    /// The build has ended.
    closed: bool,
}

/// The client's side of a build. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Forwarder {
    bridge: Bridge,
    inputs: Arc<BTreeMap<String, pb::Definition>>,
    refs: Arc<Mutex<BTreeMap<BuildRefId, BuildRef>>>,
    /// What failed steps worked on and left, by the names that the client was given.
    results: Arc<Mutex<BTreeMap<String, ResultRef>>>,
    containers: Arc<Mutex<Containers>>,
    returned: Arc<watch::Sender<Returned>>,
}

impl Forwarder {
    pub(crate) fn new(bridge: Bridge, inputs: BTreeMap<String, pb::Definition>) -> Self {
        let (returned, _) = watch::channel(None);
        Self {
            bridge,
            inputs: Arc::new(inputs),
            refs: Arc::default(),
            results: Arc::default(),
            containers: Arc::default(),
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

    /// Gives names to the inputs of a failed op and to the state of its mounts, so that the client can look at them. What
    /// has no ref has no name.
    pub fn name_failed(&self, failed: &FailedOp) -> (Vec<String>, Vec<String>) {
        let mut results = lock(&self.results);
        let mut name = |result: Option<&ResultRef>| {
            let Some((result, reference)) = result.and_then(|result| Some((result, result.get()?))) else {
                return String::new();
            };
            let id = reference.id().as_str().to_owned();
            results.entry(id.clone()).or_insert_with(|| result.clone());
            id
        };
        let inputs = failed.inputs.iter().map(|input| name(Some(input))).collect();
        let mounts = failed.mounts.iter().map(|mount| name(mount.as_ref())).collect();
        (inputs, mounts)
    }

    /// Finds what the client names: a ref that it built, which is evaluated, or one of a failed op. No name is no ref.
    ///
    /// # Errors
    /// For names that nobody was given, and those of the build.
    pub async fn result(&self, id: &str) -> Result<Option<ResultRef>, BuildError> {
        if id.is_empty() {
            return Ok(None);
        }
        let known = lock(&self.results).get(id).cloned();
        if known.is_some() {
            return Ok(known);
        }
        let reference = self.find(&BuildRefId(id.to_owned()));
        let reference =
            reference.ok_or_else(|| BuildError::user(format!("return reference {id} not found")))?;
        reference.result().await.map(Some)
    }

    /// Prepares a container.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] for a name that is taken; those of [`Bridge::new_container`].
    pub async fn new_container(&self, request: ContainerRequest) -> Result<(), BuildError> {
        let id = request.id.clone();
        let taken = || BuildError::new(ErrorKind::Conflict, format!("Container {id} already exists"));
        if lock(&self.containers).known.contains_key(&id) {
            return Err(taken());
        }
        let container = self.bridge.new_container(request).await?;
        let refused = {
            let mut containers = lock(&self.containers);
            if containers.closed {
                BuildError::canceled()
            } else {
                match containers.known.entry(id.clone()) {
                    Entry::Occupied(_) => taken(),
                    Entry::Vacant(free) => {
                        free.insert(container);
                        return Ok(());
                    }
                }
            }
        };
        // It has no process whose failure could be told.
        let _ = container.release().await;
        Err(refused)
    }

    /// Finds a container.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn container(&self, id: &str) -> Result<BuildContainer, BuildError> {
        let found = lock(&self.containers).known.get(id).cloned();
        found.ok_or_else(|| {
            let text = format!("container {id:?} previously released or not created");
            BuildError::new(ErrorKind::NotFound, text)
        })
    }

    /// Ends a container and forgets it.
    ///
    /// # Errors
    /// For a name that is not known; those of [`BuildContainer::release`].
    pub async fn release_container(&self, id: &str) -> Result<(), BuildError> {
        let found = lock(&self.containers).known.remove(id);
        let missing = || BuildError::user(format!("container details for {id} not found"));
        found.ok_or_else(missing)?.release().await
    }

    /// Ends all containers and waits until they are gone.
    pub(crate) async fn release(&self) {
        for container in self.close() {
            // Clients that want to know release their containers themselves.
            let _ = container.release().await;
        }
    }

    /// Ends all containers; there will be no more. What failed ops left is let go of.
    pub(crate) fn close(&self) -> Vec<BuildContainer> {
        lock(&self.results).clear();
        let known = {
            let mut containers = lock(&self.containers);
            containers.closed = true;
            std::mem::take(&mut containers.known)
        };
        let containers: Vec<_> = known.into_values().collect();
        for container in &containers {
            container.stop();
        }
        containers
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

    /// Returns the client's result if it is there.
    pub(crate) fn already_returned(&self) -> Option<Result<BuildResult, BuildError>> {
        self.returned.borrow().clone()
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

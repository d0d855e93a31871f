//! Exporters that the client chooses once it knows the result.
//!
//! The client is told the names of the result's refs and may look at them over the build's bridge while it chooses. When
//! all is exported it is told what came of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::bridge::{Bridge, BuildRef, BuildResult, Forwarder};
use crate::engine::Engine;
use crate::error::BuildError;
use crate::job::Job;
use crate::session::{Session, SessionError};
use crate::solve::{ExporterInstance, ExporterRequest};

impl Engine {
    /// Makes exporters of requests; `first` is the index of the first in the build.
    pub(super) fn exporters(
        &self,
        first: usize,
        wanted: &[ExporterRequest],
    ) -> Result<Vec<Arc<dyn ExporterInstance>>, BuildError> {
        let made = wanted.iter().enumerate().map(|(index, wanted)| {
            let exporter = self.services().exporters.get(&wanted.kind);
            let exporter = exporter
                .ok_or_else(|| BuildError::user(format!("exporter {:?} could not be found", wanted.kind)))?;
            exporter.resolve(first + index, wanted.attrs.clone())
        });
        made.collect()
    }

    async fn client(&self, job: &Job) -> Result<Arc<dyn Session>, BuildError> {
        let Some(session) = job.session() else {
            return Err(BuildError::from(SessionError::NoSession {
                id: "this build".to_owned(),
                reason: "exporters of the session were asked for, but the build has none".to_owned(),
            }));
        };
        Ok(self.services().sessions.get(session).await?)
    }

    /// Asks the client what to do with a result; the bridge is its own meanwhile.
    pub(super) async fn chosen_exporters(
        &self,
        job: &Job,
        bridge: &Bridge,
        result: &BuildResult,
    ) -> Result<Vec<ExporterRequest>, BuildError> {
        let client = self.client(job).await?;
        let forwarder = Forwarder::new(bridge.clone(), BTreeMap::new());
        let refs: Vec<&BuildRef> = result.all_refs().collect();
        for reference in &refs {
            forwarder.keep(reference);
        }
        let names = refs.iter().map(|reference| reference.id().0.clone()).collect();
        let _forwarding = self.0.forward(job.id().clone(), forwarder.clone());
        let chosen = client.find_exporters(&result.metadata, names).await;
        forwarder.release().await;
        Ok(chosen?)
    }

    /// Tells the client what came of its build's exports.
    pub(super) async fn tell_exported(
        &self,
        job: &Job,
        response: &BTreeMap<String, String>,
    ) -> Result<(), BuildError> {
        let client = self.client(job).await?;
        Ok(client.finalize_export(response).await?)
    }
}

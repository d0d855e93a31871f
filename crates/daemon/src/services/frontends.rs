//! Frontends that run in containers: what they are told of the daemon, and the service that they call.

use std::sync::{Arc, OnceLock};

use api::pb::worker::WorkerRecord;
use api::transport::serve_over;
use async_trait::async_trait;
use engine::bridge::Forwarder;
use engine::frontend::gateway::{FrontendHost, FrontendStream};
use serde_json::json;
use tonic::service::Routes;

use super::bridge::BridgeService;

/// The product that frontends take the daemon for. They ask it to word errors and to know what may be missing.
const PRODUCT: &str = "buildkit";

/// Serves frontends. Made before the worker is known; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct FrontendServer {
    worker: Arc<OnceLock<WorkerRecord>>,
}

impl FrontendServer {
    /// Says which worker frontends run on. Only the first call counts.
    pub fn set_worker(&self, worker: WorkerRecord) {
        // Nobody else knows it.
        let _ = self.worker.set(worker);
    }
}

#[async_trait]
impl FrontendHost for FrontendServer {
    fn environment(&self) -> Vec<String> {
        let workers: Vec<_> = self.worker.get().map(worker_json).into_iter().collect();
        vec![
            format!("BUILDKIT_WORKERS={}", serde_json::Value::from(workers)),
            format!("BUILDKIT_EXPORTEDPRODUCT={PRODUCT}"),
        ]
    }

    async fn serve(&self, forwarder: Forwarder, stream: Box<dyn FrontendStream>) {
        let worker = self.worker.get().cloned().unwrap_or_default();
        let (_, health) = tonic_health::server::health_reporter();
        let mut routes = Routes::builder();
        routes
            .add_service(BridgeService::of(forwarder, worker).server())
            .add_service(health);
        if let Err(error) = serve_over(routes.routes(), stream).await {
            tracing::debug!(%error, "a frontend's connection failed");
        }
    }
}

/// A worker as BuildKit's client library writes it.
fn worker_json(worker: &WorkerRecord) -> serde_json::Value {
    let platforms = worker.platforms.iter();
    let platforms: Vec<oci::Platform> = platforms.cloned().map(crate::meta::platform).collect();
    let version = worker.buildkit_version.clone().unwrap_or_default();
    json!({
        "id": worker.id,
        "labels": worker.labels,
        "platforms": platforms,
        "gcPolicy": null,
        "buildkitVersion": {
            "package": version.package,
            "version": version.version,
            "revision": version.revision,
            "dockerfileVersion": version.dockerfile_version,
        },
        "cdiDevices": null,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frontends_learn_of_the_worker() {
        let server = FrontendServer::default();
        assert_eq!(server.environment()[0], "BUILDKIT_WORKERS=[]");
        let facts = crate::worker::WorkerFacts {
            platforms: vec![oci::Platform::new("linux", "arm64")],
            ..Default::default()
        };
        server.set_worker(crate::worker::record("w1".to_owned(), facts));
        let environment = server.environment();
        let workers = environment[0].strip_prefix("BUILDKIT_WORKERS=").unwrap();
        let workers: serde_json::Value = serde_json::from_str(workers).unwrap();
        assert_eq!(workers[0]["id"], "w1");
        assert_eq!(
            workers[0]["platforms"],
            json!([{"architecture": "arm64", "os": "linux"}])
        );
        assert_eq!(workers[0]["buildkitVersion"]["version"], crate::worker::VERSION);
        assert_eq!(environment[1], "BUILDKIT_EXPORTEDPRODUCT=buildkit");
    }
}

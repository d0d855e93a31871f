//! Lets a scanner image list what a result contains.

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;
use export::platforms::platforms;
use llb::{Constraints, ImageOptions, MarshalOptions, Mount, ResolveMode, State, pb};
use oci::{ImageConfig, Platform};

use super::{REASON_KEY, wanted};
use crate::bridge::{
    Attestation, AttestationKind, Bridge, BridgeRequest, BuildRef, BuildResult, MetaRequest,
};
use crate::error::{BuildError, ErrorKind};
use crate::solve::{ResultProcessor, SolveRequest};

/// The scanner that is used when none is named.
pub(super) const DEFAULT_GENERATOR: &str = "docker/buildkit-syft-scanner:stable-1";

const PREDICATE_SPDX: &str = "https://spdx.dev/Document";
const CORE: &str = "sbom";
const SOURCE_DIR: &str = "/run/src/core/sbom";
const OUT_DIR: &str = "/run/out/";

/// Runs a scanner over results where the client wants it and the frontend did not do it already.
#[derive(Clone, Copy, Debug, Default)]
pub struct SbomProcessor;

/// A scanner image that is known to be runnable.
struct Scanner {
    image: String,
    config: ImageConfig,
    platform: Platform,
    params: BTreeMap<String, String>,
    ignore_cache: bool,
}

#[async_trait]
impl ResultProcessor for SbomProcessor {
    async fn process(
        &self,
        bridge: &Bridge,
        request: &SolveRequest,
        mut result: BuildResult,
    ) -> Result<BuildResult, BuildError> {
        let Some(params) = wanted(&request.frontend_opts)?.sbom else {
            return Ok(result);
        };
        let mut attested = result.attestations.values().flatten();
        if attested.any(|attestation| attestation.predicate_type == PREDICATE_SPDX) {
            return Ok(result);
        }
        let scanner = Box::pin(Scanner::resolve(bridge, request, params)).await?;
        for entry in platforms(&result.metadata)? {
            let Some(reference) = result.find(&entry.id).cloned() else {
                continue;
            };
            let attestation = Box::pin(scanner.scan(bridge, &entry.id, &reference)).await?;
            result.attestations.entry(entry.id).or_default().push(attestation);
        }
        Ok(result)
    }
}

impl Scanner {
    async fn resolve(
        bridge: &Bridge,
        request: &SolveRequest,
        mut params: BTreeMap<String, String>,
    ) -> Result<Self, BuildError> {
        let generator = params
            .remove("generator")
            .unwrap_or_else(|| DEFAULT_GENERATOR.to_owned());
        let reference = oci::Reference::parse(&generator).map_err(|error| {
            BuildError::from_source(ErrorKind::User, error)
                .context(format!("failed to parse sbom generator {generator}"))
        })?;
        let image = reference.with_default_tag().to_string();
        let platform = Platform::host().normalized();
        let opts = &request.frontend_opts;
        let meta = MetaRequest {
            platform: Some(platform.clone()),
            resolve_mode: opts.get("image-resolve-mode").cloned().unwrap_or_default(),
            ..MetaRequest::default()
        };
        let op = pb::SourceOp {
            identifier: format!("docker-image://{image}"),
            ..pb::SourceOp::default()
        };
        let resolved = bridge.resolve_image_config(op, &meta).await?;
        let image = resolved
            .op
            .identifier
            .strip_prefix("docker-image://")
            .unwrap_or(&image)
            .to_owned();
        let config = resolved.image.map(|image| image.config).unwrap_or_default();
        let config: ImageConfig = serde_json::from_slice(&config).map_err(|error| {
            BuildError::from_source(ErrorKind::User, error).context(format!("failed to read scanner {image}"))
        })?;
        if config.config.entrypoint.is_empty() && config.config.cmd.is_empty() {
            return Err(BuildError::user(format!("scanner {image} does not have cmd")));
        }
        let ignore_cache = opts.get("no-cache").is_some_and(String::is_empty);
        Ok(Self {
            image,
            config,
            platform,
            params,
            ignore_cache,
        })
    }

    async fn scan(
        &self,
        bridge: &Bridge,
        name: &str,
        reference: &BuildRef,
    ) -> Result<Attestation<BuildRef>, BuildError> {
        let definition = Some(self.definition(name, reference.definition())?);
        let built = bridge
            .solve(BridgeRequest {
                definition,
                ..BridgeRequest::default()
            })
            .await?;
        let metadata = [
            (REASON_KEY.to_owned(), Bytes::from_static(b"sbom")),
            ("sbom-core".to_owned(), Bytes::from_static(CORE.as_bytes())),
        ];
        Ok(Attestation {
            kind: AttestationKind::Bundle,
            metadata: metadata.into(),
            reference: built.single,
            path: String::new(),
            content: None,
            predicate_type: PREDICATE_SPDX.to_owned(),
            subjects: Vec::new(),
        })
    }

    /// The scanner's run, with the result mounted at one place and its report expected at another.
    fn definition(&self, name: &str, scanned: &pb::Definition) -> Result<pb::Definition, BuildError> {
        let invalid = |error: llb::GraphError| BuildError::from_source(ErrorKind::Internal, error);
        let scanned = State::from_definition(scanned).map_err(invalid)?;
        let constraints = Constraints {
            platform: Some(self.platform.clone()),
            ..Constraints::new()
        };
        let options = ImageOptions {
            resolve_mode: ResolveMode::Default,
            constraints,
            ..ImageOptions::default()
        };
        let args = self
            .config
            .config
            .entrypoint
            .iter()
            .chain(&self.config.config.cmd)
            .cloned();
        let mut settings =
            Constraints::new().custom_name(format!("[{name}] generating sbom using {}", self.image));
        if self.ignore_cache {
            settings = settings.ignore_cache();
        }
        let scratch = State::scratch();
        let run = State::image(&self.image, options)
            .dir(&self.config.config.working_dir)
            .run(args);
        let run = run.with(|state| {
            let fixed = [
                ("BUILDKIT_SCAN_DESTINATION", OUT_DIR),
                ("BUILDKIT_SCAN_SOURCE", SOURCE_DIR),
            ];
            let own = self
                .config
                .config
                .env
                .iter()
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")));
            let state = own
                .chain(fixed)
                .fold(state.clone(), |state, (key, value)| state.env(key, value));
            let params = self.params.iter();
            params.fold(state, |state, (key, value)| {
                state.env(&format!("BUILDKIT_SCAN_{key}"), value)
            })
        });
        let run = run
            .mount(Mount::tmpfs("/tmp", 0))
            .mount(Mount::new(SOURCE_DIR, &scanned).readonly())
            .mount(Mount::new(OUT_DIR, &scratch))
            .constraints(&settings)
            .done();
        let report = run
            .mount(OUT_DIR)
            .ok_or_else(|| BuildError::internal("the scanner has no output"))?;
        let options = MarshalOptions {
            platform: self.platform.clone(),
            ..MarshalOptions::default()
        };
        report
            .marshal(&options)
            .map_err(|error| BuildError::from_source(ErrorKind::Internal, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scanner_sees_the_result_and_leaves_a_report() {
        let mut config = ImageConfig::default();
        config.config.entrypoint = vec!["/bin/scan".to_owned()];
        let scanner = Scanner {
            image: "example.com/scanner:1".to_owned(),
            config,
            platform: Platform::parse("linux/amd64").unwrap(),
            params: [("EXTRA".to_owned(), "1".to_owned())].into(),
            ignore_cache: true,
        };
        let scanned = State::image("alpine", ImageOptions::default());
        let scanned = scanned.marshal(&MarshalOptions::default()).unwrap();
        let definition = scanner.definition("linux/amd64", &scanned).unwrap();
        let graph = llb::Graph::load(&definition).unwrap();
        let run = graph.vertex(graph.root());
        let Some(pb::op::Op::Exec(exec)) = &run.op.op else {
            panic!("{run:?}")
        };
        assert_eq!(exec.mounts.len(), 4);
        assert!(run.metadata.ignore_cache);
        let meta = exec.meta.as_ref().unwrap();
        assert!(
            meta.env.contains(&"BUILDKIT_SCAN_EXTRA=1".to_owned()),
            "{:?}",
            meta.env
        );
        assert!(meta.env.contains(&format!("BUILDKIT_SCAN_SOURCE={SOURCE_DIR}")));
    }
}

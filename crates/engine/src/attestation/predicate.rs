//! The provenance predicate as JSON, in both versions of SLSA that BuildKit writes.
//!
//! The order of fields is that of BuildKit's own documents.

use std::collections::{BTreeMap, BTreeSet};

use oci::{Descriptor, Platform, Reference};
use serde::Serialize;

use super::build_config::{BuildConfig, SourceText};
use super::capture::{Capture, Unpinned};
use super::request::{ConfigSource, Named, Offered, Parameters, Request};
use crate::bridge::Asked;

const BUILD_TYPE_V1: &str =
    "https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md";
const BUILD_TYPE_V02: &str = "https://mobyproject.org/buildkit@v1";

/// Which of BuildKit's behaviours builds have, where those differ between its versions.
pub(super) const COMPATIBILITY_VERSION: u32 = 30;

pub(super) type DigestSet = BTreeMap<String, String>;

pub(super) fn is_false(value: &bool) -> bool {
    !*value
}

/// Something that was used.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Material {
    pub uri: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub digest: DigestSet,
}

/// BuildKit's own part of the metadata.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct BuildKitMetadata {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub vcs: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceText>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub layers: BTreeMap<String, Vec<Vec<Descriptor>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkMetadata>,
}

/// How steps reached the network.
#[derive(Clone, Debug, Serialize)]
pub(super) struct NetworkMetadata {
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy: Option<ProxyMetadata>,
}

/// What a proxy could not pin.
#[derive(Clone, Debug, Serialize)]
struct ProxyMetadata {
    incomplete: BTreeSet<Unpinned>,
}

impl NetworkMetadata {
    fn new(capture: &Capture) -> Option<Self> {
        let unpinned = Some(&capture.unpinned).filter(|unpinned| !unpinned.is_empty());
        capture.proxy_network.then(|| Self {
            mode: "proxy",
            proxy: unpinned.map(|unpinned| ProxyMetadata {
                incomplete: unpinned.clone(),
            }),
        })
    }
}

/// How much of what a build depends on is written down.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// All of the request.
    request: bool,
    /// All materials.
    materials: bool,
    /// All materials, and nothing else could be reached.
    hermetic: bool,
}

/// Everything that a predicate says.
#[derive(Clone, Debug)]
pub(super) struct Predicate {
    materials: Vec<Material>,
    config_source: ConfigSource,
    parameters: Parameters,
    platform: String,
    /// Version of the Dockerfile syntax, if the built-in frontend made the result.
    dockerfile_version: &'static str,
    known: Known,
    pub reproducible: bool,
    pub builder_id: String,
    pub invocation_id: String,
    pub started_on: String,
    pub finished_on: String,
    pub config: Option<BuildConfig>,
    pub metadata: BuildKitMetadata,
    /// What the daemon's configuration says of where builds run.
    pub(super) environment: BTreeMap<String, serde_json::Value>,
}

/// A package URL: `pkg:docker/name@tag?digest=…&platform=…`.
fn package_url(kind: &str, reference: &str, platform: Option<&Platform>) -> String {
    let Ok(reference) = Reference::parse(reference) else {
        return format!("pkg:{kind}/{}", escape(reference, "/:@"));
    };
    let digest = reference.digest().map(ToString::to_string);
    let reference = if digest.is_none() {
        reference.with_default_tag()
    } else {
        reference
    };
    let mut url = format!("pkg:{kind}/{}", escape(&reference.familiar_name(), "/"));
    if let Some(tag) = reference.tag() {
        url.push('@');
        url.push_str(&escape(tag, "$&+=:@"));
    }
    let platform = platform.map(|platform| platform.normalized().format());
    let qualifiers = [("digest", digest), ("platform", platform)];
    let qualifiers = qualifiers
        .into_iter()
        .filter_map(|(key, value)| Some(format!("{key}={}", escape(&value?, "$&+=:@"))));
    let qualifiers: Vec<String> = qualifiers.collect();
    if !qualifiers.is_empty() {
        url.push('?');
        url.push_str(&qualifiers.join("&"));
    }
    url
}

fn escape(text: &str, kept: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || "-._~".contains(c) || kept.contains(c) {
            out.push(c);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

pub(super) fn digest_set(digest: Option<&str>) -> DigestSet {
    let pair = digest.and_then(|digest| digest.split_once(':'));
    pair.map(|(algorithm, hex)| (algorithm.to_owned(), hex.to_owned()))
        .into_iter()
        .collect()
}

pub(super) fn commit_set(commit: &str) -> DigestSet {
    let algorithm = if commit.len() == 64 { "sha256" } else { "sha1" };
    [(algorithm.to_owned(), commit.to_owned())].into()
}

fn materials(capture: &Capture) -> Vec<Material> {
    let images = capture.images.iter().map(|image| Material {
        uri: package_url(
            if image.is_local { "oci" } else { "docker" },
            &image.reference,
            image.platform.as_ref(),
        ),
        digest: digest_set(image.digest.as_deref()),
    });
    let blobs = capture.blobs.iter().map(|blob| {
        let url = package_url(
            if blob.is_local { "oci" } else { "docker" },
            &blob.reference,
            None,
        );
        Material {
            uri: format!("{url}{}ref_type=blob", if url.contains('?') { '&' } else { '?' }),
            digest: digest_set(blob.digest.as_deref()),
        }
    });
    let git = capture.git.iter().map(|(url, commit)| Material {
        uri: url.clone(),
        digest: commit_set(commit),
    });
    let bundles = capture
        .bundles
        .iter()
        .filter_map(|(url, locator)| bundle_material(url, locator));
    let http = capture.http.iter();
    let http = http.map(|(url, digest)| Material {
        uri: url.clone(),
        digest: digest_set(digest.as_deref()),
    });
    images
        .chain(blobs)
        .chain(git)
        .chain(bundles)
        .chain(http)
        .collect()
}

/// The bundle that a commit of a repository was taken from.
fn bundle_material(url: &str, locator: &str) -> Option<Material> {
    let (scheme, body) = locator.split_once("://")?;
    let (reference, digest) = body.rsplit_once('@')?;
    let kind = if scheme == "oci-layout+blob" {
        "oci"
    } else {
        "docker"
    };
    Some(Material {
        uri: format!(
            "{}?ref_type=bundle&vcs_url={}",
            package_url(kind, reference, None),
            escape(url, "$&+=:@")
        ),
        digest: digest_set(Some(digest)),
    })
}

impl Predicate {
    /// Writes down what was captured; `asked` is what the frontend that made the result was asked.
    pub(super) fn new(capture: &Capture, asked: Option<&Asked>) -> Self {
        let Request {
            config_source,
            request: mut parameters,
        } = asked
            .map(|asked| Request::new(asked, capture))
            .unwrap_or_default();
        let mut metadata = BuildKitMetadata {
            network: NetworkMetadata::new(capture),
            ..BuildKitMetadata::default()
        };
        parameters.args.retain(|key, value| {
            let Some(name) = key.strip_prefix("vcs:") else {
                return true;
            };
            if !value.is_empty() {
                metadata.vcs.insert(name.to_owned(), std::mem::take(value));
            }
            false
        });
        let offered = |ids: &BTreeMap<String, bool>| {
            ids.iter()
                .map(|(id, optional)| Offered {
                    id: id.clone(),
                    optional: *optional,
                })
                .collect()
        };
        let incomplete = capture.is_incomplete || !capture.locals.is_empty() || !capture.unpinned.is_empty();
        let dockerfile_version = match parameters.frontend.as_str() {
            "dockerfile.v0" => crate::DOCKERFILE_VERSION,
            _ => "",
        };
        Self {
            dockerfile_version,
            materials: materials(capture),
            config_source,
            known: Known {
                request: !parameters.frontend.is_empty(),
                materials: !incomplete,
                hermetic: !incomplete && !capture.network_access,
            },
            parameters: Parameters {
                secrets: offered(&capture.secrets),
                ssh: offered(&capture.agents),
                locals: capture
                    .locals
                    .iter()
                    .map(|name| Named { name: name.clone() })
                    .collect(),
                compatibility_version: COMPATIBILITY_VERSION,
                ..parameters
            },
            platform: Platform::host().normalized().format(),
            reproducible: false,
            builder_id: String::new(),
            invocation_id: String::new(),
            started_on: String::new(),
            finished_on: String::new(),
            config: None,
            metadata,
            environment: BTreeMap::new(),
        }
    }

    /// Returns whether everything that was used is named.
    pub(super) fn has_all_materials(&self) -> bool {
        self.known.materials
    }

    /// Leaves out what may be private.
    pub(super) fn scrub(&mut self) {
        self.known.request &= !self.parameters.scrub();
    }

    /// The document of SLSA 1.
    pub(super) fn to_v1(&self) -> V1<'_> {
        V1 {
            build_definition: BuildDefinitionV1 {
                build_type: BUILD_TYPE_V1,
                resolved_dependencies: &self.materials,
                external_parameters: ExternalV1 {
                    config_source: &self.config_source,
                    request: &self.parameters,
                },
                internal_parameters: InternalV1 {
                    build_config: self.config.as_ref(),
                    builder_platform: &self.platform,
                    dockerfile_version: self.dockerfile_version,
                    environment: &self.environment,
                },
            },
            run_details: RunDetailsV1 {
                builder: Builder { id: &self.builder_id },
                metadata: MetadataV1 {
                    invocation_id: &self.invocation_id,
                    started_on: &self.started_on,
                    finished_on: &self.finished_on,
                    buildkit_metadata: &self.metadata,
                    buildkit_hermetic: self.known.hermetic,
                    buildkit_completeness: CompletenessV1 {
                        request: self.known.request,
                        resolved_dependencies: self.known.materials,
                    },
                    buildkit_reproducible: self.reproducible,
                },
            },
        }
    }

    /// The document of SLSA 0.2.
    pub(super) fn to_v02(&self) -> V02<'_> {
        V02 {
            builder: Builder { id: &self.builder_id },
            build_type: BUILD_TYPE_V02,
            materials: &self.materials,
            invocation: InvocationV02 {
                config_source: ConfigSourceV02 {
                    uri: &self.config_source.uri,
                    digest: &self.config_source.digest,
                    entry_point: &self.config_source.path,
                },
                parameters: &self.parameters,
                environment: EnvironmentV02 {
                    platform: &self.platform,
                    dockerfile_version: self.dockerfile_version,
                    environment: &self.environment,
                },
            },
            build_config: self.config.as_ref(),
            metadata: MetadataV02 {
                build_invocation_id: &self.invocation_id,
                build_started_on: &self.started_on,
                build_finished_on: &self.finished_on,
                completeness: CompletenessV02 {
                    parameters: self.known.request,
                    environment: true,
                    materials: self.known.materials,
                },
                reproducible: self.reproducible,
                buildkit_metadata: &self.metadata,
                hermetic: self.known.hermetic,
            },
        }
    }
}

#[derive(Serialize)]
struct Builder<'a> {
    id: &'a str,
}

/// A predicate of SLSA 1.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct V1<'a> {
    build_definition: BuildDefinitionV1<'a>,
    run_details: RunDetailsV1<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct BuildDefinitionV1<'a> {
    build_type: &'static str,
    #[serde(skip_serializing_if = "<[Material]>::is_empty")]
    resolved_dependencies: &'a [Material],
    external_parameters: ExternalV1<'a>,
    internal_parameters: InternalV1<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ExternalV1<'a> {
    config_source: &'a ConfigSource,
    request: &'a Parameters,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct InternalV1<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    build_config: Option<&'a BuildConfig>,
    builder_platform: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    dockerfile_version: &'static str,
    #[serde(flatten)]
    environment: &'a BTreeMap<String, serde_json::Value>,
}

#[derive(Serialize)]
struct RunDetailsV1<'a> {
    builder: Builder<'a>,
    metadata: MetadataV1<'a>,
}

#[derive(Serialize)]
struct MetadataV1<'a> {
    #[serde(rename = "invocationId")]
    invocation_id: &'a str,
    #[serde(rename = "startedOn")]
    started_on: &'a str,
    #[serde(rename = "finishedOn")]
    finished_on: &'a str,
    buildkit_metadata: &'a BuildKitMetadata,
    #[serde(skip_serializing_if = "is_false")]
    buildkit_hermetic: bool,
    buildkit_completeness: CompletenessV1,
    #[serde(skip_serializing_if = "is_false")]
    buildkit_reproducible: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CompletenessV1 {
    request: bool,
    resolved_dependencies: bool,
}

/// A predicate of SLSA 0.2.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct V02<'a> {
    builder: Builder<'a>,
    build_type: &'static str,
    #[serde(skip_serializing_if = "<[Material]>::is_empty")]
    materials: &'a [Material],
    invocation: InvocationV02<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    build_config: Option<&'a BuildConfig>,
    metadata: MetadataV02<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct InvocationV02<'a> {
    config_source: ConfigSourceV02<'a>,
    parameters: &'a Parameters,
    environment: EnvironmentV02<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConfigSourceV02<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    uri: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    digest: &'a DigestSet,
    #[serde(skip_serializing_if = "str::is_empty")]
    entry_point: &'a str,
}

#[derive(Serialize)]
struct EnvironmentV02<'a> {
    platform: &'a str,
    #[serde(rename = "dockerfileVersion", skip_serializing_if = "str::is_empty")]
    dockerfile_version: &'static str,
    #[serde(flatten)]
    environment: &'a BTreeMap<String, serde_json::Value>,
}

#[derive(Serialize)]
struct MetadataV02<'a> {
    #[serde(rename = "buildInvocationID")]
    build_invocation_id: &'a str,
    #[serde(rename = "buildStartedOn")]
    build_started_on: &'a str,
    #[serde(rename = "buildFinishedOn")]
    build_finished_on: &'a str,
    completeness: CompletenessV02,
    reproducible: bool,
    #[serde(rename = "https://mobyproject.org/buildkit@v1#metadata")]
    buildkit_metadata: &'a BuildKitMetadata,
    #[serde(
        rename = "https://mobyproject.org/buildkit@v1#hermetic",
        skip_serializing_if = "is_false"
    )]
    hermetic: bool,
}

#[derive(Serialize)]
struct CompletenessV02 {
    parameters: bool,
    environment: bool,
    materials: bool,
}

#[cfg(test)]
mod tests {
    use super::super::request::tests::asked;
    use super::*;

    fn request() -> Asked {
        asked(&[
            ("filename", "Dockerfile"),
            ("context", "https://user:pw@github.com/a/b.git#main"),
            ("build-arg:SECRET", "x"),
            ("platform", "linux/amd64"),
            ("attest:provenance", ""),
            ("vcs:source", "https://github.com/a/b.git"),
            ("target", "out"),
        ])
    }

    #[test]
    fn a_request_is_told_without_credentials_and_host_settings() {
        let mut capture = Capture::default();
        let url = "https://xxxxx:xxxxx@github.com/a/b.git#main";
        capture.git.insert(url.to_owned(), "0".repeat(40));
        capture.secrets.insert("token".to_owned(), false);
        let mut predicate = Predicate::new(&capture, Some(&request()));
        let json = serde_json::to_value(predicate.to_v1()).unwrap();
        let external = &json["buildDefinition"]["externalParameters"];
        assert_eq!(external["configSource"]["uri"], url);
        assert_eq!(external["configSource"]["digest"]["sha1"], "0".repeat(40));
        assert_eq!(external["configSource"]["path"], "Dockerfile");
        assert_eq!(
            external["request"]["args"],
            serde_json::json!({"build-arg:SECRET": "x", "target": "out"})
        );
        assert_eq!(
            external["request"]["secrets"],
            serde_json::json!([{"id": "token"}])
        );
        let version = &json["buildDefinition"]["internalParameters"]["dockerfileVersion"];
        assert_eq!(version, crate::DOCKERFILE_VERSION);
        let old = serde_json::to_value(predicate.to_v02()).unwrap();
        assert_eq!(&old["invocation"]["environment"]["dockerfileVersion"], version);
        let other = serde_json::to_value(Predicate::new(&capture, None).to_v1()).unwrap();
        let internal = &other["buildDefinition"]["internalParameters"];
        assert!(internal.get("dockerfileVersion").is_none());
        assert_eq!(
            json["runDetails"]["metadata"]["buildkit_metadata"]["vcs"]["source"],
            "https://github.com/a/b.git"
        );
        assert_eq!(json["runDetails"]["metadata"]["buildkit_hermetic"], true);
        assert_eq!(
            json["runDetails"]["metadata"]["buildkit_completeness"]["request"],
            true
        );
        predicate.scrub();
        let json = serde_json::to_value(predicate.to_v02()).unwrap();
        assert_eq!(
            json["invocation"]["parameters"]["args"],
            serde_json::json!({"target": "out"})
        );
        assert!(json["invocation"]["parameters"]["secrets"].is_null());
        assert_eq!(json["metadata"]["completeness"]["parameters"], false);
        assert_eq!(json["materials"][0]["uri"], url);
    }

    #[test]
    fn a_bundle_is_a_material_of_its_own() {
        let hex = "0".repeat(64);
        let locator = format!("docker-image+blob://h:5000/a/b@sha256:{hex}");
        let material = bundle_material("https://h/x.git#main", &locator).unwrap();
        assert_eq!(
            material.uri,
            "pkg:docker/h%3A5000/a/b@latest?ref_type=bundle&vcs_url=https:%2F%2Fh%2Fx.git%23main"
        );
        assert_eq!(material.digest, digest_set(Some(&format!("sha256:{hex}"))));
    }

    #[test]
    fn package_urls_name_tag_or_digest() {
        let platform = Platform::parse("linux/arm64").unwrap();
        assert_eq!(
            package_url("docker", "docker.io/library/alpine:3", Some(&platform)),
            "pkg:docker/alpine@3?platform=linux%2Farm64"
        );
        let digest = oci::Digest::sha256(b"x");
        assert_eq!(
            package_url("docker", &format!("example.com:5000/a/b@{digest}"), None),
            format!("pkg:docker/example.com%3A5000/a/b?digest={digest}")
        );
    }
}

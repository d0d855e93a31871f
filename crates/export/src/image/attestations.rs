//! Attestations of an image: in-toto statements in a manifest of their own that names the image's.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use build::blocking::{blocking, internal};
use build::error::{BuildError, ErrorKind};
use build::op::ResultRef;
use build::result::{Attestation, AttestationKind, AttestationSubject, StatementContent};
use build::unlazy::{FetchContext, Unlazy};
use bytes::Bytes;
use oci::json::nullable;
use oci::{Descriptor, Digest, Manifest, Platform, Reference, media_type};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::config::compact;
use super::layers::{ExportLayer, LayerExporter};
use super::supplement::{SPDX_PREDICATE, supplement};
use super::writer::manifest_bytes;

/// A statement larger than this is refused.
const MAX_STATEMENT_BYTES: u64 = 40 << 20;
/// Statements in one bundle at most.
const MAX_BUNDLED: usize = 1000;
const ARTIFACT_TYPE: &str = "application/vnd.docker.attestation.manifest.v1+json";
const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
const PROVENANCE_PREFIX: &str = "https://slsa.dev/provenance/";

/// What statements about the image itself are about.
pub struct Target<'a> {
    /// The image's manifest.
    pub descriptor: &'a Descriptor,
    /// Its platform.
    pub platform: &'a Platform,
    /// The image's names, separated by commas.
    pub name: &'a str,
    /// Its layers, bottom first.
    pub layers: &'a [ExportLayer],
}

/// An in-toto statement.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Statement {
    #[serde(rename = "_type", default, deserialize_with = "nullable")]
    kind: String,
    #[serde(default, deserialize_with = "nullable")]
    predicate_type: String,
    #[serde(default, deserialize_with = "nullable")]
    subject: Vec<Subject>,
    #[serde(default)]
    predicate: Option<Box<RawValue>>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Subject {
    #[serde(default, deserialize_with = "nullable")]
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    digest: BTreeMap<String, String>,
}

/// A manifest of attestations with its blobs.
pub struct WrittenAttestations {
    /// The manifest; its descriptor says to which image it belongs.
    pub manifest: (Descriptor, Bytes),
    /// Statements and the configuration.
    pub blobs: Vec<(Descriptor, Bytes)>,
}

/// Whether an attestation only makes sense inside the image.
pub fn is_inline_only<R>(attestation: &Attestation<R>) -> bool {
    attestation
        .metadata
        .get("inline-only")
        .is_some_and(|value| value.as_ref() == b"true")
}

/// Reads and completes the statements of an image.
///
/// # Errors
/// A user error for attestations that a frontend may not make or that cannot be read.
pub async fn statements(
    exporter: &LayerExporter,
    ctx: &FetchContext,
    attestations: Vec<Attestation<ResultRef>>,
    target: &Target<'_>,
) -> Result<Vec<Statement>, BuildError> {
    let own = own_subjects(target)?;
    let mut statements = Vec::new();
    for (attestation, content) in contents(exporter.fetcher(), ctx, attestations).await? {
        let content = if is_main_bill(&attestation) {
            supplement(exporter, ctx, target.layers, content).await?
        } else {
            content
        };
        statements.push(statement(&attestation, &content, &own)?);
    }
    Ok(statements)
}

/// Writes the statements about a tree of files, given with their digests, as files of their own: name and content.
///
/// # Errors
/// As [`statements`].
pub(crate) async fn statement_files(
    unlazy: &dyn Unlazy,
    ctx: &FetchContext,
    attestations: Vec<Attestation<ResultRef>>,
    files: Vec<(String, Digest)>,
) -> Result<Vec<(String, Bytes)>, BuildError> {
    let subject = |(name, digest): (String, Digest)| Subject {
        name,
        digest: BTreeMap::from([digest_pair(&digest)]),
    };
    let own: Vec<Subject> = files.into_iter().map(subject).collect();
    let mut written = Vec::new();
    for (attestation, content) in contents(unlazy, ctx, attestations).await? {
        let statement = statement(&attestation, &content, &own)?;
        let text = indented(&oci::json::to_string(&statement).map_err(internal)?);
        let name = attestation.path.rsplit('/').next().unwrap_or_default().to_owned();
        written.push((name, text.into()));
    }
    Ok(written)
}

/// Indents compact JSON by two spaces, embedded documents along with the rest, as Go does.
fn indented(json: &str) -> String {
    let mut out = String::with_capacity(json.len() * 2);
    let mut depth = 0_usize;
    let mut in_string = false;
    let mut escaped = false;
    let mut chars = json.chars().peekable();
    let line = |out: &mut String, depth: usize| {
        out.push('\n');
        out.extend(std::iter::repeat_n("  ", depth));
    };
    while let Some(c) = chars.next() {
        match c {
            _ if in_string => out.push(c),
            '{' | '[' => {
                out.push(c);
                if let Some(end) = chars.next_if(|next| matches!(next, '}' | ']')) {
                    out.push(end);
                } else {
                    depth += 1;
                    line(&mut out, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                line(&mut out, depth);
                out.push(c);
            }
            ',' => {
                out.push(c);
                line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            _ => out.push(c),
        }
        if c == '"' && !escaped {
            in_string = !in_string;
        }
        escaped = in_string && c == '\\' && !escaped;
    }
    out
}

/// Takes bundles apart and reads what the attestations state.
async fn contents(
    unlazy: &dyn Unlazy,
    ctx: &FetchContext,
    attestations: Vec<Attestation<ResultRef>>,
) -> Result<Vec<(Attestation<ResultRef>, Bytes)>, BuildError> {
    let mut found = Vec::new();
    for attestation in attestations {
        match attestation.kind {
            AttestationKind::InToto => {
                if attestation.predicate_type.starts_with(PROVENANCE_PREFIX) && attestation.content.is_none()
                {
                    return Err(BuildError::user("frontend may not set provenance attestations"));
                }
                found.push(attestation);
            }
            AttestationKind::Bundle => found.extend(unbundle(unlazy, ctx, attestation).await?),
        }
    }
    // The main bill of materials comes first.
    found.sort_by_key(|attestation| !is_core(attestation));
    let mut read = Vec::new();
    for attestation in found {
        let content = match &attestation.content {
            Some(content) => content.read().await?,
            None => read_file(unlazy, ctx, &attestation).await?,
        };
        read.push((attestation, content));
    }
    Ok(read)
}

fn statement(
    attestation: &Attestation<ResultRef>,
    content: &[u8],
    own: &[Subject],
) -> Result<Statement, BuildError> {
    Ok(Statement {
        kind: STATEMENT_TYPE.to_owned(),
        predicate_type: attestation.predicate_type.clone(),
        subject: subjects(attestation, own),
        predicate: if content.is_empty() {
            None
        } else {
            Some(compacted(content)?)
        },
    })
}

/// JSON as Go copies it into a larger document.
fn compacted(content: &[u8]) -> Result<Box<RawValue>, BuildError> {
    let raw: &RawValue =
        serde_json::from_slice(content).map_err(invalid("cannot read in-toto attestation"))?;
    let mut text = String::new();
    compact(raw.get(), &mut text);
    RawValue::from_string(text).map_err(invalid("cannot read in-toto attestation"))
}

/// Whether this is the scanner's main SPDX document.
fn is_main_bill(attestation: &Attestation<ResultRef>) -> bool {
    let Some(core) = attestation.metadata.get("sbom-core") else {
        return false;
    };
    let file = attestation.path.rsplit('/').next().unwrap_or_default();
    let name = file.split('.').next().unwrap_or_default();
    attestation.predicate_type == SPDX_PREDICATE && name.as_bytes() == core.as_ref()
}

fn is_core(attestation: &Attestation<ResultRef>) -> bool {
    let Some(core) = attestation.metadata.get("sbom-core") else {
        return false;
    };
    attestation
        .path
        .split('.')
        .next()
        .is_some_and(|name| name.as_bytes() == core.as_ref())
}

fn subjects(attestation: &Attestation<ResultRef>, own: &[Subject]) -> Vec<Subject> {
    if attestation.subjects.is_empty() {
        return own.to_vec();
    }
    let mut all = Vec::new();
    for subject in &attestation.subjects {
        match subject {
            AttestationSubject::Image(name) => {
                for image in own {
                    all.push(image.clone());
                    if !matches!(name.as_str(), "" | "_") {
                        all.push(Subject {
                            name: name.clone(),
                            digest: image.digest.clone(),
                        });
                    }
                }
            }
            AttestationSubject::Raw { name, digests } => {
                let name = if name.is_empty() {
                    "_".to_owned()
                } else {
                    name.clone()
                };
                all.push(Subject {
                    name,
                    digest: digests.iter().map(digest_pair).collect(),
                });
            }
        }
    }
    all
}

fn digest_pair(digest: &Digest) -> (String, String) {
    (digest.algorithm().to_string(), digest.hex())
}

/// The image under each of its names, as package URLs.
fn own_subjects(target: &Target<'_>) -> Result<Vec<Subject>, BuildError> {
    let names = target.name.split(',').filter(|name| !name.is_empty());
    names
        .map(|name| {
            let reference = Reference::parse(name)
                .map_err(|error| BuildError::user(format!("failed to parse ref {name:?}: {error}")))?;
            Ok(Subject {
                name: package_url(reference, target.platform),
                digest: BTreeMap::from([digest_pair(&target.descriptor.digest)]),
            })
        })
        .collect()
}

/// `pkg:docker/name@tag?digest=…&platform=…`.
fn package_url(reference: Reference, platform: &Platform) -> String {
    let reference = reference.with_default_tag();
    let mut url = format!("pkg:docker/{}", escape(&reference.familiar_name(), "/"));
    if let Some(tag) = reference.tag() {
        url.push('@');
        url.push_str(&escape(tag, "$&+=:@"));
    }
    let mut separator = '?';
    let digest = reference.digest().map(|digest| ("digest", digest.to_string()));
    let platform = ("platform", platform.clone().normalized().format());
    for (key, value) in digest.into_iter().chain([platform]) {
        url.push(separator);
        url.push_str(&format!("{key}={}", escape(&value, "$&+=:@")));
        separator = '&';
    }
    url
}

/// Percent-encodes all but unreserved characters and those kept.
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

async fn unbundle(
    unlazy: &dyn Unlazy,
    ctx: &FetchContext,
    bundle: Attestation<ResultRef>,
) -> Result<Vec<Attestation<ResultRef>>, BuildError> {
    if bundle.content.is_some() {
        return Err(BuildError::user("attestation bundle cannot have callback"));
    }
    let Some(reference) = bundle.reference.as_ref().and_then(ResultRef::get).cloned() else {
        return Err(BuildError::user("no ref provided for attestation bundle"));
    };
    unlazy.unpack(ctx, &reference).await?;
    blocking(move || {
        let tree = Tree::open(&reference)?;
        let mut found = Vec::new();
        for name in tree.list(&bundle.path)? {
            let path = format!("{}/{name}", bundle.path.trim_end_matches('/'));
            let bytes = tree.read(&path)?;
            let statement: Statement =
                serde_json::from_slice(&bytes).map_err(invalid("cannot decode in-toto statement"))?;
            if !bundle.predicate_type.is_empty() && statement.predicate_type != bundle.predicate_type {
                return Err(BuildError::user(format!(
                    "bundle entry {} does not match required predicate type {}",
                    statement.predicate_type, bundle.predicate_type
                )));
            }
            if statement.predicate_type.starts_with(PROVENANCE_PREFIX) {
                return Err(BuildError::user(
                    "frontend may not bundle provenance attestations",
                ));
            }
            let predicate = statement
                .predicate
                .map_or_else(|| "null".to_owned(), |value| value.get().to_owned());
            found.push(Attestation {
                kind: AttestationKind::InToto,
                metadata: bundle.metadata.clone(),
                reference: None,
                path,
                content: Some(StatementContent::Ready(predicate.into())),
                predicate_type: statement.predicate_type,
                subjects: statement.subject.into_iter().map(raw_subject).collect(),
            });
        }
        Ok(found)
    })
    .await
}

fn raw_subject(subject: Subject) -> AttestationSubject {
    let digests = subject
        .digest
        .iter()
        .filter_map(|(name, hex)| format!("{name}:{hex}").parse().ok())
        .collect();
    AttestationSubject::Raw {
        name: subject.name,
        digests,
    }
}

async fn read_file(
    unlazy: &dyn Unlazy,
    ctx: &FetchContext,
    attestation: &Attestation<ResultRef>,
) -> Result<Bytes, BuildError> {
    let Some(reference) = attestation.reference.as_ref().and_then(ResultRef::get).cloned() else {
        return Err(BuildError::user("attestation does not have available content"));
    };
    unlazy.unpack(ctx, &reference).await?;
    let path = attestation.path.clone();
    blocking(move || Ok(Tree::open(&reference)?.read(&path)?.into())).await
}

/// A mounted tree; paths never leave it.
struct Tree(layer::tree::Root);

impl Tree {
    fn open(reference: &cache::ImmutableRef) -> Result<Self, BuildError> {
        let mounts = reference.mounts().map_err(internal)?;
        let [mount] = mounts.as_slice() else {
            return Err(BuildError::internal("a snapshot has not exactly one mount"));
        };
        let tree = mount.open().map_err(internal)?;
        Ok(Self(layer::tree::Root::new(&tree).map_err(internal)?))
    }

    fn list(&self, path: &str) -> Result<Vec<String>, BuildError> {
        let entries = self.0.read_dir(Path::new(path), None).map_err(user)?;
        if entries.len() > MAX_BUNDLED {
            return Err(BuildError::user(format!(
                "{path}: more than {MAX_BUNDLED} attestations"
            )));
        }
        Ok(entries.into_iter().map(|entry| entry.path).collect())
    }

    fn read(&self, path: &str) -> Result<Vec<u8>, BuildError> {
        let file = self.0.open_file(Path::new(path)).map_err(user)?;
        if !file.metadata().map_err(internal)?.is_file() {
            return Err(BuildError::user(format!("{path} is not a regular file")));
        }
        let mut bytes = Vec::new();
        file.take(MAX_STATEMENT_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(internal)?;
        if u64::try_from(bytes.len()).is_ok_and(|len| len > MAX_STATEMENT_BYTES) {
            return Err(BuildError::user(format!(
                "{path} exceeds {MAX_STATEMENT_BYTES} bytes"
            )));
        }
        Ok(bytes)
    }
}

fn user(error: impl std::error::Error + Send + Sync + 'static) -> BuildError {
    BuildError::from_source(ErrorKind::User, error).context("cannot read in-toto attestation")
}

fn invalid(what: &'static str) -> impl Fn(serde_json::Error) -> BuildError {
    move |error| BuildError::from_source(ErrorKind::User, error).context(what)
}

/// Writes the manifest of an image's statements.
///
/// # Errors
/// Internal errors only.
pub fn write(
    target: &Descriptor,
    statements: Vec<Statement>,
    manifest_type: &str,
    config_type: &str,
    artifact: bool,
) -> Result<WrittenAttestations, BuildError> {
    let mut blobs = Vec::new();
    let mut layers = Vec::new();
    let mut diff_ids = Vec::new();
    for statement in statements {
        let bytes: Bytes = oci::json::to_vec(&statement).map_err(internal)?.into();
        let descriptor = Descriptor::of_bytes(media_type::IN_TOTO, &bytes)
            .with_annotation("in-toto.io/predicate-type", statement.predicate_type);
        diff_ids.push(descriptor.digest);
        layers.push(descriptor.clone());
        blobs.push((descriptor, bytes));
    }
    let (config, config_bytes) = if artifact {
        let mut empty = Descriptor::of_bytes(media_type::OCI_EMPTY, b"{}");
        "e30=".clone_into(&mut empty.data);
        (empty, Bytes::from_static(b"{}"))
    } else {
        let bytes = config_of(diff_ids)?;
        (Descriptor::of_bytes(config_type, &bytes), bytes)
    };
    let mut manifest = Manifest::new(config.clone(), layers);
    manifest.media_type = manifest_type.to_owned();
    if artifact {
        ARTIFACT_TYPE.clone_into(&mut manifest.artifact_type);
        manifest.subject = Some(Descriptor::new(
            target.media_type.clone(),
            target.digest,
            target.size,
        ));
    }
    blobs.push((config, config_bytes));
    let bytes = manifest_bytes(&manifest)?;
    let mut descriptor = Descriptor::of_bytes(manifest_type, &bytes)
        .with_annotation("vnd.docker.reference.type", "attestation-manifest")
        .with_annotation("vnd.docker.reference.digest", target.digest.to_string());
    descriptor.platform = Some(Platform::new("unknown", "unknown"));
    Ok(WrittenAttestations {
        manifest: (descriptor, bytes),
        blobs,
    })
}

/// The configuration that stands for statements where they are layers of an ordinary image.
fn config_of(diff_ids: Vec<Digest>) -> Result<Bytes, BuildError> {
    #[derive(Serialize)]
    struct Config {
        architecture: &'static str,
        os: &'static str,
        config: BTreeMap<String, String>,
        rootfs: RootFs,
    }
    #[derive(Serialize)]
    struct RootFs {
        #[serde(rename = "type")]
        kind: &'static str,
        diff_ids: Vec<Digest>,
    }
    let config = Config {
        architecture: "unknown",
        os: "unknown",
        config: BTreeMap::new(),
        rootfs: RootFs {
            kind: "layers",
            diff_ids,
        },
    };
    Ok(oci::json::to_vec(&config).map_err(internal)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indentation_is_gos() {
        let text = r#"{"a":[],"b":{"c":[1,"x,{\"}"],"d":{}}}"#;
        assert_eq!(
            indented(text),
            "{\n  \"a\": [],\n  \"b\": {\n    \"c\": [\n      1,\n      \"x,{\\\"}\"\n    ],\n    \"d\": {}\n  }\n}"
        );
    }

    #[test]
    fn package_urls_are_buildkits() {
        let url = |name: &str| package_url(Reference::parse(name).unwrap(), &Platform::new("linux", "amd64"));
        assert_eq!(url("alpine"), "pkg:docker/alpine@latest?platform=linux%2Famd64");
        assert_eq!(
            url("localhost:5000/a/b:1.2"),
            "pkg:docker/localhost%3A5000/a/b@1.2?platform=linux%2Famd64"
        );
    }

    #[test]
    fn statements_name_the_image() {
        let descriptor = Descriptor::of_bytes(media_type::OCI_MANIFEST, b"m");
        let statement = Statement {
            kind: STATEMENT_TYPE.into(),
            predicate_type: "p".into(),
            subject: vec![Subject {
                name: "n".into(),
                digest: BTreeMap::from([digest_pair(&descriptor.digest)]),
            }],
            predicate: Some(serde_json::from_str(r#"{"b":1,"a":2}"#).unwrap()),
        };
        let written = write(
            &descriptor,
            vec![statement],
            media_type::OCI_MANIFEST,
            media_type::OCI_CONFIG,
            true,
        )
        .unwrap();
        let text = String::from_utf8(written.blobs[0].1.to_vec()).unwrap();
        assert_eq!(
            text,
            format!(
                r#"{{"_type":"https://in-toto.io/Statement/v1","predicateType":"p","subject":[{{"name":"n","digest":{{"sha256":"{}"}}}}],"predicate":{{"b":1,"a":2}}}}"#,
                descriptor.digest.hex()
            )
        );
        let manifest: Manifest = serde_json::from_slice(&written.manifest.1).unwrap();
        assert_eq!(manifest.subject.unwrap().digest, descriptor.digest);
        assert_eq!(manifest.config.data, "e30=");
    }
}

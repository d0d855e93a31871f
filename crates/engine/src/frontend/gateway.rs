//! The frontend `gateway.v0`: a frontend in an image, run as a container that uses the build over its standard streams.
//!
//! The container is one as every other: the same mounts, the same confinement. What it may do beyond that is what a client
//! may do that is its own frontend: its calls are served on a [`Forwarder`] of a bridge of its own. Whatever it does, the
//! build ends with its result or with an error that names it, and the container is gone.

mod image;
mod talk;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use executor::FileSource;
use llb::pb;
use oci::{ImageConfig, Platform, Reference};
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::bridge::{
    Bridge, BridgeRequest, BuildContainer, BuildProcess, BuildResult, ContainerFile, ContainerRequest,
    Forwarder, Frontend, FrontendRequest, MountRequest, ProcessRequest,
};
use crate::error::{BuildError, ErrorKind};
use image::FrontendImage;
use talk::Talk;

/// Name under which clients ask for this frontend.
pub const NAME: &str = "gateway.v0";

/// The option that names the image.
const SOURCE_OPT: &str = "source";
/// The option of a mode that ran a frontend from a build's result; clients may still send it.
const DEVEL_OPT: &str = "gateway-devel";
/// The option with capabilities that the client needs, separated by commas.
const CAPS_OPT: &str = "frontend.caps";
/// The label with capabilities that the image has.
const CAPS_LABEL: &str = "moby.buildkit.frontend.caps";
/// The label of an image that needs no network.
const NO_NETWORK_LABEL: &str = "moby.buildkit.frontend.network.none";
const INPUTS_CAP: &str = "moby.buildkit.frontend.inputs";
/// Images made before capabilities were told that take inputs nevertheless: `docker/dockerfile` 1.1.6 and 1.1.7, and
/// their experimental variants.
const WITH_INPUTS: [&str; 4] = [
    "sha256:9ac1c43a60e31dca741a6fe8314130a9cd4c4db0311fbbc636ff992ef60ae76d",
    "sha256:080bd74d8778f83e7b670de193362d8c593c8b14f5c8fb919d28ee8feda0d069",
    "sha256:60543a9d92b92af5088fb2938fb09b2072684af8384399e153e137fe081f8ab4",
    "sha256:de85b2f3a3e8a2f7fe48e8e84a65f6fdd5cd5183afa6412fff9caa6871649c44",
];
/// Where a frontend finds the definition that its own image comes from.
const DEFINITION_FILE: &str = "/run/config/buildkit/metadata/frontend.bin";

/// A byte stream of a frontend: what it writes can be read, what it reads can be written.
pub trait FrontendStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> FrontendStream for S {}

/// Serves the calls of frontends that run in containers.
#[async_trait]
pub trait FrontendHost: Send + Sync + fmt::Debug {
    /// Variables with which frontends learn of the daemon, as `NAME=value`.
    fn environment(&self) -> Vec<String>;

    /// Serves one frontend's calls until it closes the stream or speaks something else. Dropping the future ends it.
    async fn serve(&self, forwarder: Forwarder, stream: Box<dyn FrontendStream>);
}

/// How long a frontend may take for what does not depend on the build.
#[derive(Clone, Copy, Debug)]
pub struct GatewayLimits {
    /// From its start to its first words.
    pub start: Duration,
    /// From its last words, or its result, to its end.
    pub end: Duration,
}

impl Default for GatewayLimits {
    fn default() -> Self {
        Self {
            // Programs of other platforms are slow to start.
            start: Duration::from_secs(120),
            end: Duration::from_secs(10),
        }
    }
}

/// What the worker can do.
#[derive(Clone, Debug, Default)]
pub struct Abilities {
    /// Platforms that it runs, the preferred one first.
    pub platforms: Vec<Platform>,
    /// What definitions may contain.
    pub capabilities: BTreeSet<String>,
}

/// The frontend `gateway.v0`.
#[derive(Clone, Debug)]
pub struct GatewayFrontend {
    host: Arc<dyn FrontendHost>,
    /// Names of repositories; empty: all.
    allowed: BTreeSet<String>,
    abilities: Abilities,
    limits: GatewayLimits,
}

impl GatewayFrontend {
    /// Makes the frontend. Images may only come from the repositories that are named; if none is, from all.
    ///
    /// # Errors
    /// For a name that is none.
    pub fn new(
        host: Arc<dyn FrontendHost>,
        allowed: &[String],
        abilities: Abilities,
        limits: GatewayLimits,
    ) -> Result<Self, BuildError> {
        let allowed: Result<BTreeSet<String>, BuildError> =
            allowed.iter().map(|name| repository(name)).collect();
        Ok(Self {
            host,
            allowed: allowed?,
            abilities,
            limits,
        })
    }

    fn check_source(&self, source: &str) -> Result<(), BuildError> {
        if self.allowed.is_empty() || self.allowed.contains(&repository(source)?) {
            return Ok(());
        }
        let text = format!("'{source}' is not an allowed gateway source");
        Err(BuildError::new(ErrorKind::Denied, text))
    }
}

fn parse(name: &str) -> Result<Reference, BuildError> {
    Reference::parse(name).map_err(|error| {
        BuildError::from_source(ErrorKind::User, error)
            .context(format!("invalid image of a frontend {name:?}"))
    })
}

/// The name of an image's repository.
fn repository(name: &str) -> Result<String, BuildError> {
    parse(name).map(|reference| reference.name())
}

#[async_trait]
impl Frontend for GatewayFrontend {
    async fn solve(&self, bridge: &Bridge, request: FrontendRequest) -> Result<BuildResult, BuildError> {
        if request.opts.contains_key(DEVEL_OPT) {
            return Err(BuildError::user("development gateway is no longer supported"));
        }
        let source = request.opts.get(SOURCE_OPT).filter(|source| !source.is_empty());
        let source = source.ok_or_else(|| BuildError::user("no source specified for gateway"))?;
        self.check_source(source)?;
        let image = image::find(bridge, &request, source, &self.abilities).await?;
        check_caps(&image, &request)?;
        let source = source.clone();
        let forwarder = Closing(Forwarder::new(bridge.clone(), request.inputs));
        let container = self.container(bridge, &image, &request.opts).await;
        let (container, process) = container.map_err(|error| error.context(in_frontend(&source)))?;
        let talk = Talk {
            host: &*self.host,
            limits: self.limits,
            source: &source,
        };
        let outcome = Box::pin(talk.run(process, &forwarder.0)).await;
        // Why it failed is known already, or it was killed because nobody waits for it any more.
        let _ = container.release().await;
        forwarder.0.release().await;
        outcome
    }
}

impl GatewayFrontend {
    async fn container(
        &self,
        bridge: &Bridge,
        image: &FrontendImage,
        opts: &BTreeMap<String, String>,
    ) -> Result<(BuildContainer, BuildProcess), BuildError> {
        let request = BridgeRequest {
            definition: Some(image.definition.clone()),
            evaluate: true,
            ..BridgeRequest::default()
        };
        let built = Box::pin(bridge.solve(request)).await?.single;
        let built = built.ok_or_else(|| BuildError::user("gateway source didn't return default result"))?;
        let root = MountRequest {
            mount: pb::Mount {
                dest: "/".to_owned(),
                output: pb::EMPTY,
                ..pb::Mount::default()
            },
            reference: Some(built.result().await?),
        };
        let definition = ContainerFile {
            target: DEFINITION_FILE.to_owned(),
            content: FileSource {
                bytes: built.definition().encode_to_vec(),
                uid: 0,
                gid: 0,
                mode: 0o400,
            },
        };
        let container = ContainerRequest {
            id: format!("frontend {}", built.id()),
            mounts: vec![root],
            files: vec![definition],
            network: network(&image.config).into(),
            ..ContainerRequest::default()
        };
        let container = bridge.new_container(container).await?;
        let config = &image.config.config;
        let process = ProcessRequest {
            args: if config.entrypoint.is_empty() {
                vec!["/run".to_owned()]
            } else {
                config.entrypoint.clone()
            },
            env: self.environment(bridge, config.env.clone(), opts),
            cwd: config.working_dir.clone(),
            remove_stubs_recursive: true,
            streams: [true; 3],
            ..ProcessRequest::default()
        };
        let process = container.start(process).await?;
        Ok((container, process))
    }

    fn environment(
        &self,
        bridge: &Bridge,
        mut env: Vec<String>,
        opts: &BTreeMap<String, String>,
    ) -> Vec<String> {
        let opts = opts.iter().enumerate();
        env.extend(opts.map(|(at, (key, value))| format!("BUILDKIT_FRONTEND_OPT_{at}={key}={value}")));
        let sessions = bridge.sessions();
        let session = sessions.ids().first().map_or("", |id| id.0.as_str());
        env.push(format!("BUILDKIT_SESSION_ID={session}"));
        env.extend(self.host.environment());
        env
    }
}

fn in_frontend(source: &str) -> String {
    format!("frontend {source}")
}

fn network(config: &ImageConfig) -> pb::NetMode {
    let label = config.config.labels.get(NO_NETWORK_LABEL);
    let is_set =
        label.is_some_and(|value| matches!(value.as_str(), "1" | "t" | "T" | "true" | "TRUE" | "True"));
    if is_set {
        pb::NetMode::None
    } else {
        pb::NetMode::Unset
    }
}

/// The names in a list of capabilities, without what is said about them behind a `+`.
fn caps(text: Option<&String>) -> BTreeSet<&str> {
    let items = text.into_iter().flat_map(|text| text.split(','));
    let names = items.filter_map(|item| item.split('+').next());
    names.filter(|name| !name.is_empty()).collect()
}

/// Checks that the image has what the client asks of it.
fn check_caps(image: &FrontendImage, request: &FrontendRequest) -> Result<(), BuildError> {
    let mut known = caps(image.config.config.labels.get(CAPS_LABEL));
    let digest = image.digest.map(|digest| digest.to_string());
    if digest.is_some_and(|digest| WITH_INPUTS.contains(&digest.as_str())) {
        known.insert(INPUTS_CAP);
    }
    let mut wanted = caps(request.opts.get(CAPS_OPT));
    if !request.inputs.is_empty() {
        wanted.insert(INPUTS_CAP);
    }
    match wanted.into_iter().find(|name| !known.contains(name)) {
        None => Ok(()),
        Some(name) => Err(
            BuildError::user(format!("unsupported frontend capability {name}"))
                .with_unsupported_capability(name),
        ),
    }
}

/// Ends a frontend's containers when it is dropped.
struct Closing(Forwarder);

impl Drop for Closing {
    fn drop(&mut self) {
        drop(self.0.close());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct NoHost;

    #[async_trait]
    impl FrontendHost for NoHost {
        fn environment(&self) -> Vec<String> {
            Vec::new()
        }

        async fn serve(&self, _: Forwarder, _: Box<dyn FrontendStream>) {}
    }

    fn image(labels: &[(&str, &str)]) -> FrontendImage {
        let mut config = ImageConfig::default();
        let labels = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        config.config.labels = labels.collect();
        FrontendImage {
            definition: pb::Definition::default(),
            digest: None,
            config,
        }
    }

    #[test]
    fn only_allowed_repositories_are_run() {
        let make = |allowed: &[&str]| {
            let allowed: Vec<String> = allowed.iter().map(|name| (*name).to_owned()).collect();
            GatewayFrontend::new(
                Arc::new(NoHost),
                &allowed,
                Abilities::default(),
                GatewayLimits::default(),
            )
        };
        let frontend = make(&["docker/dockerfile:ignored", "localhost:5000/x"]).unwrap();
        assert!(frontend.check_source("docker.io/docker/dockerfile:1").is_ok());
        assert!(frontend.check_source("localhost:5000/x").is_ok());
        let error = frontend.check_source("docker/other").unwrap_err();
        assert_eq!(
            error.to_string(),
            "'docker/other' is not an allowed gateway source"
        );
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(make(&[]).unwrap().check_source("docker/other").is_ok());
        assert!(make(&["Not A Name"]).is_err());
    }

    #[test]
    fn what_an_image_lacks_is_told() {
        let request = |caps: &str, with_input: bool| {
            let mut request = FrontendRequest::default();
            request.opts.insert(CAPS_OPT.to_owned(), caps.to_owned());
            if with_input {
                request.inputs.insert("x".to_owned(), pb::Definition::default());
            }
            request
        };
        let able = image(&[(CAPS_LABEL, "moby.buildkit.frontend.inputs,a")]);
        assert!(check_caps(&able, &request("a+forward", true)).is_ok());
        let error = check_caps(&able, &request("a,b", false)).unwrap_err();
        assert_eq!(error.unsupported_capability(), Some("b"));
        let mut old = image(&[]);
        assert!(check_caps(&old, &request("", false)).is_ok());
        assert!(check_caps(&old, &request("", true)).is_err());
        old.digest = Some(WITH_INPUTS[0].parse().unwrap());
        assert!(check_caps(&old, &request("", true)).is_ok());
    }

    #[test]
    fn images_may_go_without_a_network() {
        assert_eq!(network(&image(&[]).config), pb::NetMode::Unset);
        assert_eq!(
            network(&image(&[(NO_NETWORK_LABEL, "true")]).config),
            pb::NetMode::None
        );
        assert_eq!(
            network(&image(&[(NO_NETWORK_LABEL, "0")]).config),
            pb::NetMode::Unset
        );
    }
}

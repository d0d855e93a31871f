//! What a result was made of: sources, secrets, access to the network.

use std::collections::{BTreeMap, BTreeSet};

use llb::pb;
use oci::{Platform, Reference};
use serde::Serialize;

use crate::bridge::ResolvedImage;
use crate::driver::StepProvenance;

/// An image that was used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image {
    pub reference: String,
    pub platform: Option<Platform>,
    pub digest: Option<String>,
    pub is_local: bool,
}

/// A request of a step that no material stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Unpinned {
    /// The step's vertex.
    pub op: String,
    /// The step's program and arguments.
    pub name: String,
    pub method: String,
    pub uri: String,
    pub reason: &'static str,
}

/// Everything that a result depends on, as far as it is known.
#[derive(Clone, Debug, Default)]
pub(super) struct Capture {
    pub images: Vec<Image>,
    /// Single blobs of repositories and layouts.
    pub blobs: Vec<Image>,
    /// Repository with an optional ref behind `#`, and the commit.
    pub git: BTreeMap<String, String>,
    /// Bundles that commits were taken from: the repository as in `git`, and the bundle's locator.
    pub bundles: BTreeSet<(String, String)>,
    /// URL and checksum.
    pub http: BTreeMap<String, Option<String>>,
    /// Names of the client's directories.
    pub locals: BTreeSet<String>,
    /// Ids of secrets, and whether they may be absent.
    pub secrets: BTreeMap<String, bool>,
    /// Ids of agents, and whether they may be absent.
    pub agents: BTreeMap<String, bool>,
    pub network_access: bool,
    /// Whether steps reached the network by nothing but a proxy.
    pub proxy_network: bool,
    /// What the proxy saw and could not pin.
    pub unpinned: BTreeSet<Unpinned>,
    pub is_incomplete: bool,
}

impl Capture {
    /// Adds the steps behind a ref.
    pub(super) fn add_steps(&mut self, steps: &[StepProvenance]) {
        for step in steps {
            match &step.vertex.op.op {
                Some(pb::op::Op::Source(source)) => self.add_source(source, step),
                Some(pb::op::Op::Exec(exec)) => {
                    self.network_access |= exec.network != i32::from(pb::NetMode::None);
                    self.add_rights(step, exec);
                    self.add_fetched(step, exec);
                }
                // What an op builds in its turn is not looked into.
                Some(pb::op::Op::Build(_)) => self.is_incomplete = true,
                _ => {}
            }
        }
    }

    fn add_fetched(&mut self, step: &StepProvenance, exec: &pb::ExecOp) {
        self.proxy_network |= step.vertex.is_proxied;
        let Some(fetched) = step.op.as_ref().and_then(|op| op.fetched.as_ref()) else {
            return;
        };
        for (url, digest) in &fetched.materials {
            self.http.insert(url.clone(), Some(digest.to_string()));
        }
        let args = exec.meta.as_ref().map(|meta| meta.args.join(" "));
        let op = step.vertex.digest.map(|digest| digest.to_string());
        self.unpinned
            .extend(fetched.unpinned.iter().map(|request| Unpinned {
                op: op.clone().unwrap_or_default(),
                name: args.clone().unwrap_or_default(),
                method: request.method.clone(),
                uri: request.url.clone(),
                reason: request.reason,
            }));
    }

    fn add_rights(&mut self, step: &StepProvenance, exec: &pb::ExecOp) {
        let op = step.op.clone().unwrap_or_default();
        let variables = exec
            .secretenv
            .iter()
            .map(|secret| (secret.id.clone(), secret.optional));
        for (id, optional) in op.secrets.into_iter().chain(variables) {
            *self.secrets.entry(id).or_insert(true) &= optional;
        }
        for (id, optional) in op.agents {
            let id = if id.is_empty() { "default".to_owned() } else { id };
            *self.agents.entry(id).or_insert(true) &= optional;
        }
    }

    fn add_source(&mut self, source: &pb::SourceOp, step: &StepProvenance) {
        let pin = step.op.as_ref().and_then(|op| op.pin.clone());
        let resolved = step.op.as_ref().and_then(|op| op.source.clone());
        let Some((scheme, rest)) = source.identifier.split_once("://") else {
            return;
        };
        match scheme {
            "docker-image" | "oci-layout" => {
                let reference = resolved
                    .as_deref()
                    .and_then(|text| text.split_once("://"))
                    .map(|(_, text)| text);
                let platform = step.op.as_ref().and_then(|op| op.platform.as_ref()).or(step
                    .vertex
                    .op
                    .platform
                    .as_ref());
                self.add_image(Image {
                    reference: reference.unwrap_or(rest).to_owned(),
                    platform: platform.map(Platform::from),
                    digest: pin,
                    is_local: scheme == "oci-layout",
                });
            }
            "docker-image+blob" | "oci-layout+blob" => {
                let blob = Image {
                    reference: rest.to_owned(),
                    platform: None,
                    digest: pin,
                    is_local: scheme == "oci-layout+blob",
                };
                if !self.blobs.iter().any(|known| known.reference == blob.reference) {
                    self.blobs.push(blob);
                }
            }
            "git" => {
                let (remote, reference) = rest.split_once('#').unwrap_or((rest, ""));
                let full = source
                    .attrs
                    .get(llb::attr::FULL_REMOTE_URL)
                    .filter(|url| !url.is_empty());
                let mut url = redact(&full.cloned().unwrap_or_else(|| format!("https://{remote}")));
                let reference = reference.split(':').next().unwrap_or_default();
                if !reference.is_empty() {
                    url = format!("{url}#{reference}");
                }
                let bundle = source.attrs.get(llb::attr::GIT_BUNDLE);
                if let Some(bundle) = bundle.filter(|bundle| !bundle.is_empty()) {
                    self.bundles.insert((url.clone(), bundle.clone()));
                }
                self.git.insert(url, pin.unwrap_or_default());
            }
            "http" | "https" => {
                self.http.insert(redact(&source.identifier), pin);
            }
            "local" => {
                self.locals.insert(rest.to_owned());
            }
            _ => self.is_incomplete = true,
        }
    }

    fn add_image(&mut self, image: Image) {
        let same = |known: &Image| {
            known.reference == image.reference
                && known.is_local == image.is_local
                && (known.platform == image.platform
                    || known.platform.as_ref().map(Platform::normalized)
                        == image.platform.as_ref().map(Platform::normalized))
        };
        if !self.images.iter().any(same) {
            self.images.push(image);
        }
    }

    /// Adds images that were only asked for, e.g. for their config.
    pub(super) fn add_resolved(&mut self, images: &[ResolvedImage]) {
        for image in images {
            self.add_image(Image {
                reference: image.reference.clone(),
                platform: image.platform.clone(),
                digest: Some(image.digest.to_string()),
                is_local: image.is_local,
            });
        }
    }

    /// Leaves out images named by digest of which the tag is named as well, and sorts.
    pub(super) fn finish(&mut self) {
        let parsed = |image: &Image| Reference::parse(&image.reference).ok();
        let name =
            |reference: &Reference| format!("{}:{}", reference.name(), reference.tag().unwrap_or("latest"));
        let tagged: BTreeSet<String> = self
            .images
            .iter()
            .filter_map(parsed)
            .filter(|reference| reference.digest().is_none())
            .map(|reference| name(&reference))
            .collect();
        self.images.retain(|image| {
            let reference = parsed(image).filter(|reference| reference.digest().is_some());
            reference.is_none_or(|reference| !tagged.contains(&name(&reference)))
        });
        self.images.sort_by(|a, b| a.reference.cmp(&b.reference));
        self.blobs.sort_by(|a, b| a.reference.cmp(&b.reference));
    }
}

/// Leaves out images of other platforms, where there is an image for every platform of the result.
pub(super) fn for_platform(
    images: Vec<ResolvedImage>,
    current: &Platform,
    all: &[Platform],
) -> Vec<ResolvedImage> {
    let equal = |a: &Platform, b: &Platform| a.os == b.os && a.architecture == b.architecture;
    let covered = |reference: &str| {
        all.iter().all(|platform| {
            images.iter().any(|image| {
                image.reference == reference
                    && image
                        .platform
                        .as_ref()
                        .is_some_and(|known| equal(known, platform))
            })
        })
    };
    let kept: Vec<bool> = images
        .iter()
        .map(|image| match &image.platform {
            Some(platform) if covered(&image.reference) => equal(platform, current),
            _ => true,
        })
        .collect();
    images
        .into_iter()
        .zip(kept)
        .filter(|(_, kept)| *kept)
        .map(|(image, _)| image)
        .collect()
}

/// Whether a URL contains a password.
pub(super) fn has_password(url: &str) -> bool {
    let rest = url.split_once("://").map(|(_, rest)| rest);
    let authority = rest.and_then(|rest| rest.split(['/', '?', '#']).next());
    let user = authority.and_then(|authority| authority.rsplit_once('@'));
    user.is_some_and(|(user, _)| user.contains(':'))
}

/// Masks user name and password of a URL.
pub(super) fn redact(url: &str) -> String {
    const MASK: &str = "xxxxx";
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let Some((user, host)) = authority.rsplit_once('@') else {
        return url.to_owned();
    };
    let user = match user.split_once(':') {
        Some(_) => format!("{MASK}:{MASK}@"),
        None if user.is_empty() => String::new(),
        None => format!("{MASK}@"),
    };
    format!("{scheme}://{user}{host}{path}")
}

#[cfg(test)]
mod tests {
    use oci::Digest;

    use super::*;

    #[test]
    fn credentials_are_masked() {
        assert_eq!(
            redact("https://user:pass@host/x@y"),
            "https://xxxxx:xxxxx@host/x@y"
        );
        assert_eq!(redact("https://token@host"), "https://xxxxx@host");
        assert_eq!(redact("https://host/a?b=c@d"), "https://host/a?b=c@d");
        assert_eq!(redact("not a url"), "not a url");
    }

    #[test]
    fn a_digest_is_left_out_beside_its_tag() {
        let image = |reference: &str| Image {
            reference: reference.to_owned(),
            platform: None,
            digest: None,
            is_local: false,
        };
        let digest = Digest::sha256(b"x");
        let mut capture = Capture {
            images: vec![
                image("docker.io/library/b@sha256:".to_owned().as_str()),
                image(&format!("docker.io/library/a:latest@{digest}")),
                image("docker.io/library/a:latest"),
                image(&format!("docker.io/library/c@{digest}")),
            ],
            ..Capture::default()
        };
        capture.images.remove(0);
        capture.finish();
        let names: Vec<_> = capture
            .images
            .iter()
            .map(|image| image.reference.clone())
            .collect();
        assert_eq!(
            names,
            [
                "docker.io/library/a:latest".to_owned(),
                format!("docker.io/library/c@{digest}")
            ]
        );
    }

    #[test]
    fn images_of_other_platforms_are_left_out_only_if_all_have_one() {
        let image = |reference: &str, platform: &str| ResolvedImage {
            reference: reference.to_owned(),
            platform: Some(Platform::parse(platform).unwrap()),
            digest: Digest::sha256(b"x"),
            is_local: false,
        };
        let all = [
            Platform::parse("linux/amd64").unwrap(),
            Platform::parse("linux/arm64").unwrap(),
        ];
        let images = vec![
            image("a", "linux/amd64"),
            image("a", "linux/arm64"),
            image("b", "linux/amd64"),
        ];
        let kept = for_platform(images, &all[1], &all);
        assert_eq!(kept.len(), 2);
        assert!(kept.iter().any(|image| image.reference == "b"));
    }
}

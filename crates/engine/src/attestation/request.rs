//! What was asked for a result, as provenance tells it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::capture::{Capture, has_password, redact};
use super::predicate::{DigestSet, commit_set, digest_set, is_false};
use crate::bridge::Asked;

fn is_zero(value: &u32) -> bool {
    *value == 0
}

/// A secret or an agent.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Offered {
    pub id: String,
    #[serde(skip_serializing_if = "is_false")]
    pub optional: bool,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Named {
    pub name: String,
}

/// What the client asked for.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Parameters {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub frontend: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub args: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<Offered>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ssh: Vec<Offered>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub locals: Vec<Named>,
    /// What was asked for the inputs.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, Request>,
    /// What the client asked, where that is something else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<Box<Request>>,
    #[serde(rename = "compatibilityVersion", skip_serializing_if = "is_zero")]
    pub compatibility_version: u32,
}

/// What was asked, and where the instructions came from.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Request {
    #[serde(rename = "configSource")]
    pub config_source: ConfigSource,
    pub request: Parameters,
}

/// Where the instructions came from.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct ConfigSource {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uri: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub digest: DigestSet,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub path: String,
}

/// The frontend's options without what says nothing about the result.
fn arguments(opts: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    const HOST_SPECIFIC: [&str; 4] = ["cgroup-parent", "image-resolve-mode", "platform", "cache-imports"];
    let context = context_key(opts);
    let kept = opts
        .iter()
        .filter(|(key, _)| !HOST_SPECIFIC.contains(&key.as_str()) && !key.starts_with("attest:"));
    let kept = kept.map(|(key, value)| {
        let is_place = [context.as_str(), "context", "vcs:source"].contains(&key.as_str())
            || key.starts_with("context:")
            || has_password(value);
        (key.clone(), if is_place { redact(value) } else { value.clone() })
    });
    kept.collect()
}

fn context_key(opts: &BTreeMap<String, String>) -> String {
    let set = |key: &str| opts.get(key).filter(|value| !value.is_empty());
    match set("contextkey") {
        Some(key) => key.clone(),
        None if set("input:context").is_some() => "input:context".to_owned(),
        None => "context".to_owned(),
    }
}

/// Whether two requests say the same of what was asked, whatever else their builds were asked.
fn says_same(a: &Asked, b: &Asked) -> bool {
    a.frontend == b.frontend && arguments(&a.opts) == arguments(&b.opts) && a.inputs == b.inputs
}

impl Request {
    /// Writes down what was asked, with that for its inputs and for the whole build.
    pub(super) fn new(asked: &Asked, capture: &Capture) -> Self {
        let context = context_key(&asked.opts);
        let mut args = arguments(&asked.opts);
        let mut config_source = ConfigSource::default();
        if let Some(uri) = args.remove(&context).filter(|uri| !uri.is_empty()) {
            let commit = capture.git.get(&uri).map(|commit| commit_set(commit));
            let checksum = || capture.http.get(&uri).map(|digest| digest_set(digest.as_deref()));
            config_source.digest = commit.or_else(checksum).unwrap_or_default();
            config_source.uri = uri;
        }
        config_source.path = args.remove("filename").unwrap_or_default();
        let inputs = asked.inputs.iter();
        let inputs = inputs.map(|(name, input)| (name.clone(), Self::new(input, capture)));
        let root = asked.root.as_deref().filter(|root| !says_same(root, asked));
        let root = root.map(|root| Self::new(root, capture));
        Self {
            config_source,
            request: Parameters {
                frontend: asked.frontend.clone(),
                args,
                inputs: inputs.collect(),
                root: root.filter(|root| !root.request.is_empty()).map(Box::new),
                ..Parameters::default()
            },
        }
    }
}

impl Parameters {
    fn is_empty(&self) -> bool {
        self.frontend.is_empty() && self.args.is_empty() && self.inputs.is_empty()
    }

    /// Leaves out what may be private; returns whether that was an argument.
    pub(super) fn scrub(&mut self) -> bool {
        let before = self.args.len();
        self.args
            .retain(|key, _| !key.starts_with("build-arg:") && !key.starts_with("label:"));
        self.secrets.clear();
        self.ssh.clear();
        let mut scrubbed = self.args.len() != before;
        for nested in self.inputs.values_mut().chain(self.root.as_deref_mut()) {
            scrubbed |= nested.request.scrub();
        }
        scrubbed
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::super::predicate::{COMPATIBILITY_VERSION, Predicate};
    use super::*;

    pub(in crate::attestation) fn asked(opts: &[(&str, &str)]) -> Asked {
        let opts = opts
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Asked::new("dockerfile.v0", opts.collect(), BTreeMap::new(), None)
    }

    fn told(predicate: &Predicate) -> serde_json::Value {
        let json = serde_json::to_value(predicate.to_v1()).unwrap();
        json["buildDefinition"]["externalParameters"]["request"].clone()
    }

    #[test]
    fn inputs_and_the_clients_own_request_are_told_without_what_is_private() {
        let root = Arc::new(asked(&[
            ("attest:provenance", "mode=max"),
            ("context:x", "https://me:pw@example.com/x"),
        ]));
        let input = asked(&[("target", "base"), ("build-arg:TOKEN", "abc"), ("label:a", "b")]);
        let mut asked = asked(&[("context:linked", "input:base")]);
        asked.inputs.insert("base".to_owned(), Arc::new(input));
        asked.root = Some(root);
        let mut predicate = Predicate::new(&Capture::default(), Some(&asked));
        let request = told(&predicate);
        let input = &request["inputs"]["base"]["request"];
        assert_eq!(input["args"]["build-arg:TOKEN"], "abc");
        assert_eq!(request["compatibilityVersion"], COMPATIBILITY_VERSION);
        assert!(input["compatibilityVersion"].is_null());
        assert_eq!(
            request["root"]["request"]["args"],
            serde_json::json!({"context:x": "https://xxxxx:xxxxx@example.com/x"})
        );
        predicate.scrub();
        assert_eq!(
            told(&predicate)["inputs"]["base"]["request"]["args"],
            serde_json::json!({"target": "base"})
        );
        let json = serde_json::to_value(predicate.to_v1()).unwrap();
        let completeness = &json["runDetails"]["metadata"]["buildkit_completeness"];
        assert_eq!(completeness["request"], false);
    }

    #[test]
    fn no_argument_tells_a_password() {
        let asked = asked(&[
            ("context", "https://u:p@host/a"),
            ("input:context", "https://u:p@host/b"),
            ("build-arg:REPO", "https://u:p@host/c.git#main"),
            ("build-arg:URL", "ssh://git@host/d"),
        ]);
        let request = told(&Predicate::new(&Capture::default(), Some(&asked)));
        assert!(!request.to_string().contains("u:p"), "{request}");
        assert_eq!(
            request["args"]["build-arg:REPO"],
            "https://xxxxx:xxxxx@host/c.git#main"
        );
        assert_eq!(request["args"]["build-arg:URL"], "ssh://git@host/d");
    }

    #[test]
    fn a_root_that_says_the_same_or_nothing_is_left_out() {
        let mut same = asked(&[("target", "x"), ("attest:sbom", "")]);
        same.root = Some(Arc::new(asked(&[("target", "x")])));
        let mut silent = asked(&[]);
        let opts = [("attest:provenance".to_owned(), String::new())].into();
        silent.root = Some(Arc::new(Asked::new("", opts, BTreeMap::new(), None)));
        for asked in [same, silent] {
            let predicate = Predicate::new(&Capture::default(), Some(&asked));
            assert!(told(&predicate)["root"].is_null());
        }
    }
}

//! The options of a request, checked.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use llb::ResolveMode;
use llb::pb::{self, NetMode};
use oci::{Platform, Reference, ReferenceError};

use crate::lint::{LintConfig, LintOptionError};
use crate::request::{CacheImport, Request};
use crate::size::{Ulimit, UlimitError, parse_ulimit};
use crate::text::{self, quote};
use crate::{csv, csv::CsvError};

/// Why options are refused. The texts are BuildKit's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OptionsError {
    #[error("needs BuildKit 0.5 or later")]
    TooOld,
    #[error("support for \"override-copy-image\" was removed in BuildKit 0.11")]
    CopyImage,
    #[error("support for \"BUILDKIT_DISABLE_FILEOP\" build-arg was removed in BuildKit 0.11")]
    NoFileOp,
    #[error("failed to parse target platform {text}: {error}")]
    Platform {
        text: String,
        #[source]
        error: oci::PlatformError,
    },
    #[error("invalid image-resolve-mode: {0}")]
    ResolveMode(String),
    #[error("failed to parse additional hosts: {0}")]
    Hosts(String),
    #[error("failed to parse shm size: {0}")]
    ShmSize(String),
    #[error("failed to parse ulimit: {0}")]
    Ulimit(String),
    #[error("failed to parse resource limits: invalid {name} value: {value}")]
    Limit { name: &'static str, value: String },
    #[error("invalid netmode {0}")]
    NetMode(String),
    #[error("invalid boolean value for multi-platform: {0}")]
    MultiPlatform(String),
    #[error("conflicting config: returning multiple target platforms is not allowed")]
    SinglePlatform,
    #[error("failed to unmarshal cache-imports ({}): {error}", quote(.text))]
    CacheImports { text: String, error: String },
    #[error("failed to parse build-arg:BUILDKIT_DOCKERFILE_CHECK: {0}")]
    Check(#[source] LintOptionError),
    #[error("unknown attestation type {}", quote(.0))]
    AttestationKind(String),
    #[error("failed to parse {kind}: {error}")]
    Attestation {
        kind: String,
        #[source]
        error: CsvError,
    },
    #[error("failed to parse sbom scanner {text}: {error}")]
    Scanner {
        text: String,
        #[source]
        error: ReferenceError,
    },
}

/// Which stages are built without cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum NoCache {
    #[default]
    None,
    All,
    Stages(Vec<String>),
}

impl NoCache {
    pub(crate) fn has(&self, stage: &str) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Stages(names) => names
                .iter()
                .any(|name| name.to_lowercase() == stage.to_lowercase()),
        }
    }
}

/// A scan for what a result is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sbom {
    /// The scanner's image.
    pub(crate) generator: String,
    pub(crate) parameters: BTreeMap<String, String>,
}

/// Checked options.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// All options as given, with those that others imply.
    pub(crate) all: BTreeMap<String, String>,
    pub(crate) build_args: BTreeMap<String, String>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) build_platform: Platform,
    pub(crate) target_platforms: Vec<Platform>,
    pub(crate) multi_platform: bool,
    pub(crate) resolve_mode: ResolveMode,
    pub(crate) hosts: Vec<(String, IpAddr)>,
    pub(crate) shm_size_bytes: i64,
    pub(crate) ulimits: Vec<Ulimit>,
    pub(crate) resources: Option<pb::LinuxResources>,
    pub(crate) network: NetMode,
    pub(crate) no_cache: NoCache,
    pub(crate) cache_imports: Vec<CacheImport>,
    pub(crate) sbom: Option<Sbom>,
    pub(crate) cache_namespace: String,
    pub(crate) cgroup_parent: String,
    pub(crate) target: String,
    pub(crate) hostname: String,
    pub(crate) check: Option<LintConfig>,
    pub(crate) capabilities: BTreeSet<String>,
    pub(crate) session_id: String,
}

impl Options {
    /// Checks the options of a request.
    pub(crate) fn parse(request: &Request) -> Result<Self, OptionsError> {
        let mut all = request.options.clone();
        check_minimum(request)?;
        let get = |name: &str| request.options.get(name).map_or("", String::as_str);
        let target_platforms = platforms(get("platform"))?;
        let platform_count = target_platforms.len();
        if let Some(name) = all
            .get("build-arg:BUILDKIT_SANDBOX_HOSTNAME")
            .filter(|name| !name.is_empty())
            .cloned()
        {
            all.insert("hostname".into(), name);
        }
        let no_cache = match request.options.get("no-cache").map(String::as_str) {
            None => NoCache::None,
            Some("") => NoCache::All,
            Some(names) => NoCache::Stages(names.split(',').map(str::to_owned).collect()),
        };
        let check = request.options.get("build-arg:BUILDKIT_DOCKERFILE_CHECK");
        Ok(Self {
            build_args: with_prefix(&all, "build-arg:"),
            labels: with_prefix(&all, "label:"),
            build_platform: request
                .worker_platforms
                .first()
                .cloned()
                .unwrap_or_else(Platform::host),
            target_platforms,
            resolve_mode: resolve_mode(get("image-resolve-mode"))?,
            hosts: hosts(get("add-hosts")).map_err(OptionsError::Hosts)?,
            shm_size_bytes: match get("shm-size") {
                "" => 0,
                text => text::parse_int(text).map_err(OptionsError::ShmSize)?,
            },
            ulimits: ulimits(get("ulimit")).map_err(OptionsError::Ulimit)?,
            resources: resources(&request.options)?,
            network: net_mode(get("force-network-mode"))?,
            no_cache,
            multi_platform: multi_platform(&mut all, platform_count)?,
            cache_imports: cache_imports(&request.options)?,
            sbom: sbom(&request.options)?,
            cache_namespace: get("build-arg:BUILDKIT_CACHE_MOUNT_NS").to_owned(),
            cgroup_parent: get("cgroup-parent").to_owned(),
            target: get("target").to_owned(),
            hostname: all.get("hostname").cloned().unwrap_or_default(),
            check: check
                .map(|text| LintConfig::parse(text))
                .transpose()
                .map_err(OptionsError::Check)?,
            capabilities: request.llb_capabilities.clone(),
            session_id: request.session_id.clone(),
            all,
        })
    }

    /// Returns an option.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.all.get(name).map(String::as_str)
    }

    /// Returns the session that has a local directory.
    pub(crate) fn session_of(&self, local: &str) -> String {
        self.get(&format!("local-sessionid:{local}"))
            .unwrap_or(&self.session_id)
            .to_owned()
    }

    /// Tells whether the worker understands something.
    pub(crate) fn supports(&self, capability: &str) -> bool {
        self.capabilities.contains(capability)
    }
}

fn check_minimum(request: &Request) -> Result<(), OptionsError> {
    if !request.llb_capabilities.contains(llb::caps::FILE_BASE) {
        return Err(OptionsError::TooOld);
    }
    if request
        .options
        .get("override-copy-image")
        .is_some_and(|image| !image.is_empty())
    {
        return Err(OptionsError::CopyImage);
    }
    let disabled = request
        .options
        .get("build-arg:BUILDKIT_DISABLE_FILEOP")
        .and_then(|text| text::parse_bool(text));
    if disabled == Some(true) {
        Err(OptionsError::NoFileOp)
    } else {
        Ok(())
    }
}

fn with_prefix(options: &BTreeMap<String, String>, prefix: &str) -> BTreeMap<String, String> {
    let found = options
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(prefix)?.to_owned(), value.clone())));
    found.collect()
}

fn platforms(text: &str) -> Result<Vec<Platform>, OptionsError> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let parse = |text: &str| match Platform::parse(text) {
        Ok(platform) => Ok(platform.normalized()),
        Err(error) => Err(OptionsError::Platform {
            text: text.to_owned(),
            error,
        }),
    };
    text.split(',').map(parse).collect()
}

fn multi_platform(all: &mut BTreeMap<String, String>, count: usize) -> Result<bool, OptionsError> {
    if let Some(value) = all
        .get("build-arg:BUILDKIT_MULTI_PLATFORM")
        .filter(|value| !value.is_empty())
        .cloned()
    {
        all.insert("multi-platform".into(), value);
    }
    match all.get("multi-platform").map(String::as_str) {
        None | Some("") => Ok(count > 1),
        Some(text) => match text::parse_bool(text) {
            None => Err(OptionsError::MultiPlatform(text.to_owned())),
            Some(false) if count > 1 => Err(OptionsError::SinglePlatform),
            Some(wanted) => Ok(wanted),
        },
    }
}

fn resolve_mode(text: &str) -> Result<ResolveMode, OptionsError> {
    match text {
        "" | "default" => Ok(ResolveMode::Default),
        "pull" => Ok(ResolveMode::ForcePull),
        "local" => Ok(ResolveMode::PreferLocal),
        _ => Err(OptionsError::ResolveMode(text.to_owned())),
    }
}

fn hosts(text: &str) -> Result<Vec<(String, IpAddr)>, String> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let fields = csv::fields(text).map_err(|err| err.to_string())?;
    let parse = |field: String| {
        let lower = field.to_lowercase();
        let (name, address) = lower
            .split_once('=')
            .ok_or_else(|| format!("invalid key-value pair {field}"))?;
        let address: IpAddr = address
            .parse()
            .map_err(|_| format!("failed to parse IP {address}"))?;
        Ok((name.to_owned(), address.to_canonical()))
    };
    fields.into_iter().map(parse).collect()
}

fn ulimits(text: &str) -> Result<Vec<Ulimit>, String> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let fields = csv::fields(text).map_err(|err| err.to_string())?;
    fields
        .iter()
        .map(|field| parse_ulimit(field).map_err(|err: UlimitError| err.to_string()))
        .collect()
}

fn resources(options: &BTreeMap<String, String>) -> Result<Option<pb::LinuxResources>, OptionsError> {
    let get = |name: &'static str| {
        options
            .get(name)
            .filter(|value| !value.is_empty())
            .map(|value| (name, value))
    };
    let limit = |name, value: String| OptionsError::Limit { name, value };
    let signed = |name, lowest: i64, rule: &str| match get(name) {
        None => Ok(0),
        Some((name, value)) => match text::parse_int(value) {
            Err(err) => Err(limit(name, format!("{value}: {err}"))),
            Ok(number) if number < lowest || number == 0 => {
                Err(limit(name, format!("{value}: must be {rule}")))
            }
            Ok(number) => Ok(number),
        },
    };
    let unsigned = |name| match get(name) {
        None => Ok(0),
        Some((name, value)) => match text::parse_uint(value) {
            Err(err) => Err(limit(name, format!("{value}: {err}"))),
            Ok(0) => Err(limit(name, format!("{value}: must be > 0"))),
            Ok(number) => Ok(number),
        },
    };
    let cpus = |name| match get(name) {
        None => Ok(String::new()),
        Some((name, value)) => match cpu_set_error(value) {
            Some(err) => Err(limit(name, format!("{value}: {err}"))),
            None => Ok(value.clone()),
        },
    };
    let found = pb::LinuxResources {
        memory: signed("memory", 1, "> 0")?,
        memory_swap: signed("memswap", -1, "-1 (unlimited) or > 0")?,
        cpu_shares: unsigned("cpushares")?,
        cpu_period: unsigned("cpuperiod")?,
        cpu_quota: signed("cpuquota", 1, "> 0")?,
        cpuset_cpus: cpus("cpusetcpus")?,
        cpuset_mems: cpus("cpusetmems")?,
    };
    Ok((found != pb::LinuxResources::default()).then_some(found))
}

/// The highest CPU a set may name.
const MAX_CPU: u64 = 8192;

/// Checks a set such as `0-3,7`; returns what is wrong with it.
fn cpu_set_error(set: &str) -> Option<String> {
    set.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .find_map(|part| {
            let number = |text: &str| text.trim().parse::<u64>().ok();
            let (what, bounds) = match part.split_once('-') {
                None => ("element", number(part).map(|cpu| (cpu, cpu))),
                Some((low, high)) => (
                    "range",
                    number(low).zip(number(high)).filter(|(low, high)| low <= high),
                ),
            };
            match bounds {
                None => Some(format!("invalid cpuset {what} {}", quote(part))),
                Some((_, high)) if high > MAX_CPU => {
                    Some(format!("cpuset {what} {} exceeds maximum {MAX_CPU}", quote(part)))
                }
                Some(_) => None,
            }
        })
}

fn net_mode(text: &str) -> Result<NetMode, OptionsError> {
    match text {
        "" | "sandbox" => Ok(NetMode::Unset),
        "none" => Ok(NetMode::None),
        "host" => Ok(NetMode::Host),
        _ => Err(OptionsError::NetMode(text.to_owned())),
    }
}

fn cache_imports(options: &BTreeMap<String, String>) -> Result<Vec<CacheImport>, OptionsError> {
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default, alias = "type", rename = "Type")]
        kind: String,
        #[serde(default, alias = "attrs", rename = "Attrs")]
        attributes: BTreeMap<String, String>,
    }
    let mut imports = Vec::new();
    if let Some(text) = options.get("cache-imports").filter(|text| !text.is_empty()) {
        let entries: Option<Vec<Entry>> = serde_json::from_str::<serde_json::Value>(text)
            .and_then(serde_json::from_value)
            .map_err(|error| OptionsError::CacheImports {
                text: text.clone(),
                error: if error.is_eof() {
                    "unexpected end of JSON input".to_owned()
                } else {
                    error.to_string()
                },
            })?;
        imports.extend(entries.into_iter().flatten().map(|entry| CacheImport {
            kind: entry.kind,
            attributes: entry.attributes,
        }));
    }
    if let Some(text) = options.get("cache-from").filter(|text| !text.is_empty()) {
        imports.extend(text.split(',').map(|reference| CacheImport {
            kind: "registry".into(),
            attributes: BTreeMap::from([("ref".into(), reference.to_owned())]),
        }));
    }
    Ok(imports)
}

const DEFAULT_GENERATOR: &str = "docker/buildkit-syft-scanner:stable-1";

fn sbom(options: &BTreeMap<String, String>) -> Result<Option<Sbom>, OptionsError> {
    let mut wanted: BTreeMap<String, &str> = BTreeMap::new();
    for prefix in ["attest:", "build-arg:BUILDKIT_ATTEST_"] {
        let found = options
            .iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(prefix)?, value)));
        wanted.extend(found.map(|(kind, value)| (kind.to_lowercase(), value.as_str())));
    }
    let mut parsed: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (kind, value) in wanted {
        let fields = if value.is_empty() {
            Ok(Vec::new())
        } else {
            csv::fields(value)
        };
        let fields = fields.map_err(|error| OptionsError::Attestation {
            kind: kind.clone(),
            error,
        })?;
        let attributes = fields.iter().map(|field| {
            let (key, value) = field.split_once('=').unwrap_or((field, ""));
            (key.to_owned(), value.to_owned())
        });
        parsed.insert(kind, attributes.collect());
    }
    if let Some(kind) = parsed
        .keys()
        .find(|kind| !matches!(kind.as_str(), "sbom" | "provenance"))
    {
        return Err(OptionsError::AttestationKind(kind.clone()));
    }
    let Some(mut parameters) = parsed.remove("sbom") else {
        return Ok(None);
    };
    let generator = parameters
        .remove("generator")
        .unwrap_or_else(|| DEFAULT_GENERATOR.to_owned());
    match Reference::parse(&generator) {
        Ok(reference) => Ok(Some(Sbom {
            generator: reference.with_default_tag().to_string(),
            parameters,
        })),
        Err(error) => Err(OptionsError::Scanner {
            text: generator,
            error,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[(&str, &str)]) -> Result<Options, String> {
        let options = options
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let llb_capabilities = BTreeSet::from([llb::caps::FILE_BASE.to_owned()]);
        let request = Request {
            options,
            llb_capabilities,
            ..Request::default()
        };
        Options::parse(&request).map_err(|err| err.to_string())
    }

    #[test]
    fn reads_options() {
        let options = parse(&[
            ("platform", "linux/amd64,linux/arm64/v8"),
            ("add-hosts", "A=1.2.3.4,b=::1"),
            ("ulimit", "nofile=1:2"),
            ("no-cache", "a,b"),
            ("build-arg:X", "1"),
            ("cache-from", "a,b"),
            ("attest:sbom", ""),
        ])
        .unwrap();
        assert!(options.multi_platform);
        assert_eq!(options.target_platforms[1].to_string(), "linux/arm64");
        assert_eq!(options.hosts[0].0, "a");
        assert!(options.no_cache.has("A") && !options.no_cache.has("c"));
        assert_eq!(options.cache_imports.len(), 2);
        assert_eq!(
            options.sbom.unwrap().generator,
            "docker.io/docker/buildkit-syft-scanner:stable-1"
        );
    }

    #[test]
    fn names_the_first_bad_option_in_the_order_of_the_ecosystem() {
        let both = parse(&[("multi-platform", "x"), ("force-network-mode", "y")]);
        assert_eq!(both.map(|_| ()), Err("invalid netmode y".to_owned()));
        assert!(
            parse(&[("cache-imports", "null")])
                .unwrap()
                .cache_imports
                .is_empty()
        );
    }

    #[test]
    fn refuses_options() {
        for (key, value, wanted) in [
            ("force-network-mode", "x", "invalid netmode x"),
            (
                "multi-platform",
                "x",
                "invalid boolean value for multi-platform: x",
            ),
            ("image-resolve-mode", "x", "invalid image-resolve-mode: x"),
            (
                "add-hosts",
                "a",
                "failed to parse additional hosts: invalid key-value pair a",
            ),
            (
                "add-hosts",
                "a=b",
                "failed to parse additional hosts: failed to parse IP b",
            ),
            ("ulimit", "x=1", "failed to parse ulimit: invalid ulimit type: x"),
            (
                "shm-size",
                "x",
                "failed to parse shm size: strconv.ParseInt: parsing \"x\": invalid syntax",
            ),
            (
                "memory",
                "0",
                "failed to parse resource limits: invalid memory value: 0: must be > 0",
            ),
            (
                "cpusetcpus",
                "3-1",
                "failed to parse resource limits: invalid cpusetcpus value: 3-1: invalid cpuset range \"3-1\"",
            ),
            (
                "cpusetcpus",
                "99999999999",
                "failed to parse resource limits: invalid cpusetcpus value: 99999999999: cpuset element \"99999999999\" exceeds maximum 8192",
            ),
            ("attest:x", "", "unknown attestation type \"x\""),
        ] {
            assert_eq!(parse(&[(key, value)]).map(|_| ()), Err(wanted.to_owned()));
        }
    }
}

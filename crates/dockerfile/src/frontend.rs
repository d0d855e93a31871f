//! One pass over a request with the answers known so far.

use std::collections::BTreeMap;
use std::sync::Arc;

use llb::SourceMap;
use llb::pb::{self, Definition};
use oci::{Digest, Platform};
use serde::Serialize;

use crate::ask::Asker;
use crate::context::{self, Contexts, Entrypoint};
use crate::convert::{Converted, Job, convert, lint_config};
use crate::error::{ConvertError, Progress, Stop};
use crate::image;
use crate::lint::{Finding, Linter};
use crate::options::Options;
use crate::parser;
use crate::position::Range;
use crate::request::{
    BuildOutcome, ContextOutcome, Failure, FailureKind, Forward, MetadataOutcome, Outcome, PlatformOutcome,
    Request, SourceRange, Warning,
};
use crate::{raw, sbom, subrequest};

/// Capabilities that a client may ask this frontend for.
const FRONTEND_CAPABILITIES: [&str; 4] = [
    "moby.buildkit.frontend.inputs",
    "moby.buildkit.frontend.subrequests",
    "moby.buildkit.frontend.contexts",
    "moby.buildkit.frontend.gitquerystring",
];

const CONFIG_KEY: &str = "containerimage.config";
const BASE_CONFIG_KEY: &str = "containerimage.base.config";
const EPOCH_KEY: &str = "source.date.epoch";
const PLATFORMS_KEY: &str = "refs.platforms";

/// A Dockerfile that was read.
struct Source {
    entrypoint: Entrypoint,
    text: String,
    map: Arc<SourceMap>,
}

/// How a pass failed: what is known to say so.
pub(crate) struct Failed {
    stop: Stop,
    source: Option<pb::SourceInfo>,
    warnings: Vec<Warning>,
}

impl From<Stop> for Box<Failed> {
    fn from(stop: Stop) -> Self {
        Self::new(Failed {
            stop,
            source: None,
            warnings: Vec::new(),
        })
    }
}

/// Makes one pass; `None` if answers are missing.
pub(crate) fn pass(request: &Request, asker: &Asker<'_>) -> Result<Option<Outcome>, Box<Failure>> {
    let failed = match run(request, asker) {
        Ok(outcome) => return Ok(Some(outcome)),
        Err(failed) => *failed,
    };
    let error = match failed.stop {
        Stop::Pending => return Ok(None),
        Stop::Failed(error) => error,
    };
    Err(failure(&error, failed.source, failed.warnings))
}

/// Makes one pass in search of a named context; the outer `None` if answers are missing, the inner one if there is no such
/// context.
pub(crate) fn context_pass(
    request: &Request,
    asker: &Asker<'_>,
    name: &str,
) -> Result<Option<Option<ContextOutcome>>, Box<Failure>> {
    match find_context(request, asker, name) {
        Ok(found) => Ok(Some(found)),
        Err(Stop::Pending) => Ok(None),
        Err(Stop::Failed(error)) => Err(failure(&error, None, Vec::new())),
    }
}

fn find_context(request: &Request, asker: &Asker<'_>, name: &str) -> Progress<Option<ContextOutcome>> {
    let options = Options::parse(request)?;
    let contexts = Contexts::only_named(&options, &request.inputs, asker);
    let Some(context) = contexts.named(name, None, "")? else {
        return Ok(None);
    };
    let mut locals = Vec::new();
    let loaded = contexts.load(&context, &mut locals, None)?;
    for local in locals {
        local.resolve();
    }
    Ok(Some(ContextOutcome {
        definition: context::marshal(&loaded.state)?,
        config: loaded.image,
    }))
}

fn failure(error: &ConvertError, source: Option<pb::SourceInfo>, warnings: Vec<Warning>) -> Box<Failure> {
    let place = |source: pb::SourceInfo| {
        let place = |ranges| SourceRange {
            source: source.clone(),
            ranges,
        };
        error.locations().into_iter().map(place).collect()
    };
    Box::new(Failure {
        message: raw::shown(error.to_string()),
        kind: kind_of(error),
        sources: source.map(place).unwrap_or_default(),
        cause: error.cause(),
        warnings,
    })
}

fn kind_of(error: &ConvertError) -> FailureKind {
    match error {
        ConvertError::Capability(name) => FailureKind::UnsupportedCapability(name.clone()),
        ConvertError::Subrequest(name) => FailureKind::UnsupportedSubrequest(name.clone()),
        _ => FailureKind::User,
    }
}

fn run(request: &Request, asker: &Asker<'_>) -> Result<Outcome, Box<Failed>> {
    let missing = missing_capability(request);
    if let Some((name, false)) = missing {
        return Err(Stop::from(ConvertError::Capability(name.to_owned())).into());
    }
    let options = Options::parse(request).map_err(Stop::from)?;
    let mut contexts = Contexts::detect(&options, &request.inputs, asker)?;
    let entrypoint = contexts.entrypoint()?;
    let source = Source::new(entrypoint);
    if let Some(forward) = forward(request, &options, &source) {
        return Ok(Outcome::Forward(forward));
    }
    if let Some((name, _)) = missing {
        return Err(Stop::from(ConvertError::Capability(name.to_owned())).into());
    }
    if let Some(name) = options.get("requestid") {
        let (metadata, linter) =
            subrequest::answer(name, &source.entrypoint, &source.text, &source.map, &contexts);
        let warnings = source.warnings(&linter);
        return match metadata {
            Ok(metadata) => Ok(Outcome::Metadata(MetadataOutcome { metadata, warnings })),
            Err(stop) => Err(Box::new(Failed {
                stop,
                source: None,
                warnings,
            })),
        };
    }
    let linter = match lint_config(&source.text, options.check.as_ref()) {
        Ok(config) => Linter::new(config),
        Err(stop) => return Err(source.failed(stop, &Linter::silent())),
    };
    match build(&options, &contexts, &source, &linter) {
        Ok(mut outcome) => {
            outcome.warnings = source.warnings(&linter);
            Ok(Outcome::Build(outcome))
        }
        Err(stop) => Err(source.failed(stop, &linter)),
    }
}

/// Finds a capability that is asked for and not there, and whether another frontend may be tried.
fn missing_capability(request: &Request) -> Option<(&str, bool)> {
    let asked = request
        .options
        .get("frontend.caps")
        .filter(|caps| !caps.is_empty())?;
    let missing = asked.split(',').filter_map(|cap| {
        let name = cap.split('+').next().unwrap_or_default();
        (!FRONTEND_CAPABILITIES.contains(&name)).then(|| (name, cap.contains("+forward")))
    });
    let mut last = None;
    for (name, may_forward) in missing {
        last = Some((name, may_forward));
        if !may_forward {
            break;
        }
    }
    last
}

/// Tells which frontend the Dockerfile, or the client, asks for.
fn forward(request: &Request, options: &Options, source: &Source) -> Option<Forward> {
    if options.get("cmdline").is_some() {
        return None;
    }
    let make = |image: &str, cmdline: &str| {
        let mut all = options.all.clone();
        all.insert("cmdline".to_owned(), cmdline.to_owned());
        all.insert("source".to_owned(), image.to_owned());
        Forward {
            image: image.to_owned(),
            options: all,
            inputs: request.inputs.clone(),
            source: None,
            error_prefix: None,
        }
    };
    if let Some(cmdline) = options.get("build-arg:BUILDKIT_SYNTAX") {
        let image = cmdline.trim().split(' ').next().unwrap_or_default();
        let error_prefix = Some(format!("failed with build-arg:BUILDKIT_SYNTAX = {cmdline}"));
        return Some(Forward {
            error_prefix,
            ..make(image, cmdline)
        });
    }
    let (image, directive) = parser::detect_syntax(&source.text)?;
    let place = SourceRange {
        source: source.wire(),
        ranges: directive.ranges,
    };
    Some(Forward {
        source: Some(place),
        ..make(&raw::shown(image), &raw::shown(directive.value))
    })
}

impl Source {
    fn new(entrypoint: Entrypoint) -> Self {
        let map = Arc::new(SourceMap {
            state: None,
            definition: Some(entrypoint.definition.clone()),
            filename: entrypoint.filename.clone(),
            language: "Dockerfile".to_owned(),
            data: entrypoint.data.clone().into(),
        });
        let text = raw::decode(&entrypoint.data);
        Self {
            entrypoint,
            text,
            map,
        }
    }

    fn wire(&self) -> pb::SourceInfo {
        wire_source(&self.map)
    }

    fn warnings(&self, linter: &Linter) -> Vec<Warning> {
        let vertex = head(&self.entrypoint.definition);
        let source = self.wire();
        let warning = |finding: Finding| Warning {
            vertex,
            rule: finding.rule.name.to_owned(),
            short: raw::shown(finding.short()),
            detail: vec![finding.rule.description.to_owned()],
            url: finding.rule.url.to_owned(),
            level: 1,
            source: SourceRange {
                source: source.clone(),
                ranges: finding.location,
            },
        };
        linter.findings().into_iter().map(warning).collect()
    }

    fn failed(&self, stop: Stop, linter: &Linter) -> Box<Failed> {
        if matches!(stop, Stop::Pending) {
            return stop.into();
        }
        Box::new(Failed {
            stop,
            source: Some(self.wire()),
            warnings: self.warnings(linter),
        })
    }
}

/// Describes a source file.
pub(crate) fn wire_source(map: &SourceMap) -> pb::SourceInfo {
    pb::SourceInfo {
        filename: map.filename.clone(),
        data: map.data.clone(),
        definition: map.definition.clone(),
        language: map.language.clone(),
    }
}

/// Returns the digest of the vertex that a definition is about.
fn head(definition: &Definition) -> Digest {
    let graph = llb::Graph::load(definition);
    graph.map_or_else(|_| Digest::sha256(b""), |graph| graph.vertex(graph.root()).digest)
}

fn build(
    options: &Options,
    contexts: &Contexts<'_>,
    source: &Source,
    linter: &Linter,
) -> Progress<BuildOutcome> {
    let wanted: Vec<Option<&Platform>> = match options.target_platforms.as_slice() {
        [] => vec![None],
        platforms => platforms.iter().map(Some).collect(),
    };
    let mut converted: Vec<(Platform, Converted)> = Vec::with_capacity(wanted.len());
    let mut pending = false;
    let scanner = match sbom::scanner(contexts) {
        Err(Stop::Pending) => {
            pending = true;
            None
        }
        scanner => scanner?,
    };
    for (at, platform) in wanted.into_iter().enumerate() {
        let job = Job {
            text: &source.text,
            contexts,
            source_map: &source.map,
            platform,
            // The others would only find the same.
            linter: if at == 0 { linter.clone() } else { Linter::silent() },
            all_stages: false,
        };
        match convert(job) {
            Ok(done) => converted.push((platform.cloned().unwrap_or_else(Platform::host), done)),
            // The other platforms may ask at the same time.
            Err(Stop::Pending) => pending = true,
            Err(stop) => return Err(stop),
        }
    }
    if pending {
        return Err(Stop::Pending);
    }
    let mut outcome = BuildOutcome {
        multi_platform: options.multi_platform,
        cache_imports: options.cache_imports.clone(),
        ..BuildOutcome::default()
    };
    let mut exported = Vec::with_capacity(converted.len());
    for (platform, done) in &converted {
        let result = platform_outcome(platform, done, scanner.as_ref())?;
        let suffix = if options.multi_platform {
            format!("/{}", result.id)
        } else {
            String::new()
        };
        let mut add =
            |key: &str, value: &[u8]| outcome.metadata.insert(format!("{key}{suffix}"), value.to_vec());
        add(CONFIG_KEY, &result.config);
        if let Some(base) = &result.base_config {
            add(BASE_CONFIG_KEY, base);
        }
        if let Some(epoch) = done.epoch {
            add(EPOCH_KEY, epoch.seconds.to_string().as_bytes());
        }
        exported.push(ExportPlatform {
            id: result.id.clone(),
            platform: result.platform.clone(),
        });
        outcome.results.push(result);
    }
    let platforms = oci::json::to_vec(&ExportPlatforms { platforms: exported });
    let platforms = platforms.map_err(|error| ConvertError::Json(error.to_string()))?;
    outcome.metadata.insert(PLATFORMS_KEY.to_owned(), platforms);
    Ok(outcome)
}

fn platform_outcome(
    platform: &Platform,
    done: &Converted,
    scanner: Option<&sbom::Scanner>,
) -> Progress<PlatformOutcome> {
    let mut platform = platform.normalized();
    let id = platform.format_all();
    if platform.os == "windows" && done.image.os == "windows" {
        if platform.os_version.is_empty() {
            platform.os_version.clone_from(&done.image.os_version);
        }
        if platform.os_features.is_empty() {
            platform.os_features.clone_from(&done.image.os_features);
        }
        platform = platform.normalized();
    }
    Ok(PlatformOutcome {
        definition: done
            .definition()
            .map_err(|stop| stop.context("failed to marshal LLB definition"))?,
        config: image::print(&done.image)?,
        base_config: done.base_image.as_ref().map(image::print).transpose()?,
        attestations: scanner
            .map(|scanner| scanner.scan(&id, done))
            .transpose()?
            .into_iter()
            .collect(),
        id,
        platform,
    })
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ExportPlatforms {
    platforms: Vec<ExportPlatform>,
}

#[derive(Serialize)]
struct ExportPlatform {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Platform")]
    platform: Platform,
}

/// Metadata of a subrequest.
pub(crate) type Metadata = BTreeMap<String, Vec<u8>>;

/// Joins places that touch, for showing them together.
pub(crate) fn merge_ranges(locations: &[Vec<Range>]) -> Vec<Range> {
    let mut all: Vec<Range> = locations.iter().flatten().copied().collect();
    if all.len() < 2 {
        return all;
    }
    all.sort_by_key(|range| range.start.line);
    let mut merged: Vec<Range> = Vec::new();
    for range in all {
        match merged.last_mut() {
            Some(last) if range.start.line <= last.end.line => {
                last.end.line = last.end.line.max(range.end.line)
            }
            _ => merged.push(range),
        }
    }
    merged
}

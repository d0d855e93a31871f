//! From stages to a graph of operations and an image configuration, for one platform.

mod copy;
mod dispatch;
mod epoch;
mod mounts;
mod name;
mod onbuild;
mod resolve;
mod run;
mod settings;
mod stages;
mod utf8;
mod validate;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use llb::pb::Definition;
use llb::{Deferred, MarshalOptions, ProxyEnv, SourceMap, State};
use oci::pattern::Matcher;
use oci::{ImageConfig, Platform};

pub(crate) use epoch::Epoch;
pub(crate) use stages::{StageId, StageState};

use crate::context::{Contexts, PendingLocal};
use crate::env::Env;
use crate::error::{ConvertError, Progress};
use crate::instruction::{self, Stage};
use crate::lint::{Finding, LintConfig, Linter, rules};
use crate::outline::Capture;
use crate::parser;
use crate::position::Range;
use crate::text;
use crate::word::{Lexer, Variables};

/// Arguments that do not become variables of commands.
const NON_ENV_ARGS: [&str; 2] = [SBOM_SCAN_CONTEXT, SBOM_SCAN_STAGE];
const SBOM_SCAN_CONTEXT: &str = "BUILDKIT_SBOM_SCAN_CONTEXT";
const SBOM_SCAN_STAGE: &str = "BUILDKIT_SBOM_SCAN_STAGE";
const EPOCH_ARG: &str = "SOURCE_DATE_EPOCH";
const SCRATCH: &str = "scratch";
/// How many bytes definition and image may come to; beyond, nobody accepts them.
const MAX_BYTES: usize = 64 << 20;
/// What a stage, or a step that makes an operation, comes to at least: names, places, platform, history. There can be
/// some 20,000 of them; no builder runs as many.
const STEP_BYTES: usize = 3 << 10;

/// What to convert, and how.
pub(crate) struct Job<'a> {
    pub(crate) text: &'a str,
    pub(crate) contexts: &'a Contexts<'a>,
    pub(crate) source_map: &'a Arc<SourceMap>,
    /// `None` if the client asked for no platform.
    pub(crate) platform: Option<&'a Platform>,
    pub(crate) linter: Linter,
    /// Converts stages that the target does not need, too.
    pub(crate) all_stages: bool,
}

/// A converted target.
pub(crate) struct Converted {
    pub(crate) state: State,
    pub(crate) image: ImageConfig,
    pub(crate) base_image: Option<ImageConfig>,
    pub(crate) epoch: Option<Epoch>,
    /// More filesystems to scan, by name.
    pub(crate) scan_extras: BTreeMap<String, State>,
    /// Some scanned stage is built without cache.
    pub(crate) ignore_cache: bool,
    pub(crate) outline: crate::outline::Outline,
    marshal: MarshalOptions,
    /// Some of the Dockerfile is not ASCII, so perhaps not UTF-8, or its flags end within characters.
    may_have_raw: bool,
}

impl Converted {
    /// Encodes the target.
    pub(crate) fn definition(&self) -> Progress<Definition> {
        let mut definition = self.state.marshal(&self.marshal)?;
        if self.may_have_raw {
            utf8::check(&mut definition)?;
        }
        Ok(definition)
    }
}

/// Platforms of a conversion.
struct Platforms {
    target: Platform,
    build: Platform,
    /// Nobody asked for the target.
    implicit: bool,
}

/// A conversion in work.
struct Converter<'a> {
    contexts: &'a Contexts<'a>,
    source_map: &'a Arc<SourceMap>,
    platforms: Platforms,
    asked_platform: Option<&'a Platform>,
    linter: Linter,
    lexer: Lexer,
    all_stages: bool,
    build_args: BTreeMap<String, String>,
    global_args: Env,
    epoch: Option<Epoch>,
    outline: Capture,
    proxy: Option<ProxyEnv>,
    /// All stages ever made, also those that stand for an image only.
    stages: Vec<StageState>,
    /// Stages in the order in which they can be referred to.
    order: Vec<StageId>,
    by_name: BTreeMap<String, StageId>,
    build_context: State,
    build_context_slot: Deferred,
    ignore: Option<Matcher>,
    locals: Vec<PendingLocal>,
    /// Some of the Dockerfile is not ASCII, so perhaps not UTF-8, or its flags end within characters.
    may_have_raw: bool,
    /// Names that were compared for suggestions.
    compared: Cell<usize>,
    /// Bytes of the definition and the image so far, roughly.
    spent_bytes: usize,
}

/// Finds out which checks a file wants.
pub(crate) fn lint_config(text: &str, option: Option<&LintConfig>) -> Progress<LintConfig> {
    if let Some(config) = option {
        return Ok(config.clone());
    }
    let directive = parser::directive("check", text);
    Ok(LintConfig::parse(
        &directive.map(|found| found.value).unwrap_or_default(),
    )?)
}

/// A file that was read, to be used by later passes and for other platforms.
#[derive(Debug)]
pub(crate) struct Read {
    text: String,
    config: LintConfig,
    parsed: instruction::Parsed,
    escape: char,
    findings: Vec<Finding>,
}

/// Remembers what was read first.
#[derive(Debug, Default)]
pub(crate) struct Memory(OnceLock<Read>);

/// Reads the stages of a file, once for all passes that look for the same.
fn read_once(text: &str, linter: &Linter, memory: &Memory) -> Progress<(instruction::Parsed, char)> {
    let fits =
        |read: &&Read| read.text == text && linter.config().is_none_or(|config| *config == read.config);
    if let Some(read) = memory.0.get().filter(fits) {
        linter.extend(&read.findings);
        return Ok((read.parsed.clone(), read.escape));
    }
    let before = linter.count();
    let (parsed, escape) = read(text, linter)?;
    if let Some(config) = linter.config() {
        // Another text may have been read before; then this one is read again.
        let _ = memory.0.set(Read {
            text: text.to_owned(),
            config: config.clone(),
            parsed: parsed.clone(),
            escape,
            findings: linter.findings().split_off(before),
        });
    }
    Ok((parsed, escape))
}

/// Reads the stages of a file.
pub(crate) fn read(text: &str, linter: &Linter) -> Progress<(instruction::Parsed, char)> {
    let file = parser::parse(text)?;
    for line in &file.empty_continuations {
        linter.run(
            &rules::NO_EMPTY_CONTINUATION,
            &[Range::line(*line)],
            rules::no_empty_continuation,
        );
    }
    let parsed = instruction::parse(file.nodes, linter)?;
    Ok((parsed, file.escape))
}

/// Converts a Dockerfile.
pub(crate) fn convert(job: Job<'_>) -> Progress<Converted> {
    let options = job.contexts.options;
    let linter = job.linter.clone();
    if job.text.is_empty() {
        return Err(ConvertError::Empty.into());
    }
    let (parsed, escape) = read_once(job.text, &linter, job.contexts.asker.memory())?;
    if parsed.stages.is_empty() {
        return Err(ConvertError::NoStages.into());
    }
    validate::stage_names(&parsed.stages, &linter);
    validate::command_casing(&parsed.stages, &linter);

    let build = options.build_platform.clone();
    let target = job.platform.unwrap_or(&build).clone();
    let platforms = Platforms {
        target,
        build,
        implicit: job.platform.is_none(),
    };
    let last_name = parsed.stages.last().map_or("", |stage| stage.name.as_str());
    let target_name = if options.target.is_empty() {
        last_name
    } else {
        &options.target
    };
    let defaults = default_args(&platforms, &options.build_args, target_name);
    let lexer = Lexer::new(escape);
    validate::base_images(&parsed, &lexer, &defaults, &linter);
    let (global_args, all_args) =
        stages::meta_args(defaults, &lexer, &parsed.meta_args, &options.build_args)?;

    let (build_context, build_context_slot) = State::deferred();
    let mut converter = Converter {
        contexts: job.contexts,
        source_map: job.source_map,
        platforms,
        asked_platform: job.platform,
        linter,
        lexer,
        all_stages: job.all_stages,
        build_args: options.build_args.clone(),
        global_args,
        epoch: None,
        outline: Capture::new(all_args),
        proxy: proxy(&options.build_args),
        stages: Vec::new(),
        order: Vec::new(),
        by_name: BTreeMap::new(),
        build_context,
        build_context_slot,
        ignore: None,
        locals: Vec::new(),
        may_have_raw: !job.text.is_ascii(),
        compared: Cell::new(0),
        spent_bytes: 0,
    };
    converter.resolve_epoch(&parsed.stages)?;
    converter.run(parsed.stages)
}

impl Converter<'_> {
    /// Counts bytes of the definition or the image, and refuses too many.
    fn spend(&mut self, bytes: usize) -> Progress<()> {
        self.spent_bytes = self.spent_bytes.saturating_add(bytes);
        if self.spent_bytes > MAX_BYTES {
            return Err(ConvertError::TooLarge.into());
        }
        Ok(())
    }

    fn run(mut self, stages: Vec<Stage>) -> Progress<Converted> {
        self.make_stages(stages)?;
        let target = self.target()?;
        self.make_dependencies()?;
        // The ignore file is certainly needed: asking early spares a round.
        let ignored = self.contexts.ignore_patterns();
        let reachable = self.resolve_stages(target)?;
        let patterns = ignored?;
        if !patterns.is_empty() {
            self.ignore = Some(Matcher::new(&patterns)?);
        }
        let used = self.dispatch_stages(&reachable, target)?;
        self.finish(target, &used)
    }

    fn finish(mut self, target: StageId, used: &BTreeSet<String>) -> Progress<Converted> {
        let options = self.contexts.options;
        let history = self.history_of(target);
        let reachable = self.reachable(target);
        let image = &mut self.stages[target.0].image;
        image.history = history;
        image.config.labels.extend(options.labels.clone());
        if let Some(names) = self.linter.violation() {
            return Err(ConvertError::Lint(names).into());
        }
        let context = self.contexts.main(used)?;
        self.build_context_slot.resolve(&context);
        self.locals.drain(..).for_each(PendingLocal::resolve);
        if !self.platforms.implicit {
            set_platform(&mut self.stages[target.0].image, &self.platforms.target);
        }
        let image = &mut self.stages[target.0].image;
        let normalized = image.platform().normalized();
        image.set_platform(normalized);

        let mut scan_extras = BTreeMap::new();
        let stage = &self.stages[target.0];
        let mut ignore_cache = stage.ignore_cache;
        if stage.scan_context {
            scan_extras.insert("context".to_owned(), self.build_context.clone());
        }
        for id in reachable.iter().filter(|id| **id != target) {
            let scanned = &self.stages[id.0];
            if scanned.scan_stage {
                scan_extras.insert(scanned.stage_name.clone(), scanned.state.clone());
                ignore_cache |= scanned.ignore_cache;
            }
        }
        let outline = self.outline_of(target);
        let stage = self.stages.swap_remove(target.0);
        Ok(Converted {
            state: stage.state,
            image: stage.image,
            base_image: stage.base_image,
            epoch: self.epoch,
            scan_extras,
            ignore_cache,
            outline,
            marshal: MarshalOptions {
                platform: self.platforms.target,
                caps: Some(options.capabilities.clone()),
                ..MarshalOptions::default()
            },
            may_have_raw: self.may_have_raw,
        })
    }
}

/// Gives an image the platform that was asked for.
fn set_platform(image: &mut ImageConfig, target: &Platform) {
    let same = target.os == image.os && target.architecture == image.architecture;
    image.os.clone_from(&target.os);
    image.architecture.clone_from(&target.architecture);
    if !target.variant.is_empty() || !same {
        image.variant.clone_from(&target.variant);
    }
    if !target.os_version.is_empty() || !same {
        image.os_version.clone_from(&target.os_version);
    }
    if !target.os_features.is_empty() {
        image.os_features.clone_from(&target.os_features);
    }
}

/// The arguments every Dockerfile can use in FROM.
fn default_args(platforms: &Platforms, overrides: &BTreeMap<String, String>, target: &str) -> Env {
    let (build, wanted) = (&platforms.build, &platforms.target);
    let target = if target.is_empty() { "default" } else { target };
    let defaults = [
        ("BUILDPLATFORM", build.format()),
        ("BUILDOS", build.os.clone()),
        ("BUILDOSVERSION", build.os_version.clone()),
        ("BUILDARCH", build.architecture.clone()),
        ("BUILDVARIANT", build.variant.clone()),
        ("TARGETPLATFORM", wanted.format_all()),
        ("TARGETOS", wanted.os.clone()),
        ("TARGETOSVERSION", wanted.os_version.clone()),
        ("TARGETARCH", wanted.architecture.clone()),
        ("TARGETVARIANT", wanted.variant.clone()),
        ("TARGETSTAGE", target.to_owned()),
    ];
    let mut env = Env::default();
    for (name, value) in defaults {
        env.set(name, overrides.get(name).unwrap_or(&value));
    }
    env
}

fn proxy(build_args: &BTreeMap<String, String>) -> Option<ProxyEnv> {
    let mut proxy = ProxyEnv::default();
    let mut given = false;
    for (name, value) in build_args {
        let field = match name.to_lowercase().as_str() {
            "http_proxy" => &mut proxy.http_proxy,
            "https_proxy" => &mut proxy.https_proxy,
            "ftp_proxy" => &mut proxy.ftp_proxy,
            "no_proxy" => &mut proxy.no_proxy,
            "all_proxy" => &mut proxy.all_proxy,
            _ => continue,
        };
        value.clone_into(field);
        given = true;
    }
    given.then_some(proxy)
}

/// Tells whether a value, a truth value or a list of names, is meant for a stage.
fn is_enabled_for(stage: &str, value: &str) -> bool {
    text::parse_bool(value).unwrap_or_else(|| value.split(',').any(|name| name == stage))
}

/// Turns places into those of definitions.
pub(crate) fn wire_ranges(ranges: &[Range]) -> Vec<llb::pb::Range> {
    let position = |at: crate::position::Position| llb::pb::Position {
        line: i32::try_from(at.line).unwrap_or(i32::MAX),
        character: i32::try_from(at.character).unwrap_or(i32::MAX),
    };
    let range = |range: &Range| llb::pb::Range {
        start: Some(position(range.start)),
        end: Some(position(range.end)),
    };
    ranges.iter().map(range).collect()
}

/// Lists the names of variables, for suggestions.
fn names_of(variables: &dyn Variables) -> Vec<String> {
    variables.names().into_iter().map(str::to_owned).collect()
}

//! Stages, their names, and how they depend on each other.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use llb::State;
use oci::{History, ImageConfig, Platform};

use super::{Converter, SCRATCH, STEP_BYTES, names_of, validate};
use crate::context::{NamedContext, Paths};
use crate::env::Env;
use crate::error::{ConvertError, Progress, Stop};
use crate::instruction::{Argument, Instruction, Kind, MetaArgs, Stage};
use crate::outline::{ArgSeen, Capture, Outline};
use crate::position::Range;
use crate::suggest;
use crate::word::{Expanded, Lexer, NoVariables, Variables};

/// Index of a stage in the converter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StageId(pub(crate) usize);

/// An instruction with the stages it takes files from.
#[derive(Clone, Debug)]
pub(crate) struct Command {
    pub(crate) instruction: Arc<Instruction>,
    /// COPY: at most one. RUN: one for each mount.
    pub(crate) sources: Vec<StageId>,
    pub(crate) is_onbuild: bool,
}

/// A stage in work.
#[derive(Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent marks that are set at different times"
)]
pub(crate) struct StageState {
    pub(crate) stage: Stage,
    pub(crate) commands: Vec<Command>,
    pub(crate) base: Option<StageId>,
    /// Stages it takes files from, and the instruction that does.
    pub(crate) dependencies: Vec<(StageId, Vec<Range>)>,
    dependency_index: BTreeMap<StageId, usize>,
    pub(crate) state: State,
    pub(crate) env: Env,
    /// The image so far; its history is in `history`.
    pub(crate) image: ImageConfig,
    /// Where in the image's environment each variable stands.
    image_env: BTreeMap<String, usize>,
    /// What this stage adds to the history of its base.
    pub(crate) history: Vec<History>,
    pub(crate) base_image: Option<ImageConfig>,
    pub(crate) platform: Option<Platform>,
    pub(crate) named: Option<NamedContext>,
    /// All done: others may use it.
    pub(crate) dispatched: bool,
    /// The base image is known.
    pub(crate) resolved: bool,
    pub(crate) onbuild_started: bool,
    pub(crate) build_args: Vec<Argument>,
    /// Names of `build_args`.
    pub(crate) arg_names: BTreeSet<String>,
    pub(crate) context_paths: BTreeSet<String>,
    /// Paths used of its files; shared with the base.
    pub(crate) paths: Paths,
    pub(crate) ignore_cache: bool,
    /// Stands for an image that only a `--from` names.
    pub(crate) unregistered: bool,
    pub(crate) stage_name: String,
    pub(crate) command_index: u64,
    pub(crate) command_total: u64,
    pub(crate) in_onbuild: bool,
    pub(crate) outline: Capture,
    pub(crate) scan_stage: bool,
    pub(crate) scan_context: bool,
    /// WORKDIR has been used.
    pub(crate) workdir_set: bool,
    pub(crate) entrypoint_at: Option<Vec<Range>>,
    pub(crate) cmd_at: Option<Vec<Range>>,
    pub(crate) healthcheck_at: Option<Vec<Range>>,
}

impl StageState {
    /// Notes where the variables of the image are.
    pub(super) fn index_image_env(&mut self) {
        self.image_env.clear();
        for (at, variable) in self.image.config.env.iter().enumerate() {
            let name = variable.split('=').next().unwrap_or_default();
            self.image_env.entry(name.to_owned()).or_insert(at);
        }
    }

    /// Replaces a variable of the image where it stands, or appends it.
    pub(super) fn set_image_env(&mut self, name: &str, value: &str) {
        let variables = &mut self.image.config.env;
        let at = *self.image_env.entry(name.to_owned()).or_insert(variables.len());
        let assignment = format!("{name}={value}");
        match variables.get_mut(at) {
            Some(known) => *known = assignment,
            None => variables.push(assignment),
        }
    }
}

/// Expands a word; an error leaves out what was found.
pub(super) fn expand(lexer: &Lexer, word: &str, variables: &dyn Variables) -> Progress<Expanded> {
    let (expanded, result) = lexer.expand(word, variables);
    result?;
    Ok(expanded)
}

/// Computes the arguments in front of the first stage.
pub(super) fn meta_args(
    mut env: Env,
    lexer: &Lexer,
    meta: &[MetaArgs],
    build_args: &BTreeMap<String, String>,
) -> Progress<(Env, BTreeMap<String, ArgSeen>)> {
    let mut seen: BTreeMap<String, ArgSeen> = BTreeMap::new();
    for instruction in meta {
        for arg in &instruction.args {
            let mut found = ArgSeen::new(arg, &instruction.location);
            let value = match (build_args.get(&arg.key), &arg.value) {
                (Some(value), _) => Some(value.clone()),
                (None, None) => None,
                (None, Some(default)) => {
                    let expanded =
                        expand(lexer, default, &env).map_err(|stop| stop.at(&instruction.location))?;
                    found.depends = expanded.matched;
                    if found.depends.remove(&arg.key)
                        && let Some(before) = seen.get(&arg.key)
                    {
                        found.depends.extend(before.depends.iter().cloned());
                    }
                    Some(expanded.text)
                }
            };
            if let Some(value) = value {
                env.set(&arg.key, &value);
                found.value = value;
            }
            seen.insert(arg.key.clone(), found);
        }
    }
    Ok((env, seen))
}

impl Converter<'_> {
    /// Makes a stage of each FROM, with names and platforms expanded.
    pub(super) fn make_stages(&mut self, stages: Vec<Stage>) -> Progress<()> {
        let names = self.declared_names();
        for (at, mut stage) in stages.into_iter().enumerate() {
            let location = stage.location.clone();
            self.spend(STEP_BYTES).map_err(|stop| stop.at(&location))?;
            let linter = self.linter.with_comments(&stage.comments);
            let (base, result) = self.lexer.expand(&stage.base_name, &self.global_args);
            validate::undeclared_args(&names, &base.unmatched, &location, &linter);
            result.map_err(|error| Stop::from(error).at(&location))?;
            if base.text.is_empty() {
                return Err(Stop::from(ConvertError::BlankBase(stage.base_name)).at(&location));
            }
            stage.base_name = base.text;
            let mut used = base.matched;
            let platform = match stage.platform.as_str() {
                "" => None,
                _ => Some(self.stage_platform(&stage, &names, &mut used, &linter)?),
            };
            let mut state = StageState {
                stage_name: stage.name.clone(),
                outline: self.outline.clone(),
                platform,
                stage,
                ..StageState::default()
            };
            if !state.stage.name.is_empty()
                && let Some(named) = self.named_context(&state.stage.name, state.platform.as_ref())?
            {
                state.named = Some(named);
                let id = self.add_stage(state);
                self.stages[id.0].base = None;
                continue;
            }
            if state.stage.name.is_empty() {
                state.stage_name = format!("stage-{at}");
            }
            state.ignore_cache = self.contexts.options.no_cache.has(&state.stage.name);
            let id = self.add_stage(state);
            let state = &mut self.stages[id.0];
            state.outline.used_args.extend(used);
            let from = u64::from(state.stage.base_name != SCRATCH && state.base.is_none());
            let shown = |kind: &Kind| {
                matches!(
                    kind,
                    Kind::Add(_) | Kind::Copy(_) | Kind::Run(_) | Kind::Workdir(_)
                )
            };
            let steps = state
                .stage
                .instructions
                .iter()
                .filter(|instruction| shown(&instruction.kind))
                .count();
            state.command_total = from + u64::try_from(steps).unwrap_or(u64::MAX - 1);
        }
        Ok(())
    }

    fn declared_names(&self) -> BTreeSet<String> {
        self.outline
            .all_args
            .keys()
            .cloned()
            .chain(names_of(&self.global_args))
            .collect()
    }

    fn stage_platform(
        &self,
        stage: &Stage,
        names: &BTreeSet<String>,
        used: &mut BTreeSet<String>,
        linter: &crate::lint::Linter,
    ) -> Progress<Platform> {
        let location = &stage.location;
        let (found, result) = self.lexer.expand(&stage.platform, &self.global_args);
        validate::undeclared_args(names, &found.unmatched, location, linter);
        validate::redundant_platform(&stage.platform, &found, location, &self.global_args, linter);
        validate::constant_platform(&stage.name, &found, location, linter);
        result.map_err(|error| {
            Stop::from(error)
                .context(format!("failed to process arguments for platform {}", found.text))
                .at(location)
        })?;
        let suggest = |error: ConvertError| {
            let declared = names_of(&self.global_args);
            let closest = found
                .unmatched
                .iter()
                .find_map(|name| suggest::search(name, &declared, false));
            error.at(location).suggest(closest)
        };
        if found.text.is_empty() {
            return Err(suggest(ConvertError::EmptyPlatform(stage.platform.clone())).into());
        }
        let platform = Platform::parse(&found.text).map_err(|error| {
            let error = suggest(ConvertError::Platform(error));
            error
                .context(format!("failed to parse platform {}", stage.platform))
                .at(location)
        })?;
        used.extend(found.matched);
        Ok(platform)
    }

    /// Looks for a named context that replaces a stage or an image.
    pub(super) fn named_context(
        &self,
        name: &str,
        platform: Option<&Platform>,
    ) -> Progress<Option<NamedContext>> {
        if name.eq_ignore_ascii_case(SCRATCH) || name.eq_ignore_ascii_case("context") {
            return Ok(None);
        }
        let mode = self.contexts.options.resolve_mode.as_str();
        self.contexts.named(name, platform.or(self.asked_platform), mode)
    }

    /// Adds a stage behind the others; its base is the stage it names.
    pub(super) fn add_stage(&mut self, mut state: StageState) -> StageId {
        let id = StageId(self.stages.len());
        self.link_base(&mut state);
        if !state.stage.name.is_empty() {
            self.by_name.insert(state.stage.name.to_lowercase(), id);
        }
        self.stages.push(state);
        self.order.push(id);
        id
    }

    fn link_base(&self, state: &mut StageState) {
        if let Some(base) = self.by_name.get(&state.stage.base_name) {
            state.base = Some(*base);
            state.outline = self.stages[base.0].outline.clone();
        }
    }

    /// Lists names that a stage can be referred to by.
    pub(super) fn stage_names(&self) -> Vec<String> {
        let names = self.order.iter().map(|id| self.stages[id.0].stage_name.clone());
        names.filter(|name| !name.is_empty()).collect()
    }

    pub(super) fn target(&self) -> Progress<StageId> {
        let wanted = &self.contexts.options.target;
        if wanted.is_empty() {
            return self
                .order
                .last()
                .copied()
                .ok_or_else(|| ConvertError::NoStages.into());
        }
        self.by_name.get(&wanted.to_lowercase()).copied().ok_or_else(|| {
            let closest = suggest::search(wanted, self.stage_names(), false);
            ConvertError::NoTarget(wanted.clone()).suggest(closest).into()
        })
    }

    /// Finds out which stages take files from which.
    pub(super) fn make_dependencies(&mut self) -> Progress<()> {
        for id in self.order.clone() {
            let instructions = std::mem::take(&mut self.stages[id.0].stage.instructions);
            let mut commands = Vec::with_capacity(instructions.len());
            for instruction in instructions {
                let command = self.command(instruction)?;
                self.depend(id, &command);
                commands.push(command);
            }
            self.stages[id.0].commands = commands;
        }
        self.check_cycles()?;
        if let [only] = self.order[..] {
            self.stages[only.0].stage_name.clear();
        }
        Ok(())
    }

    /// Notes what a command of a stage takes files from.
    pub(super) fn depend(&mut self, id: StageId, command: &Command) {
        let stage = &mut self.stages[id.0];
        for source in &command.sources {
            let location = &command.instruction.location;
            let next = stage.dependencies.len();
            let at = *stage.dependency_index.entry(*source).or_insert(next);
            match stage.dependencies.get_mut(at) {
                Some((_, known)) => known.clone_from(location),
                None => stage.dependencies.push((*source, location.clone())),
            }
        }
    }

    /// Finds the sources of an instruction; what is no stage becomes one that stands for an image.
    pub(super) fn command(&mut self, instruction: Arc<Instruction>) -> Progress<Command> {
        let sources = match &instruction.kind {
            Kind::Copy(copy) if !copy.from.is_empty() => {
                vec![self.copy_source(&copy.from, &instruction.location)?]
            }
            Kind::Run(run) => {
                let names = run.mounts.iter().map(|mount| {
                    if mount.from.is_empty() {
                        SCRATCH
                    } else {
                        &mount.from
                    }
                });
                names.map(|name| self.stage_or_image(name, &[])).collect()
            }
            _ => Vec::new(),
        };
        // Some of them are stages now.
        self.spend(STEP_BYTES * sources.len())?;
        Ok(Command {
            instruction,
            sources,
            is_onbuild: false,
        })
    }

    fn copy_source(&mut self, from: &str, location: &[Range]) -> Progress<StageId> {
        let expanded = expand(&self.lexer, from, &NoVariables)?;
        if expanded.text != from {
            return Err(ConvertError::FromVariable.into());
        }
        match from.parse::<i64>() {
            Ok(index) => {
                let found = usize::try_from(index)
                    .ok()
                    .and_then(|index| self.order.get(index));
                found
                    .copied()
                    .ok_or_else(|| ConvertError::StageIndex(index).into())
            }
            Err(_) => Ok(self.stage_or_image(from, location)),
        }
    }

    fn stage_or_image(&mut self, name: &str, location: &[Range]) -> StageId {
        if let Some(id) = self.by_name.get(&name.to_lowercase()) {
            return *id;
        }
        let stage = Stage {
            base_name: name.to_owned(),
            location: location.to_vec(),
            ..Stage::default()
        };
        self.add_stage(StageState {
            stage,
            unregistered: true,
            ..StageState::default()
        })
    }

    fn check_cycles(&self) -> Progress<()> {
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            New,
            OnPath,
            Done,
        }
        let mut marks = vec![Mark::New; self.stages.len()];
        for start in &self.order {
            let mut path: Vec<(StageId, usize)> = vec![(*start, 0)];
            if marks[start.0] != Mark::New {
                continue;
            }
            marks[start.0] = Mark::OnPath;
            while let Some((id, next)) = path.last_mut() {
                let Some((dependency, _)) = self.stages[id.0].dependencies.get(*next) else {
                    marks[id.0] = Mark::Done;
                    path.pop();
                    continue;
                };
                *next += 1;
                match marks[dependency.0] {
                    Mark::Done => {}
                    Mark::New => {
                        marks[dependency.0] = Mark::OnPath;
                        path.push((*dependency, 0));
                    }
                    Mark::OnPath => {
                        let error = ConvertError::Circular(self.stages[start.0].stage_name.clone());
                        let step = |(id, next): &(StageId, usize)| {
                            self.stages[id.0].dependencies[next - 1].1.clone()
                        };
                        return Err(error.at_all(path.iter().map(step).collect()).into());
                    }
                }
            }
        }
        Ok(())
    }

    /// Lists the stages that a stage needs, itself included.
    pub(super) fn reachable(&self, from: StageId) -> BTreeSet<StageId> {
        let mut found = BTreeSet::new();
        let mut pending = vec![from];
        while let Some(id) = pending.pop() {
            if found.insert(id) {
                let stage = &self.stages[id.0];
                pending.extend(stage.base);
                pending.extend(stage.dependencies.iter().map(|(dependency, _)| *dependency));
            }
        }
        found
    }

    /// Takes over from the base stage what a stage begins with.
    pub(super) fn inherit(&mut self, id: StageId) {
        let Some(base_id) = self.stages[id.0].base else {
            return;
        };
        let base = &self.stages[base_id.0];
        let (state, env, platform) = (base.state.clone(), base.env.clone(), base.platform.clone());
        let (mut image, base_image) = (base.image.clone(), base.base_image.clone());
        let (paths, workdir_set, build_args) =
            (Rc::clone(&base.paths), base.workdir_set, base.build_args.clone());
        let arg_names = base.arg_names.clone();
        image.config.on_build.clear();
        let stage = &mut self.stages[id.0];
        stage.state = state;
        stage.env = env;
        stage.platform = platform;
        stage.image = image;
        stage.base_image = base_image;
        stage.paths = paths;
        stage.workdir_set = workdir_set;
        stage.build_args.extend(build_args);
        stage.arg_names.extend(arg_names);
    }

    /// Collects what a target can be given, from its own stage and then from those it needs.
    pub(super) fn outline_of(&self, target: StageId) -> Outline {
        let mut seen = BTreeSet::new();
        let mut ordered = Vec::new();
        let mut pending = vec![target];
        while let Some(id) = pending.pop() {
            if seen.insert(id) {
                let stage = &self.stages[id.0];
                ordered.push(&stage.outline);
                pending.extend(stage.dependencies.iter().rev().map(|(dependency, _)| *dependency));
                pending.extend(stage.base);
            }
        }
        let stage = &self.stages[target.0].stage;
        Outline::new(&stage.name, &stage.doc_comment, ordered)
    }

    /// Puts the history of a stage together.
    pub(super) fn history_of(&self, id: StageId) -> Vec<History> {
        let mut chain = vec![id];
        while let Some(base) = chain.last().and_then(|id| self.stages[id.0].base) {
            chain.push(base);
        }
        chain
            .iter()
            .rev()
            .flat_map(|id| self.stages[id.0].history.iter().cloned())
            .collect()
    }
}

//! Going through the commands of all stages.

use std::collections::BTreeSet;
use std::sync::Arc;

use oci::{History, path};

use super::stages::{Command, StageId};
use super::{Converter, SBOM_SCAN_CONTEXT, SBOM_SCAN_STAGE, STEP_BYTES, is_enabled_for, names_of};
use crate::error::{ConvertError, Progress, Stop};
use crate::instruction::{Instruction, Kind};
use crate::lint::{Linter, rules};
use crate::os_path;
use crate::raw;
use crate::suggest;
use crate::word::{Lexer, Variables};

/// How much more it costs to take a variable over than to print it.
const INHERIT_WEIGHT: usize = 8;
/// Beyond this many comparisons of names nothing is suggested any more.
const MAX_COMPARED: usize = 200_000;

/// The command being dispatched.
pub(super) struct Step<'c> {
    pub(super) id: StageId,
    pub(super) instruction: &'c Instruction,
    pub(super) sources: &'c [StageId],
    pub(super) linter: Linter,
}

impl Converter<'_> {
    /// Dispatches all stages that are needed; returns the paths used of the build context.
    pub(super) fn dispatch_stages(
        &mut self,
        reachable: &BTreeSet<StageId>,
        target: StageId,
    ) -> Progress<BTreeSet<String>> {
        let mut used = BTreeSet::new();
        for id in self.order.clone() {
            if !self.all_stages && (!reachable.contains(&id) || self.stages[id.0].dispatched) {
                continue;
            }
            self.inherit(id);
            self.stages[id.0].dispatched = true;
            self.begin(id)
                .map_err(|stop| stop.at(&self.stages[id.0].stage.location))?;
            for command in std::mem::take(&mut self.stages[id.0].commands) {
                let location = &command.instruction.location;
                self.dispatch(id, &command).map_err(|stop| stop.at(location))?;
            }
            used.append(&mut self.stages[id.0].context_paths.clone());
            self.note_scans(id);
        }
        self.stages[target.0].paths.borrow_mut().insert("/".to_owned());
        Ok(used)
    }

    /// Takes over the settings of the image.
    fn begin(&mut self, id: StageId) -> Progress<()> {
        let options = self.contexts.options;
        let stage = &self.stages[id.0];
        let variables: usize = stage.image.config.env.iter().map(String::len).sum();
        self.spend(INHERIT_WEIGHT * (variables + stage.env.bytes()))?;
        let stage = &mut self.stages[id.0];
        let platform = stage.platform.get_or_insert_default().clone();
        let variables = &mut stage.image.config.env;
        if !variables
            .iter()
            .any(|variable| variable.starts_with("PATH=") || variable == "PATH")
            && platform.os != "windows"
        {
            variables.push(format!("PATH={}", llb::default_path(&platform.os)));
        }
        for variable in variables.iter() {
            let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
            stage.env.set(name, value);
        }
        stage.index_image_env();
        if !options.hostname.is_empty() {
            stage.state = stage.state.hostname(&options.hostname);
        }
        let workdir = stage.image.config.working_dir.clone();
        if !workdir.is_empty() {
            self.change_dir(id, &workdir)?;
        }
        let stage = &mut self.stages[id.0];
        if !stage.image.config.user.is_empty() {
            stage.state = stage.state.user(&stage.image.config.user);
        }
        stage.state = stage.state.network(options.network);
        Ok(())
    }

    /// Sets the working directory of image and state; returns it with slashes.
    pub(super) fn change_dir(&mut self, id: StageId, dir: &str) -> Progress<String> {
        let stage = &mut self.stages[id.0];
        let os = stage
            .platform
            .as_ref()
            .map_or("", |platform| platform.os.as_str());
        let dir = os_path::normalize_workdir(&stage.image.config.working_dir, dir, os).map_err(|error| {
            ConvertError::OsPath(error).context("normalizing workdir: normalizing working directory")
        })?;
        let slashed = os_path::to_slash(&dir, os);
        stage.image.config.working_dir = dir;
        stage.state = stage.state.dir(&slashed);
        Ok(slashed)
    }

    fn note_scans(&mut self, id: StageId) {
        for name in [SBOM_SCAN_CONTEXT, SBOM_SCAN_STAGE] {
            let stage = &self.stages[id.0];
            let mut values = stage
                .build_args
                .iter()
                .filter(|arg| arg.key == name)
                .filter_map(|arg| arg.value.as_deref());
            let value = values.next_back().or_else(|| self.global_args.get(name));
            let enabled = value.is_some_and(|value| is_enabled_for(&stage.stage_name, value));
            let stage = &mut self.stages[id.0];
            if enabled && name == SBOM_SCAN_CONTEXT {
                stage.scan_context = true;
            } else if enabled {
                stage.scan_stage = true;
            }
        }
    }

    fn dispatch(&mut self, id: StageId, command: &Command) -> Progress<()> {
        let instruction = Arc::clone(&command.instruction);
        self.stages[id.0].in_onbuild = command.is_onbuild;
        if matches!(
            instruction.kind,
            Kind::Run(_) | Kind::Copy(_) | Kind::Add(_) | Kind::Workdir(_)
        ) {
            // Each has the directory in it, which can grow with each line, and the user.
            let config = &self.stages[id.0].image.config;
            let carried = config.working_dir.len().saturating_mul(2);
            self.spend(
                STEP_BYTES
                    .saturating_add(carried)
                    .saturating_add(config.user.len()),
            )?;
        }
        let linter = self.linter.with_comments(&instruction.comments);
        let step = Step {
            id,
            instruction: &instruction,
            sources: &command.sources,
            linter,
        };
        match &instruction.kind {
            Kind::Maintainer(name) => {
                self.stages[id.0].image.author.clone_from(name);
                self.commit(id, format!("MAINTAINER {name}"), false);
                Ok(())
            }
            Kind::Env(pairs) => self.env(&step, pairs),
            Kind::Label(pairs) => self.label(&step, pairs),
            Kind::Run(run) => self.run_command(&step, run),
            Kind::Workdir(dir) => self.workdir(&step, dir),
            Kind::Add(copy) => self.copy(&step, copy, true),
            Kind::Copy(copy) => self.copy(&step, copy, false),
            Kind::OnBuild(expression) => {
                self.stages[id.0].image.config.on_build.push(expression.clone());
                Ok(())
            }
            Kind::Cmd(line) => {
                self.cmd(&step, line);
                Ok(())
            }
            Kind::Entrypoint(line) => {
                self.entrypoint(&step, line);
                Ok(())
            }
            Kind::Healthcheck(check) => {
                self.healthcheck(&step, check);
                Ok(())
            }
            Kind::Expose(ports) => self.expose(&step, ports),
            Kind::User(user) => {
                let user = self.expand(&step, user)?;
                let stage = &mut self.stages[id.0];
                stage.state = stage.state.user(&user);
                stage.image.config.user.clone_from(&user);
                self.commit(id, format!("USER {user}"), false);
                Ok(())
            }
            Kind::Volume(volumes) => self.volume(&step, volumes),
            Kind::StopSignal(signal) => self.stop_signal(&step, signal),
            Kind::Arg(args) => self.arg(&step, args),
            Kind::Shell(shell) => {
                self.stages[id.0].image.config.shell.clone_from(shell);
                self.commit(id, format!("SHELL {}", crate::text::list(shell)), false);
                Ok(())
            }
        }
    }

    /// Adds to the history.
    pub(super) fn commit(&mut self, id: StageId, created_by: String, has_layer: bool) {
        let created = self.epoch.map(|epoch| epoch.to_rfc3339());
        self.stages[id.0].history.push(History {
            created,
            created_by,
            comment: "buildkit.dockerfile.v0".to_owned(),
            empty_layer: !has_layer,
            ..History::default()
        });
    }

    /// Expands a word of an instruction with the variables of its stage.
    pub(super) fn expand(&self, step: &Step<'_>, word: &str) -> Progress<String> {
        self.expand_with(&self.lexer, step, word)
    }

    /// Expands a word; variables that are not set are warned of.
    pub(super) fn expand_with(&self, lexer: &Lexer, step: &Step<'_>, word: &str) -> Progress<String> {
        if !word.contains(['$', '\'', '"', '\\', '`', '\u{feff}']) && !raw::is_in(word) {
            return Ok(word.to_owned());
        }
        let env = &self.stages[step.id.0].env;
        let (expanded, result) = lexer.expand(word, env);
        self.warn_unset(step, &expanded.unmatched, env);
        result.map_err(Stop::from)?;
        Ok(expanded.text)
    }

    /// Warns of variables that are not set and no argument of the stage.
    pub(super) fn warn_unset(&self, step: &Step<'_>, unmatched: &BTreeSet<String>, env: &dyn Variables) {
        if unmatched.is_empty() {
            return;
        }
        let args = &self.stages[step.id.0].arg_names;
        let unknown = unmatched.difference(args);
        for name in unknown.filter(|name| !super::NON_ENV_ARGS.contains(&name.as_str())) {
            let suggestion = || {
                if self.compared.get() > MAX_COMPARED {
                    return None;
                }
                let names = names_of(env);
                self.compared.set(self.compared.get() + names.len());
                suggest::search(name, names, false)
            };
            let message = || rules::undefined_var(name, suggestion().as_deref());
            step.linter
                .run(&rules::UNDEFINED_VAR, &step.instruction.location, message);
        }
    }

    /// Notes paths as used of the build context.
    pub(super) fn use_context(&mut self, id: StageId, source: &str) {
        let path = path::join(&["/", source]);
        self.stages[id.0].context_paths.insert(path);
    }
}

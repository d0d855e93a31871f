//! RUN.

use std::collections::BTreeMap;

use llb::pb::{NetMode, SecurityMode};
use llb::{Constraints, FileActions, MkfileOptions, Mount, State, caps};

use super::Converter;
use super::copy::MAX_MADE;
use super::dispatch::Step;
use super::mounts::Extras;
use super::name::shown;
use super::settings::with_shell;
use super::stages::{StageId, StageState};
use super::wire_ranges;
use crate::context::internal;
use crate::env::{Env, Masked};
use crate::error::{ConvertError, Progress};
use crate::instruction::{self, CommandLine, InlineFile, MountKind, Network, Run};
use crate::parser::{parse_heredoc, trim_leading_tabs};
use crate::word::Variables;
use crate::{raw, text};

/// Where a script of its own is mounted.
const SCRIPT_DIR: &str = "/dev/pipes/";

/// How much more it costs to print an argument than its bytes say.
const ARG_WEIGHT: usize = 8;
/// A command's variables are in its operation, and in the definition again.
const ENV_WEIGHT: usize = 2;

/// The words of a command, and what its heredocs add.
struct Words {
    args: Vec<String>,
    /// Added to the name of the step.
    summary: String,
    /// A script to mount.
    script: Option<Mount>,
}

impl Converter<'_> {
    pub(super) fn run_command(&mut self, step: &Step<'_>, run: &Run) -> Progress<()> {
        let id = step.id;
        let parsed = self.expand_mounts(step, run)?;
        self.stages[id.0].paths.borrow_mut().insert("/".to_owned());
        let stage = &self.stages[id.0];
        let words = command_words(stage, &run.command)?;
        let args = if run.command.prepend_shell {
            with_shell(stage, &words.args)
        } else {
            words.args
        };
        self.check_size(id, &args)?;
        if parsed.len() > MAX_MADE {
            return Err(ConvertError::TooLarge.into());
        }
        let pairs = self.stages[id.0].env.to_pairs();
        let base = self.stages[id.0].state.environment(pairs);
        let mut command = base.run(args.clone());
        if let Some(script) = words.script {
            command = command.mount(script);
        }
        if let Some(proxy) = &self.proxy {
            command = command.proxy(proxy.clone());
        }
        let extras = self.run_mounts(step, &parsed)?;
        let Extras { mounts, secrets, ssh } = extras;
        command = mounts
            .into_iter()
            .fold(command, |command, mount| command.mount(mount));
        command = secrets
            .into_iter()
            .fold(command, |command, secret| command.secret(secret));
        command = ssh.into_iter().fold(command, |command, ssh| command.ssh(ssh));
        command = command.with(|state| self.sandbox(state, run));
        let options = self.contexts.options;
        if run.wants_devices {
            return Err(ConvertError::Device.into());
        }
        if options.shm_size_bytes > 0 && options.supports(caps::EXEC_MOUNT_TMPFS_SIZE) {
            command = command.mount(Mount::tmpfs("/dev/shm", options.shm_size_bytes));
        }
        let constraints = self.run_constraints(step, &parsed, &words.summary);
        let state = command.constraints(&constraints).done().root();
        let stage = &mut self.stages[id.0];
        let env = stage.env.clone();
        stage.state = state;
        let created_by = format!("RUN {} # buildkit", history_text(&args, &self.stages[id.0], &env));
        self.commit(id, created_by, true);
        Ok(())
    }

    /// Counts what a command adds to definition and history.
    fn check_size(&mut self, id: StageId, args: &[String]) -> Progress<()> {
        let stage = &self.stages[id.0];
        let words: usize = args.iter().map(String::len).sum();
        let length =
            |arg: &instruction::Argument| arg.key.len() + arg.value.as_ref().map_or(0, String::len) + 2;
        let shown: usize = stage.build_args.iter().map(length).sum();
        self.spend(2 * words + ARG_WEIGHT * shown + ENV_WEIGHT * stage.env.bytes())
    }

    fn sandbox(&self, state: &State, run: &Run) -> State {
        let options = self.contexts.options;
        let mut state = state.security(if run.insecure {
            SecurityMode::Insecure
        } else {
            SecurityMode::Sandbox
        });
        state = match run.network {
            Network::Default => state,
            Network::None => state.network(NetMode::None),
            Network::Host => state.network(NetMode::Host),
        };
        if options.supports(caps::EXEC_META_ULIMIT) {
            for limit in &options.ulimits {
                state = state.ulimit(&limit.name, limit.soft, limit.hard);
            }
        }
        for (host, address) in &options.hosts {
            state = state.extra_host(host, *address);
        }
        if !options.cgroup_parent.is_empty() && options.supports(caps::EXEC_META_CGROUP_PARENT) {
            state = state.cgroup_parent(&options.cgroup_parent);
        }
        state
    }

    fn run_constraints(
        &mut self,
        step: &Step<'_>,
        mounts: &[instruction::Mount],
        summary: &str,
    ) -> Constraints {
        let id = step.id;
        let mut lexer = self.lexer.clone();
        lexer.raw_quotes = true;
        lexer.skip_unset = true;
        let stage = &self.stages[id.0];
        let mask = secret_mask(mounts);
        let text = format!("{}{summary}", step.instruction.code);
        let text = shown(
            &lexer,
            &text,
            &Masked {
                base: &stage.env,
                mask,
            },
        );
        let platform = stage.state.get_platform().cloned();
        let name = self.instruction_name(id, &text, platform.as_ref());
        let code = raw::shown(step.instruction.code.clone());
        let mut constraints = Constraints::new()
            .description([("com.docker.dockerfile.v1.command", code)])
            .location(self.source_map, wire_ranges(&step.instruction.location))
            .custom_name(name);
        if self.stages[id.0].ignore_cache {
            constraints = constraints.ignore_cache();
        }
        let options = self.contexts.options;
        match &options.resources {
            Some(resources) if options.supports(caps::EXEC_META_LINUX_RESOURCES) => {
                constraints.linux_resources(resources.clone())
            }
            _ => constraints,
        }
    }
}

/// Variables that hold secrets, shown as stars.
fn secret_mask(mounts: &[instruction::Mount]) -> Env {
    let mut mask = Env::default();
    let secrets = mounts.iter().filter(|mount| mount.kind == MountKind::Secret);
    secrets
        .filter_map(|mount| mount.env.as_ref())
        .for_each(|name| mask.set(name, "****"));
    mask
}

/// Puts heredocs where they belong: into the command, or into a script if there is but one and it names its interpreter.
fn command_words(stage: &StageState, line: &CommandLine) -> Progress<Words> {
    let Some(first) = line.files.first() else {
        return Ok(Words {
            args: line.args.clone(),
            summary: String::new(),
            script: None,
        });
    };
    let ([command], true) = (line.args.as_slice(), line.prepend_shell) else {
        return Err(ConvertError::HeredocCommand(text::list(&line.args)).into());
    };
    if parse_heredoc(command).ok().flatten().is_none() {
        let mut whole = command.clone();
        for file in &line.files {
            whole.push('\n');
            whole.push_str(&file.content);
            whole.push_str(&file.name);
        }
        return Ok(Words {
            args: vec![whole],
            summary: String::new(),
            script: None,
        });
    }
    let content = if first.chomp {
        trim_leading_tabs(&first.content)
    } else {
        first.content.clone()
    };
    let summary = format!(" ({})", summarize(&first.content));
    if stage.image.os == "windows" || !content.starts_with("#!") {
        return Ok(Words {
            args: vec![content],
            summary,
            script: None,
        });
    }
    let script = script_mount(stage, first, content);
    Ok(Words {
        args: vec![oci::path::join(&[SCRIPT_DIR, &first.name])],
        summary,
        script: Some(script),
    })
}

fn script_mount(stage: &StageState, file: &InlineFile, content: String) -> Mount {
    let actions = FileActions::new().mkfile(
        &file.name,
        0o755,
        raw::encode(&content).into_owned(),
        MkfileOptions::default(),
    );
    let platform = stage.platform.clone().unwrap_or_default();
    let constraints = internal("preparing inline document").platform(&platform);
    let state = State::scratch().dir("/").file(actions, &constraints);
    Mount::new(SCRIPT_DIR, &state).selector("/").readonly()
}

/// Shows the first line of a document.
fn summarize(document: &str) -> String {
    let document = document.trim().replace("\r\n", "\n");
    match document.split_once('\n') {
        Some((first, _)) => format!("{first}..."),
        None => document,
    }
}

/// The command as history shows it, with the stage's arguments in front.
fn history_text(args: &[String], stage: &StageState, env: &Env) -> String {
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    let mut assignments: Vec<String> = Vec::new();
    for arg in &stage.build_args {
        let value = env.get(&arg.key).or(arg.value.as_deref()).unwrap_or_default();
        let assignment = format!("{}={value}", arg.key);
        match places.get(arg.key.as_str()) {
            Some(at) => assignments[*at] = assignment,
            None => {
                places.insert(&arg.key, assignments.len());
                assignments.push(assignment);
            }
        }
    }
    let mut words = Vec::with_capacity(assignments.len() + args.len() + 1);
    if !assignments.is_empty() {
        words.push(format!("|{}", assignments.len()));
        words.append(&mut assignments);
    }
    words.extend(args.iter().cloned());
    words.join(" ")
}

//! The mounts of RUN.

use llb::{CacheSharing, Chown, Constraints, FileActions, MkdirOptions, Mount, Secret, Ssh, State, caps};
use oci::path;

use super::dispatch::Step;
use super::stages::StageId;
use super::{Converter, SCRATCH};
use crate::error::{ConvertError, Progress, Stop};
use crate::instruction::{self, InstructionError, MountKind, Run, Sharing, parse_mount};
use crate::position::Range;
use crate::word::WordError;

/// What mounts come to.
#[derive(Default)]
pub(super) struct Extras {
    pub(super) mounts: Vec<Mount>,
    pub(super) secrets: Vec<Secret>,
    pub(super) ssh: Vec<Ssh>,
}

impl Converter<'_> {
    /// Parses the mounts again, now with variables.
    pub(super) fn expand_mounts(&self, step: &Step<'_>, run: &Run) -> Progress<Vec<instruction::Mount>> {
        let env = &self.stages[step.id.0].env;
        let mut expand = |word: &str| -> Result<String, WordError> {
            let (expanded, result) = self.lexer.expand(word, env);
            self.warn_unset(step, &expanded.unmatched, env);
            result.map(|()| expanded.text)
        };
        let parse = |flag: &String| {
            parse_mount(flag, Some(&mut expand)).map_err(|error: InstructionError| error.into())
        };
        run.mount_flags.iter().map(parse).collect()
    }

    pub(super) fn run_mounts(&mut self, step: &Step<'_>, mounts: &[instruction::Mount]) -> Progress<Extras> {
        let mut extras = Extras::default();
        for (at, mount) in mounts.iter().enumerate() {
            let location = &step.instruction.location;
            match mount.kind {
                MountKind::Secret => extras.secrets.push(self.secret(step.id, mount, location)?),
                MountKind::Ssh => extras.ssh.push(self.ssh(step.id, mount, location)?),
                _ => extras
                    .mounts
                    .push(self.filesystem(step, mount, step.sources.get(at).copied())?),
            }
        }
        Ok(extras)
    }

    fn filesystem(
        &mut self,
        step: &Step<'_>,
        mount: &instruction::Mount,
        source: Option<StageId>,
    ) -> Progress<Mount> {
        let from = match mount.from.as_str() {
            "" if mount.kind == MountKind::Cache => SCRATCH,
            from => from,
        };
        let source = source.filter(|_| !from.is_empty());
        let mut state = match source {
            None => self.build_context.clone(),
            Some(source) => {
                let stage = &self.stages[source.0];
                if !stage.dispatched {
                    let (from, target) = (from.to_owned(), mount.target.clone());
                    return Err(ConvertError::MountOrder { from, target }.into());
                }
                stage.state.clone()
            }
        };
        let target = self.mount_target(step.id, &mount.target)?;
        let selector = path::join(&["/", &mount.source]);
        let has_owner = mount.uid.is_some() || mount.gid.is_some() || mount.mode.is_some();
        let selector = if selector != "/" {
            Some(selector)
        } else if has_owner {
            state = owned_directory(&state, mount);
            Some("/cache".to_owned())
        } else {
            None
        };
        let mut made = match mount.kind {
            MountKind::Cache => {
                let id = if mount.id.is_empty() {
                    path::clean(&mount.target)
                } else {
                    mount.id.clone()
                };
                let id = format!("{}/{id}", self.contexts.options.cache_namespace);
                Mount::cache(target, &state, id, sharing(mount))
            }
            MountKind::Tmpfs => Mount::tmpfs(target, mount.size_bytes),
            _ => Mount::new(target, &state),
        };
        if mount.readonly {
            made = made.readonly();
        } else if mount.kind == MountKind::Bind
            && self
                .contexts
                .options
                .supports(caps::EXEC_MOUNT_BIND_READ_WRITE_NO_OUTPUT)
        {
            made = made.no_output();
        }
        if let Some(selector) = selector {
            made = made.selector(selector);
        }
        match source {
            None => self.use_context(step.id, &mount.source),
            Some(source) => {
                let used = path::join(&["/", &mount.source]);
                self.stages[source.0].paths.borrow_mut().insert(used);
            }
        }
        Ok(made)
    }

    fn mount_target(&self, id: StageId, target: &str) -> Progress<String> {
        let target = if path::clean(target).starts_with('/') {
            target.to_owned()
        } else {
            path::join(&["/", self.stages[id.0].state.get_dir(), target])
        };
        if target == "/" {
            Err(ConvertError::MountTarget(target).into())
        } else {
            Ok(target)
        }
    }

    fn secret(&mut self, id: StageId, mount: &instruction::Mount, location: &[Range]) -> Progress<Secret> {
        let name = match (mount.source.as_str(), mount.id.as_str(), mount.target.as_str()) {
            ("", "", "") => return Err(Stop::from(ConvertError::SecretTarget)),
            ("", "", target) => path::base(target),
            ("", name, _) | (name, _, _) => name,
        };
        let target = match (mount.target.as_str(), &mount.env) {
            ("", Some(_)) => None,
            ("", None) => Some(format!("/run/secrets/{}", path::base(name))),
            (target, _) => Some(target.to_owned()),
        };
        self.stages[id.0]
            .outline
            .add_secret(name, mount.required, location);
        let mut secret = Secret {
            target,
            env: mount.env.clone(),
            ..Secret::file(name, "")
        };
        secret.optional = !mount.required;
        if mount.uid.is_some() || mount.gid.is_some() || mount.mode.is_some() {
            secret.uid = mount.uid.unwrap_or_default();
            secret.gid = mount.gid.unwrap_or_default();
            secret.mode = mount.mode.unwrap_or(0o400);
        }
        Ok(secret)
    }

    fn ssh(&mut self, id: StageId, mount: &instruction::Mount, location: &[Range]) -> Progress<Ssh> {
        if !mount.source.is_empty() {
            return Err(ConvertError::SshSource.into());
        }
        let name = if mount.id.is_empty() { "default" } else { &mount.id };
        self.stages[id.0].outline.add_ssh(name, mount.required, location);
        let mut ssh = Ssh::new(mount.id.clone());
        ssh.target.clone_from(&mount.target);
        ssh.optional = !mount.required;
        if mount.uid.is_some() || mount.gid.is_some() || mount.mode.is_some() {
            ssh.uid = mount.uid.unwrap_or_default();
            ssh.gid = mount.gid.unwrap_or_default();
            ssh.mode = mount.mode.unwrap_or(0o600);
        }
        Ok(ssh)
    }
}

fn sharing(mount: &instruction::Mount) -> CacheSharing {
    match mount.sharing {
        None | Some(Sharing::Shared) => CacheSharing::Shared,
        Some(Sharing::Private) => CacheSharing::Private,
        Some(Sharing::Locked) => CacheSharing::Locked,
    }
}

/// Makes a directory with the owner and permissions a cache is to start with.
fn owned_directory(state: &State, mount: &instruction::Mount) -> State {
    let chown = Chown::ids(mount.uid.unwrap_or_default(), mount.gid.unwrap_or_default());
    let options = MkdirOptions {
        chown: Some(chown),
        ..MkdirOptions::default()
    };
    let actions = FileActions::new().mkdir("/cache", mount.mode.unwrap_or(0o755), options);
    state.file(
        actions,
        &Constraints::new().custom_name("[internal] setting cache mount permissions"),
    )
}

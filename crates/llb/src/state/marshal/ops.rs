//! Encoding each kind of vertex.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Encoded, MarshalError, Marshaler};
use crate::pb::{
    BuildInput, BuildOp, CacheOpt, CacheSharingOpt, CdiDevice, DiffOp, EMPTY, ExecOp, FileAction, FileOp,
    Input, LLB_DEFINITION_INPUT, LowerDiffInput, MergeInput, MergeOp, Meta, Mount, MountContentCache,
    MountType, NetMode, Op, PassthroughOp, ProxyEnv, SecretEnv, SecretOpt, SecurityMode, SourceOp, SshOpt,
    TmpfsOpt, UpperDiffInput, op,
};
use crate::state::exec::{ExecMount, ExecVertex};
use crate::state::file::{Action, BoundActions, FileSource};
use crate::state::vertex::{Kind, Output, Vertex};
use crate::state::{CacheSharing, Constraints, default_path, set_env};
use crate::{attr, caps, encode_op};

impl Marshaler<'_> {
    pub(super) fn encode_vertex(&self, vertex: &Vertex) -> Result<Encoded, MarshalError> {
        if let Kind::Imported { set, digest } = &vertex.kind {
            let (raw, metadata, locations) = set.marshal(digest).ok_or(MarshalError::NoIdentifier)?;
            return Ok(Encoded {
                raw,
                metadata: metadata.clone(),
                locations: locations.to_vec(),
            });
        }
        let mut constraints = vertex.constraints.clone();
        let mut inputs = Vec::new();
        let kind = self.kind(&vertex.kind, &mut constraints, &mut inputs)?;
        let keeps_platform = match &kind {
            op::Op::Exec(_) | op::Op::Build(_) => true,
            op::Op::Source(source) => {
                let identifier = &source.identifier;
                identifier.starts_with("docker-image://") || identifier.starts_with("oci-layout://")
            }
            _ => false,
        };
        let locations = std::mem::take(&mut constraints.locations);
        let (constrained, metadata) = self.constrained(constraints);
        let platform = constrained.platform.filter(|_| keeps_platform);
        let raw = encode_op(&Op {
            inputs,
            platform,
            constraints: constrained.constraints,
            op: Some(kind),
        });
        Ok(Encoded {
            raw,
            metadata,
            locations,
        })
    }

    fn kind(
        &self,
        kind: &Kind,
        constraints: &mut Constraints,
        inputs: &mut Vec<Input>,
    ) -> Result<op::Op, MarshalError> {
        Ok(match kind {
            Kind::Source {
                error: Some(error), ..
            } => return Err(error.clone()),
            Kind::Source {
                identifier, attrs, ..
            } => op::Op::Source(self.source(identifier, attrs, constraints)?),
            Kind::Exec(exec) => op::Op::Exec(self.exec(exec, constraints, inputs)?),
            Kind::File(actions) => {
                constraints.add_cap(caps::FILE_BASE);
                op::Op::File(self.file(actions, inputs)?)
            }
            Kind::Merge(merged) => {
                inputs.extend(merged.iter().map(|input| self.input(input)));
                let merged = (0..).take(inputs.len()).map(|input| MergeInput { input });
                op::Op::Merge(MergeOp {
                    inputs: merged.collect(),
                })
            }
            Kind::Diff { lower, upper } => op::Op::Diff(self.diff(lower.as_ref(), upper.as_ref(), inputs)),
            Kind::Passthrough { id, .. } if id.is_empty() => return Err(MarshalError::NoId),
            Kind::Passthrough { outputs, .. } if outputs.is_empty() => return Err(MarshalError::NoOutput),
            Kind::Passthrough {
                id,
                inputs: passed,
                outputs,
            } => {
                inputs.extend(passed.iter().map(|input| self.input(input)));
                op::Op::Passthrough(PassthroughOp {
                    id: id.clone(),
                    outputs: outputs.clone(),
                })
            }
            Kind::Build { source, attrs } => {
                inputs.push(self.input(source));
                let definition = (LLB_DEFINITION_INPUT.to_owned(), BuildInput { input: 0 });
                let definition = BTreeMap::from([definition]);
                op::Op::Build(BuildOp {
                    builder: EMPTY,
                    inputs: definition,
                    def: None,
                    attrs: attrs.clone(),
                })
            }
            // Inputs are resolved, and what is imported is passed on, before anything is encoded.
            Kind::Deferred(_) | Kind::Imported { .. } => return Err(MarshalError::NoIdentifier),
        })
    }

    fn source(
        &self,
        identifier: &str,
        attrs: &BTreeMap<String, String>,
        constraints: &mut Constraints,
    ) -> Result<SourceOp, MarshalError> {
        if identifier.is_empty() {
            return Err(MarshalError::NoIdentifier);
        }
        let mut attrs = attrs.clone();
        if identifier.starts_with("local://") && !attrs.contains_key(attr::LOCAL_SESSION_ID) {
            let given = constraints.local_unique_id.as_ref().filter(|id| !id.is_empty());
            let id = given.unwrap_or(&self.options.local_unique_id).clone();
            attrs.insert(attr::LOCAL_UNIQUE_ID.to_owned(), id);
            constraints.add_cap(caps::SOURCE_LOCAL_UNIQUE);
        }
        Ok(SourceOp {
            identifier: identifier.to_owned(),
            attrs,
        })
    }

    fn diff(&self, lower: Option<&Output>, upper: Option<&Output>, inputs: &mut Vec<Input>) -> DiffOp {
        let mut side = |output: Option<&Output>| match output {
            None => EMPTY,
            Some(output) => {
                inputs.push(self.input(output));
                index(inputs.len() - 1)
            }
        };
        let lower = Some(LowerDiffInput { input: side(lower) });
        DiffOp {
            lower,
            upper: Some(UpperDiffInput { input: side(upper) }),
        }
    }

    /// Returns the position of an input, added unless it is there.
    fn add_input(&self, output: Option<&Output>, inputs: &mut Vec<Input>) -> i64 {
        let Some(output) = output.and_then(Output::resolved) else {
            return EMPTY;
        };
        let input = self.input(&output);
        let at = inputs.iter().position(|have| *have == input).unwrap_or_else(|| {
            inputs.push(input);
            inputs.len() - 1
        });
        index(at)
    }

    fn exec(
        &self,
        exec: &ExecVertex,
        constraints: &mut Constraints,
        inputs: &mut Vec<Input>,
    ) -> Result<ExecOp, MarshalError> {
        let settings = &exec.base.settings;
        if settings.args.is_empty() {
            return Err(MarshalError::NoArgs);
        }
        if settings.dir.is_empty() {
            return Err(MarshalError::NoDir);
        }
        let env = self.exec_env(exec, constraints);
        exec_caps(exec, constraints);
        if constraints.platform.is_none() {
            constraints.platform.clone_from(&settings.platform);
        }
        let meta = Meta {
            args: settings.args.clone(),
            env: env.iter().map(|(key, value)| format!("{key}={value}")).collect(),
            cwd: settings.dir.clone(),
            user: settings.user.clone(),
            proxy_env: exec.proxy.as_ref().map(|proxy| ProxyEnv {
                http_proxy: proxy.http_proxy.clone(),
                https_proxy: proxy.https_proxy.clone(),
                ftp_proxy: proxy.ftp_proxy.clone(),
                no_proxy: proxy.no_proxy.clone(),
                all_proxy: proxy.all_proxy.clone(),
            }),
            extra_hosts: settings.extra_hosts.clone(),
            hostname: settings.hostname.clone(),
            ulimit: settings.ulimits.clone(),
            cgroup_parent: settings.cgroup_parent.clone(),
            remove_mount_stubs_recursive: true,
            valid_exit_codes: settings.valid_exit_codes.clone().unwrap_or_default(),
        };
        let device = |(name, optional): &(String, bool)| CdiDevice {
            name: name.clone(),
            optional: *optional,
        };
        let (mounts, secretenv) = self.exec_mounts(exec, inputs)?;
        Ok(ExecOp {
            meta: Some(meta),
            mounts,
            network: settings.network.into(),
            security: settings.security.into(),
            secretenv,
            cdi_devices: exec.cdi_devices.iter().map(device).collect(),
        })
    }

    fn exec_env(&self, exec: &ExecVertex, constraints: &mut Constraints) -> Arc<Vec<(String, String)>> {
        let mut env = Arc::clone(&exec.base.settings.env);
        let has = |env: &[(String, String)], name| env.iter().any(|(key, _)| key == name);
        if let Some(target) = ssh_targets(exec).first()
            && !has(&env, "SSH_AUTH_SOCK")
        {
            set_env(Arc::make_mut(&mut env), "SSH_AUTH_SOCK", target);
        }
        match &self.options.caps {
            Some(supported) if supported.contains(caps::EXEC_META_SETS_DEFAULT_PATH) => {
                constraints.add_cap(caps::EXEC_META_SETS_DEFAULT_PATH);
            }
            Some(_) => {
                let os = &self.options.platform.os;
                if os != "windows" && !has(&env, "PATH") {
                    set_env(Arc::make_mut(&mut env), "PATH", default_path(os));
                }
            }
            None => {}
        }
        env
    }

    fn exec_mounts(
        &self,
        exec: &ExecVertex,
        inputs: &mut Vec<Input>,
    ) -> Result<(Vec<Mount>, Vec<SecretEnv>), MarshalError> {
        let (mut mounts, mut secretenv, mut outputs) = (Vec::new(), Vec::new(), 0);
        for mount in &exec.mounts {
            if mount.tmpfs.is_some() && mount.source.is_some() {
                return Err(MarshalError::TmpfsSource);
            }
            let input = self.add_input(mount.source.as_ref(), inputs);
            let output = if mount.has_output { outputs } else { EMPTY };
            outputs += i64::from(mount.has_output);
            mounts.push(marshal_mount(mount, input, output));
        }
        for secret in &exec.secrets {
            if let Some(name) = &secret.env {
                secretenv.push(SecretEnv {
                    id: secret.id.clone(),
                    name: name.clone(),
                    optional: secret.optional,
                });
            }
            if let Some(target) = &secret.target {
                let (uid, gid, mode) = (secret.uid, secret.gid, secret.mode);
                let secret_opt = SecretOpt {
                    id: secret.id.clone(),
                    uid,
                    gid,
                    mode,
                    optional: secret.optional,
                };
                mounts.push(Mount {
                    input: EMPTY,
                    dest: target.clone(),
                    mount_type: MountType::Secret.into(),
                    secret_opt: Some(secret_opt),
                    ..Mount::default()
                });
            }
        }
        for (ssh, target) in exec.ssh.iter().zip(ssh_targets(exec)) {
            let (uid, gid, mode) = (ssh.uid, ssh.gid, ssh.mode);
            mounts.push(Mount {
                input: EMPTY,
                dest: target,
                mount_type: MountType::Ssh.into(),
                ssh_opt: Some(SshOpt {
                    id: ssh.id.clone(),
                    uid,
                    gid,
                    mode,
                    optional: ssh.optional,
                }),
                ..Mount::default()
            });
        }
        Ok((mounts, secretenv))
    }

    fn file(&self, actions: &Arc<BoundActions>, inputs: &mut Vec<Input>) -> Result<FileOp, MarshalError> {
        if actions.actions.is_empty() {
            return Err(MarshalError::NoAction);
        }
        let mut flat = Flat {
            inputs,
            placed: Vec::new(),
            last: BTreeMap::new(),
        };
        self.flatten(actions, &mut flat);
        let Flat { placed, inputs, .. } = flat;
        let count = placed.len();
        let resolve = |place: Place| match place {
            Place::Input(index) => index,
            Place::Action(at) => index(inputs.len() + at),
        };
        let encode = |(at, placed): (usize, &Placed<'_>)| FileAction {
            input: resolve(placed.input),
            secondary_input: resolve(placed.secondary),
            output: if at + 1 == count { 0 } else { EMPTY },
            action: Some(placed.action.marshal(placed.base, placed.dir)),
        };
        Ok(FileOp {
            actions: placed.iter().enumerate().map(encode).collect(),
        })
    }

    /// Puts actions, and those they copy from, into one list; returns the position of the last.
    fn flatten<'v>(&self, actions: &'v Arc<BoundActions>, flat: &mut Flat<'v, '_>) -> Place {
        let key = Arc::as_ptr(actions).addr();
        if let Some(at) = flat.last.get(&key) {
            return Place::Action(*at);
        }
        let mut previous = None;
        for action in &actions.actions {
            let base = self.add_input(actions.state.output.as_ref(), flat.inputs);
            let secondary = match action {
                Action::Copy {
                    from: FileSource::State(state),
                    ..
                } => Place::Input(self.add_input(state.output.as_ref(), flat.inputs)),
                Action::Copy { from, .. } => match from.bound() {
                    Some(bound) => self.flatten(bound, flat),
                    None => Place::Input(EMPTY),
                },
                _ => Place::Input(EMPTY),
            };
            let input = previous.unwrap_or(Place::Input(base));
            let dir = actions.state.get_dir();
            flat.placed.push(Placed {
                action,
                base,
                dir,
                input,
                secondary,
            });
            previous = Some(Place::Action(flat.placed.len() - 1));
        }
        if !actions.actions.is_empty() {
            flat.last.insert(key, flat.placed.len() - 1);
        }
        previous.unwrap_or(Place::Input(EMPTY))
    }
}

/// Where an action takes files from: an input, or what an earlier action made.
#[derive(Clone, Copy)]
enum Place {
    Input(i64),
    Action(usize),
}

struct Placed<'v> {
    action: &'v Action,
    base: i64,
    dir: &'v str,
    input: Place,
    secondary: Place,
}

struct Flat<'v, 'i> {
    inputs: &'i mut Vec<Input>,
    placed: Vec<Placed<'v>>,
    /// Last action of each bound list, by its address.
    last: BTreeMap<usize, usize>,
}

fn index(at: usize) -> i64 {
    i64::try_from(at).unwrap_or(i64::MAX)
}

fn ssh_targets(exec: &ExecVertex) -> Vec<String> {
    let target = |(at, ssh): (usize, &crate::state::Ssh)| {
        if ssh.target.is_empty() {
            format!("/run/buildkit/ssh_agent.{at}")
        } else {
            ssh.target.clone()
        }
    };
    exec.ssh.iter().enumerate().map(target).collect()
}

fn exec_caps(exec: &ExecVertex, constraints: &mut Constraints) {
    let settings = &exec.base.settings;
    let limited = constraints.metadata.linux_resources.is_some();
    let any = |is: &dyn Fn(&ExecMount) -> bool| exec.mounts.iter().any(is);
    let needed = [
        (true, caps::EXEC_META_BASE),
        (settings.valid_exit_codes.is_some(), caps::EXEC_VALID_EXIT_CODE),
        (!settings.ulimits.is_empty(), caps::EXEC_META_ULIMIT),
        (limited, caps::EXEC_META_LINUX_RESOURCES),
        (settings.network != NetMode::Unset, caps::EXEC_META_NETWORK),
        (
            settings.security == SecurityMode::Insecure,
            caps::EXEC_META_SECURITY,
        ),
        (exec.proxy.is_some(), caps::EXEC_META_PROXY),
        (
            any(&|mount| !mount.selector.is_empty()),
            caps::EXEC_MOUNT_SELECTOR,
        ),
        (any(&|mount| mount.cache.is_some()), caps::EXEC_MOUNT_CACHE),
        (
            any(&|mount| mount.cache.is_some()),
            caps::EXEC_MOUNT_CACHE_SHARING,
        ),
        (
            any(&|mount| mount.cache.is_none() && mount.tmpfs.is_some()),
            caps::EXEC_MOUNT_TMPFS,
        ),
        (
            any(&|mount| mount.cache.is_none() && mount.tmpfs > Some(0)),
            caps::EXEC_MOUNT_TMPFS_SIZE,
        ),
        (
            any(&|mount| mount.cache.is_none() && mount.tmpfs.is_none() && mount.source.is_some()),
            caps::EXEC_MOUNT_BIND,
        ),
        (
            any(&|mount| mount.content_cache != MountContentCache::Default),
            caps::EXEC_MOUNT_CONTENT_CACHE,
        ),
        (!exec.secrets.is_empty(), caps::EXEC_MOUNT_SECRET),
        (
            exec.secrets.iter().any(|secret| secret.env.is_some()),
            caps::EXEC_SECRET_ENV,
        ),
        (!exec.ssh.is_empty(), caps::EXEC_MOUNT_SSH),
        (!exec.cdi_devices.is_empty(), caps::EXEC_META_CDI),
    ];
    for (needed, cap) in needed {
        if needed {
            constraints.add_cap(cap);
        }
    }
}

fn marshal_mount(mount: &ExecMount, input: i64, output: i64) -> Mount {
    let mut out = Mount {
        input,
        selector: mount.selector.clone(),
        dest: mount.target.clone(),
        output,
        readonly: mount.readonly,
        content_cache: mount.content_cache.into(),
        ..Mount::default()
    };
    if let Some((id, sharing)) = &mount.cache {
        let sharing = match sharing {
            CacheSharing::Shared => CacheSharingOpt::Shared,
            CacheSharing::Private => CacheSharingOpt::Private,
            CacheSharing::Locked => CacheSharingOpt::Locked,
        };
        out.mount_type = MountType::Cache.into();
        out.cache_opt = Some(CacheOpt {
            id: id.clone(),
            sharing: sharing.into(),
        });
    }
    if let Some(size) = mount.tmpfs {
        out.mount_type = MountType::Tmpfs.into();
        out.tmpfs_opt = Some(TmpfsOpt { size });
    }
    out
}

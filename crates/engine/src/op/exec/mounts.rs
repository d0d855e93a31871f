//! Preparing the mounts of a container from the op's inputs, and turning them into results afterwards.

use std::sync::Arc;

use build::agent::AgentSocket;
use bytes::Bytes;
use cache::{ImmutableRef, MutableRef, RefOptions, Store};
use executor::{ContainerMount, FileSource, MountSource, Root};
use llb::pb;
use tokio_util::sync::CancellationToken;

use super::cache_dir::{CacheDir, Wanted};
use super::{ExecParts, blocking};
use crate::error::{BuildError, ErrorKind};
use crate::op::ResultRef;
use crate::session::{SessionError, SessionGroup};

/// Fetches a secret from the first session that has it.
pub(crate) async fn secret(sessions: &SessionGroup, id: &str) -> Result<Bytes, SessionError> {
    let fetch = |session: Arc<dyn crate::session::Session>| {
        let id = id.to_owned();
        async move { session.secret(&id).await }
    };
    sessions.any(fetch).await
}

/// The inputs as the mounts use them, for whoever looks into a failure.
pub(super) fn inputs_by_mount(exec: &pb::ExecOp, inputs: &[ResultRef]) -> Vec<ResultRef> {
    exec.mounts
        .iter()
        .map(|mount| input_of(mount, inputs).unwrap_or(ResultRef::SCRATCH))
        .collect()
}

fn input_of(mount: &pb::Mount, inputs: &[ResultRef]) -> Option<ResultRef> {
    usize::try_from(mount.input)
        .ok()
        .and_then(|index| inputs.get(index))
        .cloned()
}

/// What of a mount has to be asked of clients or waited for, before anything is made.
enum Held {
    Nothing,
    Cache(CacheDir),
    Secret(FileSource),
    Agent(AgentSocket),
    /// An optional secret or agent that no client has.
    Absent,
}

/// For whom a container's mounts are prepared.
#[derive(Clone, Debug)]
pub(crate) struct MountContext {
    /// The clients that are asked for secrets and agents.
    pub sessions: SessionGroup,
    /// Fires when nobody waits for the container any more.
    pub cancel: CancellationToken,
    /// What the container is for, as refs made for it are described: `exec make all`.
    pub purpose: String,
}

/// The mounts of a container that is about to run.
pub(crate) struct Mounts<'a> {
    ctx: MountContext,
    parts: &'a ExecParts,
    exec: &'a pb::ExecOp,
    inputs: &'a [ResultRef],
}

impl<'a> Mounts<'a> {
    pub fn new(
        ctx: MountContext,
        parts: &'a ExecParts,
        exec: &'a pb::ExecOp,
        inputs: &'a [ResultRef],
    ) -> Self {
        Self {
            ctx,
            parts,
            exec,
            inputs,
        }
    }

    /// Asks clients for what they have, waits for locked cache mounts, makes writable refs.
    pub async fn prepare(&self) -> Result<Prepared, BuildError> {
        let mut held: Vec<Held> = Vec::with_capacity(self.exec.mounts.len());
        for mount in &self.exec.mounts {
            held.push(self.ask(mount).await?);
        }
        // Cache mounts last, so that none is kept waiting while a client is slow.
        let is_cache = |mount: &pb::Mount| mount.mount_type == i32::from(pb::MountType::Cache);
        let caches = || {
            self.exec
                .mounts
                .iter()
                .enumerate()
                .filter(|(_, mount)| is_cache(mount))
        };
        let wanted = caches().map(|(_, mount)| self.wanted(mount));
        let wanted = wanted.collect::<Result<Vec<_>, _>>()?;
        let dirs = tokio::select! {
            dirs = self.parts.cache_dirs.take_all(wanted) => dirs?,
            () = self.ctx.cancel.cancelled() => return Err(BuildError::canceled()),
        };
        for ((at, _), dir) in caches().zip(dirs) {
            held[at] = Held::Cache(dir);
        }
        let (mounts, inputs) = (self.exec.mounts.clone(), self.inputs.to_vec());
        let store = self.parts.store.clone();
        let purpose = self.ctx.purpose.clone();
        let cwd = self
            .exec
            .meta
            .as_ref()
            .map(|meta| meta.cwd.clone())
            .unwrap_or_default();
        blocking(move || {
            let prepared = Prepared::default();
            let mut making = Making {
                store,
                purpose,
                cwd,
                prepared,
                mount_count: mounts.len(),
            };
            for (at, (mount, held)) in mounts.iter().zip(held).enumerate() {
                making.add(at, mount, input_of(mount, &inputs), held)?;
            }
            Ok(making.finish())
        })
        .await
    }

    async fn ask(&self, mount: &pb::Mount) -> Result<Held, BuildError> {
        let kind = pb::MountType::try_from(mount.mount_type)
            .map_err(|_| BuildError::user(format!("mount type {} not implemented", mount.mount_type)))?;
        if mount.dest == "/" && kind != pb::MountType::Bind {
            return Err(BuildError::user(format!(
                "invalid mount type {} for /",
                kind.as_str_name()
            )));
        }
        if mount.input < -1 || (mount.input >= 0 && input_of(mount, self.inputs).is_none()) {
            return Err(BuildError::user(format!("missing input {}", mount.input)));
        }
        match kind {
            pb::MountType::Secret => self.secret(mount).await,
            pb::MountType::Ssh => self.agent(mount).await,
            pb::MountType::Bind | pb::MountType::Cache | pb::MountType::Tmpfs => Ok(Held::Nothing),
        }
    }

    async fn secret(&self, mount: &pb::Mount) -> Result<Held, BuildError> {
        let options = mount
            .secret_opt
            .as_ref()
            .ok_or_else(|| BuildError::user("invalid secret mount options"))?;
        if options.id.is_empty() {
            return Err(BuildError::user("secret ID missing from mount options"));
        }
        match secret(&self.ctx.sessions, &options.id).await {
            Ok(bytes) => Ok(Held::Secret(FileSource {
                bytes: bytes.to_vec(),
                uid: options.uid,
                gid: options.gid,
                mode: options.mode & 0o777,
            })),
            Err(SessionError::NotFound { .. }) if options.optional => Ok(Held::Absent),
            Err(error) => Err(error.into()),
        }
    }

    async fn agent(&self, mount: &pb::Mount) -> Result<Held, BuildError> {
        let options = mount
            .ssh_opt
            .as_ref()
            .ok_or_else(|| BuildError::user("invalid ssh mount options"))?;
        let check = |session: Arc<dyn crate::session::Session>| {
            let id = options.id.clone();
            async move {
                session.check_agent(&id).await?;
                Ok(session)
            }
        };
        match self.ctx.sessions.any(check).await {
            Ok(session) => AgentSocket::open(&self.parts.socket_dir, session, options)
                .await
                .map(Held::Agent),
            Err(_) if options.optional => Ok(Held::Absent),
            Err(SessionError::Unsupported { .. }) => Err(BuildError::user(format!(
                "no SSH key {:?} forwarded from the client",
                options.id
            ))),
            Err(error) => Err(error.into()),
        }
    }

    /// Describes the directory of a cache mount.
    fn wanted(&self, mount: &pb::Mount) -> Result<Wanted, BuildError> {
        let options = mount
            .cache_opt
            .as_ref()
            .ok_or_else(|| BuildError::user("missing cache mount options"))?;
        let sharing = pb::CacheSharingOpt::try_from(options.sharing)
            .map_err(|_| BuildError::user(format!("invalid cache sharing option: {}", options.sharing)))?;
        let id = if options.id.is_empty() {
            &mount.dest
        } else {
            &options.id
        };
        let mut description = format!("cached mount {} from {}", mount.dest, self.ctx.purpose);
        if *id != mount.dest {
            description.push_str(&format!(" with id {id:?}"));
        }
        let base = input_of(mount, self.inputs)
            .as_ref()
            .and_then(ResultRef::get)
            .cloned();
        Ok(Wanted {
            store: self.parts.store.clone(),
            mount_dir: self.parts.socket_dir.clone(),
            key: match &base {
                Some(base) => format!("{id}:{}", base.id()),
                None => id.clone(),
            },
            base,
            sharing,
            description,
        })
    }
}

/// What becomes an output of the op.
enum Output {
    /// The mount's own writable ref.
    Written(MutableRef),
    /// The input, which the process could not change.
    Input(ResultRef),
}

/// Everything a container needs, and what is made of it afterwards. Dropping it lets go of all.
#[derive(Default)]
pub(crate) struct Prepared {
    /// The root file system.
    pub root: Root,
    /// What is mounted into it.
    pub mounts: Vec<ContainerMount>,
    outputs: Vec<(usize, i64, Output)>,
    /// Refs that only this run sees, by mount.
    scratch: Vec<(usize, MutableRef)>,
    inputs: Vec<(usize, ResultRef)>,
    cache_dirs: Vec<(usize, CacheDir)>,
    agents: Vec<AgentSocket>,
    mount_count: usize,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared")
            .field("root", &self.root)
            .field("mounts", &self.mounts)
            .finish_non_exhaustive()
    }
}

/// What is left of a run.
pub(crate) struct Finished {
    /// The op's outputs.
    pub outputs: Vec<Option<ResultRef>>,
    /// State of each mount, when the run failed.
    pub mounts: Vec<Option<ResultRef>>,
}

impl Prepared {
    /// Describes how to look at a mount's tree from outside, by the mount's index; `None` for what is no tree on disk.
    /// Blocking.
    pub fn view(&self, at: usize) -> Result<Option<MountSource>, BuildError> {
        if let Some((_, dir)) = self.cache_dirs.iter().find(|(index, _)| *index == at) {
            return dir.source(true).map(Some);
        }
        let written = self.outputs.iter().find(|(index, _, _)| *index == at);
        let scratch = self.scratch.iter().find(|(index, _)| *index == at);
        let input = self.inputs.iter().find(|(index, _)| *index == at);
        let mounts = match (written, scratch, input) {
            (Some((_, _, Output::Written(reference))), _, _) | (None, Some((_, reference)), _) => {
                reference.mounts(true).map_err(internal)?
            }
            (Some((_, _, Output::Input(input))), _, _) | (None, None, Some((_, input))) => {
                read_mounts(input)?
            }
            (None, None, None) => return Ok(None),
        };
        Ok(Some(MountSource::Snapshot(mounts)))
    }

    /// Commits what was written. Blocking.
    pub fn finish(self, failed: bool) -> Result<Finished, BuildError> {
        let mut mounts: Vec<Option<ResultRef>> = vec![None; self.mount_count];
        for (at, input) in self.inputs {
            mounts[at] = Some(input);
        }
        drop(self.cache_dirs);
        let mut outputs = self.outputs;
        outputs.sort_by_key(|(_, index, _)| *index);
        let mut results = Vec::with_capacity(outputs.len());
        for (at, _, output) in outputs {
            let result = match output {
                Output::Written(reference) => ResultRef::new(reference.commit().map_err(internal)?),
                Output::Input(input) => input,
            };
            mounts[at] = Some(result.clone());
            results.push(Some(result));
        }
        if failed {
            for (at, reference) in self.scratch {
                mounts[at] = reference.commit().ok().map(ResultRef::new);
            }
        }
        Ok(Finished {
            outputs: results,
            mounts,
        })
    }
}

fn internal(error: cache::StoreError) -> BuildError {
    BuildError::from_source(ErrorKind::Internal, error)
}

struct Making {
    store: Store,
    purpose: String,
    cwd: String,
    prepared: Prepared,
    mount_count: usize,
}

impl Making {
    fn writable(&self, mount: &pb::Mount, base: Option<&ImmutableRef>) -> Result<MutableRef, BuildError> {
        let description = format!("mount {} from {}", mount.dest, self.purpose);
        self.store
            .create_mutable(
                base,
                RefOptions {
                    description,
                    ..RefOptions::default()
                },
            )
            .map_err(internal)
    }

    fn add(
        &mut self,
        at: usize,
        mount: &pb::Mount,
        input: Option<ResultRef>,
        held: Held,
    ) -> Result<(), BuildError> {
        if let Some(input) = &input {
            self.prepared.inputs.push((at, input.clone()));
        }
        let source = match held {
            Held::Nothing if mount.mount_type == i32::from(pb::MountType::Tmpfs) => {
                let size = mount
                    .tmpfs_opt
                    .as_ref()
                    .and_then(|options| u64::try_from(options.size).ok());
                MountSource::Tmpfs {
                    size_bytes: size.filter(|size| *size > 0),
                }
            }
            Held::Nothing => return self.bind(at, mount, input),
            Held::Cache(dir) => {
                let source = dir.source(mount.readonly)?;
                self.prepared.cache_dirs.push((at, dir));
                if let (Some(input), true) = (input, mount.output != -1) {
                    self.prepared
                        .outputs
                        .push((at, mount.output, Output::Input(input)));
                }
                source
            }
            Held::Secret(file) => MountSource::File(file),
            Held::Agent(agent) => {
                let source = MountSource::Host(agent.path().to_owned());
                self.prepared.agents.push(agent);
                source
            }
            Held::Absent => return Ok(()),
        };
        self.mount(mount, source);
        Ok(())
    }

    fn bind(&mut self, at: usize, mount: &pb::Mount, input: Option<ResultRef>) -> Result<(), BuildError> {
        let base = input.as_ref().and_then(ResultRef::get);
        let is_root = mount.dest == "/";
        let has_output = mount.output != -1;
        if has_output && mount.readonly && base.is_some() && !is_root {
            let input = input.ok_or_else(|| BuildError::internal("a mount lost its input"))?;
            let source = MountSource::Snapshot(read_mounts(&input)?);
            self.prepared
                .outputs
                .push((at, mount.output, Output::Input(input)));
            self.mount(mount, source);
            return Ok(());
        }
        if let (Some(base), true, false) = (base, mount.readonly && !has_output, is_root) {
            let source = MountSource::Snapshot(base.mounts().map_err(internal)?);
            self.mount(mount, source);
            return Ok(());
        }
        // Mount points are made in the root, so it is always writable from outside.
        let reference = self.writable(mount, base)?;
        let mounts = reference.mounts(false).map_err(internal)?;
        if has_output {
            self.prepared
                .outputs
                .push((at, mount.output, Output::Written(reference)));
        } else {
            self.prepared.scratch.push((at, reference));
        }
        if is_root {
            self.prepared.root = Root {
                mounts,
                read_only: mount.readonly,
            };
        } else {
            self.mount(mount, MountSource::Snapshot(mounts));
        }
        Ok(())
    }

    fn mount(&mut self, mount: &pb::Mount, source: MountSource) {
        let is_absolute = mount.dest.starts_with('/');
        self.prepared.mounts.push(ContainerMount {
            target: if is_absolute {
                mount.dest.clone()
            } else {
                oci::path::join(&["/", &self.cwd, &mount.dest])
            },
            source,
            selector: mount.selector.clone(),
            read_only: mount.readonly,
        });
    }

    fn finish(mut self) -> Prepared {
        // Parents are mounted before what is in them.
        self.prepared.mounts.sort_by(|a, b| a.target.cmp(&b.target));
        self.prepared.mount_count = self.mount_count;
        self.prepared
    }
}

fn read_mounts(input: &ResultRef) -> Result<Vec<snapshot::Mount>, BuildError> {
    match input.get() {
        Some(reference) => reference.mounts().map_err(internal),
        None => Ok(Vec::new()),
    }
}

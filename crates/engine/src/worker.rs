//! The worker: makes the op of every vertex, and resolves sources for frontends.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use cache::Store;
use executor::{DeviceRegistry, Executor};
use llb::pb;
use llb::pb::op::Op as Kind;
use source::git::{GitOp, GitRepositories};
use source::http::{HttpFiles, HttpOp};
use source::image::{ImageOp, Images};
use source::image_blob::{self, BlobOp};
use source::local::LocalOp;
use source::oci_layout::{self, LayoutOp};

use crate::bridge::{MetaContext, MetaRequest, SourceMeta, SourceResolver};
use crate::error::{BuildError, ErrorKind};
use crate::op::build::BuildOp;
use crate::op::compose::{DiffOp, MergeOp, PassthroughOp};
use crate::op::exec::{CacheDirs, Emulators, ExecOp, ExecParts, Proxies};
use crate::op::file::FileOp;
use crate::op::{Op, OpFactory, VertexSpec};
use crate::unlazy::Unlazy;

/// What a worker is made of.
#[derive(Clone, Debug)]
pub struct WorkerParts {
    /// Where refs are kept.
    pub store: Store,
    /// Where images come from.
    pub images: Arc<Images>,
    /// Where web files come from.
    pub http: HttpFiles,
    /// Makes lazy refs real.
    pub unlazy: Arc<dyn Unlazy>,
    /// Where devices are described.
    pub devices: DeviceRegistry,
    /// Runs programs of other platforms.
    pub emulators: Emulators,
    /// Runs containers; `None`: this process may not, and says so when a step needs one.
    pub executor: Option<Executor>,
    /// A directory of the worker's own; emptied and made anew.
    pub dir: PathBuf,
}

/// Makes ops and resolves sources.
#[derive(Debug)]
pub struct Worker {
    parts: WorkerParts,
    cache_dirs: CacheDirs,
    proxies: Proxies,
    socket_dir: PathBuf,
    git: GitRepositories,
}

impl Worker {
    /// Prepares the worker's directory. Blocking.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(parts: WorkerParts) -> Result<Self, BuildError> {
        let (socket_dir, git_dir) = (parts.dir.join("sockets"), parts.dir.join("git"));
        for dir in [&socket_dir, &git_dir] {
            remake(dir).map_err(|error| {
                BuildError::from_source(ErrorKind::Internal, error)
                    .context(format!("prepare {}", dir.display()))
            })?;
        }
        let git = GitRepositories::new(Arc::clone(&parts.images), git_dir);
        Ok(Self {
            parts,
            cache_dirs: CacheDirs::default(),
            proxies: Proxies::default(),
            socket_dir,
            git,
        })
    }

    fn parts_of_exec(&self) -> Result<ExecParts, BuildError> {
        let executor = self.parts.executor.clone().ok_or_else(|| {
            BuildError::new(
                ErrorKind::Denied,
                "running containers needs root: start the daemon as root",
            )
        })?;
        Ok(ExecParts {
            executor,
            devices: self.parts.devices.clone(),
            emulators: self.parts.emulators.clone(),
            store: self.parts.store.clone(),
            unlazy: Arc::clone(&self.parts.unlazy),
            cache_dirs: self.cache_dirs.clone(),
            proxies: self.proxies.clone(),
            socket_dir: self.socket_dir.clone(),
        })
    }

    fn source(&self, vertex: &VertexSpec, source: &pb::SourceOp) -> Result<Arc<dyn Op>, BuildError> {
        let parts = &self.parts;
        Ok(match scheme(&source.identifier)? {
            "docker-image" => Arc::new(ImageOp::new(vertex, Arc::clone(&parts.images))?),
            "oci-layout" => Arc::new(LayoutOp::new(vertex, Arc::clone(&parts.images))?),
            image_blob::REGISTRY_SCHEME | image_blob::LAYOUT_SCHEME => {
                Arc::new(BlobOp::new(vertex, Arc::clone(&parts.images))?)
            }
            "local" => Arc::new(LocalOp::new(vertex, parts.store.clone())?),
            "git" => Arc::new(GitOp::new(vertex, self.git.clone())?),
            "http" | "https" => Arc::new(HttpOp::new(vertex, parts.http.clone())?),
            scheme => return Err(unknown_scheme(scheme)),
        })
    }
}

fn remake(dir: &Path) -> std::io::Result<()> {
    // What a killed daemon left mounted must not be emptied.
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        snapshot::unmount(&entry.path()).map_err(|error| error.source)?;
    }
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut made = std::fs::DirBuilder::new();
    made.recursive(true).mode(0o711).create(dir)
}

fn scheme(identifier: &str) -> Result<&str, BuildError> {
    let scheme = identifier.split_once("://").map(|(scheme, _)| scheme);
    scheme.ok_or_else(|| BuildError::user(format!("failed to parse {identifier:?}: no source scheme")))
}

fn unknown_scheme(scheme: &str) -> BuildError {
    BuildError::user(format!("unsupported source scheme {scheme}"))
}

#[async_trait]
impl OpFactory for Worker {
    async fn prune_cache_mounts(&self, ids: &BTreeMap<String, bool>) -> Result<(), BuildError> {
        for (id, is_on_ref) in ids {
            self.cache_dirs.forget(&self.parts.store, id, *is_on_ref).await?;
        }
        Ok(())
    }

    async fn close(&self) {
        if let Some(executor) = &self.parts.executor {
            executor.close().await;
        }
    }

    fn devices(&self) -> DeviceRegistry {
        self.parts.devices.clone()
    }

    fn exec_parts(&self) -> Result<ExecParts, BuildError> {
        self.parts_of_exec()
    }

    fn create(&self, vertex: &Arc<VertexSpec>) -> Result<Arc<dyn Op>, BuildError> {
        let store = self.parts.store.clone();
        let unlazy = Arc::clone(&self.parts.unlazy);
        Ok(match &vertex.op.op {
            Some(Kind::Exec(_)) => Arc::new(ExecOp::new(vertex, self.parts_of_exec()?)?),
            Some(Kind::Source(source)) => self.source(vertex, source)?,
            Some(Kind::File(_)) => Arc::new(FileOp::new(vertex, store, unlazy)?),
            Some(Kind::Merge(_)) => Arc::new(MergeOp::new(vertex, store)?),
            Some(Kind::Diff(_)) => Arc::new(DiffOp::new(vertex, store, unlazy)?),
            Some(Kind::Passthrough(_)) => Arc::new(PassthroughOp::new(vertex)?),
            Some(Kind::Build(_)) => Arc::new(BuildOp::new(vertex)?),
            None => return Err(BuildError::user("invalid op without a kind")),
        })
    }
}

#[async_trait]
impl SourceResolver for Worker {
    async fn resolve_meta(
        &self,
        ctx: &MetaContext,
        op: pb::SourceOp,
        request: &MetaRequest,
    ) -> Result<SourceMeta, BuildError> {
        let scheme = scheme(&op.identifier)?.to_owned();
        match scheme.as_str() {
            "docker-image" => self.parts.images.resolve_meta(ctx, op, request).await,
            "oci-layout" => oci_layout::resolve_meta(&self.parts.images, ctx, op, request).await,
            "git" => {
                let git = self.git.resolve_meta(ctx, &op, request).await?;
                Ok(SourceMeta {
                    op,
                    git: Some(git),
                    ..SourceMeta::default()
                })
            }
            "http" | "https" => {
                let http = self
                    .parts
                    .http
                    .resolve_meta(ctx, &op, request.checksum.as_ref())
                    .await?;
                Ok(SourceMeta {
                    op,
                    http: Some(http),
                    ..SourceMeta::default()
                })
            }
            // There is nothing to find out without the directory's transfer.
            "local" => Ok(SourceMeta {
                op,
                ..SourceMeta::default()
            }),
            scheme => Err(unknown_scheme(scheme)),
        }
    }
}

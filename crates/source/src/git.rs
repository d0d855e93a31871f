//! The git source: the files of a commit, with or without its repository.
//!
//! A remote is asked once per build what a ref points to. What is fetched stays in a bare repository per remote; what is
//! checked out is found again by commit. Git itself runs apart from the daemon's environment; see [`command`].

mod access;
mod attributes;
mod bundle;
mod checkout;
mod command;
mod remote;
mod signed;
mod template;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use build::error::BuildError;
use build::job::{Job, memo};
use build::meta::{GitMeta, MetaContext, MetaRequest};
use build::op::{CacheMap, Op, OpContext, OpProvenance, ResultRef, VertexSpec};
use build::progress::VertexProgress;
use build::session::SessionGroup;
use bytes::Bytes;
use cache::ImmutableRef;
use oci::Digest;
use tokio_util::sync::CancellationToken;

use super::image::Images;
use crate::resolution::{self, Asked};
use access::Access;
use attributes::Attributes;
use bundle::Bundles;
use checkout::Checkout;
use command::Git;
use remote::{Locks, Repository, Resolved};

/// Where git repositories are fetched and checked out: one per engine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct GitRepositories {
    images: Arc<Images>,
    dir: PathBuf,
    locks: Locks,
}

/// For whom Git works.
struct Caller {
    jobs: Vec<Arc<Job>>,
    sessions: SessionGroup,
    progress: VertexProgress,
    cancel: CancellationToken,
}

impl Caller {
    fn of_op(ctx: &OpContext) -> Self {
        Self {
            jobs: ctx.jobs(),
            sessions: ctx.sessions(),
            progress: ctx.progress().clone(),
            cancel: ctx.cancel().clone(),
        }
    }
}

impl GitRepositories {
    /// Keeps repositories in the store of `images`, which bundles come from; `dir` is an empty directory of its own, for
    /// what is needed while Git runs.
    pub fn new(images: Arc<Images>, dir: PathBuf) -> Self {
        Self {
            images,
            dir,
            locks: Locks::default(),
        }
    }

    /// Finds out what a source's ref points to; with `return_object`, fetches it.
    ///
    /// # Errors
    /// When the remote cannot be asked, has no such ref, or has something else than the pinned checksum says.
    pub async fn resolve_meta(
        &self,
        ctx: &MetaContext,
        op: &llb::pb::SourceOp,
        request: &MetaRequest,
    ) -> Result<GitMeta, BuildError> {
        let attributes = Attributes::read(op)?;
        let caller = Caller {
            jobs: vec![Arc::clone(&ctx.job)],
            sessions: ctx.sessions.clone(),
            progress: ctx.progress.clone(),
            cancel: ctx.cancel.clone(),
        };
        let resolved = self.resolve_signed(&attributes, &caller).await?;
        let commit = resolved
            .commit
            .clone()
            .filter(|_| !attributes.options.keep_git_dir);
        let mut meta = GitMeta {
            checksum: resolved.checksum.clone(),
            reference: resolved.reference.clone(),
            commit_checksum: commit.unwrap_or_default(),
            ..GitMeta::default()
        };
        if request.return_object {
            self.add_objects(&attributes, &caller, &resolved, &mut meta)
                .await?;
        }
        Ok(meta)
    }

    /// Checks that what a source's ref points to is signed as demanded.
    async fn check_signature(
        &self,
        attributes: &Attributes,
        caller: &Caller,
        resolved: &Resolved,
    ) -> Result<(), BuildError> {
        let Some(demand) = &attributes.demand else {
            return Ok(());
        };
        let mut found = GitMeta {
            checksum: resolved.checksum.clone(),
            ..GitMeta::default()
        };
        Box::pin(self.add_objects(attributes, caller, resolved, &mut found)).await?;
        demand.check(&found, SystemTime::now())
    }

    async fn add_objects(
        &self,
        attributes: &Attributes,
        caller: &Caller,
        resolved: &Resolved,
        meta: &mut GitMeta,
    ) -> Result<(), BuildError> {
        let repository = self.fetch(attributes, caller, resolved).await?;
        let git = &repository.git;
        let checksum = resolved.checksum.as_str();
        let kind = git.run(&["cat-file", "-t", checksum]).await?;
        let mut commit = checksum.to_owned();
        match kind.trim_end() {
            "commit" => meta.commit_checksum.clear(),
            "tag" => {
                let peeled = format!("{checksum}^{{commit}}");
                git.run(&["rev-parse", "--verify", &peeled])
                    .await?
                    .trim_end()
                    .clone_into(&mut commit);
                meta.commit_checksum.clone_from(&commit);
                meta.tag_object = Bytes::from(git.bytes(&["cat-file", "tag", checksum]).await?);
            }
            kind => {
                return Err(BuildError::user(format!(
                    "expected commit or tag object, got {kind}"
                )));
            }
        }
        meta.commit_object = Bytes::from(git.bytes(&["cat-file", "commit", &commit]).await?);
        Ok(())
    }

    async fn git(&self, attributes: &Attributes, caller: &Caller) -> Result<Git, BuildError> {
        let access = Access::open(&self.dir, attributes, &caller.sessions).await?;
        let git = Git::new(access, caller.progress.clone(), caller.cancel.clone());
        Ok(git.with_origin(&attributes.plain_remote()))
    }

    /// What the source's ref points to: the same for all steps of a build.
    async fn resolve(&self, attributes: &Attributes, caller: &Caller) -> Result<Arc<Resolved>, BuildError> {
        if let Some(resolved) = attributes.pinned()? {
            return Ok(Arc::new(resolved));
        }
        let mut key = format!("git:{}#{}", attributes.remote, attributes.reference);
        if let Some(bundle) = &attributes.bundle {
            key = format!("{key}@{}", bundle.digest);
        }
        let ask = Box::pin(async {
            let git = self.git(attributes, caller).await?;
            let Some(bundle) = &attributes.bundle else {
                return remote::resolve(&git, attributes).await;
            };
            let repository = Box::pin(self.bundles(caller).open(&git, bundle)).await?;
            let git = git.with_origin(&repository.url()?).local();
            remote::resolve(&git, attributes).await
        });
        let asked = Asked {
            key: key.clone(),
            shown: format!("{}#{}", attributes.shown_remote(), attributes.reference),
            mode: resolution::mode(&caller.jobs),
            progress: &caller.progress,
        };
        let recall = async |bytes: Vec<u8>| Resolved::decode(&bytes);
        let store = self.images.store();
        let ask = Box::pin(resolution::resolve(store, asked, ask, Resolved::encode, recall));
        let resolved = tokio::select! {
            resolved = memo(&caller.jobs, &key, ask) => resolved?,
            () = caller.cancel.cancelled() => return Err(BuildError::canceled()),
        };
        attributes.check(&resolved.checksum, resolved.commit.as_deref())?;
        Ok(resolved)
    }

    /// As [`Self::resolve`]; what is not signed as demanded is refused.
    async fn resolve_signed(
        &self,
        attributes: &Attributes,
        caller: &Caller,
    ) -> Result<Arc<Resolved>, BuildError> {
        let resolved = self.resolve(attributes, caller).await?;
        self.check_signature(attributes, caller, &resolved).await?;
        Ok(resolved)
    }

    async fn fetch(
        &self,
        attributes: &Attributes,
        caller: &Caller,
        resolved: &Resolved,
    ) -> Result<Repository, BuildError> {
        let git = self.git(attributes, caller).await?;
        let Some(bundle) = &attributes.bundle else {
            return Repository::open(self.images.store(), &self.locks, &git, attributes, resolved).await;
        };
        let repository = Box::pin(self.bundles(caller).open(&git, bundle)).await?;
        repository.find_commit(attributes, resolved, bundle).await?;
        Ok(repository)
    }

    fn bundles<'a>(&'a self, caller: &'a Caller) -> Bundles<'a> {
        Bundles {
            store: self.images.store(),
            locks: &self.locks,
            dir: &self.dir,
            images: &self.images,
            sessions: &caller.sessions,
            cancel: &caller.cancel,
        }
    }

    async fn checkout(
        &self,
        attributes: &Attributes,
        caller: &Caller,
        resolved: &Resolved,
    ) -> Result<ImmutableRef, BuildError> {
        let index = attributes.snapshot_index(resolved);
        let _lock = self.locks.lock(index.clone()).await;
        if let Some(known) = self.kept(index).await? {
            return Ok(known);
        }
        let repository = self.fetch(attributes, caller, resolved).await?;
        let (store, dir) = (self.images.store(), self.dir.as_path());
        Checkout {
            store,
            dir,
            repository: &repository,
            attributes,
            resolved,
        }
        .run()
        .await
    }

    async fn kept(&self, index: String) -> Result<Option<ImmutableRef>, BuildError> {
        let store = self.images.store().clone();
        blocking(move || {
            let known = store
                .search_index(&index)
                .map_err(|error| BuildError::from_source(build::error::ErrorKind::Internal, error))?;
            // A ref that went meanwhile is a miss.
            Ok(known.iter().find_map(|id| store.get(id).ok()))
        })
        .await
    }
}

/// The identifier of a git source as policies know it; `None` for one that cannot be understood.
pub(crate) fn canonical_identifier(op: &llb::pb::SourceOp) -> Option<String> {
    Attributes::read(op)
        .ok()
        .map(|attributes| attributes.identifier())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| BuildError::internal(format!("git source: {error}")))?
}

/// One `git://` vertex.
#[derive(Debug)]
pub struct GitOp {
    repositories: GitRepositories,
    attributes: Attributes,
    /// What the key was made of, so that the files are those of the key.
    resolved: Mutex<Option<Arc<Resolved>>>,
}

impl GitOp {
    /// Makes the op of a vertex.
    ///
    /// # Errors
    /// A user error for an identifier or attributes that cannot be understood or are not supported.
    pub fn new(vertex: &VertexSpec, repositories: GitRepositories) -> Result<Self, BuildError> {
        let Some(llb::pb::op::Op::Source(source)) = &vertex.op.op else {
            return Err(BuildError::internal("not a source op"));
        };
        Ok(Self {
            repositories,
            attributes: Attributes::read(source)?,
            resolved: Mutex::default(),
        })
    }

    fn known(&self) -> Option<Arc<Resolved>> {
        self.resolved
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    async fn resolved(&self, caller: &Caller) -> Result<Arc<Resolved>, BuildError> {
        if let Some(known) = self.known() {
            return Ok(known);
        }
        let resolved = self.repositories.resolve_signed(&self.attributes, caller).await?;
        let mut slot = self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(slot.get_or_insert(resolved)))
    }
}

#[async_trait]
impl Op for GitOp {
    async fn cache_map(&self, ctx: &OpContext, _: u32) -> Result<CacheMap, BuildError> {
        let resolved = self.resolved(&Caller::of_op(ctx)).await?;
        let key = self.attributes.key(&resolved);
        Ok(CacheMap {
            digests: vec![super::key_digest(&key)],
            ..CacheMap::default()
        })
    }

    async fn content_digest(
        &self,
        _: &OpContext,
        _: usize,
        _: &ResultRef,
    ) -> Result<Option<Digest>, BuildError> {
        Ok(None)
    }

    async fn exec(&self, ctx: &OpContext, _: &[ResultRef]) -> Result<Vec<Option<ResultRef>>, BuildError> {
        let caller = Caller::of_op(ctx);
        let resolved = self.resolved(&caller).await?;
        let work = self.repositories.checkout(&self.attributes, &caller, &resolved);
        Ok(vec![Some(ResultRef::new(Box::pin(work).await?))])
    }

    fn provenance(&self) -> Option<OpProvenance> {
        let mut source = self.attributes.shown_remote();
        if !self.attributes.reference.is_empty() {
            source.push('#');
            source.push_str(&self.attributes.reference);
        }
        let named = |id: &String| (!id.is_empty()).then(|| (id.clone(), true));
        Some(OpProvenance {
            source: Some(source),
            pin: self.known().map(|resolved| resolved.checksum.clone()),
            secrets: [&self.attributes.token_secret, &self.attributes.header_secret]
                .into_iter()
                .filter_map(named)
                .collect(),
            agents: named(&self.attributes.agent).into_iter().collect(),
            ..OpProvenance::default()
        })
    }
}

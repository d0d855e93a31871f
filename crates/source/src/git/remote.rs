//! Asking a remote what a ref points to, and keeping what was fetched from it.
//!
//! Each remote has a bare repository of its own, a retained mutable ref that one build at a time works on. What a fetch
//! brought is named by a ref below `refs/cooper`, which is only made once the fetch has ended: objects that an interrupted
//! fetch left behind are never taken for a commit that is there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use build::error::{BuildError, ErrorKind};
use cache::{MutableRef, RefOptions, Store};
use oci::Digest;
use tokio::sync::OwnedMutexGuard;

use super::attributes::{Attributes, invalid_ref, is_commit};
use super::blocking;
use super::command::{Git, GitError};
use crate::image_blob::BlobLocation;

/// Says in a repository's metadata that it is whole, and its object format.
const FORMAT: &str = "git.format";

/// What a source's ref points to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Resolved {
    /// The full name of the ref, or the commit if that was asked for.
    pub reference: String,
    /// What it points to: a commit, or the object of an annotated tag.
    pub checksum: String,
    /// The commit that the remote says the tag object points to.
    pub commit: Option<String>,
}

impl Resolved {
    /// A commit that is known without asking.
    pub fn commit(reference: &str, checksum: &str) -> Self {
        Self {
            reference: reference.to_owned(),
            checksum: checksum.to_owned(),
            commit: None,
        }
    }

    /// Writes it for [`Self::decode`]: one part a line, none of which has line breaks.
    pub fn encode(&self) -> Vec<u8> {
        let commit = self.commit.as_deref().unwrap_or_default();
        format!("{}\n{}\n{commit}\n", self.reference, self.checksum).into_bytes()
    }

    /// Reads what [`Self::encode`] wrote; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut lines = std::str::from_utf8(bytes).ok()?.lines();
        let (reference, checksum) = (lines.next()?, lines.next().filter(|name| is_commit(name))?);
        let commit = lines.next().filter(|commit| !commit.is_empty());
        Some(Self {
            commit: commit.map(str::to_owned),
            ..Self::commit(reference, checksum)
        })
    }

    fn is_sha256(&self) -> bool {
        self.checksum.len() == 64
    }

    /// Name of the ref under which the fetched object is kept.
    pub fn local_ref(&self) -> String {
        format!("refs/cooper/{}", Digest::sha256(self.reference.as_bytes()).hex())
    }
}

/// Asks the remote for a ref.
pub(super) async fn resolve(git: &Git, attributes: &Attributes) -> Result<Resolved, BuildError> {
    let shown = attributes.shown_remote();
    let name = attributes.reference.as_str();
    if name.is_empty() {
        let context = || format!("error fetching default branch for repository {shown}");
        let listing = git.run(&["ls-remote", "--symref", "--", "origin", "HEAD"]).await;
        let listing = listing.map_err(|error| BuildError::from(error).context(context()))?;
        return default_branch(&listing)?.ok_or_else(|| {
            BuildError::user(format!("could not find default branch for repository: {shown}"))
        });
    }
    let peeled = format!("{name}^{{}}");
    let listing = git.run(&["ls-remote", "--", "origin", name, &peeled]).await;
    let listing = listing
        .map_err(|error| BuildError::from(error).context(format!("failed to fetch remote {shown}")))?;
    let found = find(&listing, name).ok_or_else(|| {
        let text = format!("repository does not contain ref {name}, output: {listing:?}");
        BuildError::new(ErrorKind::NotFound, text)
    })?;
    for checksum in [Some(&found.checksum), found.commit.as_ref()]
        .into_iter()
        .flatten()
    {
        if !is_commit(checksum) {
            return Err(BuildError::user(format!("invalid commit sha {checksum:?}")));
        }
    }
    Ok(found)
}

fn lines(listing: &str) -> impl Iterator<Item = (&str, &str)> {
    listing.lines().filter_map(|line| line.split_once('\t'))
}

fn default_branch(listing: &str) -> Result<Option<Resolved>, BuildError> {
    let head = lines(listing).find_map(|(target, name)| {
        let branch = target.strip_prefix("ref: ")?;
        (name == "HEAD" && branch.starts_with("refs/heads/")).then_some(branch)
    });
    let commit = lines(listing).find(|(checksum, name)| *name == "HEAD" && is_commit(checksum));
    let (Some(reference), Some((checksum, _))) = (head, commit) else {
        return Ok(None);
    };
    if reference.starts_with("refs/heads/-") || reference.bytes().any(|byte| byte.is_ascii_whitespace()) {
        return Err(invalid_ref(reference));
    }
    Ok(Some(Resolved::commit(reference, checksum)))
}

/// Picks a ref by its short or full name; a branch goes before a tag, as in `git checkout`.
fn find(listing: &str, name: &str) -> Option<Resolved> {
    let listed = |wanted: &str| {
        lines(listing)
            .find(|(_, name)| *name == wanted)
            .map(|(checksum, _)| checksum)
    };
    let full = |prefix: &str| format!("{prefix}{}", name.strip_prefix(prefix).unwrap_or(name));
    let (exact, branch, tag) = (full("refs/"), full("refs/heads/"), full("refs/tags/"));
    for reference in [&exact, &branch] {
        if *reference != tag
            && let Some(checksum) = listed(reference)
        {
            return Some(Resolved::commit(reference, checksum));
        }
    }
    let commit = listed(&format!("{tag}^{{}}")).map(str::to_owned);
    Some(Resolved {
        checksum: listed(&tag)?.to_owned(),
        reference: tag,
        commit,
    })
}

/// Locks by name, taken by one build at a time. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Locks(Arc<Mutex<BTreeMap<String, Weak<tokio::sync::Mutex<()>>>>>);

impl Locks {
    /// Waits for a lock; dropping the guard lets go of it.
    pub async fn lock(&self, name: String) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let known = locks.get(&name).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let lock = Arc::default();
                locks.insert(name, Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }
}

/// The bare repository of a remote, held by this build alone.
#[derive(Debug)]
pub(super) struct Repository {
    /// Where it is.
    pub path: PathBuf,
    /// Git, working in it.
    pub git: Git,
    reference: Arc<MutableRef>,
    _lock: OwnedMutexGuard<()>,
}

impl Repository {
    /// Takes the repository of a remote, or makes it, with the object that `resolved` names in it.
    pub async fn open(
        store: &Store,
        locks: &Locks,
        git: &Git,
        attributes: &Attributes,
        resolved: &Resolved,
    ) -> Result<Self, BuildError> {
        let index = attributes.remote_index();
        let description = format!("shared git repo for {}", attributes.shown_remote());
        let this = Self::hold(store, locks, git, &index, description).await?;
        let format = if resolved.is_sha256() { "sha256" } else { "sha1" };
        let kept = this.reference.metadata(FORMAT).map_err(internal)?;
        if kept.as_deref() != Some(format.as_bytes()) {
            this.make(format, &index).await?;
        }
        match this.fetch(attributes, resolved).await {
            Err(error) if is_broken(&error) => {
                this.make(format, &index).await?;
                this.fetch(attributes, resolved).await?;
            }
            done => done?,
        }
        this.verify(attributes, resolved).await?;
        Ok(this)
    }

    /// Takes what is kept under an index, or an empty directory, and locks it.
    pub async fn hold(
        store: &Store,
        locks: &Locks,
        git: &Git,
        index: &str,
        description: String,
    ) -> Result<Self, BuildError> {
        let lock = locks.lock(index.to_owned()).await;
        let (store, name) = (store.clone(), index.to_owned());
        let reference = Arc::new(blocking(move || take(&store, &name, description)).await?);
        let path = tree_path(&reference)?;
        Ok(Self {
            git: git.at(&path),
            path,
            reference,
            _lock: lock,
        })
    }

    /// Returns whether a mark was set since the repository was made.
    pub fn mark(&self, name: &str) -> Result<bool, BuildError> {
        let format = self.reference.metadata(FORMAT).map_err(internal)?;
        let mark = self.reference.metadata(name).map_err(internal)?;
        Ok(format.is_some() && mark == format)
    }

    /// Marks the repository.
    pub async fn set_mark(&self, name: &'static str) -> Result<(), BuildError> {
        let reference = Arc::clone(&self.reference);
        blocking(move || {
            let format = reference.metadata(FORMAT).map_err(internal)?;
            reference.set_metadata(name, format.as_deref()).map_err(internal)
        })
        .await
    }

    /// The repository as a remote.
    pub fn url(&self) -> Result<String, BuildError> {
        let path = self.path.to_str();
        let path = path.ok_or_else(|| BuildError::internal("the state directory's path is not UTF-8"))?;
        Ok(format!("file://{path}"))
    }

    /// Takes a commit that must be in the repository already.
    pub async fn find_commit(
        &self,
        attributes: &Attributes,
        resolved: &Resolved,
        bundle: &BlobLocation,
    ) -> Result<(), BuildError> {
        let commit = format!("{}^{{commit}}", resolved.checksum);
        match self.git.run(&["cat-file", "-e", &commit]).await {
            Err(GitError::Failed { .. }) => {
                let text = format!("commit {} not found in bundle {bundle}", resolved.checksum);
                return Err(BuildError::new(ErrorKind::NotFound, text));
            }
            done => drop(done?),
        }
        self.keep(resolved).await?;
        self.verify(attributes, resolved).await
    }

    /// Names a commit that was fetched.
    async fn keep(&self, resolved: &Resolved) -> Result<(), GitError> {
        let name = resolved.local_ref();
        let args = ["update-ref", "--no-deref", &name, &resolved.checksum];
        self.git.run(&args).await.map(drop)
    }

    /// Fetches the history of a commit that was fetched alone.
    pub async fn complete(&self, resolved: &Resolved) -> Result<(), BuildError> {
        if !self.path.join("shallow").exists() {
            return Ok(());
        }
        self.fetch_all(resolved).await?;
        Ok(self.keep(resolved).await?)
    }

    /// Makes the repository anew in place of what is there.
    pub async fn make(&self, format: &str, index: &str) -> Result<(), BuildError> {
        let (reference, path) = (Arc::clone(&self.reference), self.path.clone());
        blocking(move || {
            reference.set_metadata(FORMAT, None).map_err(internal)?;
            remove_entries(&path).map_err(internal)
        })
        .await?;
        let object_format = format!("--object-format={format}");
        let made = self
            .git
            .run(&["init", "--quiet", "--bare", "--template=", &object_format])
            .await;
        made.map_err(|error| BuildError::from(error).context("failed to init repo"))?;
        let (reference, index) = (Arc::clone(&self.reference), index.to_owned());
        let format = format.to_owned();
        blocking(move || {
            reference.retain();
            reference.set_index(&index).map_err(internal)?;
            reference
                .set_metadata(FORMAT, Some(format.as_bytes()))
                .map_err(internal)
        })
        .await
    }

    async fn points_to(&self, resolved: &Resolved) -> Result<bool, GitError> {
        match self
            .git
            .run(&["rev-parse", "--verify", "--quiet", &resolved.local_ref()])
            .await
        {
            Ok(found) => Ok(found.trim_end() == resolved.checksum),
            Err(GitError::Failed { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn fetch(&self, attributes: &Attributes, resolved: &Resolved) -> Result<(), BuildError> {
        if self.points_to(resolved).await? {
            return Ok(());
        }
        // What a fetch left behind that was killed; this build holds the repository, so nobody is at work.
        let stale = self.path.join("shallow.lock");
        let _ = tokio::fs::remove_file(stale).await;
        let context = |error: GitError| {
            BuildError::from(error).context(format!("failed to fetch remote {}", attributes.shown_remote()))
        };
        let by_commit = attributes.options.fetch_by_commit;
        let mut failure = None;
        if !by_commit && !is_commit(&resolved.reference) {
            match self.fetch_object(&resolved.reference, resolved).await {
                Ok(()) if self.points_to(resolved).await? => return Ok(()),
                Ok(()) => {}
                Err(GitError::Failed { stderr, status }) => {
                    failure = Some(GitError::Failed { stderr, status })
                }
                Err(error) => return Err(context(error)),
            }
        }
        // The ref moved since it was resolved, or it is a commit. Not every server gives one away by its hash.
        match self.fetch_object(&resolved.checksum, resolved).await {
            Ok(()) => return Ok(()),
            Err(error @ GitError::Failed { .. }) if !by_commit && !is_broken_text(error.stderr()) => {
                failure.get_or_insert(error);
            }
            Err(error) => return Err(context(error)),
        }
        self.fetch_all(resolved).await.map_err(context)?;
        let commit = format!("{}^{{commit}}", resolved.checksum);
        if self.git.run(&["cat-file", "-e", &commit]).await.is_err() {
            return Err(match failure {
                Some(failure) => context(failure),
                None => moved(resolved),
            });
        }
        self.keep(resolved).await.map_err(context)
    }

    async fn fetch_object(&self, source: &str, resolved: &Resolved) -> Result<(), GitError> {
        let spec = format!("+{source}:{}", resolved.local_ref());
        self.git
            .run(&["fetch", "--depth=1", "--no-tags", "--", "origin", &spec])
            .await
            .map(drop)
    }

    /// Fetches everything that branches and tags lead to.
    async fn fetch_all(&self, resolved: &Resolved) -> Result<(), GitError> {
        let mut args = vec!["fetch", "--tags", "--force"];
        if self.path.join("shallow").exists() {
            args.push("--unshallow");
        }
        let spec = format!("+{}:{}", resolved.reference, resolved.local_ref());
        args.extend(["--", "origin", "+refs/heads/*:refs/remotes/origin/*"]);
        // Refs that are neither branches nor tags, such as those of pull requests.
        let mut with_ref = args.clone();
        with_ref.push(&spec);
        if is_commit(&resolved.reference) || self.git.run(&with_ref).await.is_err() {
            self.git.run(&args).await?;
        }
        Ok(())
    }

    /// Checks that what was fetched is what the remote, and the client, said it is.
    async fn verify(&self, attributes: &Attributes, resolved: &Resolved) -> Result<(), BuildError> {
        let peeled = format!("{}^{{commit}}", resolved.checksum);
        let commit = self
            .git
            .run(&["rev-parse", "--verify", &peeled])
            .await
            .map_err(|error| {
                BuildError::from(error).context(format!("{} is not a commit or tag", resolved.checksum))
            })?;
        let commit = commit.trim_end();
        if resolved.commit.as_ref().is_some_and(|said| said != commit) {
            return Err(BuildError::user(format!(
                "{} points to {commit}, not where the remote says",
                resolved.reference
            )));
        }
        attributes.check(&resolved.checksum, Some(commit))
    }
}

fn moved(resolved: &Resolved) -> BuildError {
    BuildError::new(
        ErrorKind::Unavailable,
        format!(
            "fetched ref {} does not match expected commit {} and commit can not be found in the repository",
            resolved.reference, resolved.checksum
        ),
    )
}

/// Whether a repository has to be made anew: another object format, or locks that nobody holds any more.
fn is_broken(error: &BuildError) -> bool {
    is_broken_text(&error.to_string())
}

fn is_broken_text(text: &str) -> bool {
    [
        "mismatched algorithms",
        ".lock': File exists",
        "not a git repository",
    ]
    .iter()
    .any(|sign| text.contains(sign))
}

fn take(store: &Store, index: &str, description: String) -> Result<MutableRef, BuildError> {
    for id in store.search_index(index).map_err(internal)? {
        // One that was just collected is not an error.
        if let Ok(reference) = store.get_mutable(&id) {
            return Ok(reference);
        }
    }
    let options = RefOptions {
        description,
        ..RefOptions::default()
    };
    store.create_mutable(None, options).map_err(internal)
}

/// Where a ref without parents has its files. Such a ref is one directory, whatever the snapshotter.
pub(super) fn tree_path(reference: &MutableRef) -> Result<PathBuf, BuildError> {
    let mounts = reference.mounts(false).map_err(internal)?;
    match mounts.as_slice() {
        [mount] if mount.fstype == "bind" => Ok(mount.source.clone()),
        _ => Err(BuildError::internal("a new ref is not one directory")),
    }
}

fn remove_entries(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn internal(error: impl std::error::Error + Send + Sync + 'static) -> BuildError {
    BuildError::from_source(ErrorKind::Internal, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sha(digit: char) -> String {
        digit.to_string().repeat(40)
    }

    #[test]
    fn finds_refs_as_git_checkout_does() {
        let listing = format!(
            "{}\trefs/heads/x\n{}\trefs/tags/x\n{}\trefs/tags/x^{{}}\n{}\trefs/pull/1/merge\n",
            sha('1'),
            sha('2'),
            sha('3'),
            sha('4')
        );
        let found =
            |name: &str| find(&listing, name).map(|found| (found.reference, found.checksum, found.commit));
        let is =
            |name: &str, at: char, commit: Option<char>| Some((name.to_owned(), sha(at), commit.map(sha)));
        assert_eq!(found("x"), is("refs/heads/x", '1', None));
        assert_eq!(found("heads/x"), is("refs/heads/x", '1', None));
        assert_eq!(found("refs/tags/x"), is("refs/tags/x", '2', Some('3')));
        // As for BuildKit, this name is one of a ref like any other.
        assert_eq!(found("tags/x"), is("refs/tags/x", '2', None));
        assert_eq!(found("refs/pull/1/merge"), is("refs/pull/1/merge", '4', None));
        assert_eq!(found("y"), None);
    }

    #[test]
    fn the_default_branch_is_where_head_points() {
        let listing = format!("ref: refs/heads/main\tHEAD\n{}\tHEAD\n", sha('1'));
        let found = default_branch(&listing).expect("is valid");
        assert_eq!(found, Some(Resolved::commit("refs/heads/main", &sha('1'))));
        assert!(default_branch(&format!("ref: refs/heads/-x\tHEAD\n{}\tHEAD\n", sha('1'))).is_err());
        assert_eq!(default_branch("").expect("is valid"), None);
    }
}

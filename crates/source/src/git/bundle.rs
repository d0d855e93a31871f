//! Bundles: repositories in one file, to fetch from and to make.
//!
//! What a bundle holds is unpacked into a repository of its own, which is found again by the bundle's digest: bundles do not
//! change. The commit that is taken from it is pinned by the client, and is checked like that of any remote.

use std::path::Path;

use build::error::{BuildError, ErrorKind};
use build::name::random_name;
use build::session::SessionGroup;
use cache::Store;
use futures_util::StreamExt as _;
use tokio::io::AsyncWriteExt as _;
use tokio_util::sync::CancellationToken;

use super::access::TempFile;
use super::attributes::is_commit;
use super::checkout::{Checkout, Scratch, object_format};
use super::command::Git;
use super::remote::{Locks, Repository};
use crate::image::Images;
use crate::image_blob::{self, BlobLocation};

/// Says in a repository's metadata that all of its bundle is in it.
const UNPACKED: &str = "git.bundle";
/// Name of the file that a bundle is checked out as.
const FILE: &str = "bundle";
/// The name of a commit in a bundle when it was asked for without one.
const DEFAULT_REF: &str = "refs/heads/main";

/// Reads where a bundle is; without `layout` its repository's name is that of the layout.
pub(super) fn locate(
    locator: &str,
    session: Option<String>,
    layout: String,
) -> Result<BlobLocation, BuildError> {
    let (scheme, body) = locator.split_once("://").ok_or_else(|| {
        BuildError::user(format!(
            "failed to parse git.bundle locator {locator:?}: missing scheme"
        ))
    })?;
    if ![image_blob::REGISTRY_SCHEME, image_blob::LAYOUT_SCHEME].contains(&scheme) {
        return Err(BuildError::user(format!(
            "git.bundle locator scheme {scheme:?} is not supported; expected {:?} or {:?}",
            image_blob::REGISTRY_SCHEME,
            image_blob::LAYOUT_SCHEME
        )));
    }
    let layout = if layout.is_empty() {
        layout_name(body).to_owned()
    } else {
        layout
    };
    BlobLocation::read(locator, session, layout)
        .map_err(|error| error.context(format!("failed to parse git.bundle locator {locator:?}")))
}

/// A reference without tag and digest.
fn layout_name(reference: &str) -> &str {
    let name = reference.split('@').next().unwrap_or_default();
    match name.rsplit_once(':') {
        Some((before, tag)) if !tag.contains('/') => before,
        _ => name,
    }
}

/// The name that a commit has in a bundle, made of the ref that was asked for. A short name is that of a branch: which it
/// is cannot be told from the name.
pub(super) fn target_ref(reference: &str) -> String {
    if reference.is_empty() || is_commit(reference) {
        return DEFAULT_REF.to_owned();
    }
    if reference.starts_with("refs/tags/") {
        return reference.to_owned();
    }
    let name = reference.strip_prefix("refs/").unwrap_or(reference);
    format!("refs/heads/{}", name.strip_prefix("heads/").unwrap_or(name))
}

/// Where bundles are unpacked, and how they are had.
pub(super) struct Bundles<'a> {
    /// Where repositories are kept.
    pub store: &'a Store,
    /// Their locks.
    pub locks: &'a Locks,
    /// Where a bundle is put meanwhile.
    pub dir: &'a Path,
    /// Where blobs come from.
    pub images: &'a Images,
    /// The clients.
    pub sessions: &'a SessionGroup,
    /// Fires when nobody needs them any more.
    pub cancel: &'a CancellationToken,
}

impl Bundles<'_> {
    /// Takes the repository that a bundle was unpacked into, or makes it.
    pub async fn open(&self, git: &Git, bundle: &BlobLocation) -> Result<Repository, BuildError> {
        let index = format!("git-bundle::{}", bundle.digest);
        let description = format!("git repo of bundle {bundle}");
        let repository = Repository::hold(self.store, self.locks, git, &index, description).await?;
        if repository.mark(UNPACKED)? {
            return Ok(repository);
        }
        let unpacked = async {
            let file = tokio::select! {
                file = Box::pin(self.download(bundle)) => file?,
                () = self.cancel.cancelled() => return Err(BuildError::canceled()),
            };
            let path = file
                .path()
                .to_str()
                .ok_or_else(|| BuildError::internal("the state directory's path is not UTF-8"))?;
            let git = repository.git.local();
            let listing = git.without_repository().run(&["ls-remote", "--", path]).await?;
            let first = listing.split('\t').next().unwrap_or_default();
            if !is_commit(first) {
                return Err(BuildError::user("it has no refs"));
            }
            let format = if first.len() == 64 { "sha256" } else { "sha1" };
            repository.make(format, &index).await?;
            git.run(&["fetch", "--no-tags", "--", path, "+refs/*:refs/*"])
                .await?;
            Ok(())
        };
        unpacked
            .await
            .map_err(|error| error.context(format!("failed to import git bundle {bundle}")))?;
        repository.set_mark(UNPACKED).await?;
        Ok(repository)
    }

    /// Brings a bundle to a file, which is verified.
    async fn download(&self, bundle: &BlobLocation) -> Result<TempFile, BuildError> {
        let mut bytes = bundle.open(self.images, self.sessions).await?;
        let path = self.dir.join(random_name());
        let mut out = tokio::fs::File::create_new(&path).await.map_err(internal)?;
        let file = TempFile::new(path);
        let mut digester = bundle.digest.verifier();
        while let Some(chunk) = bytes.next().await {
            let chunk = chunk?;
            digester.update(&chunk);
            out.write_all(&chunk).await.map_err(internal)?;
        }
        out.flush().await.map_err(internal)?;
        let actual = digester.finish();
        if actual != bundle.digest {
            let text = format!("expected checksum to match {}, got {actual}", bundle.digest);
            return Err(BuildError::new(ErrorKind::Unavailable, text));
        }
        Ok(file)
    }
}

impl Checkout<'_> {
    /// Makes a bundle of the commit and all that leads to it.
    pub(super) async fn bundle_into(&self, root: &Path) -> Result<(), BuildError> {
        self.repository.complete(self.resolved).await?;
        let scratch = Scratch::create(self.dir).await?;
        let git = self.repository.git.at(&scratch.0).without_origin();
        let format = object_format(self.resolved);
        git.run(&["init", "--quiet", "--bare", "--template=", format])
            .await?;
        // Without the list of commits whose parents are missing: a bundle with gaps cannot be fetched from.
        self.borrow_objects(&scratch.0).await?;
        let target = target_ref(&self.attributes.reference);
        let object = if target.starts_with("refs/tags/") {
            self.resolved.checksum.clone()
        } else {
            format!("{}^{{commit}}", self.resolved.checksum)
        };
        git.run(&["update-ref", &target, &object]).await?;
        let file = root.join(FILE);
        let file = file
            .to_str()
            .ok_or_else(|| BuildError::internal("the state directory's path is not UTF-8"))?;
        git.run(&["bundle", "create", "--quiet", file, &target]).await?;
        Ok(())
    }
}

fn internal(error: impl std::error::Error + Send + Sync + 'static) -> BuildError {
    BuildError::from_source(ErrorKind::Internal, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_have_names_in_bundles() {
        for (asked, name) in [
            ("", "refs/heads/main"),
            ("0123456789abcdef0123456789abcdef01234567", "refs/heads/main"),
            ("v1", "refs/heads/v1"),
            ("heads/a", "refs/heads/a"),
            ("refs/heads/a/b", "refs/heads/a/b"),
            ("refs/tags/v1", "refs/tags/v1"),
        ] {
            assert_eq!(target_ref(asked), name);
        }
    }

    #[test]
    fn a_layout_has_its_repositorys_name() {
        assert_eq!(layout_name("not/real@sha256:00"), "not/real");
        assert_eq!(layout_name("h:5000/a:t@sha256:00"), "h:5000/a");
        assert_eq!(layout_name("h:5000/a"), "h:5000/a");
    }
}

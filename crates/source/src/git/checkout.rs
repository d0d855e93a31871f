//! Making the files of a commit.
//!
//! Without `.git`, a scratch repository that borrows the objects of the remote's one has the index and the submodules'
//! repositories, so that nothing of one checkout shows in another.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use build::error::{BuildError, ErrorKind};
use build::name::random_name;
use cache::{ImmutableRef, MutableRef, RecordType, RefOptions, Store};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::attributes::{Attributes, is_commit};
use super::blocking;
use super::command::{Git, GitError};
use super::remote::{Repository, Resolved, tree_path};
use super::template;

/// Deepest directory whose entries are visited; Linux allows no longer path.
pub(super) const MAX_DEPTH: usize = 2048;

/// What a checkout is made of.
pub(super) struct Checkout<'a> {
    /// Where refs are kept.
    pub store: &'a Store,
    /// Where scratch repositories are put.
    pub dir: &'a Path,
    /// The remote's repository, with the commit in it.
    pub repository: &'a Repository,
    /// What is wanted.
    pub attributes: &'a Attributes,
    /// The commit or tag.
    pub resolved: &'a Resolved,
}

impl Checkout<'_> {
    /// Makes a ref of the files.
    pub async fn run(&self) -> Result<ImmutableRef, BuildError> {
        let remote = self.attributes.shown_remote();
        let options = RefOptions {
            description: format!("git snapshot for {remote}#{}", self.attributes.reference),
            record_type: RecordType::SourceGitCheckout,
            ..RefOptions::default()
        };
        let store = self.store.clone();
        let reference = blocking(move || store.create_mutable(None, options).map_err(internal)).await?;
        self.fill(&reference)
            .await
            .map_err(|error| error.context(format!("failed to checkout remote {remote}")))?;
        let index = self.attributes.snapshot_index(self.resolved);
        blocking(move || {
            let reference = reference.commit().map_err(internal)?;
            reference.set_index(&index).map_err(internal)?;
            Ok(reference)
        })
        .await
    }

    async fn fill(&self, reference: &MutableRef) -> Result<(), BuildError> {
        let root = tree_path(reference)?;
        let options = self.attributes.options;
        if options.as_bundle {
            self.bundle_into(&root).await?;
        } else if options.keep_git_dir && self.attributes.subdir.is_empty() {
            self.clone_into(&root).await?;
        } else {
            self.files_into(&root).await?;
        }
        if options.commit_time {
            let commit = format!("{}^{{commit}}", self.resolved.checksum);
            let text = self
                .repository
                .git
                .run(&["log", "-1", "--format=%ct", &commit])
                .await?;
            let seconds = text
                .trim()
                .parse()
                .map_err(|_| BuildError::user(format!("failed to parse commit timestamp {text:?}")))?;
            blocking(move || set_times(&root, seconds).map_err(internal)).await?;
        }
        Ok(())
    }

    /// Files alone.
    async fn files_into(&self, root: &Path) -> Result<(), BuildError> {
        let subdir = self.attributes.subdir.clone();
        let is_whole = subdir.is_empty();
        let inner = format!(".checkout-{}", random_name());
        let work_tree = if is_whole {
            root.to_owned()
        } else {
            root.join(&inner)
        };
        let scratch = Scratch::create(self.dir).await?;
        make_dir(&work_tree).await?;
        let format = object_format(self.resolved);
        let git = self.repository.git.at(&scratch.0).without_origin();
        git.run(&["init", "--quiet", "--bare", "--template=", format])
            .await?;
        self.borrow_objects(&scratch.0).await?;
        self.know_remote(&scratch.0).await?;
        let git = git.on(&work_tree);
        git.run(&["read-tree", "--reset", "-u", &self.resolved.checksum])
            .await?;
        if self.update_submodules(&git, &work_tree).await? {
            let work_tree = work_tree.clone();
            // They would point to repositories that are gone in a moment.
            blocking(move || remove_git_files(&work_tree).map_err(internal)).await?;
        }
        if !is_whole {
            let root = root.to_owned();
            blocking(move || raise(&root, &inner, &subdir)).await?;
        }
        Ok(())
    }

    /// Gives a scratch repository the objects of the remote's repository.
    pub(super) async fn borrow_objects(&self, scratch: &Path) -> Result<(), BuildError> {
        let objects = self.repository.path.join("objects");
        let text = objects
            .to_str()
            .ok_or_else(|| BuildError::internal("the state directory's path is not UTF-8"))?;
        tokio::fs::write(scratch.join("objects/info/alternates"), format!("{text}\n"))
            .await
            .map_err(internal)
    }

    /// Gives a scratch repository the remote, and the list of commits whose parents are not here.
    async fn know_remote(&self, scratch: &Path) -> Result<(), BuildError> {
        let shallow = self.repository.path.join("shallow");
        match tokio::fs::copy(&shallow, scratch.join("shallow")).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(internal(error)),
            _ => {}
        }
        // Submodules may be named relative to the remote.
        let url = self
            .attributes
            .plain_remote()
            .replace('\\', "\\\\")
            .replace('"', "\\\"");
        let config = scratch.join("config");
        let mut text = tokio::fs::read_to_string(&config).await.map_err(internal)?;
        text.push_str(&format!("[remote \"origin\"]\n\turl = \"{url}\"\n"));
        tokio::fs::write(&config, text).await.map_err(internal)
    }

    /// Files with a repository of their own in `.git`, as a clone of this one commit would be.
    async fn clone_into(&self, root: &Path) -> Result<(), BuildError> {
        let git_dir = root.join(".git");
        let template = template::create(self.dir).await?;
        let git = self.repository.git.at(&git_dir).without_origin().on(root);
        let git = git.with_template(&template.0);
        git.run(&["init", "--quiet", object_format(self.resolved)])
            .await?;
        let path = self.repository.path.to_str();
        let path = path.ok_or_else(|| BuildError::internal("the state directory's path is not UTF-8"))?;
        let source = format!("file://{path}");
        let local = self.resolved.local_ref();
        let spec = if is_commit(&self.resolved.reference) {
            local
        } else {
            format!("{local}:{}", self.resolved.reference)
        };
        // Over the protocol, not by linking files: what is not part of the commit cannot come along.
        let fetch = [
            "fetch",
            "--update-head-ok",
            "--depth=1",
            "--no-tags",
            "--",
            &source,
            &spec,
        ];
        git.local().run(&fetch).await?;
        git.run(&["checkout", "--quiet", "FETCH_HEAD"]).await?;
        git.run(&["remote", "add", "--", "origin", &self.attributes.plain_remote()])
            .await?;
        self.update_submodules(&git, root).await?;
        git.run(&[
            "remote",
            "set-url",
            "--",
            "origin",
            &self.attributes.shown_remote(),
        ])
        .await?;
        for leftover in ["FETCH_HEAD", "ORIG_HEAD"] {
            match tokio::fs::remove_file(git_dir.join(leftover)).await {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(internal(error)),
                _ => {}
            }
        }
        template::add_logs(&git_dir).await
    }

    /// Brings in submodules; returns whether there are any.
    async fn update_submodules(&self, git: &Git, work_tree: &Path) -> Result<bool, BuildError> {
        let is_listed = work_tree
            .join(".gitmodules")
            .symlink_metadata()
            .is_ok_and(|found| found.is_file());
        if self.attributes.options.skip_submodules || !is_listed {
            return Ok(false);
        }
        let updated = git
            .run(&["submodule", "update", "--init", "--recursive", "--depth=1"])
            .await;
        updated.map_err(|error: GitError| {
            BuildError::from(error).context(format!(
                "failed to update submodules for {}",
                self.attributes.shown_remote()
            ))
        })?;
        Ok(true)
    }
}

pub(super) fn object_format(resolved: &Resolved) -> &'static str {
    if resolved.checksum.len() == 64 {
        "--object-format=sha256"
    } else {
        "--object-format=sha1"
    }
}

async fn make_dir(path: &Path) -> Result<(), BuildError> {
    match tokio::fs::create_dir(path).await {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(internal(error)),
        _ => Ok(()),
    }
}

/// A directory, such as a repository's, that is removed when it is dropped.
pub(super) struct Scratch(pub PathBuf);

impl Scratch {
    pub(super) async fn create(dir: &Path) -> Result<Self, BuildError> {
        let this = Self(dir.join(random_name()));
        tokio::fs::create_dir(&this.0).await.map_err(internal)?;
        Ok(this)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now goes with the directory at the next start.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn open_dir(at: impl AsFd, name: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

fn open_root(path: &Path) -> Result<OwnedFd, Errno> {
    open_dir(rustix::fs::CWD, path)
}

/// Moves what is in `subdir` of the checkout `inner` up to `root` and removes the rest of it.
fn raise(root: &Path, inner: &str, subdir: &str) -> Result<(), BuildError> {
    let root_dir = open_root(root).map_err(internal)?;
    let mut dir = open_dir(&root_dir, inner).map_err(internal)?;
    for part in subdir.split('/') {
        let invalid = |error: String| BuildError::user(format!("invalid subdir {subdir}: {error}"));
        dir = open_dir(&dir, part).map_err(|error| match error {
            Errno::NOTDIR | Errno::LOOP => {
                invalid(format!("git subpath {subdir:?} contains non-directory {part:?}"))
            }
            error => invalid(format!("failed to lstat {part:?}: {error}")),
        })?;
    }
    for entry in Dir::read_from(&dir).map_err(internal)? {
        let entry = entry.map_err(internal)?;
        let name = entry.file_name();
        if !matches!(name.to_bytes(), b"." | b"..") {
            rustix::fs::renameat(&dir, name, &root_dir, name).map_err(internal)?;
        }
    }
    std::fs::remove_dir_all(root.join(inner)).map_err(internal)
}

/// Calls `visit` with every entry but the root, those of a directory before it.
fn walk(
    dir: &OwnedFd,
    depth: usize,
    visit: &mut dyn FnMut(&OwnedFd, &std::ffi::CStr, FileType) -> Result<(), Errno>,
) -> Result<(), Errno> {
    if depth > MAX_DEPTH {
        return Err(Errno::NAMETOOLONG);
    }
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                FileType::from_raw_mode(rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode)
            }
            kind => kind,
        };
        if kind == FileType::Directory {
            walk(&open_dir(dir, name)?, depth + 1, visit)?;
        }
        visit(dir, name, kind)?;
    }
    Ok(())
}

/// Removes the files named `.git` that tie submodules to their repositories. Git lets no repository bring one itself.
fn remove_git_files(root: &Path) -> Result<(), Errno> {
    walk(&open_root(root)?, 0, &mut |dir, name, kind| {
        if name.to_bytes() == b".git" && kind == FileType::RegularFile {
            rustix::fs::unlinkat(dir, name, AtFlags::empty())?;
        }
        Ok(())
    })
}

/// Gives everything the time of the commit.
fn set_times(root: &Path, seconds: i64) -> Result<(), Errno> {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    let root = open_root(root)?;
    walk(&root, 0, &mut |dir, name, _| {
        rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
    })?;
    rustix::fs::futimens(File::from(root), &times)
}

pub(super) fn internal(error: impl std::error::Error + Send + Sync + 'static) -> BuildError {
    BuildError::from_source(ErrorKind::Internal, error)
}

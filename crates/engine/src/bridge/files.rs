//! Reading single files of a result, for frontends.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use layer::tree::{GoStat, Root, TreeError};
use oci::Digest;
use snapshot::MountedTree;
use tokio_util::sync::CancellationToken;

use crate::bridge::{Bridge, FileRange};
use crate::error::{BuildError, ErrorKind};
use crate::op::ResultRef;
use crate::progress::VertexProgress;
use crate::session::FileStat;
use crate::unlazy::FetchContext;

/// Most bytes that one read returns: an answer has to fit into a message.
pub const MAX_READ_BYTES: usize = 16 << 20;

/// A tree that can be read: that of a result, or one that somebody else mounted. Cheap to clone.
#[derive(Clone, Debug)]
pub struct FileReader {
    /// Keeps the result from being collected, and its mount.
    held: Option<(Option<ResultRef>, Arc<MountedTree>)>,
    /// `None` is the empty tree.
    root: Option<Arc<Root>>,
}

impl FileReader {
    /// Reads below a directory that somebody else holds.
    pub fn of_root(root: Root) -> Self {
        Self {
            held: None,
            root: Some(Arc::new(root)),
        }
    }

    /// Mounts a result for reading, fetching its bytes if need be.
    ///
    /// # Errors
    /// When its bytes cannot be had, or cannot be mounted.
    pub async fn of_ref(bridge: &Bridge, result: &ResultRef) -> Result<Self, BuildError> {
        let Some(reference) = result.get() else {
            return Ok(Self {
                held: None,
                root: None,
            });
        };
        if reference.is_lazy() {
            let id = Digest::sha256(reference.id().as_str().as_bytes());
            let progress = VertexProgress::new(id, "unpack".to_owned(), Vec::new(), None);
            let cancel = CancellationToken::new();
            let _cancel_on_drop = cancel.clone().drop_guard();
            let ctx = FetchContext::new(progress, bridge.sessions(), cancel);
            bridge.engine().services.unlazy.unpack(&ctx, reference).await?;
        }
        let result = result.clone();
        blocking(move || {
            let Some(reference) = result.get() else {
                return Ok(Self {
                    held: None,
                    root: None,
                });
            };
            let mounts = reference.mounts().map_err(unmountable)?;
            let mut reader = Self::of_mounts(&mounts)?;
            if let Some((held, _)) = &mut reader.held {
                *held = Some(result);
            }
            Ok(reader)
        })
        .await
    }

    /// Mounts a snapshot for reading; nothing to mount is the empty tree. Somebody else keeps it from being collected.
    /// Blocking.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub(super) fn of_mounts(mounts: &[snapshot::Mount]) -> Result<Self, BuildError> {
        let mount = match mounts {
            [] => {
                return Ok(Self {
                    held: None,
                    root: None,
                });
            }
            [mount] => mount,
            _ => {
                return Err(unmountable(format_args!(
                    "{} mounts instead of one",
                    mounts.len()
                )));
            }
        };
        let tree = mount.open().map_err(unmountable)?;
        let root = Root::new(&tree).map_err(unmountable)?;
        Ok(Self {
            held: Some((None, Arc::new(tree))),
            root: Some(Arc::new(root)),
        })
    }

    /// Reads below a directory of the host. Blocking.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(super) fn of_directory(path: &Path) -> Result<Self, BuildError> {
        Root::open(path).map(Self::of_root).map_err(unmountable)
    }

    /// Reads a regular file; at most [`MAX_READ_BYTES`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or [`ErrorKind::User`] for what cannot be read.
    pub async fn read_file(&self, path: &str, range: FileRange) -> Result<Bytes, BuildError> {
        let length = if range.length == 0 { u64::MAX } else { range.length };
        let range = (range != FileRange::default()).then_some((range.offset, length));
        self.look(path, "open", move |root, path| {
            root.read_file(path, range, MAX_READ_BYTES).map(Bytes::from)
        })
        .await
    }

    /// Lists a directory in the order of names; `include` is a pattern of names, empty for all.
    ///
    /// # Errors
    /// As [`Self::read_file`].
    pub async fn read_dir(&self, path: &str, include: &str) -> Result<Vec<FileStat>, BuildError> {
        if self.root.is_none() && matches!(path, "" | "/" | ".") {
            return Ok(Vec::new());
        }
        let include = (!include.is_empty()).then(|| include.to_owned());
        let listed = self
            .look(path, "open", move |root, path| {
                root.read_dir(path, include.as_deref())
            })
            .await?;
        Ok(listed.into_iter().map(file_stat).collect())
    }

    /// Returns the attributes of what a path leads to.
    ///
    /// # Errors
    /// As [`Self::read_file`].
    pub async fn stat_file(&self, path: &str) -> Result<FileStat, BuildError> {
        self.look(path, "lstat", |root, path| root.stat_file(path))
            .await
            .map(file_stat)
    }

    async fn look<T: Send + 'static>(
        &self,
        path: &str,
        action: &str,
        look: impl FnOnce(&Root, &Path) -> Result<T, TreeError> + Send + 'static,
    ) -> Result<T, BuildError> {
        if path.contains('\0') {
            return Err(BuildError::user(format!("{action} {path:?}: invalid argument")));
        }
        let Some(root) = self.root.clone() else {
            let text = format!("{action} {path}: no such file or directory");
            return Err(BuildError::new(ErrorKind::NotFound, text));
        };
        let (path, held) = (PathBuf::from(path), self.held.clone());
        blocking(move || {
            let found = look(&root, &path);
            drop(held);
            found.map_err(|error| {
                let kind = if error.is_not_found() {
                    ErrorKind::NotFound
                } else {
                    ErrorKind::User
                };
                let text = format!(
                    "{} {}: {}",
                    error.action,
                    error.path.display(),
                    system_text(&error.source)
                );
                BuildError::new(kind, text)
            })
        })
        .await
    }
}

fn unmountable(error: impl std::fmt::Display) -> BuildError {
    BuildError::internal(format!("mount a result: {error}"))
}

/// The system's text without Rust's number behind it, in lower case as Go has it.
fn system_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

fn file_stat(stat: GoStat) -> FileStat {
    FileStat {
        path: stat.path,
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        size_bytes: stat.size,
        mod_time_ns: stat.mod_time,
        linkname: stat.linkname,
        dev_major: stat.devmajor,
        dev_minor: stat.devminor,
        xattrs: stat
            .xattrs
            .into_iter()
            .map(|(key, value)| (key, Bytes::from(value)))
            .collect(),
        ..FileStat::default()
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| BuildError::internal(format!("reading files: {error}")))?
}

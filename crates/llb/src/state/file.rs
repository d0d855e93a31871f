//! Changing files without running a command: several actions form one operation.

use std::sync::Arc;

use bytes::Bytes;
use oci::path;

use super::Constraints;
use super::State;
use super::vertex::{Kind, Output, Vertex};
use crate::pb::{
    ChownOpt, FileActionCopy, FileActionMkDir, FileActionMkFile, FileActionRm, FileActionSymlink,
    NamedUserOpt, UserOpt, file_action, user_opt,
};

/// A user or a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// By number.
    Id(u32),
    /// By name, looked up in the filesystem changed.
    Name(String),
}

impl Owner {
    fn parse(text: &str) -> Self {
        match text.parse::<i32>() {
            _ if text == "root" => Self::Id(0),
            Ok(id) => Self::Id(id.cast_unsigned()),
            Err(_) => Self::Name(text.into()),
        }
    }

    fn marshal(&self, base: i64) -> UserOpt {
        let user = match self {
            Self::Id(id) => user_opt::User::ById(*id),
            Self::Name(name) if name.is_empty() => user_opt::User::ById(0),
            Self::Name(name) => user_opt::User::ByName(NamedUserOpt {
                name: name.clone(),
                input: base,
            }),
        };
        UserOpt { user: Some(user) }
    }
}

/// Who a file is to belong to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chown {
    /// Owner.
    pub user: Option<Owner>,
    /// Group.
    pub group: Option<Owner>,
}

impl Chown {
    /// Parses `user[:group]`, each a name or a number.
    pub fn parse(text: &str) -> Self {
        let (user, group) = text
            .split_once(':')
            .map_or((text, None), |(user, group)| (user, Some(group)));
        Self {
            user: Some(Owner::parse(user)),
            group: group.map(Owner::parse),
        }
    }

    /// Owner and group by number.
    pub const fn ids(uid: u32, gid: u32) -> Self {
        Self {
            user: Some(Owner::Id(uid)),
            group: Some(Owner::Id(gid)),
        }
    }

    fn marshal(&self, base: i64) -> ChownOpt {
        let marshal = |owner: &Option<Owner>| owner.as_ref().map(|owner| owner.marshal(base));
        ChownOpt {
            user: marshal(&self.user),
            group: marshal(&self.group),
        }
    }
}

/// Options of [`FileActions::mkdir`].
#[derive(Clone, Debug, Default)]
pub struct MkdirOptions {
    /// Makes missing parents, too.
    pub make_parents: bool,
    /// Owner.
    pub chown: Option<Chown>,
    /// Time of the directory, in nanoseconds since the Unix epoch.
    pub created_ns: Option<i64>,
}

/// Options of [`FileActions::mkfile`].
#[derive(Clone, Debug, Default)]
pub struct MkfileOptions {
    /// Owner.
    pub chown: Option<Chown>,
    /// Time of the file, in nanoseconds since the Unix epoch.
    pub created_ns: Option<i64>,
}

/// Options of [`FileActions::symlink`].
#[derive(Clone, Debug, Default)]
pub struct SymlinkOptions {
    /// Owner.
    pub chown: Option<Chown>,
    /// Time of the link, in nanoseconds since the Unix epoch.
    pub created_ns: Option<i64>,
}

/// Options of [`FileActions::rm`].
#[derive(Clone, Copy, Debug, Default)]
pub struct RmOptions {
    /// Does not fail when there is nothing.
    pub allow_not_found: bool,
    /// Expands wildcards.
    pub allow_wildcard: bool,
}

/// Options of [`FileActions::copy`].
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a field of the protocol")]
pub struct CopyOptions {
    /// Permission bits; unset keeps those of the source.
    pub mode: Option<i32>,
    /// Permissions in symbolic form; goes before `mode`.
    pub mode_str: String,
    /// Follows symlinks in the source path.
    pub follow_symlinks: bool,
    /// Copies what is in a directory instead of the directory.
    pub copy_dir_contents_only: bool,
    /// Copies only what matches.
    pub include_patterns: Vec<String>,
    /// Copies nothing that matches.
    pub exclude_patterns: Vec<String>,
    /// Paths that must be there.
    pub required_paths: Vec<String>,
    /// Unpacks a tar archive.
    pub attempt_unpack: bool,
    /// Makes missing parents of the destination.
    pub create_dest_path: bool,
    /// Expands wildcards in the source path.
    pub allow_wildcard: bool,
    /// Does not fail when a wildcard matches nothing.
    pub allow_empty_wildcard: bool,
    /// Owner.
    pub chown: Option<Chown>,
    /// Time of the files, in nanoseconds since the Unix epoch.
    pub created_ns: Option<i64>,
    /// Replaces what is of another kind at the destination.
    pub always_replace_existing_dest_paths: bool,
}

/// Where [`FileActions::copy`] copies from.
#[derive(Clone, Debug)]
pub enum FileSource {
    /// A filesystem.
    State(State),
    /// What other actions make of a filesystem; see [`FileActions::on`].
    Actions(BoundFileActions),
}

impl From<&State> for FileSource {
    fn from(state: &State) -> Self {
        Self::State(state.clone())
    }
}

/// Actions together with the filesystem they change.
#[derive(Clone, Debug)]
pub struct BoundFileActions(Arc<BoundActions>);

impl From<&BoundFileActions> for FileSource {
    fn from(actions: &BoundFileActions) -> Self {
        Self::Actions(actions.clone())
    }
}

/// Actions on files, done one after the other.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct FileActions(Vec<Action>);

#[derive(Clone, Debug)]
pub(super) enum Action {
    Mkdir {
        path: String,
        mode: u32,
        options: MkdirOptions,
    },
    Mkfile {
        path: String,
        mode: u32,
        data: Bytes,
        options: MkfileOptions,
    },
    Symlink {
        oldpath: String,
        newpath: String,
        options: SymlinkOptions,
    },
    Rm {
        path: String,
        options: RmOptions,
    },
    Copy {
        from: FileSource,
        src: String,
        dest: String,
        options: Box<CopyOptions>,
    },
}

impl FileActions {
    /// Returns no actions.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells whether there are no actions.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes a directory; `mode` are its permission bits.
    pub fn mkdir(mut self, path: impl Into<String>, mode: u32, options: MkdirOptions) -> Self {
        self.0.push(Action::Mkdir {
            path: path.into(),
            mode,
            options,
        });
        self
    }

    /// Makes a file; `mode` are its permission bits.
    pub fn mkfile(
        mut self,
        path: impl Into<String>,
        mode: u32,
        data: impl Into<Bytes>,
        options: MkfileOptions,
    ) -> Self {
        self.0.push(Action::Mkfile {
            path: path.into(),
            mode,
            data: data.into(),
            options,
        });
        self
    }

    /// Makes a symlink at `newpath` that points to `oldpath`; both are taken as they are.
    pub fn symlink(
        mut self,
        oldpath: impl Into<String>,
        newpath: impl Into<String>,
        options: SymlinkOptions,
    ) -> Self {
        self.0.push(Action::Symlink {
            oldpath: oldpath.into(),
            newpath: newpath.into(),
            options,
        });
        self
    }

    /// Removes a file or a tree.
    pub fn rm(mut self, path: impl Into<String>, options: RmOptions) -> Self {
        self.0.push(Action::Rm {
            path: path.into(),
            options,
        });
        self
    }

    /// Copies a file or a tree.
    pub fn copy(
        mut self,
        from: impl Into<FileSource>,
        src: impl Into<String>,
        dest: impl Into<String>,
        options: CopyOptions,
    ) -> Self {
        self.0.push(Action::Copy {
            from: from.into(),
            src: src.into(),
            dest: dest.into(),
            options: options.into(),
        });
        self
    }

    /// Binds the actions to a filesystem, so that another action of the same operation can copy from the result.
    pub fn on(self, state: &State) -> BoundFileActions {
        BoundFileActions(Arc::new(BoundActions {
            state: state.clone(),
            actions: self.0,
        }))
    }
}

impl State {
    /// Changes files.
    #[must_use]
    pub fn file(&self, actions: FileActions, constraints: &Constraints) -> Self {
        let kind = Kind::File(actions.on(self).0);
        let vertex = Arc::new(Vertex {
            kind,
            constraints: constraints.clone(),
        });
        self.with_output(Some(Output {
            vertex,
            index: 0,
            platform: None,
        }))
    }
}

#[derive(Debug)]
pub(super) struct BoundActions {
    pub state: State,
    pub actions: Vec<Action>,
}

impl BoundActions {
    /// Returns the inputs in the order in which the Go client visits them: from the last action to the first.
    pub fn outputs(&self) -> Vec<Output> {
        let mut out: Vec<Output> = self.state.output.iter().cloned().collect();
        for action in self.actions.iter().rev() {
            match action {
                Action::Copy {
                    from: FileSource::State(state),
                    ..
                } => out.extend(state.output.clone()),
                Action::Copy {
                    from: FileSource::Actions(actions),
                    ..
                } => out.extend(actions.0.outputs()),
                _ => {}
            }
        }
        out
    }

    /// Moves the inputs out, for dropping.
    pub fn take_outputs(&mut self, into: &mut Vec<Arc<Vertex>>) {
        into.extend(self.state.output.take().map(|output| output.vertex));
        for action in self.actions.drain(..) {
            match action {
                Action::Copy {
                    from: FileSource::State(mut state),
                    ..
                } => {
                    into.extend(state.output.take().map(|output| output.vertex));
                }
                Action::Copy {
                    from: FileSource::Actions(mut actions),
                    ..
                } => {
                    if let Some(actions) = Arc::get_mut(&mut actions.0) {
                        actions.take_outputs(into);
                    }
                }
                _ => {}
            }
        }
    }
}

impl FileSource {
    pub(super) fn bound(&self) -> Option<&Arc<BoundActions>> {
        match self {
            Self::State(_) => None,
            Self::Actions(actions) => Some(&actions.0),
        }
    }

    fn dir(&self) -> &str {
        match self {
            Self::State(state) => state.get_dir(),
            Self::Actions(actions) => actions.0.state.get_dir(),
        }
    }
}

impl Action {
    /// Encodes the action; `base` is the input that users are looked up in, `dir` what relative paths are relative to.
    pub fn marshal(&self, base: i64, dir: &str) -> file_action::Action {
        let owner = |chown: &Option<Chown>| chown.as_ref().map(|chown| chown.marshal(base));
        let time = |created: Option<i64>| created.unwrap_or(-1);
        match self {
            Self::Mkdir { path, mode, options } => file_action::Action::Mkdir(FileActionMkDir {
                path: absolute(dir, path, false),
                mode: permissions(*mode),
                make_parents: options.make_parents,
                owner: owner(&options.chown),
                timestamp: time(options.created_ns),
            }),
            Self::Mkfile {
                path,
                mode,
                data,
                options,
            } => file_action::Action::Mkfile(FileActionMkFile {
                path: absolute(dir, path, false),
                mode: permissions(*mode),
                data: data.clone(),
                owner: owner(&options.chown),
                timestamp: time(options.created_ns),
            }),
            Self::Symlink {
                oldpath,
                newpath,
                options,
            } => file_action::Action::Symlink(FileActionSymlink {
                oldpath: oldpath.clone(),
                newpath: newpath.clone(),
                owner: owner(&options.chown),
                timestamp: time(options.created_ns),
            }),
            Self::Rm { path, options } => file_action::Action::Rm(FileActionRm {
                path: absolute(dir, path, false),
                allow_not_found: options.allow_not_found,
                allow_wildcard: options.allow_wildcard,
            }),
            Self::Copy {
                from,
                src,
                dest,
                options,
            } => file_action::Action::Copy(FileActionCopy {
                src: absolute_source(from.dir(), src),
                dest: absolute(dir, dest, true),
                owner: owner(&options.chown),
                mode: match (options.mode_str.is_empty(), options.mode) {
                    (false, _) => 0,
                    (true, mode) => mode.unwrap_or(-1),
                },
                follow_symlink: options.follow_symlinks,
                dir_copy_contents: options.copy_dir_contents_only,
                attempt_unpack_docker_compatibility: options.attempt_unpack,
                create_dest_path: options.create_dest_path,
                allow_wildcard: options.allow_wildcard,
                allow_empty_wildcard: options.allow_empty_wildcard,
                timestamp: time(options.created_ns),
                include_patterns: options.include_patterns.clone(),
                exclude_patterns: options.exclude_patterns.clone(),
                always_replace_existing_dest_paths: options.always_replace_existing_dest_paths,
                mode_str: options.mode_str.clone(),
                required_paths: options.required_paths.clone(),
            }),
        }
    }
}

fn permissions(mode: u32) -> i32 {
    i32::try_from(mode & 0o777).unwrap_or(0)
}

fn absolute_source(dir: &str, src: &str) -> String {
    let cleaned = path::clean(src);
    if cleaned.starts_with('/') {
        cleaned
    } else {
        path::join(&[dir, &cleaned])
    }
}

/// Makes a path absolute and clean; with `keep_slash` a final `/` or `/.` stays, because it says "into this directory".
fn absolute(dir: &str, text: &str, keep_slash: bool) -> String {
    let mut out = path::clean(text);
    if !out.starts_with('/') {
        out = path::join(&["/", dir, &out]);
    }
    if keep_slash {
        if text.ends_with('/') {
            if !out.ends_with('/') {
                out.push('/');
            }
        } else if text.ends_with("/.") {
            if out != "/" {
                out.push('/');
            }
            out.push('.');
        }
    }
    out
}

//! Instructions and what they say, with nothing expanded yet.

mod duration;
mod error;
mod expose;
mod flags;
mod healthcheck;
mod mount;
mod parse;
mod run;

use std::sync::Arc;

use oci::Healthcheck;

pub(crate) use error::{InstructionError, LocatedInstructionError};
pub(crate) use expose::{PortError, split_port};
pub(crate) use mount::{Mount, MountKind, Sharing, parse_mount};
pub(crate) use parse::{Parsed, parse, parse_trigger};
pub(crate) use run::{Network, Run};

use crate::position::Range;

/// One instruction within a stage.
#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    /// The source, one logical line.
    pub(crate) code: String,
    /// The name as written.
    pub(crate) name: String,
    /// Its lines.
    pub(crate) location: Vec<Range>,
    /// Comments directly in front of it.
    pub(crate) comments: Vec<String>,
    pub(crate) kind: Kind,
}

/// What an instruction says.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Env(Vec<KeyValue>),
    Maintainer(String),
    Label(Vec<KeyValue>),
    Add(Copy),
    Copy(Copy),
    OnBuild(String),
    Workdir(String),
    Run(Run),
    Cmd(CommandLine),
    Entrypoint(CommandLine),
    Healthcheck(Healthcheck),
    Expose(Vec<String>),
    User(String),
    Volume(Vec<String>),
    StopSignal(String),
    Arg(Vec<Argument>),
    Shell(Vec<String>),
}

/// `name=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyValue {
    pub(crate) key: String,
    pub(crate) value: String,
    /// Written with a space instead of `=`.
    pub(crate) legacy: bool,
}

/// `name` or `name=default`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Argument {
    pub(crate) key: String,
    pub(crate) value: Option<String>,
    /// What a comment in front says about it.
    pub(crate) doc_comment: String,
}

/// ADD or COPY.
#[derive(Clone, Debug, Default)]
pub(crate) struct Copy {
    pub(crate) sources: Vec<String>,
    pub(crate) contents: Vec<InlineSource>,
    pub(crate) dest: String,
    /// COPY only: a stage, an image or a named context; empty for the build context.
    pub(crate) from: String,
    pub(crate) chown: String,
    pub(crate) chmod: String,
    pub(crate) link: bool,
    pub(crate) excludes: Vec<String>,
    /// COPY only.
    pub(crate) parents: bool,
    /// ADD only.
    pub(crate) keep_git_dir: Option<bool>,
    /// ADD only.
    pub(crate) checksum: String,
    /// ADD only.
    pub(crate) unpack: Option<bool>,
}

/// A file whose content is in the Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InlineSource {
    pub(crate) path: String,
    pub(crate) content: String,
    pub(crate) expand: bool,
}

/// A command that may need a shell.
#[derive(Clone, Debug, Default)]
pub(crate) struct CommandLine {
    pub(crate) args: Vec<String>,
    pub(crate) files: Vec<InlineFile>,
    /// Shell form: the shell has to be put in front.
    pub(crate) prepend_shell: bool,
}

/// A heredoc of RUN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InlineFile {
    pub(crate) name: String,
    pub(crate) content: String,
    pub(crate) chomp: bool,
}

/// FROM and what follows it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stage {
    /// Name, lower case; may be empty.
    pub(crate) name: String,
    /// Another stage or an image, unexpanded.
    pub(crate) base_name: String,
    /// `--platform`, unexpanded.
    pub(crate) platform: String,
    /// FROM as written.
    pub(crate) keyword: String,
    pub(crate) doc_comment: String,
    pub(crate) code: String,
    pub(crate) location: Vec<Range>,
    pub(crate) comments: Vec<String>,
    pub(crate) instructions: Vec<Arc<Instruction>>,
}

/// An ARG in front of the first FROM.
#[derive(Clone, Debug)]
pub(crate) struct MetaArgs {
    pub(crate) args: Vec<Argument>,
    pub(crate) location: Vec<Range>,
}

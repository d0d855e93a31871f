//! Why a conversion stops.

use llb::GraphError;
use llb::MarshalError;
use oci::pattern::PatternError;
use oci::{DigestError, PlatformError, ReferenceError};

use crate::chmod::ChmodError;
use crate::git_ref::GitRefError;
use crate::instruction::{InstructionError, LocatedInstructionError, PortError};
use crate::lint::LintOptionError;
use crate::options::OptionsError;
use crate::os_path::OsPathError;
use crate::parser::LocatedSyntaxError;
use crate::position::Range;
use crate::request::AnswerError;
use crate::text::quote;
use crate::word::WordError;

/// Why a conversion cannot go on.
#[derive(Clone, Debug)]
pub(crate) enum Stop {
    /// Answers are missing.
    Pending,
    /// It failed.
    Failed(Box<ConvertError>),
}

impl<E: Into<ConvertError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(Box::new(error.into()))
    }
}

impl Stop {
    /// Puts a text in front of the error.
    pub(crate) fn context(self, context: impl Into<String>) -> Self {
        match self {
            Self::Pending => Self::Pending,
            Self::Failed(error) => Self::Failed(Box::new(error.context(context))),
        }
    }

    /// Says where the error is.
    pub(crate) fn at(self, ranges: &[Range]) -> Self {
        match self {
            Self::Pending => Self::Pending,
            Self::Failed(error) => Self::Failed(Box::new(error.at(ranges))),
        }
    }
}

/// Shorthand of this crate's fallible steps.
pub(crate) type Progress<T> = Result<T, Stop>;

/// Why a conversion failed. The texts are BuildKit's.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum ConvertError {
    #[error("the Dockerfile cannot be empty")]
    Empty,
    #[error("dockerfile contains no stages to build")]
    NoStages,
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error("failed to parse check options: {0}")]
    Check(#[from] LintOptionError),
    #[error("{error}")]
    Syntax {
        #[source]
        error: LocatedSyntaxError,
    },
    #[error("{0}")]
    Located(#[source] LocatedInstructionError),
    #[error(transparent)]
    Instruction(#[from] InstructionError),
    #[error(transparent)]
    Word(#[from] WordError),
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    #[error(transparent)]
    Platform(#[from] PlatformError),
    #[error(transparent)]
    Pattern(#[from] PatternError),
    #[error(transparent)]
    Digest(#[from] DigestError),
    #[error(transparent)]
    OsPath(#[from] OsPathError),
    #[error(transparent)]
    Chmod(#[from] ChmodError),
    #[error(transparent)]
    Git(#[from] GitRefError),
    #[error(transparent)]
    Port(#[from] PortError),
    #[error(transparent)]
    Marshal(#[from] MarshalError),
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error("{0}")]
    Json(String),
    #[error("{}", .0.message)]
    Answer(AnswerError),
    #[error("the answer does not fit the need for {0}")]
    WrongAnswer(String),
    #[error("lint violation found for rules: {0}")]
    Lint(String),
    #[error("base name ({0}) should not be blank")]
    BlankBase(String),
    #[error("empty platform value from expression {0}")]
    EmptyPlatform(String),
    #[error("target stage {} could not be found", quote(.0))]
    NoTarget(String),
    #[error("invalid stage index {0}")]
    StageIndex(i64),
    #[error(
        "variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround"
    )]
    FromVariable,
    #[error("circular dependency detected on stage: {0}")]
    Circular(String),
    #[error("onbuild trigger should be a single expression")]
    OnBuild,
    #[error(
        "cannot copy from stage {}, it needs to be defined before current stage {}",
        quote(.from),
        quote(.stage)
    )]
    CopyOrder { from: String, stage: String },
    #[error(
        "cannot mount from stage {} to {}, stage needs to be defined before current command",
        quote(.from),
        quote(.target)
    )]
    MountOrder { from: String, target: String },
    #[error("invalid mount target {}", quote(.0))]
    MountTarget(String),
    #[error("one of source, target required")]
    SecretTarget,
    #[error("ssh does not support source")]
    SshSource,
    #[error("device feature is only supported in Dockerfile frontend 1.14.0-labs or later")]
    Device,
    #[error("parsing produced an invalid run command: {0}")]
    HeredocCommand(String),
    #[error("VOLUME specified can not be an empty string")]
    EmptyVolume,
    #[error("invalid signal: {0}")]
    Signal(String),
    #[error("checksum can't be specified for COPY")]
    CopyChecksum,
    #[error("checksum can't be specified for multiple sources")]
    ManyChecksum,
    #[error("checksum requires HTTP(S) or Git sources")]
    ChecksumSource,
    #[error("source can't be a git ref for COPY")]
    CopyGit,
    #[error("source can't be a URL for COPY")]
    CopyUrl,
    #[error("inconsistent keep-git-dir configuration")]
    KeepGitDir,
    #[error("checksum mismatch {} != {}", quote(.0), quote(.1))]
    Checksum(String, String),
    #[error("invalid context specifier {input} for {name}")]
    ContextForm { input: String, name: String },
    #[error("unsupported context source {kind} for {name}")]
    ContextKind { kind: String, name: String },
    #[error("invalid git context {0}")]
    GitContext(String),
    #[error("invalid input {input} for {name}")]
    Input { input: String, name: String },
    #[error("oci-layout reference {} has no digest", quote(.0))]
    LayoutDigest(String),
    #[error(
        "context recursion limit exceeded; this may indicate a cycle in the provided source policies: {0}"
    )]
    ContextRecursion(String),
    #[error("could not parse ref: {0}")]
    Redirect(String),
    #[error("ref mutated by policy to non-image: docker-image://{reference} -> {updated}")]
    NonImage { reference: String, updated: String },
    #[error("{0}")]
    GitObject(String),
    #[error("invalid SOURCE_DATE_EPOCH: {0}")]
    Epoch(String),
    #[error("{0}")]
    EpochStage(&'static str),
    #[error("SOURCE_DATE_EPOCH stage does not meet source-only requirements: unsupported {0} instruction")]
    EpochInstruction(String),
    #[error("scanner {0} does not have cmd")]
    Scanner(String),
    #[error("unsupported frontend capability {0}")]
    Capability(String),
    #[error("unsupported request {0}")]
    Subrequest(String),
    #[error("invalid nil input definition to definition op")]
    NilInput,
    /// The first part is what the ecosystem says, the second tells where to look.
    #[error(
        "string field contains invalid UTF-8: {file} line {line} holds bytes that are not UTF-8, save the file as UTF-8"
    )]
    Utf8 { file: String, line: u32 },
    #[error("the definition is too large")]
    TooLarge,
    #[error("the report of what was found is too large: it comes to more than {0} MiB")]
    ReportTooLarge(usize),
    #[error("{context}: {error}")]
    Context {
        context: String,
        #[source]
        error: Box<ConvertError>,
    },
    #[error("{error} (did you mean {found}?)")]
    Suggested {
        #[source]
        error: Box<ConvertError>,
        found: String,
    },
    #[error("{error}")]
    At {
        #[source]
        error: Box<ConvertError>,
        /// Innermost first.
        places: Vec<Vec<Range>>,
        /// Forgets the places inside.
        replace: bool,
    },
}

impl From<LocatedSyntaxError> for ConvertError {
    fn from(error: LocatedSyntaxError) -> Self {
        Self::Syntax { error }
    }
}

impl From<LocatedInstructionError> for ConvertError {
    fn from(error: LocatedInstructionError) -> Self {
        Self::Located(error)
    }
}

impl ConvertError {
    /// Puts a text in front.
    pub(crate) fn context(self, context: impl Into<String>) -> Self {
        Self::Context {
            context: context.into(),
            error: Box::new(self),
        }
    }

    /// Adds a place; an error inside one may have more of them.
    pub(crate) fn at(self, ranges: &[Range]) -> Self {
        self.at_all(vec![ranges.to_vec()])
    }

    /// Adds several places.
    pub(crate) fn at_all(self, places: Vec<Vec<Range>>) -> Self {
        Self::At {
            error: Box::new(self),
            places,
            replace: false,
        }
    }

    /// Sets the place and forgets those inside.
    pub(crate) fn only_at(self, ranges: &[Range]) -> Self {
        Self::At {
            error: Box::new(self),
            places: vec![ranges.to_vec()],
            replace: true,
        }
    }

    /// Adds what was probably meant.
    pub(crate) fn suggest(self, found: Option<String>) -> Self {
        match found {
            Some(found) => Self::Suggested {
                error: Box::new(self),
                found,
            },
            None => self,
        }
    }

    /// Lists the places, innermost first.
    pub(crate) fn locations(&self) -> Vec<Vec<Range>> {
        match self {
            Self::Syntax { error } => vec![error.ranges.clone()],
            Self::Located(error) => vec![error.ranges.clone()],
            Self::Context { error, .. } | Self::Suggested { error, .. } => error.locations(),
            Self::At {
                error,
                places,
                replace,
            } => {
                let mut locations = if *replace { Vec::new() } else { error.locations() };
                locations.extend(places.iter().cloned());
                locations
            }
            _ => Vec::new(),
        }
    }

    /// Returns the token of the answer that caused it.
    pub(crate) fn cause(&self) -> Option<u64> {
        match self {
            Self::Answer(error) => Some(error.token),
            Self::Context { error, .. } | Self::Suggested { error, .. } | Self::At { error, .. } => {
                error.cause()
            }
            _ => None,
        }
    }
}

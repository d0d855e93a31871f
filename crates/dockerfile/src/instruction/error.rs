//! Why instructions are refused.

use crate::position::Range;
use crate::text::quote;
use crate::word::WordError;

/// Why an instruction is refused. The texts are BuildKit's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InstructionError {
    #[error("unknown instruction: {0}")]
    Unknown(String),
    #[error("{0} requires at least one argument")]
    AtLeastOneArgument(&'static str),
    #[error("{0} requires exactly one argument")]
    ExactlyOneArgument(&'static str),
    #[error(
        "{0} requires at least two arguments, but only one was provided. Destination could not be determined"
    )]
    NoDestination(&'static str),
    #[error("{0} cannot accept a heredoc as a destination")]
    HeredocDestination(&'static str),
    #[error("{0} names can not be blank")]
    BlankName(&'static str),
    #[error("{0} requires the arguments to be in JSON form")]
    NotJson(&'static str),
    #[error("FROM requires either one or three arguments")]
    FromArguments,
    #[error("invalid name for build stage: {}, name can't start with a number or contain symbols", quote(.0))]
    StageName(String),
    #[error("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed")]
    OnBuildChain,
    #[error("{0} isn't allowed as an ONBUILD trigger")]
    OnBuildTrigger(String),
    #[error("HEALTHCHECK NONE takes no arguments")]
    HealthcheckNone,
    #[error("Missing command after HEALTHCHECK CMD")]
    HealthcheckCommand,
    #[error("Unknown type {} in HEALTHCHECK (try CMD)", quote(.0))]
    HealthcheckKind(String),
    #[error("Interval {} cannot be less than 1ms", quote(.0))]
    ShortInterval(&'static str),
    #[error("--retries cannot be negative ({0})")]
    NegativeRetries(i64),
    #[error("{0}")]
    Number(String),
    #[error("VOLUME specified can not be an empty string")]
    EmptyVolume,
    #[error("arg should start with -- : {0}")]
    FlagStart(String),
    #[error("unknown flag: {0}")]
    UnknownFlag(String),
    #[error("duplicate flag specified: {0}")]
    DuplicateFlag(String),
    #[error("missing a value on flag: {0}")]
    FlagValue(String),
    #[error("expecting boolean value for flag {flag}, not: {value}")]
    FlagBool { flag: String, value: String },
    #[error("failed to parse csv {what}: {error}")]
    Csv {
        what: &'static str,
        #[source]
        error: crate::csv::CsvError,
    },
    #[error("'{0}' doesn't support variable expansion, define alias stage instead")]
    MountVariable(String),
    #[error("invalid field '{0}' must be a key=value pair")]
    MountField(String),
    #[error("unexpected key '{key}' for mount type '{kind}'")]
    MountKeyForKind { key: String, kind: &'static str },
    #[error("unexpected key '{key}' in '{field}'")]
    MountKey { key: String, field: String },
    #[error("invalid value for {key}: {value}")]
    MountValue { key: String, value: String },
    #[error("invalid value {value} for {what}")]
    MountNumber { what: &'static str, value: String },
    #[error("unsupported mount type {}", quote(.0))]
    MountType(String),
    #[error("unsupported sharing value {}", quote(.0))]
    MountSharing(String),
    #[error("{what} not allowed for {} type mounts", quote(.kind))]
    MountOwner { what: &'static str, kind: &'static str },
    #[error("{0}")]
    SecretMount(&'static str),
    #[error("invalid cache sharing set for {0} mount")]
    SharingForKind(&'static str),
    #[error("invalid network mode {}", quote(.0))]
    Network(String),
    #[error("security {} is not valid", quote(.0))]
    Security(String),
    #[error("device name already set to {0}")]
    DeviceName(String),
    #[error(transparent)]
    Word(#[from] WordError),
    #[error("no build stage in current context")]
    NoStage,
    #[error("{0} is not a command type")]
    NotACommand(&'static str),
    #[error("{error} (did you mean {found}?)")]
    Suggested {
        #[source]
        error: Box<InstructionError>,
        found: String,
    },
}

impl InstructionError {
    /// Adds what was probably meant.
    pub(super) fn suggest(self, found: Option<String>) -> Self {
        match found {
            Some(found) => Self::Suggested {
                error: Box::new(self),
                found,
            },
            None => self,
        }
    }
}

/// An [`InstructionError`] and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocatedInstructionError {
    pub(crate) error: InstructionError,
    /// The line named in the text, if it names one.
    pub(crate) line: Option<u32>,
    pub(crate) ranges: Vec<Range>,
}

/// Words a located error as BuildKit does.
impl std::fmt::Display for LocatedInstructionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            Some(line) => write!(f, "dockerfile parse error on line {line}: {}", self.error),
            None => write!(f, "{}", self.error),
        }
    }
}

impl std::error::Error for LocatedInstructionError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

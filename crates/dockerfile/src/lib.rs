//! The built-in Dockerfile frontend: turns a Dockerfile and its options into LLB definitions and image configurations.
//!
//! Purpose: do what BuildKit's `dockerfile.v0` does, judged by the vertex digests, the texts of errors and warnings and
//! the bytes of the image configuration.
//!
//! Non-goals: no IO of any kind. What a conversion cannot know (files, image configurations) it asks for by returning
//! [`Step::Needs`]; the caller answers and calls [`Conversion::step`] again.
//!
//! Invariants: a conversion is a pure function of its [`Request`] and the answers; the same needs are never asked twice;
//! hostile input costs time and memory in proportion to its size and to what it defines, and never panics.
//!
//! Start at [`Conversion`].
#![forbid(unsafe_code)]

mod ask;
mod chmod;
mod context;
mod conversion;
mod convert;
mod convert_llb;
mod csv;
mod env;
mod error;
mod frontend;
mod git_ref;
mod image;
mod instruction;
mod lint;
mod options;
mod os_path;
mod outline;
mod parser;
mod position;
mod print_source;
mod raw;
mod request;
mod sbom;
mod signal;
mod size;
mod subrequest;
mod suggest;
mod table;
mod text;
mod word;

/// The version of the Dockerfile syntax that is spoken, as `docker/dockerfile` counts its releases.
pub const SYNTAX_VERSION: &str = "1.26.0";

pub use conversion::{ContextLookup, Conversion};
pub use position::{Position, Range};
pub use request::{
    Answer, AnswerError, AttestationOutcome, BuildOutcome, CacheImport, ContextOutcome, ContextStep, Failure,
    FailureKind, FilesNeed, Forward, ImageAnswer, ImageConfigNeed, LayoutStore, MetadataOutcome, Need,
    Outcome, PlatformOutcome, Request, SourceAnswer, SourceMetadataNeed, SourceRange, Step, Warning,
};

//! What a build yields: refs by key, metadata, attestations.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use oci::Digest;

use crate::error::BuildError;

/// Statement kinds of an attestation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttestationKind {
    /// One in-toto statement.
    #[default]
    InToto,
    /// A directory of statements.
    Bundle,
}

/// What an in-toto statement is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttestationSubject {
    /// The image that is exported; with a name if the statement wants one.
    Image(String),
    /// Named digests.
    Raw {
        /// The subject's name.
        name: String,
        /// Its digests.
        digests: Vec<Digest>,
    },
}

/// A statement that is in no tree.
#[derive(Clone, Debug)]
pub enum StatementContent {
    /// It is there.
    Ready(Bytes),
    /// It is written when it is read, because it tells of what exporters made until then.
    Late(Arc<dyn LateStatement>),
}

/// Writes a statement when it is read.
#[async_trait]
pub trait LateStatement: Send + Sync + fmt::Debug {
    /// Writes the statement as JSON.
    ///
    /// # Errors
    /// Those of what it tells of.
    async fn write(&self) -> Result<Bytes, BuildError>;
}

impl StatementContent {
    /// Returns the statement as JSON.
    ///
    /// # Errors
    /// Those of [`LateStatement::write`].
    pub async fn read(&self) -> Result<Bytes, BuildError> {
        match self {
            Self::Ready(bytes) => Ok(bytes.clone()),
            Self::Late(late) => late.write().await,
        }
    }
}

/// A statement about a result. `R` is how results are held: the engine's `BuildRef` in a build,
/// [`ResultRef`](crate::op::ResultRef) at exporters.
#[derive(Clone, Debug)]
pub struct Attestation<R> {
    /// One statement or a directory.
    pub kind: AttestationKind,
    /// The attester's own metadata.
    pub metadata: BTreeMap<String, Bytes>,
    /// The tree that contains the statement.
    pub reference: Option<R>,
    /// Where in the tree.
    pub path: String,
    /// The statement itself when it is not in a tree. Only the engine's own statements have one.
    pub content: Option<StatementContent>,
    /// The predicate's type.
    pub predicate_type: String,
    /// What it is about.
    pub subjects: Vec<AttestationSubject>,
}

impl<R> Attestation<R> {
    /// Changes how the tree is held.
    pub fn map<T>(self, reference: Option<T>) -> Attestation<T> {
        Attestation {
            kind: self.kind,
            metadata: self.metadata,
            reference,
            path: self.path,
            content: self.content,
            predicate_type: self.predicate_type,
            subjects: self.subjects,
        }
    }
}

/// A build's result: one ref or several by key, with metadata. `R` as for [`Attestation`].
///
/// A result may be without any ref (a frontend's subrequest answers in metadata alone). A present key without ref is
/// an empty tree.
#[derive(Clone, Debug)]
pub struct BuildResult<R> {
    /// The only ref.
    pub single: Option<R>,
    /// Refs by key, usually the platform.
    pub refs: BTreeMap<String, Option<R>>,
    /// Metadata such as `containerimage.config`.
    pub metadata: BTreeMap<String, Bytes>,
    /// Attestations by the key of the ref they are about.
    pub attestations: BTreeMap<String, Vec<Attestation<R>>>,
}

impl<R> Default for BuildResult<R> {
    fn default() -> Self {
        Self {
            single: None,
            refs: BTreeMap::new(),
            metadata: BTreeMap::new(),
            attestations: BTreeMap::new(),
        }
    }
}

impl<R> BuildResult<R> {
    /// Returns all refs, those of attestations last.
    pub fn all_refs(&self) -> impl Iterator<Item = &R> {
        let attested = self
            .attestations
            .values()
            .flatten()
            .filter_map(|att| att.reference.as_ref());
        self.single
            .iter()
            .chain(self.refs.values().flatten())
            .chain(attested)
    }

    /// Returns the ref of a key; the only ref serves every key.
    pub fn find(&self, key: &str) -> Option<&R> {
        match self.refs.get(key) {
            Some(reference) => reference.as_ref(),
            None if self.refs.len() == 1 => self.refs.values().next().and_then(Option::as_ref),
            None => self.single.as_ref(),
        }
    }
}

//! The plain values that describe refs.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use oci::{Descriptor, Digest};
use serde::{Deserialize, Serialize};
use snapshot::SnapshotKey;

/// Identifies a ref: 1 to 128 letters, digits, `-`, `_` or `.`, not beginning with a dot. New ones have 25 random letters
/// and digits, as BuildKit's.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RefId(SnapshotKey);

impl RefId {
    /// Returns the text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// Returns the ref that a snapshot would have been made for.
    pub(crate) fn of_snapshot(key: &SnapshotKey) -> Option<Self> {
        key.as_str().parse().ok()
    }

    /// Returns the key or the name of the snapshot that is made for the ref.
    pub(crate) fn snapshot_key(&self) -> &SnapshotKey {
        &self.0
    }
}

/// A text that cannot be a ref's id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid ref id {text:?}")]
pub struct RefIdError {
    /// What was offered.
    pub text: String,
}

impl FromStr for RefId {
    type Err = RefIdError;

    fn from_str(text: &str) -> Result<Self, RefIdError> {
        let invalid = || RefIdError {
            text: text.to_owned(),
        };
        let key = SnapshotKey::new(text).map_err(|_| invalid())?;
        if text.len() > 128 {
            return Err(invalid());
        }
        Ok(Self(key))
    }
}

impl TryFrom<String> for RefId {
    type Error = RefIdError;

    fn try_from(text: String) -> Result<Self, RefIdError> {
        text.parse()
    }
}

impl From<RefId> for String {
    fn from(id: RefId) -> Self {
        id.as_str().to_owned()
    }
}

impl fmt::Display for RefId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for RefId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// What a ref is for; BuildKit's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RecordType {
    /// A build step's result.
    #[default]
    #[serde(rename = "regular")]
    Regular,
    /// The daemon's own.
    #[serde(rename = "internal")]
    Internal,
    /// A frontend image.
    #[serde(rename = "frontend")]
    Frontend,
    /// Files sent by a client.
    #[serde(rename = "source.local")]
    SourceLocal,
    /// A git checkout.
    #[serde(rename = "source.git.checkout")]
    SourceGitCheckout,
    /// A cache mount.
    #[serde(rename = "exec.cachemount")]
    ExecCacheMount,
}

impl RecordType {
    /// Returns BuildKit's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Regular => "regular",
            Self::Internal => "internal",
            Self::Frontend => "frontend",
            Self::SourceLocal => "source.local",
            Self::SourceGitCheckout => "source.git.checkout",
            Self::ExecCacheMount => "exec.cachemount",
        }
    }
}

impl fmt::Display for RecordType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Says where the bytes of a lazy blob can be fetched. Opaque to this crate; the engine reads it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Provider {
    /// What kind of place: `registry`, `local`, `s3`, ….
    pub scheme: String,
    /// Where in it, for example a normalized image reference.
    pub locator: String,
}

/// A layer of a blob chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerBlob {
    /// The compressed blob.
    pub descriptor: Descriptor,
    /// Digest of the uncompressed layer.
    pub diff_id: Digest,
    /// Where to fetch the blob; may be empty when the blob is in the content store.
    pub providers: Vec<Provider>,
    /// What to show for this layer; empty takes the description of the options.
    pub description: String,
    /// When the layer was made, if known.
    pub created_at: Option<SystemTime>,
}

/// How to make a ref.
#[derive(Clone, Debug, Default)]
pub struct RefOptions {
    /// What to show in disk usage.
    pub description: String,
    /// What the ref is for.
    pub record_type: RecordType,
    /// Keeps the ref after its last handle goes, until garbage collection takes it. Without it a ref that nobody could find
    /// again (it has no blobs, no index, no children) is removed at once. Recording a solver result for a ref sets this.
    pub retain: bool,
    /// When the content was made; now if absent.
    pub created_at: Option<SystemTime>,
}

/// What a ref stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Parents {
    /// One layer on its parent, or on nothing.
    Layer {
        /// The ref below.
        parent: Option<RefId>,
    },
    /// Several trees on top of each other, first lowest.
    Merge {
        /// The refs merged.
        inputs: Vec<RefId>,
    },
    /// What turns `lower` into `upper`. Boxed, as layers, which are many, have one ref.
    Diff {
        /// The tree to compare with.
        lower: Option<Box<RefId>>,
        /// The tree whose changes are taken.
        upper: Option<Box<RefId>>,
    },
}

impl Parents {
    /// Lists the refs this one holds, in order.
    pub fn ids(&self) -> Vec<&RefId> {
        match self {
            Self::Layer { parent } => parent.iter().collect(),
            Self::Merge { inputs } => inputs.iter().collect(),
            Self::Diff { lower, upper } => lower.iter().chain(upper).map(|id| &**id).collect(),
        }
    }
}

/// A blob that has to be put into the content store before a ref can be unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingBlob {
    /// The ref whose layer it is.
    pub ref_id: RefId,
    /// What to fetch.
    pub descriptor: Descriptor,
    /// Digest of the uncompressed layer.
    pub diff_id: Digest,
    /// Where to fetch it, best first.
    pub providers: Vec<Provider>,
    /// What to show while fetching.
    pub description: String,
}

/// A picture of a ref's metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefStat {
    /// Its id.
    pub id: RefId,
    /// What it stands on.
    pub parents: Parents,
    /// Whether it is writable.
    pub mutable: bool,
    /// Digest of its uncompressed layer, once known.
    pub diff_id: Option<Digest>,
    /// Identity of the stack of uncompressed layers, once known.
    pub chain_id: Option<Digest>,
    /// The layer's blobs; the first is the one it came as.
    pub blobs: Vec<Descriptor>,
    /// Where blobs can be fetched.
    pub providers: BTreeMap<Digest, Vec<Provider>>,
    /// What to show.
    pub description: String,
    /// What it is for.
    pub record_type: RecordType,
    /// When it was made.
    pub created_at: SystemTime,
    /// When a handle was last taken or dropped.
    pub last_used_at: Option<SystemTime>,
    /// How often it was used.
    pub usage_count: u64,
    /// Size on disk when measured.
    pub size_bytes: Option<u64>,
    /// Whether it outlives its last handle.
    pub retain: bool,
}

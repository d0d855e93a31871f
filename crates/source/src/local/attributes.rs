//! What a `local://` vertex asks for.

use build::error::BuildError;
use build::op::VertexSpec;
use build::session::SessionId;
use oci::pattern::Matcher;
use serde::Serialize;

/// Which files count as changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Differ {
    /// Those that are not surely the same.
    #[default]
    Surely,
    /// Those whose attributes differ: what a client gets that asks for nothing more.
    Attributes,
    /// All.
    Always,
}

/// The vertex's identifier and attributes, read.
#[derive(Clone, Debug, Default)]
pub(super) struct Attributes {
    /// The directory's name at the client.
    pub name: String,
    /// The session to ask first.
    pub session: Option<SessionId>,
    /// Only what matches one of these.
    pub include_patterns: Vec<String>,
    /// Nothing that matches one of these.
    pub exclude_patterns: Vec<String>,
    /// Paths together with the targets of the links on the way.
    pub follow_paths: Vec<String>,
    /// Tells trees of one name and client apart.
    pub shared_key_hint: String,
    /// Which files are transferred again.
    pub differ: Differ,
    /// Transfer the listing, and content only of what matches the exceptions.
    pub metadata_only: bool,
    /// See `metadata_only`.
    pub metadata_exceptions: Vec<String>,
}

impl Attributes {
    pub fn read(vertex: &VertexSpec) -> Result<Self, BuildError> {
        let Some(llb::pb::op::Op::Source(source)) = &vertex.op.op else {
            return Err(BuildError::internal("not a source op"));
        };
        let name = source
            .identifier
            .strip_prefix("local://")
            .unwrap_or(&source.identifier);
        let mut this = Self {
            name: name.to_owned(),
            ..Self::default()
        };
        for (key, value) in &source.attrs {
            match key.as_str() {
                "local.session" => match value.split_once(':') {
                    Some((prefix, id)) => {
                        this.name = format!("{prefix}-{name}");
                        this.session = Some(SessionId(id.to_owned()));
                    }
                    None if value.is_empty() => {}
                    None => this.session = Some(SessionId(value.clone())),
                },
                "local.includepattern" => this.include_patterns = list(key, value)?,
                "local.excludepatterns" => this.exclude_patterns = list(key, value)?,
                "local.followpaths" => this.follow_paths = list(key, value)?,
                "local.sharedkeyhint" => this.shared_key_hint.clone_from(value),
                "local.differ" => {
                    this.differ = match value.as_str() {
                        "" => Differ::Surely,
                        "none" => Differ::Always,
                        "metadata" => Differ::Attributes,
                        unknown => {
                            return Err(BuildError::user(format!("invalid value for {key} {unknown:?}")));
                        }
                    };
                }
                "local.metadatatransfer" => this.metadata_only = boolean(value)?,
                "local.metadatatransferexclude" => this.metadata_exceptions = list(key, value)?,
                _ => {}
            }
        }
        Ok(this)
    }

    /// The name under which the tree is kept.
    pub fn shared_key(&self, client: &str) -> String {
        let suffix = if self.metadata_only { ":metadata" } else { "" };
        format!(
            "local.sharedKey:{}:{}:{client}{suffix}",
            self.name, self.shared_key_hint
        )
    }

    /// The source's key: it names a session, so it holds within one build only.
    pub fn key(&self, session: &SessionId) -> Result<String, BuildError> {
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Document<'a> {
            #[serde(rename = "SessionID")]
            session: &'a str,
            include_patterns: Option<&'a [String]>,
            exclude_patterns: Option<&'a [String]>,
            follow_paths: Option<&'a [String]>,
            #[serde(skip_serializing_if = "is_false")]
            metadata_transfer: bool,
            #[serde(skip_serializing_if = "<[String]>::is_empty")]
            metadata_exceptions: &'a [String],
        }
        // Go writes a list that was never set as null.
        fn set(list: &[String]) -> Option<&[String]> {
            (!list.is_empty()).then_some(list)
        }
        let document = Document {
            session: &session.0,
            include_patterns: set(&self.include_patterns),
            exclude_patterns: set(&self.exclude_patterns),
            follow_paths: set(&self.follow_paths),
            metadata_transfer: self.metadata_only,
            metadata_exceptions: &self.metadata_exceptions,
        };
        let bytes = oci::json::to_vec(&document)
            .map_err(|error| BuildError::internal(format!("local key: {error}")))?;
        Ok(format!("session:{}:{}", self.name, oci::Digest::sha256(&bytes)))
    }

    /// Which files' content is transferred; `None`: all.
    pub fn content_filter(&self) -> Result<Option<Matcher>, BuildError> {
        if !self.metadata_only {
            return Ok(None);
        }
        Matcher::new(&self.metadata_exceptions)
            .map(Some)
            .map_err(|error| BuildError::user(format!("local.metadatatransferexclude: {error}")))
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

fn list(key: &str, value: &str) -> Result<Vec<String>, BuildError> {
    serde_json::from_str::<Option<Vec<String>>>(value)
        .map(Option::unwrap_or_default)
        .map_err(|error| BuildError::user(format!("invalid value for {key}: {error}")))
}

fn boolean(value: &str) -> Result<bool, BuildError> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(BuildError::user(format!(
            "invalid value for local.metadatatransfer {value:?}"
        ))),
    }
}

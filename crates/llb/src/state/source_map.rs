//! Source files that operations come from, so that errors can show the line.

use std::sync::Arc;

use bytes::Bytes;

use super::State;
use crate::pb::{Definition, Range};

/// A source file, such as a Dockerfile.
#[derive(Debug, Default)]
pub struct SourceMap {
    /// Where the file was read from.
    pub state: Option<State>,
    /// Where the file was read from, marshaled already; goes before `state`.
    pub definition: Option<Definition>,
    /// Its name there.
    pub filename: String,
    /// Its language, in the spelling of GitHub's linguist.
    pub language: String,
    /// Its content.
    pub data: Bytes,
}

impl SourceMap {
    /// Makes a source map to be shared by the operations of one file.
    pub fn new(
        state: Option<State>,
        filename: impl Into<String>,
        language: impl Into<String>,
        data: impl Into<Bytes>,
    ) -> Arc<Self> {
        let (filename, language, data) = (filename.into(), language.into(), data.into());
        Arc::new(Self {
            state,
            definition: None,
            filename,
            language,
            data,
        })
    }

    pub(super) fn same(&self, other: &Self) -> bool {
        let last = |map: &Self| {
            map.definition
                .as_ref()
                .and_then(|definition| definition.def.last().cloned())
        };
        let same_origin = match (last(self), last(other)) {
            (Some(one), Some(two)) => one == two,
            _ => true,
        };
        self.filename == other.filename
            && self.language == other.language
            && self.data == other.data
            && same_origin
    }
}

/// Some lines of a source file.
#[derive(Clone, Debug)]
pub struct SourceLocation {
    /// The file.
    pub map: Arc<SourceMap>,
    /// The lines.
    pub ranges: Vec<Range>,
}

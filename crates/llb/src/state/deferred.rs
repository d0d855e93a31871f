//! Filesystems that are decided on only after they were used.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use super::vertex::{Kind, Output, Vertex};
use super::{Constraints, State};

/// What a state made by [`State::deferred`] will stand for.
#[derive(Clone, Debug)]
pub struct Deferred(Arc<OnceLock<Option<Output>>>);

impl Deferred {
    /// Decides on the filesystem. Only the first decision counts; without one the filesystem is empty.
    pub fn resolve(&self, state: &State) {
        let _ = self.0.set(state.output.clone());
    }
}

impl State {
    /// Returns a state for a filesystem that is known only later, but before anything that uses it is marshaled: for
    /// instance local files of which only those are sent that turn out to be used.
    pub fn deferred() -> (Self, Deferred) {
        let slot = Arc::new(OnceLock::new());
        let kind = Kind::Deferred(Arc::clone(&slot));
        let vertex = Arc::new(Vertex {
            kind,
            constraints: Constraints::new(),
        });
        let state = Self::new(Some(Output {
            vertex,
            index: 0,
            platform: None,
        }));
        (state, Deferred(slot))
    }

    /// Returns identifier and attributes, if the state is nothing but a source.
    pub fn as_source(&self) -> Option<(String, BTreeMap<String, String>)> {
        match &self.output.as_ref()?.resolved()?.vertex.kind {
            Kind::Source {
                identifier, attrs, ..
            } => Some((identifier.clone(), attrs.clone())),
            _ => None,
        }
    }
}

//! The graph behind states: vertices that are shared, and marshaled only at the end.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use oci::{Digest, Platform};

use super::exec::ExecVertex;
use super::file::BoundActions;
use super::imported::Imported;
use super::{Constraints, MarshalError};

/// One output of a vertex.
#[derive(Clone, Debug)]
pub(super) struct Output {
    pub vertex: Arc<Vertex>,
    pub index: i64,
    /// Platform that the operation was explicitly given.
    pub platform: Option<Platform>,
}

#[derive(Debug)]
pub(super) struct Vertex {
    pub kind: Kind,
    pub constraints: Constraints,
}

#[derive(Debug)]
pub(super) enum Kind {
    Source {
        identifier: String,
        attrs: BTreeMap<String, String>,
        error: Option<MarshalError>,
    },
    Exec(Box<ExecVertex>),
    File(Arc<BoundActions>),
    Merge(Vec<Output>),
    Diff {
        lower: Option<Output>,
        upper: Option<Output>,
    },
    Passthrough {
        id: String,
        inputs: Vec<Output>,
        outputs: Vec<i64>,
    },
    Build {
        source: Output,
        attrs: BTreeMap<String, String>,
    },
    Imported {
        set: Arc<Imported>,
        digest: Digest,
    },
    /// Another output, known by the time of marshaling; none stands for the empty filesystem.
    Deferred(Arc<OnceLock<Option<Output>>>),
}

impl Output {
    /// Returns the output that a deferred one came to stand for, any other as it is.
    pub fn resolved(&self) -> Option<Self> {
        let mut output = self.clone();
        while let Kind::Deferred(slot) = &output.vertex.kind {
            output = slot.get().cloned().flatten()?;
        }
        Some(output)
    }
}

impl Vertex {
    /// Returns the inputs in the order in which the Go client visits them.
    pub fn inputs(&self) -> Vec<Output> {
        match &self.kind {
            Kind::Source { .. } | Kind::Deferred(_) => Vec::new(),
            Kind::Exec(exec) => exec
                .mounts
                .iter()
                .filter_map(|mount| mount.source.clone())
                .collect(),
            Kind::File(actions) => actions.outputs(),
            Kind::Merge(inputs) | Kind::Passthrough { inputs, .. } => inputs.clone(),
            Kind::Diff { lower, upper } => lower.iter().chain(upper).cloned().collect(),
            Kind::Build { source, .. } => vec![source.clone()],
            Kind::Imported { set, digest } => Imported::inputs(set, digest),
        }
    }

    fn take_inputs(&mut self, into: &mut Vec<Arc<Self>>) {
        match &mut self.kind {
            Kind::Source { .. } | Kind::Imported { .. } => {}
            Kind::Exec(exec) => {
                into.extend(
                    exec.mounts
                        .iter_mut()
                        .filter_map(|mount| mount.source.take())
                        .map(|output| output.vertex),
                );
            }
            Kind::File(actions) => {
                if let Some(actions) = Arc::get_mut(actions) {
                    actions.take_outputs(into);
                }
            }
            Kind::Merge(inputs) | Kind::Passthrough { inputs, .. } => {
                into.extend(inputs.drain(..).map(|output| output.vertex));
            }
            Kind::Diff { lower, upper } => {
                into.extend(
                    [lower.take(), upper.take()]
                        .into_iter()
                        .flatten()
                        .map(|output| output.vertex),
                );
            }
            Kind::Build { source, .. } => into.push(Arc::clone(&source.vertex)),
            Kind::Deferred(slot) => {
                let output = Arc::get_mut(slot).and_then(OnceLock::take).flatten();
                into.extend(output.map(|output| output.vertex));
            }
        }
    }
}

/// Drops a chain of vertices step by step: a recursive drop would overflow the stack on a long one.
impl Drop for Vertex {
    fn drop(&mut self) {
        let mut pending = Vec::new();
        self.take_inputs(&mut pending);
        while let Some(vertex) = pending.pop() {
            if let Some(mut vertex) = Arc::into_inner(vertex) {
                vertex.take_inputs(&mut pending);
            }
        }
    }
}

//! Operations that make one filesystem of several without running anything.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::vertex::{Kind, Output, Vertex};
use super::{Constraints, State};
use crate::{attr, caps};

/// Lays filesystems on top of each other, the first at the bottom. Empty ones have no effect.
pub fn merge<'a>(states: impl IntoIterator<Item = &'a State>, constraints: &Constraints) -> State {
    let states: Vec<&State> = states.into_iter().filter(|state| !state.is_scratch()).collect();
    let Some((first, rest)) = states.split_first() else {
        return State::scratch();
    };
    if rest.is_empty() {
        return State::clone(first);
    }
    let mut constraints = constraints.clone();
    constraints.add_cap(caps::MERGE_OP);
    let kind = Kind::Merge(states.iter().filter_map(|state| state.output.clone()).collect());
    first.with_output(Some(plain_output(kind, constraints)))
}

/// Keeps what `upper` has beyond `lower`.
pub fn diff(lower: &State, upper: &State, constraints: &Constraints) -> State {
    if lower.is_scratch() {
        return if upper.is_scratch() {
            State::scratch()
        } else {
            upper.clone()
        };
    }
    let mut constraints = constraints.clone();
    constraints.add_cap(caps::DIFF_OP);
    let kind = Kind::Diff {
        lower: lower.output.clone(),
        upper: upper.output.clone(),
    };
    lower.with_output(Some(plain_output(kind, constraints)))
}

fn plain_output(kind: Kind, constraints: Constraints) -> Output {
    Output {
        vertex: Arc::new(Vertex { kind, constraints }),
        index: 0,
        platform: None,
    }
}

impl State {
    /// Makes the state depend on others without using their files.
    #[must_use]
    pub fn requires<'a>(&self, id: &str, others: impl IntoIterator<Item = &'a Self>) -> Self {
        let others: Vec<&Self> = others.into_iter().collect();
        if others.is_empty() {
            return self.clone();
        }
        let outputs = if self.is_scratch() { Vec::new() } else { vec![0] };
        let inputs = self
            .output
            .iter()
            .chain(others.iter().filter_map(|other| other.output.as_ref()))
            .cloned();
        let mut constraints = Constraints::new();
        constraints.add_cap(caps::PASSTHROUGH_OP);
        let kind = Kind::Passthrough {
            id: id.into(),
            inputs: inputs.collect(),
            outputs,
        };
        self.with_output(Some(plain_output(kind, constraints)))
    }

    /// Builds the definition in a file of this state. The empty filesystem has no files: it is returned as it is.
    #[must_use]
    pub fn build(&self, filename: Option<&str>, constraints: &Constraints) -> Self {
        let Some(source) = &self.output else {
            return self.clone();
        };
        let mut constraints = constraints.clone();
        constraints.add_cap(caps::BUILD_OP_LLB_FILE_NAME);
        let name = filename.filter(|name| !name.is_empty());
        let attrs: BTreeMap<_, _> = name
            .map(|name| (attr::LLB_DEFINITION_FILENAME.to_owned(), name.to_owned()))
            .into_iter()
            .collect();
        let kind = Kind::Build {
            source: source.clone(),
            attrs,
        };
        self.with_output(Some(plain_output(kind, constraints)))
    }
}

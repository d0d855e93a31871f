//! What frontends were asked when they made a definition, so that the provenance of a build tells where its inputs come
//! from.
//!
//! A client may solve a frontend, take the definition of the result and give it to another frontend as an input, also in
//! another build. While the first build is open, the second one finds out what was asked for the input.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use llb::pb;
use oci::Digest;
use prost::Message as _;

use crate::bridge::lock;

/// What a frontend, or a build, was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The frontend; empty when the client is its own.
    pub frontend: String,
    /// Its options as they came.
    pub opts: BTreeMap<String, String>,
    /// What was asked for its inputs, by their names, as far as it is known.
    pub inputs: BTreeMap<String, Arc<Asked>>,
    /// What the client asked of the whole build.
    pub root: Option<Arc<Asked>>,
    /// How many questions are in it, written out.
    size: usize,
}

/// Most questions in one. A frontend's result may be several inputs of the next frontend and so on: written out, each
/// step could double what is told. Inputs that are too much are left out.
const MAX_SIZE: usize = 256;

impl Asked {
    /// Makes a question.
    pub fn new(
        frontend: impl Into<String>,
        opts: BTreeMap<String, String>,
        inputs: BTreeMap<String, Arc<Self>>,
        root: Option<Arc<Self>>,
    ) -> Self {
        let parts = inputs.values().chain(&root);
        let size = parts.fold(1_usize, |size, part| size.saturating_add(part.size));
        let is_small = size <= MAX_SIZE;
        Self {
            frontend: frontend.into(),
            opts,
            inputs: if is_small { inputs } else { BTreeMap::new() },
            size: if is_small {
                size
            } else {
                1 + root.as_ref().map_or(0, |root| root.size)
            },
            root,
        }
    }

    fn without_root(&self) -> Self {
        let (frontend, opts) = (self.frontend.clone(), self.opts.clone());
        Self::new(frontend, opts, self.inputs.clone(), None)
    }
}

/// Who asked for which definitions, by the vertex that they are about.
#[derive(Debug, Default)]
pub(crate) struct AskedBook {
    known: Mutex<BTreeMap<Digest, BTreeMap<u64, Arc<Asked>>>>,
    next: AtomicU64,
}

/// A line of the book; dropping it takes it out.
#[derive(Debug)]
pub(crate) struct AskedEntry {
    book: Arc<AskedBook>,
    vertex: Digest,
    number: u64,
}

impl AskedBook {
    /// Notes what was asked for a definition; `None` for one that is about nothing.
    pub(crate) fn enter(
        self: &Arc<Self>,
        definition: &pb::Definition,
        asked: Arc<Asked>,
    ) -> Option<AskedEntry> {
        let vertex = head(definition)?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.known).entry(vertex).or_default().insert(number, asked);
        Some(AskedEntry {
            book: Arc::clone(self),
            vertex,
            number,
        })
    }

    /// Finds what was asked for a definition. Where several were asked different things for the same definition, nobody
    /// can tell which of them it came from.
    pub(crate) fn find(&self, definition: &pb::Definition) -> Option<Arc<Asked>> {
        let vertex = head(definition)?;
        let known = lock(&self.known);
        let mut found = known.get(&vertex)?.values().map(|asked| asked.without_root());
        let first = found.next()?;
        found.all(|other| other == first).then(|| Arc::new(first))
    }

    /// Finds what was asked for inputs.
    pub(crate) fn find_all(&self, inputs: &BTreeMap<String, pb::Definition>) -> BTreeMap<String, Arc<Asked>> {
        let found = inputs
            .iter()
            .filter_map(|(name, input)| Some((name.clone(), self.find(input)?)));
        found.collect()
    }
}

impl Drop for AskedEntry {
    fn drop(&mut self) {
        let mut known = lock(&self.book.known);
        if let Some(entries) = known.get_mut(&self.vertex) {
            entries.remove(&self.number);
            if entries.is_empty() {
                known.remove(&self.vertex);
            }
        }
    }
}

/// The vertex that a definition is about: its last op only names it.
fn head(definition: &pb::Definition) -> Option<Digest> {
    let last = pb::Op::decode(definition.def.last()?.as_ref()).ok()?;
    last.inputs.first()?.digest.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(image: &str) -> pb::Definition {
        let state = llb::State::image(image, llb::ImageOptions::default());
        state.marshal(&llb::MarshalOptions::default()).unwrap()
    }

    fn asked(target: &str, root: Option<Arc<Asked>>) -> Arc<Asked> {
        let opts = [("target".to_owned(), target.to_owned())].into();
        Arc::new(Asked::new("dockerfile.v0", opts, BTreeMap::new(), root))
    }

    #[test]
    fn what_was_asked_is_known_while_somebody_keeps_it() {
        let book = Arc::new(AskedBook::default());
        let entry = book
            .enter(&definition("alpine"), asked("a", Some(asked("root", None))))
            .unwrap();
        assert_eq!(book.find(&definition("alpine")), Some(asked("a", None)));
        assert_eq!(book.find(&definition("busybox")), None);
        assert!(book.enter(&pb::Definition::default(), asked("a", None)).is_none());
        drop(entry);
        assert_eq!(book.find(&definition("alpine")), None);
        assert!(lock(&book.known).is_empty());
    }

    #[test]
    fn what_is_told_does_not_double_without_end() {
        let mut last = asked("a", None);
        for _ in 0..64 {
            let both = BTreeMap::from([
                ("a".to_owned(), Arc::clone(&last)),
                ("b".to_owned(), Arc::clone(&last)),
            ]);
            last = Arc::new(Asked::new("x", BTreeMap::new(), both, None));
            assert!(last.size <= MAX_SIZE);
        }
    }

    #[test]
    fn different_questions_for_one_definition_are_no_answer() {
        let book = Arc::new(AskedBook::default());
        let definition = definition("alpine");
        let first = book.enter(&definition, asked("a", None));
        let again = book.enter(&definition, asked("a", Some(asked("root", None))));
        assert!(book.find(&definition).is_some());
        let other = book.enter(&definition, asked("b", None));
        assert!(book.find(&definition).is_none());
        drop(other);
        let inputs = BTreeMap::from([
            ("in".to_owned(), definition),
            ("x".to_owned(), self::definition("x")),
        ]);
        assert_eq!(book.find_all(&inputs).len(), 1);
        drop((first, again));
    }
}

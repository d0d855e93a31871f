//! The resumable conversion.
//!
//! Every step makes a whole pass over the request with the answers known so far. A pass that misses some notes them all
//! and stops; passes are cheap, and the code in between needs no state machine. The file is read in the first of them only.

use crate::ask::{Asker, Known};
use crate::convert::Memory;
use crate::frontend;
use crate::request::{Answer, ContextOutcome, ContextStep, Failure, FailureKind, Need, Request, Step};

/// A conversion of one request, driven by its caller.
///
/// Call [`Conversion::step`] without answers first, then with the answers to the needs it returned, in their order.
#[derive(Debug)]
pub struct Conversion(Passes);

impl Conversion {
    /// Prepares the conversion of a request; nothing is looked at yet.
    pub fn new(request: Request) -> Self {
        Self(Passes::new(request))
    }

    /// Goes on as far as the answers allow.
    ///
    /// `answers` belong to the needs of the last call, one each, in their order. After [`Step::Done`] or an error the
    /// conversion is over.
    pub fn step(&mut self, answers: Vec<Answer>) -> Result<Step, Box<Failure>> {
        Ok(match self.0.step(answers, frontend::pass)? {
            Passed::Done(outcome) => Step::Done(Box::new(outcome)),
            Passed::Needs(needs) => Step::Needs(needs),
        })
    }
}

/// The search for one of a request's named contexts, driven as a [`Conversion`] is.
///
/// This is how the image of a frontend can be replaced as any other: by a context of its name.
#[derive(Debug)]
pub struct ContextLookup {
    passes: Passes,
    name: String,
}

impl ContextLookup {
    /// Prepares the search for the context that replaces the image `name`.
    pub fn new(request: Request, name: impl Into<String>) -> Self {
        Self {
            passes: Passes::new(request),
            name: name.into(),
        }
    }

    /// Goes on as far as the answers allow, as [`Conversion::step`] does.
    pub fn step(&mut self, answers: Vec<Answer>) -> Result<ContextStep, Box<Failure>> {
        let name = &self.name;
        let pass = |request: &Request, asker: &Asker<'_>| -> Result<_, Box<Failure>> {
            frontend::context_pass(request, asker, name)
        };
        Ok(match self.passes.step::<Option<ContextOutcome>>(answers, pass)? {
            Passed::Done(outcome) => ContextStep::Done(outcome.map(Box::new)),
            Passed::Needs(needs) => ContextStep::Needs(needs),
        })
    }
}

/// How far a pass came.
enum Passed<T> {
    Done(T),
    Needs(Vec<Need>),
}

/// Passes over one request.
#[derive(Debug)]
struct Passes {
    request: Request,
    known: Known,
    memory: Memory,
    /// Keys of the needs that were returned last.
    asked: Vec<String>,
}

impl Passes {
    fn new(request: Request) -> Self {
        Self {
            request,
            known: Known::new(),
            memory: Memory::default(),
            asked: Vec::new(),
        }
    }

    fn step<T>(
        &mut self,
        answers: Vec<Answer>,
        pass: impl FnOnce(&Request, &Asker<'_>) -> Result<Option<T>, Box<Failure>>,
    ) -> Result<Passed<T>, Box<Failure>> {
        if answers.len() != self.asked.len() {
            return Err(Box::new(Failure {
                message: format!(
                    "{} needs were answered by {} answers",
                    self.asked.len(),
                    answers.len()
                ),
                kind: FailureKind::User,
                sources: Vec::new(),
                cause: None,
                warnings: Vec::new(),
            }));
        }
        self.known.extend(self.asked.drain(..).zip(answers));
        let asker = Asker::new(&self.known, &self.memory);
        if let Some(outcome) = pass(&self.request, &asker)? {
            return Ok(Passed::Done(outcome));
        }
        let (keys, needs) = asker.into_missing().into_iter().unzip();
        self.asked = keys;
        Ok(Passed::Needs(needs))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use llb::{ImageOptions, MarshalOptions, State};
    use oci::Platform;

    use super::*;
    use crate::request::ImageAnswer;

    fn request(context: &str) -> Request {
        let own = State::image("own", ImageOptions::default());
        Request {
            options: BTreeMap::from([("context:docker/dockerfile".to_owned(), context.to_owned())]),
            inputs: BTreeMap::from([("own".to_owned(), own.marshal(&MarshalOptions::default()).unwrap())]),
            llb_capabilities: BTreeSet::from(["file.base".to_owned()]),
            worker_platforms: vec![Platform::host()],
            ..Request::default()
        }
    }

    fn found(step: ContextStep) -> Option<ContextOutcome> {
        match step {
            ContextStep::Done(found) => found.map(|found| *found),
            ContextStep::Needs(needs) => panic!("{needs:?}"),
        }
    }

    #[test]
    fn an_input_replaces_an_image() {
        let mut lookup = ContextLookup::new(request("input:own"), "docker.io/docker/dockerfile:latest");
        let outcome = found(lookup.step(Vec::new()).unwrap()).unwrap();
        let graph = llb::Graph::load(&outcome.definition).unwrap();
        let root = graph.vertex(graph.root());
        assert!(
            format!("{:?}", root.op).contains("docker.io/library/own"),
            "{root:?}"
        );
        assert!(outcome.config.is_none());
        let mut lookup = ContextLookup::new(request("input:own"), "docker/dockerfile:1");
        assert!(found(lookup.step(Vec::new()).unwrap()).is_none());
        let mut lookup = ContextLookup::new(request("input:absent"), "docker/dockerfile");
        assert!(lookup.step(Vec::new()).is_err());
    }

    #[test]
    fn another_image_replaces_an_image() {
        let context = "docker-image://example.com/mine";
        let mut lookup = ContextLookup::new(request(context), "docker/dockerfile");
        let ContextStep::Needs(needs) = lookup.step(Vec::new()).unwrap() else {
            panic!("nothing is needed")
        };
        assert!(
            matches!(needs.as_slice(), [Need::ImageConfig(need)] if need.reference == "example.com/mine:latest")
        );
        let answer = Answer::Image(ImageAnswer {
            reference: "example.com/mine:latest".to_owned(),
            digest: None,
            config: br#"{"config":{"Entrypoint":["/mine"]}}"#.to_vec(),
        });
        let outcome = found(lookup.step(vec![answer]).unwrap()).unwrap();
        assert_eq!(outcome.config.unwrap().config.entrypoint, ["/mine"]);
    }
}

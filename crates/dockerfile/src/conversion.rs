//! The resumable conversion.
//!
//! Every step makes a whole pass over the request with the answers known so far. A pass that misses some notes them all
//! and stops; passes are cheap, and the code in between needs no state machine.

use crate::ask::{Asker, Known};
use crate::frontend;
use crate::request::{Answer, Failure, FailureKind, Request, Step};

/// A conversion of one request, driven by its caller.
///
/// Call [`Conversion::step`] without answers first, then with the answers to the needs it returned, in their order.
#[derive(Debug)]
pub struct Conversion {
    request: Request,
    known: Known,
    /// Keys of the needs that were returned last.
    asked: Vec<String>,
}

impl Conversion {
    /// Prepares the conversion of a request; nothing is looked at yet.
    pub fn new(request: Request) -> Self {
        Self {
            request,
            known: Known::new(),
            asked: Vec::new(),
        }
    }

    /// Goes on as far as the answers allow.
    ///
    /// `answers` belong to the needs of the last call, one each, in their order. After [`Step::Done`] or an error the
    /// conversion is over.
    pub fn step(&mut self, answers: Vec<Answer>) -> Result<Step, Box<Failure>> {
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
        let asker = Asker::new(&self.known);
        if let Some(outcome) = frontend::pass(&self.request, &asker)? {
            return Ok(Step::Done(Box::new(outcome)));
        }
        let (keys, needs) = asker.into_missing().into_iter().unzip();
        self.asked = keys;
        Ok(Step::Needs(needs))
    }
}

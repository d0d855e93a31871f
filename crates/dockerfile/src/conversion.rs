//! The resumable conversion.

use crate::request::{Answer, Failure, Request, Step};

/// A conversion of one request, driven by its caller.
///
/// Call [`Conversion::step`] without answers first, then with the answers to the needs it returned, in their order.
#[derive(Debug)]
pub struct Conversion {
    request: Request,
}

impl Conversion {
    /// Prepares the conversion of a request; nothing is looked at yet.
    pub fn new(request: Request) -> Self {
        Self { request }
    }

    /// Goes on as far as the answers allow.
    ///
    /// `answers` belong to the needs of the last call, one each, in their order. After [`Step::Done`] or an error the
    /// conversion is over.
    pub fn step(&mut self, answers: Vec<Answer>) -> Result<Step, Box<Failure>> {
        let _ = (&self.request, answers);
        unimplemented!("in work")
    }
}

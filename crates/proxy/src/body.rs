//! A body on its way from a server to the container: checksummed, and noted when it has arrived.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use oci::Digester;

use crate::forward::Driven;
use crate::record::{Incomplete, Material, Record};

/// What is noted when a body ends, and where.
#[derive(Debug)]
pub(crate) struct Note {
    pub(crate) record: Record,
    pub(crate) method: String,
    pub(crate) url: String,
    pub(crate) status: u16,
    /// Why the body cannot be a material even if it arrives.
    pub(crate) reason: Option<&'static str>,
}

/// A body that is passed on.
#[derive(Debug)]
pub(crate) struct Watched {
    body: Incoming,
    hash: Digester,
    note: Option<Note>,
    _connection: Driven,
}

impl Watched {
    /// Wraps a body that comes over `connection`.
    pub(crate) fn new(body: Incoming, connection: Driven, note: Note) -> Self {
        Self {
            body,
            hash: Digester::sha256(),
            note: Some(note),
            _connection: connection,
        }
    }

    fn end(&mut self, is_whole: bool) {
        let Some(note) = self.note.take() else { return };
        let reason = note.reason.or((!is_whole).then_some("body_read_failed"));
        let reason = reason.or((note.status >= 400).then_some("unsuccessful_response"));
        match reason {
            Some(reason) => note.record.add_incomplete(Incomplete {
                method: note.method,
                url: note.url,
                reason,
            }),
            None if (200..300).contains(&note.status) => {
                let hash = std::mem::replace(&mut self.hash, Digester::sha256());
                note.record.add_material(Material {
                    url: note.url,
                    digest: hash.finish(),
                });
            }
            // Redirects and the like bring nothing in.
            None => {}
        }
    }
}

impl Body for Watched {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(bytes) = frame.data_ref() {
                    self.hash.update(bytes);
                }
                // Of a body of known length nobody asks for more than its last piece.
                if self.body.is_end_stream() {
                    self.end(true);
                }
            }
            Poll::Ready(Some(Err(_))) => self.end(false),
            Poll::Ready(None) => self.end(true),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // An empty body is never asked for anything; any other was given up.
        let is_whole = self.body.is_end_stream();
        self.end(is_whole);
    }
}

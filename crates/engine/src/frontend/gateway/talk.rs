//! A running frontend's conversation with the build, from its first words to its end.

use std::collections::VecDeque;
use std::io::Cursor;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::time::timeout;

use super::{FrontendHost, GatewayLimits, in_frontend};
use crate::bridge::{BuildProcess, BuildResult, Forwarder, ProcessInput, ProcessOutput};
use crate::error::BuildError;

/// What every HTTP/2 connection begins with, see RFC 9113, section 3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A frontend that ended well without saying so.
const NO_RESULT: &str = "no result for incomplete build";
/// A frontend that ended the conversation and nothing else.
const CLOSED: &str = "frontend grpc server closed unexpectedly";
/// How much of a frontend's errors is kept, and how much of it is told.
const KEPT_BYTES: usize = 2 << 10;
const PIECE_BYTES: usize = 32 << 10;
/// How much of something that is not understood is shown.
const SHOWN_BYTES: usize = 64;
/// How long the last errors of a frontend may take to arrive.
const ERRORS_LINGER: Duration = Duration::from_millis(500);

/// One frontend's conversation.
pub(super) struct Talk<'a> {
    pub host: &'a dyn FrontendHost,
    pub limits: GatewayLimits,
    /// The image, as errors name it.
    pub source: &'a str,
}

/// Why a frontend's process is not waited for any longer, or its end.
enum End {
    /// It ended by itself.
    Exited(Result<(), BuildError>),
    /// It does not end although it closed the connection or returned.
    Stuck,
}

impl Talk<'_> {
    /// Serves the frontend until it ends, has nothing more to say or says what nobody understands. The process may still
    /// run afterwards.
    ///
    /// # Errors
    /// What the frontend returns, or how it failed.
    pub async fn run(
        &self,
        mut process: BuildProcess,
        forwarder: &Forwarder,
    ) -> Result<BuildResult, BuildError> {
        let (stdin, stdout, stderr) = (process.stdin.take(), process.stdout.take(), process.stderr.take());
        let (Some(stdin), Some(stdout)) = (stdin, stdout) else {
            return Err(BuildError::internal("a frontend has no streams"));
        };
        let mut errors = Tail::default();
        let outcome = {
            let mut draining = std::pin::pin!(errors.fill(stderr));
            let mut conversing = std::pin::pin!(self.converse(&process, stdin, stdout, forwarder));
            let mut is_drained = false;
            let outcome = loop {
                tokio::select! {
                    outcome = &mut conversing => break outcome,
                    () = &mut draining, if !is_drained => is_drained = true,
                }
            };
            // What it said last may say why it failed.
            if outcome.is_err() && !is_drained {
                let _ = timeout(ERRORS_LINGER, draining).await;
            }
            outcome
        };
        let said = errors.text();
        if !said.is_empty() {
            tracing::debug!(frontend = self.source, said, "a frontend's errors");
        }
        outcome.map_err(|failed| match failed {
            Failed::Returned(error) => error,
            Failed::Broken(error) if said.is_empty() => error.context(in_frontend(self.source)),
            Failed::Broken(error) => {
                let text = format!("{}: {error}: {said}", in_frontend(self.source));
                error.with_message(text)
            }
        })
    }

    async fn converse(
        &self,
        process: &BuildProcess,
        stdin: ProcessInput,
        stdout: ProcessOutput,
        forwarder: &Forwarder,
    ) -> Result<BuildResult, Failed> {
        let mut stdout = stdout.into_pipe().ok_or_else(no_pipe)?;
        let stdin = stdin.into_pipe().ok_or_else(no_pipe)?;
        self.greet(process, &mut stdout).await.map_err(Failed::Broken)?;
        let stream = tokio::io::join(Cursor::new(PREFACE).chain(stdout), stdin);
        let end = {
            let mut serving = self.host.serve(forwarder.clone(), Box::new(stream));
            let mut waiting = std::pin::pin!(process.wait());
            // Its result is delivered over the connection, which therefore goes on until its end.
            let overdue = async {
                let _ = forwarder.returned().await;
                tokio::time::sleep(self.limits.end).await;
            };
            tokio::select! {
                ended = &mut waiting => End::Exited(ended),
                () = &mut serving => match timeout(self.limits.end, waiting).await {
                    Ok(ended) => End::Exited(ended),
                    Err(_) => End::Stuck,
                },
                () = overdue => End::Stuck,
            }
        };
        self.judge(end, forwarder)
    }

    /// Waits until the frontend speaks HTTP/2.
    async fn greet(
        &self,
        process: &BuildProcess,
        stdout: &mut (impl AsyncRead + Unpin),
    ) -> Result<(), BuildError> {
        let Ok(greeting) = timeout(self.limits.start, greeting(stdout)).await else {
            let text = format!("it did not connect within {} s", self.limits.start.as_secs());
            return Err(BuildError::user(text));
        };
        match greeting {
            Greeting::Http => Ok(()),
            Greeting::Closed => match timeout(self.limits.end, process.wait()).await {
                Ok(Err(error)) => Err(error),
                Ok(Ok(())) => Err(BuildError::user(NO_RESULT)),
                Err(_) => Err(BuildError::user("it closed its output without connecting")),
            },
            Greeting::Other(bytes) => {
                let shown = String::from_utf8_lossy(&bytes);
                let text = format!("it does not speak gRPC on its standard output, but wrote {shown:?}");
                Err(BuildError::user(text))
            }
        }
    }

    /// A returned error counts more than how the process ended, and that counts more than a returned result.
    fn judge(&self, end: End, forwarder: &Forwarder) -> Result<BuildResult, Failed> {
        let returned = forwarder.already_returned();
        match (returned, end) {
            (Some(Err(error)), _) => Err(Failed::Returned(error)),
            (_, End::Exited(Err(error))) => Err(Failed::Broken(error)),
            (Some(Ok(result)), End::Exited(Ok(()))) => Ok(result),
            (Some(Ok(result)), End::Stuck) => {
                tracing::warn!(frontend = self.source, "a frontend does not end after its result");
                Ok(result)
            }
            (None, End::Exited(Ok(()))) => Err(Failed::Broken(BuildError::user(NO_RESULT))),
            (None, End::Stuck) => Err(Failed::Broken(BuildError::user(CLOSED))),
        }
    }
}

/// How a frontend failed.
enum Failed {
    /// It says so itself.
    Returned(BuildError),
    /// It did not come to say anything.
    Broken(BuildError),
}

fn no_pipe() -> Failed {
    Failed::Broken(BuildError::internal("a frontend's stream is no pipe"))
}

/// What a frontend says first.
#[derive(Debug, PartialEq, Eq)]
enum Greeting {
    Http,
    /// Nothing.
    Closed,
    /// The beginning of something else.
    Other(Bytes),
}

/// Reads until it is clear whether a frontend speaks HTTP/2; all of the preface is taken then.
async fn greeting(from: &mut (impl AsyncRead + Unpin)) -> Greeting {
    let mut said = Vec::with_capacity(SHOWN_BYTES);
    let mut piece = [0; PREFACE.len()];
    while said.len() < PREFACE.len() {
        let wanted = PREFACE.len() - said.len();
        match from.read(&mut piece[..wanted]).await {
            Ok(0) | Err(_) if said.is_empty() => return Greeting::Closed,
            Ok(0) | Err(_) => return Greeting::Other(said.into()),
            Ok(count) => said.extend_from_slice(&piece[..count]),
        }
        if !PREFACE.starts_with(&said) {
            return Greeting::Other(said.into());
        }
    }
    Greeting::Http
}

/// The last bytes of what a frontend writes to its errors.
#[derive(Debug, Default)]
struct Tail(VecDeque<u8>);

impl Tail {
    async fn fill(&mut self, from: Option<ProcessOutput>) {
        let Some(mut from) = from else { return };
        while let Ok(piece) = from.read(PIECE_BYTES).await {
            if piece.is_empty() {
                return;
            }
            self.push(&piece);
            // A flood leaves time to others.
            tokio::task::yield_now().await;
        }
    }

    fn push(&mut self, piece: &[u8]) {
        let kept = piece.len().min(KEPT_BYTES);
        let surplus = (self.0.len() + kept).saturating_sub(KEPT_BYTES);
        self.0.drain(..surplus);
        self.0.extend(&piece[piece.len() - kept..]);
    }

    /// Returns what is kept, from the beginning of a line if there is one.
    fn text(&self) -> String {
        let bytes: Vec<u8> = self.0.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let whole = match text.split_once('\n') {
            Some((_, rest)) if bytes.len() == KEPT_BYTES && !rest.trim().is_empty() => rest,
            _ => &text,
        };
        whole.trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frontends_begin_with_the_preface() {
        let mut rest = [PREFACE, b"more"].concat();
        let mut from = rest.as_slice();
        assert_eq!(greeting(&mut from).await, Greeting::Http);
        assert_eq!(from, b"more");
        rest.truncate(10);
        let said = Bytes::copy_from_slice(&rest);
        assert_eq!(greeting(&mut rest.as_slice()).await, Greeting::Other(said));
        assert_eq!(greeting(&mut &b""[..]).await, Greeting::Closed);
        let other = Greeting::Other(Bytes::from_static(b"hello"));
        assert_eq!(greeting(&mut &b"hello"[..]).await, other);
    }

    #[test]
    fn only_the_last_errors_are_kept() {
        let mut tail = Tail::default();
        tail.push(&[b'x'; KEPT_BYTES + 7]);
        assert_eq!(tail.text().len(), KEPT_BYTES);
        tail.push(b" the end\n");
        let text = tail.text();
        assert!(text.ends_with("x the end") && text.len() < KEPT_BYTES, "{text}");
        tail.push(&[b"cut\n".as_slice(), &[b'y'; KEPT_BYTES - 3]].concat());
        assert_eq!(tail.text(), "y".repeat(KEPT_BYTES - 3));
        assert!(Tail::default().text().is_empty());
    }
}

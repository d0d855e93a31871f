//! Every message as one line of JSON, as Go encodes `client.SolveStatus`.

use std::io::{self, Write};

use super::event::Status;
use super::{Display, write_out};

/// Writes a line of JSON a message.
#[derive(Debug)]
pub struct RawJsonDisplay<W> {
    out: W,
}

impl<W: Write> RawJsonDisplay<W> {
    /// Makes a display on `out`.
    pub fn new(out: W) -> Self {
        Self { out }
    }
}

impl<W: Write + Send> Display for RawJsonDisplay<W> {
    fn update(&mut self, status: Status) -> io::Result<()> {
        let mut line = status.to_value().to_json(true);
        line.push('\n');
        write_out(&mut self.out, &line)
    }

    fn refresh(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

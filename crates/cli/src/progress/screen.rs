//! The last lines a step wrote, as a terminal would show them: carriage returns, backspaces and the escapes that
//! progress bars use move and erase; colours are dropped.

use std::collections::VecDeque;

/// Lines kept.
const MAX_LINES: usize = 100;
/// Longest line kept.
const MAX_COLUMNS: usize = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
enum Escape {
    #[default]
    None,
    /// After ESC.
    Start,
    /// Inside of a control sequence.
    Control,
    /// Inside of an operating system command, which ends with BEL or ESC \.
    Command,
}

/// A step's last lines.
#[derive(Clone, Debug)]
pub struct Screen {
    lines: VecDeque<Vec<char>>,
    row: usize,
    column: usize,
    escape: Escape,
    parameters: String,
    partial: Vec<u8>,
    /// Bytes written so far.
    pub written: usize,
    width: usize,
}

impl Screen {
    /// Makes an empty screen; `width` only limits what [`Screen::tail`] returns.
    pub fn new(width: usize) -> Self {
        Self {
            lines: VecDeque::from([Vec::new()]),
            row: 0,
            column: 0,
            escape: Escape::None,
            parameters: String::new(),
            partial: Vec::new(),
            written: 0,
            width: width.max(1),
        }
    }

    /// Takes in output.
    pub fn write(&mut self, data: &[u8]) {
        self.written += data.len();
        let mut bytes = std::mem::take(&mut self.partial);
        bytes.extend_from_slice(data);
        let mut rest: &[u8] = &bytes;
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    text.chars().for_each(|c| self.put(c));
                    return;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    String::from_utf8_lossy(valid).chars().for_each(|c| self.put(c));
                    let Some(len) = error.error_len() else {
                        self.partial = after.to_vec();
                        return;
                    };
                    self.put('\u{fffd}');
                    rest = &after[len..];
                }
            }
        }
    }

    /// Returns the last lines that are not blank, cut to the width.
    pub fn tail(&self, count: usize) -> Vec<String> {
        let mut lines: Vec<String> = self
            .lines
            .iter()
            .rev()
            .map(|line| line.iter().take(self.width).collect::<String>())
            .filter(|line| !line.trim().is_empty())
            .take(count)
            .collect();
        lines.reverse();
        lines
    }

    /// Changes the width.
    pub fn resize(&mut self, width: usize) {
        self.width = width.max(1);
    }

    fn put(&mut self, c: char) {
        match self.escape {
            Escape::None => self.put_plain(c),
            Escape::Start => {
                self.parameters.clear();
                self.escape = match c {
                    '[' => Escape::Control,
                    ']' => Escape::Command,
                    _ => Escape::None,
                };
            }
            Escape::Control if ('\u{40}'..='\u{7e}').contains(&c) => {
                self.escape = Escape::None;
                self.control(c);
            }
            Escape::Control if self.parameters.len() < 32 => self.parameters.push(c),
            Escape::Control => {}
            Escape::Command if c == '\u{7}' => self.escape = Escape::None,
            Escape::Command if c == '\u{1b}' => self.escape = Escape::Start,
            Escape::Command => {}
        }
    }

    fn put_plain(&mut self, c: char) {
        match c {
            '\n' => {
                self.column = 0;
                self.down();
            }
            '\r' => self.column = 0,
            '\u{8}' => self.column = self.column.saturating_sub(1),
            '\t' => self.column = (self.column / 8 + 1) * 8,
            '\u{1b}' => self.escape = Escape::Start,
            c if c.is_control() => {}
            c if self.column < MAX_COLUMNS => {
                let line = &mut self.lines[self.row];
                if line.len() <= self.column {
                    line.resize(self.column + 1, ' ');
                }
                line[self.column] = c;
                self.column += 1;
            }
            _ => {}
        }
    }

    fn down(&mut self) {
        self.row += 1;
        if self.row == self.lines.len() {
            self.lines.push_back(Vec::new());
        }
        if self.lines.len() > MAX_LINES {
            self.lines.pop_front();
            self.row -= 1;
        }
    }

    fn control(&mut self, c: char) {
        let number: usize = self
            .parameters
            .split(';')
            .next()
            .and_then(|first| first.parse().ok())
            .unwrap_or(0);
        let count = number.clamp(1, MAX_COLUMNS);
        match c {
            'A' | 'F' => {
                self.row = self.row.saturating_sub(count);
                if c == 'F' {
                    self.column = 0;
                }
            }
            'B' | 'E' => {
                self.row = (self.row + count).min(self.lines.len() - 1);
                if c == 'E' {
                    self.column = 0;
                }
            }
            'C' => self.column = (self.column + count).min(MAX_COLUMNS),
            'D' => self.column = self.column.saturating_sub(count),
            'G' => self.column = count - 1,
            'K' => {
                let column = self.column;
                let line = &mut self.lines[self.row];
                match number {
                    0 => line.truncate(column),
                    1 => line.iter_mut().take(column + 1).for_each(|c| *c = ' '),
                    _ => line.clear(),
                }
            }
            'J' => {
                self.lines.truncate(self.row + 1);
                if number > 1 {
                    self.lines[self.row].clear();
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(text: &str) -> Vec<String> {
        let mut screen = Screen::new(20);
        screen.write(text.as_bytes());
        screen.tail(3)
    }

    #[test]
    fn keeps_the_last_lines() {
        assert_eq!(tail("a\nb\n\nc\nd\n"), ["b", "c", "d"]);
        assert_eq!(tail("a\tb"), ["a       b"]);
        assert_eq!(tail(&"x".repeat(30)), ["x".repeat(20)]);
    }

    #[test]
    fn follows_progress_bars() {
        assert_eq!(tail("10%\r20%\r100%\n"), ["100%"]);
        assert_eq!(tail("one\ntwo\n\u{1b}[2A\u{1b}[2Kuno\n"), ["uno", "two"]);
        assert_eq!(tail("\u{1b}[1;31mred\u{1b}[0m"), ["red"]);
        assert_eq!(tail("\u{1b}]0;title\u{7}x"), ["x"]);
        assert_eq!(tail("abc\u{8}\u{8}\u{1b}[K"), ["a"]);
    }

    #[test]
    fn joins_characters_split_between_writes() {
        let mut screen = Screen::new(10);
        screen.write(&[0xc3]);
        screen.write(&[0xa9, 0xff, b'x']);
        assert_eq!(screen.tail(1), ["é\u{fffd}x"]);
    }

    #[test]
    fn stays_small() {
        let mut screen = Screen::new(10);
        for _ in 0..10_000 {
            screen.write(b"line\n\x1b[9999B\x1b[9999Cx\t\t\t");
        }
        assert!(screen.lines.len() <= MAX_LINES);
        assert!(screen.lines.iter().all(|line| line.len() <= MAX_COLUMNS));
    }
}

//! Symbolic modes: `[ugoa]*([-+=]([rwxXst]*|[ugo]))+`, separated by commas.
//!
//! The meaning is that of the BSDs' `setmode(3)` with an empty umask, which BuildKit uses through a Go translation.

const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;
const STICKY: u32 = 0o1000;
const ALL: u32 = SET_UID | SET_GID | 0o777;

/// One step of a mode change.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// Sets bits.
    Add(u32),
    /// Clears bits.
    Clear(u32),
    /// Sets bits if the file is a directory or anyone could execute it at first.
    AddExecute(u32),
    /// Copies the permissions of one class (its shift) to others.
    Copy {
        from: u32,
        to: Vec<u32>,
        set: bool,
        clear: bool,
    },
}

/// A parsed mode change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mode(Vec<Step>);

/// A clause being parsed.
struct Clause {
    /// Bits of the classes named; 0 for none, which means all.
    who: u32,
    steps: Vec<Step>,
    equal_done: bool,
}

impl Clause {
    fn bits(&self, bits: u32) -> u32 {
        if self.who == 0 { bits } else { bits & self.who }
    }

    fn apply(&mut self, op: u8, perm: u32) {
        let bits = self.bits(perm);
        match op {
            b'-' => self.steps.push(Step::Clear(bits)),
            b'+' => self.steps.push(Step::Add(bits)),
            _ => {
                self.steps
                    .push(Step::Clear(if self.who == 0 { ALL } else { self.who }));
                self.steps.push(Step::Add(bits));
            }
        }
    }

    fn copy(&mut self, op: u8, class: u8) {
        let classes = [(0o400, 6), (0o040, 3), (0o004, 0)];
        let to = classes
            .iter()
            .filter(|(read, _)| self.who == 0 || self.who & read != 0);
        let from = match class {
            b'u' => 6,
            b'g' => 3,
            _ => 0,
        };
        let to = to.map(|(_, shift)| *shift).collect();
        self.steps.push(Step::Copy {
            from,
            to,
            set: op != b'-',
            clear: op != b'+',
        });
    }

    /// Parses what follows an operator; returns the rest.
    fn perms<'t>(&mut self, op: u8, mut text: &'t [u8]) -> &'t [u8] {
        self.who &= !STICKY;
        let (mut perm, mut execute) = (0, 0);
        while let Some((letter, rest)) = text.split_first() {
            // Set-id and sticky bits belong to "u" and "g", not to "o" alone.
            let owns_special = self.who == 0 || self.who & !0o007 != 0;
            match letter {
                b'r' => perm |= 0o444,
                b'w' => perm |= 0o222,
                b'x' => perm |= 0o111,
                b'X' if op == b'-' => perm |= 0o111,
                b'X' => execute = 0o111,
                b's' if owns_special => perm |= SET_UID | SET_GID,
                b't' if owns_special => {
                    if self.who != 0 {
                        self.who |= STICKY;
                    }
                    perm |= STICKY;
                }
                b's' | b't' => {}
                b'u' | b'g' | b'o' => {
                    if perm != 0 {
                        self.apply(op, std::mem::take(&mut perm));
                    }
                    if op == b'=' {
                        self.equal_done = true;
                    }
                    if execute != 0 {
                        self.steps
                            .push(Step::AddExecute(self.bits(std::mem::take(&mut execute))));
                    }
                    self.copy(op, *letter);
                }
                _ => break,
            }
            text = rest;
        }
        if perm != 0 || op == b'=' && !self.equal_done {
            self.equal_done |= op == b'=';
            self.apply(op, perm);
        }
        if execute != 0 {
            self.steps.push(Step::AddExecute(self.bits(execute)));
        }
        text
    }
}

impl Mode {
    /// Parses a symbolic mode, or octal digits; `None` for anything else.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text.starts_with(|first: char| first.is_ascii_digit()) {
            let bits = u32::from_str_radix(text, 8).ok().filter(|bits| *bits <= 0o7777)?;
            return Some(Self(vec![Step::Clear(0o7777), Step::Add(bits)]));
        }
        let mut steps = Vec::new();
        for clause in text.as_bytes().split(|byte| *byte == b',') {
            let mut text = clause;
            let mut who = 0;
            while let Some((class, rest)) = text.split_first() {
                who |= match class {
                    b'a' => ALL,
                    b'u' => SET_UID | 0o700,
                    b'g' => SET_GID | 0o070,
                    b'o' => 0o007,
                    _ => break,
                };
                text = rest;
            }
            let mut clause = Clause {
                who,
                steps: Vec::new(),
                equal_done: false,
            };
            loop {
                let (op, rest) = text.split_first()?;
                match op {
                    b'+' | b'-' => {}
                    b'=' => clause.equal_done = false,
                    _ => return None,
                }
                text = clause.perms(*op, rest);
                if text.is_empty() {
                    break;
                }
            }
            steps.extend(clause.steps);
        }
        Some(Self(steps))
    }

    /// Computes the new twelve bits of a file that has `old`.
    pub(super) fn apply(&self, old: u32, is_dir: bool) -> u32 {
        let old = old & 0o7777;
        let mut new = old;
        for step in &self.0 {
            match step {
                Step::Add(bits) => new |= bits,
                Step::Clear(bits) => new &= !bits,
                Step::AddExecute(bits) if is_dir || old & 0o111 != 0 => new |= bits,
                Step::AddExecute(_) => {}
                Step::Copy { from, to, set, clear } => {
                    let value = new >> from & 0o7;
                    let cleared = if *set { 0o7 } else { value };
                    for shift in to {
                        if *clear {
                            new &= !(cleared << shift);
                        }
                        if *set {
                            new |= value << shift;
                        }
                    }
                }
            }
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_what_chmod_means() {
        let cases = [
            ("u+x", 0o644, false, 0o744),
            ("+x", 0o644, false, 0o755),
            ("a=rX", 0o644, false, 0o444),
            ("a=rX", 0o744, false, 0o555),
            ("a=rX", 0o700, true, 0o555),
            ("go-w", 0o666, false, 0o644),
            ("u=rwx,go=", 0o4777, false, 0o700),
            ("g=u", 0o640, false, 0o660),
            ("o=g-w", 0o664, false, 0o664),
            ("g+u-x", 0o710, false, 0o760),
            ("u+s", 0o755, false, 0o4755),
            ("+t", 0o777, true, 0o1777),
            ("o+s", 0o755, false, 0o755),
            ("=", 0o7777, false, 0o1000),
            ("0644", 0o4755, false, 0o644),
            ("go-u", 0o755, false, 0o700),
            ("u+r+w", 0o000, false, 0o600),
        ];
        for (text, old, is_dir, expected) in cases {
            let mode = Mode::parse(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(mode.apply(old, is_dir), expected, "{text} on {old:o}");
        }
    }

    #[test]
    fn refuses_what_is_no_mode() {
        for text in ["", "u", "x", "u+q", "u+x,", ",u+x", "8", "77777", "u x", "+x;"] {
            assert_eq!(Mode::parse(text), None, "{text}");
        }
    }
}

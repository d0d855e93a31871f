//! The `--flag` words in front of an instruction's arguments.

use crate::raw;
use crate::text::is_latin1_space;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Spaces,
    Word,
    Quote(u8),
}

/// Splits the flags off. The rest begins at the first word that is no flag, or behind `--`.
///
/// Works on bytes and takes each for a character of its own: so the ecosystem reads flags outside of ASCII.
pub(super) fn split_flags(line: &str, escape: char) -> (Vec<String>, String) {
    let bytes = raw::encode(line);
    let escape = u8::try_from(escape).unwrap_or(b'\\');
    let mut flags = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    let mut phase = Phase::Spaces;
    let mut at = 0;
    let rest = |at: usize| raw::decode(&bytes[at..]);
    while at < bytes.len() {
        let mut byte = bytes[at];
        if phase == Phase::Spaces {
            if is_latin1_space(byte) {
                at += 1;
                continue;
            }
            if byte != b'-' || bytes.get(at + 1) != Some(&b'-') {
                return (flags, rest(at));
            }
            phase = Phase::Word;
        }
        match phase {
            Phase::Word if is_latin1_space(byte) => {
                if word == "--" {
                    return (flags, rest(at));
                }
                push(&mut flags, &mut word, &mut quoted);
                phase = Phase::Spaces;
                at += 1;
                continue;
            }
            Phase::Word if byte == b'\'' || byte == b'"' => {
                quoted = true;
                phase = Phase::Quote(byte);
                at += 1;
                continue;
            }
            Phase::Quote(quote) if byte == quote => {
                phase = Phase::Word;
                at += 1;
                continue;
            }
            _ => {}
        }
        if byte == escape {
            at += 1;
            let Some(next) = bytes.get(at) else { break };
            byte = *next;
        }
        word.push(char::from(byte));
        at += 1;
    }
    if phase != Phase::Spaces && word != "--" {
        push(&mut flags, &mut word, &mut quoted);
    }
    (flags, String::new())
}

fn push(flags: &mut Vec<String>, word: &mut String, quoted: &mut bool) {
    if *quoted || !word.is_empty() {
        flags.push(std::mem::take(word));
    }
    *quoted = false;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_flags_from_arguments() {
        let split = |line| split_flags(line, '\\');
        assert_eq!(
            split("--a=b --c x --d"),
            (vec!["--a=b".into(), "--c".into()], "x --d".into())
        );
        assert_eq!(split("--a='b c' -- --d"), (vec!["--a=b c".into()], " --d".into()));
        assert_eq!(split("--a=\\ b"), (vec!["--a= b".into()], String::new()));
        assert_eq!(split("-a"), (vec![], "-a".into()));
        assert_eq!(
            split("--x=\u{800}"),
            (vec!["--x=\u{e0}".into()], raw::decode(b"\x80"))
        );
    }
}

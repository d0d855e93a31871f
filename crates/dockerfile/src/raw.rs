//! Bytes of a Dockerfile that are not UTF-8.
//!
//! The ecosystem's parser works on bytes: what is not UTF-8 lives on in some places (the command of RUN, documents,
//! texts of the image) and becomes U+FFFD in others (wherever variables are expanded). So that texts can be texts here,
//! such a byte is a character of its own, one of the last 128 of Unicode's private ones, until it leaves the crate.
//! Where a file uses those itself they are treated as bytes, too.

use std::borrow::Cow;

/// Stands for the byte 0x80.
const FIRST: char = '\u{10ff80}';
/// What takes the place of a byte that cannot be kept.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Returns the character that stands for a byte.
fn char_of(byte: u8) -> char {
    let code = u32::from(FIRST) + u32::from(byte & 0x7f);
    char::from_u32(code).unwrap_or(REPLACEMENT)
}

/// Returns the byte that a character stands for.
pub(crate) fn byte_of(c: char) -> Option<u8> {
    let offset = u32::from(c).checked_sub(u32::from(FIRST))?;
    u8::try_from(offset).ok().map(|offset| offset | 0x80)
}

/// Returns the character itself, or U+FFFD for one that stands for a byte.
pub(crate) fn replaced(c: char) -> char {
    if c >= FIRST { REPLACEMENT } else { c }
}

/// Reads bytes; each that is not part of a character becomes one.
pub(crate) fn decode(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !is_in(text) => text.to_owned(),
        _ => {
            let mut text = String::with_capacity(bytes.len());
            for chunk in bytes.utf8_chunks() {
                for c in chunk.valid().chars() {
                    if c >= FIRST {
                        let mut buffer = [0; 4];
                        text.extend(c.encode_utf8(&mut buffer).bytes().map(char_of));
                    } else {
                        text.push(c);
                    }
                }
                text.extend(chunk.invalid().iter().copied().map(char_of));
            }
            text
        }
    }
}

/// Returns the bytes that a text was read from.
pub(crate) fn encode(text: &str) -> Cow<'_, [u8]> {
    if !is_in(text) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        match byte_of(c) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Cow::Owned(bytes)
}

/// Tells whether some characters of a text stand for bytes.
pub(crate) fn is_in(text: &str) -> bool {
    is_within(text.as_bytes())
}

/// Tells whether encoded text stands somewhere that stands for bytes.
pub(crate) fn is_within(bytes: &[u8]) -> bool {
    // U+10FF80 to U+10FFFF.
    bytes
        .iter()
        .enumerate()
        .any(|(at, byte)| *byte == 0xf4 && matches!(bytes[at + 1..], [0x8f, 0xbe | 0xbf, 0x80..=0xbf, ..]))
}

/// Puts something else in the place of characters that stand for bytes.
fn substitute(text: String, by: &str) -> String {
    if !is_in(&text) {
        return text;
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c >= FIRST {
            out.push_str(by);
        } else {
            out.push(c);
        }
    }
    out
}

/// Makes a text that can be shown: with U+FFFD.
pub(crate) fn shown(text: String) -> String {
    substitute(text, "\u{fffd}")
}

/// Makes JSON of it as Go would: with U+FFFD, escaped.
pub(crate) fn json(text: String) -> String {
    substitute(text, "\\ufffd")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive() {
        for bytes in [
            b"plain \xc3\xa9".as_slice(),
            b"\xff\xfe a \x80",
            b"\xe2\x82",
            "\u{10ff80}\u{10fffd}\u{10ff7f}".as_bytes(),
        ] {
            assert_eq!(encode(&decode(bytes)), bytes);
        }
        let text = decode(b"a\xe2\x82b");
        assert_eq!(shown(text.clone()), "a\u{fffd}\u{fffd}b");
        assert_eq!(json(text.clone()), "a\\ufffd\\ufffdb");
        assert!(is_in(&text) && !is_in("\u{10ff7f}\u{fffd}"));
        assert_eq!(text.chars().filter_map(byte_of).collect::<Vec<_>>(), [0xe2, 0x82]);
    }
}

//! Numbers in header fields: octal text, or two's complement with the top bit set.

/// Parses a field; `None` when it is neither.
pub(super) fn parse(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => parse_binary(field),
        _ => parse_octal(field).and_then(|value| i64::try_from(value).ok()),
    }
}

fn parse_binary(field: &[u8]) -> Option<i64> {
    let negative = field[0] & 0x40 != 0;
    let invert = if negative { 0xff } else { 0 };
    let mut value = 0_u64;
    for (index, byte) in field.iter().enumerate() {
        let mut byte = byte ^ invert;
        if index == 0 {
            byte &= 0x7f;
        }
        if value >> 56 != 0 {
            return None;
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).ok()?;
    Some(if negative { !value } else { value })
}

/// Parses octal digits surrounded by spaces and zero bytes; an empty field is 0.
pub(super) fn parse_octal(field: &[u8]) -> Option<u64> {
    let is_filler = |byte: &u8| *byte == b' ' || *byte == 0;
    let start = field
        .iter()
        .position(|byte| !is_filler(byte))
        .unwrap_or(field.len());
    let text = &field[start..];
    let end = text
        .iter()
        .rposition(|byte| !is_filler(byte))
        .map_or(0, |last| last + 1);
    let text = &text[..end];
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    if text.is_empty() {
        return Some(0);
    }
    text.iter().try_fold(0_u64, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
        value.checked_mul(8)?.checked_add(digit.into())
    })
}

/// Reports whether `value` fits into an octal field of `width` bytes with its terminator.
pub(super) fn fits_octal(width: usize, value: i64) -> bool {
    let bits = (width - 1) * 3;
    value >= 0 && (bits >= 63 || value < 1 << bits)
}

/// Writes zero-padded octal with a terminating zero byte; what does not fit becomes 0.
pub(super) fn write_octal(field: &mut [u8], value: i64) {
    let value = if fits_octal(field.len(), value) { value } else { 0 };
    let text = format!("{value:0width$o}\0", width = field.len() - 1);
    field.copy_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_archives_hold() {
        assert_eq!(parse(b"0000644\0"), Some(0o644));
        assert_eq!(parse(b" 644 \0\0\0"), Some(0o644));
        assert_eq!(parse(b"\0\0\0\0"), Some(0));
        assert_eq!(parse(b"9"), None);
        assert_eq!(parse(b"-1"), None);
        assert_eq!(parse(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]), Some(256));
        assert_eq!(parse(&[0xff; 12]), Some(-1));
        assert_eq!(
            parse(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            None
        );
        assert_eq!(parse(b"7777777777777777777777777"), None);
    }
}

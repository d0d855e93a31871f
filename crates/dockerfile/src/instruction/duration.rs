//! Durations in Go's notation, e.g. `1h30m`, `1.5s`.

use crate::raw;

/// Parses a duration into nanoseconds. The error is Go's text.
pub(super) fn parse_duration(text: &str) -> Result<i64, String> {
    let invalid = || format!("time: invalid duration {}", quote(text));
    let (negative, mut rest) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let whole = take_digits(&mut rest);
        let fraction = rest.strip_prefix('.').map(|tail| {
            rest = tail;
            take_digits(&mut rest)
        });
        if whole.is_empty() && fraction.is_none_or(str::is_empty) {
            return Err(invalid());
        }
        let unit_end = rest
            .find(|c: char| c == '.' || c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (unit, tail) = rest.split_at(unit_end);
        rest = tail;
        if unit.is_empty() {
            return Err(format!("time: missing unit in duration {}", quote(text)));
        }
        let scale = unit_ns(unit)
            .ok_or_else(|| format!("time: unknown unit {} in duration {}", quote(unit), quote(text)))?;
        let part = part_ns(whole, fraction.unwrap_or_default(), scale).ok_or_else(invalid)?;
        total = total
            .checked_add(part)
            .filter(|total| *total <= 1 << 63)
            .ok_or_else(invalid)?;
    }
    if negative {
        return Ok(i64::try_from(total).map_or(i64::MIN, |total| -total));
    }
    i64::try_from(total).map_err(|_| invalid())
}

/// Quotes as Go's durations do: byte by byte outside of ASCII.
fn quote(text: &str) -> String {
    let mut out = String::from('"');
    for byte in raw::encode(text).iter() {
        match byte {
            b'"' | b'\\' => out.extend(['\\', char::from(*byte)]),
            b' '..=0x7f => out.push(char::from(*byte)),
            _ => out.push_str(&format!("\\x{byte:02x}")),
        }
    }
    out.push('"');
    out
}

fn take_digits<'a>(rest: &mut &'a str) -> &'a str {
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (digits, tail) = rest.split_at(end);
    *rest = tail;
    digits
}

const fn unit_ns_of(unit: &[u8]) -> Option<u64> {
    match unit {
        b"ns" => Some(1),
        b"us" => Some(1_000),
        b"ms" => Some(1_000_000),
        b"s" => Some(1_000_000_000),
        b"m" => Some(60_000_000_000),
        b"h" => Some(3_600_000_000_000),
        _ => None,
    }
}

fn unit_ns(unit: &str) -> Option<u64> {
    if unit == "µs" || unit == "μs" {
        Some(1_000)
    } else {
        unit_ns_of(unit.as_bytes())
    }
}

fn part_ns(whole: &str, fraction: &str, scale: u64) -> Option<u64> {
    let whole = if whole.is_empty() {
        0
    } else {
        whole.parse::<u64>().ok()?
    };
    let mut ns = whole.checked_mul(scale)?;
    // Digits beyond nanoseconds of an hour do not count.
    let digits = &fraction[..fraction.len().min(18)];
    if !digits.is_empty() {
        let power = 10u128.pow(u32::try_from(digits.len()).ok()?);
        let part = digits.parse::<u128>().ok()? * u128::from(scale) / power;
        ns = ns.checked_add(u64::try_from(part).ok()?)?;
    }
    Some(ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_like_go() {
        assert_eq!(parse_duration("1h2m3.5s"), Ok(3_723_500_000_000));
        assert_eq!(parse_duration("-1.5ms"), Ok(-1_500_000));
        assert_eq!(parse_duration("0"), Ok(0));
        assert_eq!(parse_duration(".5us"), Ok(500));
        assert_eq!(
            parse_duration("1").unwrap_err(),
            "time: missing unit in duration \"1\""
        );
        assert_eq!(
            parse_duration("1x").unwrap_err(),
            "time: unknown unit \"x\" in duration \"1x\""
        );
        assert_eq!(
            parse_duration("1\"µ\\").unwrap_err(),
            r#"time: unknown unit "\"\xc2\xb5\\" in duration "1\"\xc2\xb5\\""#
        );
        assert_eq!(parse_duration("s").unwrap_err(), "time: invalid duration \"s\"");
        assert_eq!(
            parse_duration("9999999999h").unwrap_err(),
            "time: invalid duration \"9999999999h\""
        );
    }
}

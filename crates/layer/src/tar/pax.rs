//! PAX extended header records: `<length> <key>=<value>\n`.

use std::collections::BTreeMap;

use crate::tree::Timestamp;

/// Prefix of records that hold extended attributes.
pub(super) const XATTR: &[u8] = b"SCHILY.xattr.";
/// Prefix of GNU's sparse file records.
pub(super) const SPARSE: &[u8] = b"GNU.sparse.";

/// Records that describe fields of the header itself.
pub(super) const BASIC: [&[u8]; 10] = [
    b"path",
    b"linkpath",
    b"size",
    b"uid",
    b"gid",
    b"uname",
    b"gname",
    b"mtime",
    b"atime",
    b"ctime",
];

/// Records by key, in the order of keys.
pub(super) type Records = BTreeMap<Vec<u8>, Vec<u8>>;

fn is_valid(key: &[u8], value: &[u8]) -> bool {
    if key.is_empty() || key.contains(&b'=') {
        return false;
    }
    match key {
        b"path" | b"linkpath" | b"uname" | b"gname" => !value.contains(&0),
        _ => !key.contains(&0),
    }
}

/// Parses a header's records. Sparse maps of the oldest kind, which repeat two keys, are joined with commas under
/// `GNU.sparse.map` as later kinds have them. An empty value deletes the key, as PAX says.
pub(super) fn parse(mut data: &[u8]) -> Option<Records> {
    let mut records = Records::new();
    let mut map: Vec<Vec<u8>> = Vec::new();
    while !data.is_empty() {
        let (key, value, rest) = parse_one(data)?;
        data = rest;
        match key {
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let expects_offset = map.len().is_multiple_of(2);
                if (key == b"GNU.sparse.offset") != expects_offset || value.contains(&b',') {
                    return None;
                }
                map.push(value.to_vec());
            }
            _ => {
                records.insert(key.to_vec(), value.to_vec());
            }
        }
    }
    if !map.is_empty() {
        records.insert(b"GNU.sparse.map".to_vec(), map.join(&b','));
    }
    Some(records)
}

fn parse_one(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = data.iter().take(21).position(|byte| *byte == b' ')?;
    let length = decimal(&data[..space])?;
    let length = usize::try_from(length)
        .ok()
        .filter(|length| *length <= data.len() && *length > space + 2)?;
    let record = &data[space + 1..length - 1];
    if data[length - 1] != b'\n' {
        return None;
    }
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    is_valid(key, value).then_some((key, value, &data[length..]))
}

/// Parses a decimal number without a sign.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        value.checked_mul(10)?.checked_add(digit.into())
    })
}

/// Parses `seconds[.fraction]`, which may be negative; digits beyond nanoseconds are dropped.
pub(super) fn time(text: &[u8]) -> Option<Timestamp> {
    let dot = text.iter().position(|byte| *byte == b'.').unwrap_or(text.len());
    let fraction = text.get(dot + 1..).unwrap_or_default();
    let (negative, digits) = match text[..dot].strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, &text[..dot]),
    };
    let magnitude = i64::try_from(decimal(digits)?).ok()?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let mut nanos = 0_u32;
    for index in 0..9 {
        nanos = nanos * 10 + fraction.get(index).map_or(0, |digit| u32::from(digit - b'0'));
    }
    Some(match (negative, nanos) {
        (false, _) => Timestamp {
            seconds: magnitude,
            nanoseconds: nanos,
        },
        (true, 0) => Timestamp {
            seconds: -magnitude,
            nanoseconds: 0,
        },
        (true, _) => Timestamp {
            seconds: -magnitude - 1,
            nanoseconds: 1_000_000_000 - nanos,
        },
    })
}

/// Writes a time the way Go does: no trailing zeros.
pub(super) fn format_time(time: Timestamp) -> Vec<u8> {
    let (mut sign, mut seconds, mut nanos) = ("", i128::from(time.seconds), time.nanoseconds);
    if nanos == 0 {
        return seconds.to_string().into_bytes();
    }
    if seconds < 0 {
        (sign, seconds, nanos) = ("-", -(seconds + 1), 1_000_000_000 - nanos);
    }
    format!("{sign}{seconds}.{nanos:09}")
        .trim_end_matches('0')
        .as_bytes()
        .to_vec()
}

/// Appends one record; its length counts itself.
pub(super) fn append(out: &mut Vec<u8>, key: &[u8], value: &[u8]) -> Option<()> {
    if !is_valid(key, value) {
        return None;
    }
    let rest = key.len() + value.len() + 3;
    let mut length = rest + rest.to_string().len();
    if rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_its_own_length() {
        let mut out = Vec::new();
        append(&mut out, b"k", &[b'v'; 94]).unwrap();
        assert_eq!(out.len(), 100 + 1);
        let records = parse(&out).unwrap();
        assert_eq!(records[&b"k"[..]].len(), 94);
    }

    #[test]
    fn times_keep_their_sign_and_nanoseconds() {
        for text in ["0", "1.5", "-1.5", "-0.000000001", "1577836800.123456789", "-7"] {
            let parsed = time(text.as_bytes()).unwrap();
            assert_eq!(String::from_utf8(format_time(parsed)).unwrap(), text);
        }
        assert_eq!(time(b"1.0000000019").unwrap().nanoseconds, 1);
        for text in ["", "x", "1.x", "--1", "1e3", "99999999999999999999"] {
            assert_eq!(time(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn refuses_damaged_records() {
        for data in [
            "5 k=\n6", "3 k=", "99 k=v\n", "6 kv=v\n", "x k=v\n", "6 =vv\n", "5k=v\n",
        ] {
            assert_eq!(parse(data.as_bytes()), None, "{data:?}");
        }
    }
}

//! File names and dates in HTTP headers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Makes a name that is one path element and shows no control characters.
pub(super) fn safe(name: &str) -> String {
    let base = oci::path::base(name.trim());
    if matches!(base, "" | "." | ".." | "/") || base.chars().any(char::is_control) {
        return "download".to_owned();
    }
    base.to_owned()
}

/// The file name of a `Content-Disposition` header.
pub(super) fn from_disposition(value: &str) -> Option<String> {
    let mut parameters = value.split(';').skip(1);
    let found = parameters.find_map(|parameter| {
        let (key, value) = parameter.split_once('=')?;
        key.trim().eq_ignore_ascii_case("filename").then(|| value.trim())
    })?;
    let name = match found.strip_prefix('"') {
        Some(quoted) => quoted.strip_suffix('"')?.replace("\\\"", "\"").replace("\\\\", "\\"),
        None => found.to_owned(),
    };
    (!name.is_empty() && !name.ends_with('/')).then_some(name)
}

/// Decodes `%20` and the like; what is no UTF-8 afterwards is replaced.
pub(super) fn percent_decoded(path: &str) -> String {
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let hex = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.filter(|_| *byte == b'%').and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(value) => {
                decoded.push(value);
                at += 3;
            }
            None => {
                decoded.push(*byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// Reads `Sun, 06 Nov 1994 08:49:37 GMT`.
pub(super) fn parse_http_date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let rest = text.split_once(", ")?.1;
    let mut parts = rest.split(' ');
    let day: i64 = parts.next()?.parse().ok()?;
    let name = parts.next()?;
    let month = i64::try_from(MONTHS.iter().position(|month| *month == name)?).ok()? + 1;
    let year: i64 = parts.next()?.parse().ok()?;
    let mut clock = parts.next()?.split(':').map(|part| part.parse::<i64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let in_range = (1..=31).contains(&day) && hour < 24 && minute < 60 && second < 61 && (1..10_000).contains(&year);
    if parts.next() != Some("GMT") || !in_range {
        return None;
    }
    // Days since 1970 of a proleptic Gregorian date, counting years from March.
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted.div_euclid(400);
    let year_of_era = shifted - era * 400;
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = era * 146_097 + day_of_era - 719_468;
    let seconds = u64::try_from(days * 86_400 + hour * 3_600 + minute * 60 + second).ok()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_dates() {
        let at = |text| parse_http_date(text).map(|time| time.duration_since(UNIX_EPOCH).expect("is later").as_secs());
        assert_eq!(at("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(at("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(at("Thu, 29 Feb 2024 12:00:00 GMT"), Some(1_709_208_000));
        assert_eq!(at("nonsense"), None);
        assert_eq!(at("Thu, 99 Feb 2024 12:00:00 GMT"), None);
    }

    #[test]
    fn reads_names_from_headers() {
        assert_eq!(from_disposition("attachment; filename=\"a b.txt\"").as_deref(), Some("a b.txt"));
        assert_eq!(from_disposition("inline; FileName=x"), Some("x".to_owned()));
        assert_eq!(from_disposition("attachment"), None);
        assert_eq!(from_disposition("attachment; filename=dir/"), None);
    }

    #[test]
    fn decodes_escapes() {
        assert_eq!(percent_decoded("/a%2Fb%zz%"), "/a/b%zz%");
    }
}

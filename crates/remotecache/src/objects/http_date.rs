//! Times as HTTP headers have them: `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

/// Formats a time.
pub(super) fn format(at: SystemTime) -> String {
    let (seconds, _) = oci::timestamp::to_unix(at);
    let text = oci::timestamp::format(seconds, 0);
    let weekday = usize::try_from(seconds.div_euclid(86_400).rem_euclid(7)).unwrap_or(0);
    let month = text.get(5..7).and_then(|month| month.parse::<usize>().ok());
    let month = month.and_then(|month| MONTHS.get(month.wrapping_sub(1)));
    format!(
        "{}, {} {} {} {} GMT",
        DAYS[weekday],
        text.get(8..10).unwrap_or_default(),
        month.copied().unwrap_or_default(),
        text.get(..4).unwrap_or_default(),
        text.get(11..19).unwrap_or_default(),
    )
}

/// Reads a time in the form that servers have to send.
pub(super) fn parse(text: &str) -> Option<SystemTime> {
    let mut words = text.trim().split_once(", ")?.1.split(' ');
    let (day, month, year, time) = (words.next()?, words.next()?, words.next()?, words.next()?);
    if words.next() != Some("GMT") || words.next().is_some() {
        return None;
    }
    let month = MONTHS.iter().position(|name| *name == month)? + 1;
    let (seconds, _) = oci::timestamp::parse(&format!("{year}-{month:02}-{day:0>2}T{time}Z"))?;
    UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(seconds).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let at = UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(format(at), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:37 GMT"), Some(at));
        assert_eq!(format(UNIX_EPOCH), "Thu, 01 Jan 1970 00:00:00 GMT");
        for wrong in [
            "",
            "now",
            "Sun, 06 Nov 1994",
            "Sun, 31 Feb 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49:37 CET",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}

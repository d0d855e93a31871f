//! Instants and durations in Go's spellings. Instants are nanoseconds since the epoch, always printed in UTC.

use std::time::SystemTime;

/// Nanoseconds since the epoch (years 1677 to 2262).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant {
    /// Nanoseconds since 1970-01-01T00:00:00Z.
    pub unix_ns: i64,
}

const NS_PER_S: i64 = 1_000_000_000;

impl Instant {
    /// Returns the present.
    pub fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            unix_ns: i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        }
    }

    /// Makes an instant of protobuf's timestamp; what does not fit is clamped.
    pub fn from_parts(seconds: i64, nanos: i32) -> Self {
        Self {
            unix_ns: seconds.saturating_mul(NS_PER_S).saturating_add(i64::from(nanos)),
        }
    }

    /// Seconds from `earlier` to this instant.
    pub fn seconds_since(self, earlier: Self) -> f64 {
        self.unix_ns.saturating_sub(earlier.unix_ns) as f64 / 1e9
    }

    fn civil(self) -> (String, String, i64) {
        let seconds = self.unix_ns.div_euclid(NS_PER_S);
        let days = seconds.div_euclid(86_400);
        let second = seconds.rem_euclid(86_400);
        // Days to year, month and day by eras of 400 years that start on March 1st.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_index = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_index + 2) / 5 + 1;
        let month = if month_index < 10 {
            month_index + 3
        } else {
            month_index - 9
        };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let date = format!("{year:04}-{month:02}-{day:02}");
        let time = format!("{:02}:{:02}:{:02}", second / 3_600, second / 60 % 60, second % 60);
        (date, time, self.unix_ns.rem_euclid(NS_PER_S))
    }

    /// Formats as RFC 3339 with as many decimals as are needed.
    pub fn rfc3339_nano(self) -> String {
        let (date, time, nanos) = self.civil();
        format!("{date}T{time}{}Z", decimals(nanos))
    }

    /// Formats as RFC 3339 in whole seconds.
    pub fn rfc3339(self) -> String {
        let (date, time, _) = self.civil();
        format!("{date}T{time}Z")
    }

    /// Formats as Go prints a time.
    pub fn go_string(self) -> String {
        let (date, time, nanos) = self.civil();
        format!("{date} {time}{} +0000 UTC", decimals(nanos))
    }
}

fn decimals(nanos: i64) -> String {
    if nanos == 0 {
        return String::new();
    }
    let digits = format!("{nanos:09}");
    format!(".{}", digits.trim_end_matches('0'))
}

/// Formats a duration as Go prints it: `48h0m0s`, `1.5s`, `20ms`.
pub fn go_duration(ns: i64) -> String {
    if ns == 0 {
        return "0s".to_owned();
    }
    let sign = if ns < 0 { "-" } else { "" };
    let abs = ns.unsigned_abs();
    let fraction = |value: u64, unit: u64| {
        let whole = value / unit;
        let rest = value % unit;
        if rest == 0 {
            return whole.to_string();
        }
        let width = unit.to_string().len() - 1;
        format!("{whole}.{}", format!("{rest:0width$}").trim_end_matches('0'))
    };
    if abs < 1_000 {
        return format!("{sign}{abs}ns");
    }
    if abs < 1_000_000 {
        return format!("{sign}{}µs", fraction(abs, 1_000));
    }
    if abs < 1_000_000_000 {
        return format!("{sign}{}ms", fraction(abs, 1_000_000));
    }
    let total_s = abs / 1_000_000_000;
    let seconds = fraction(abs - (total_s / 60) * 60_000_000_000, 1_000_000_000);
    let (hours, minutes) = (total_s / 3_600, total_s / 60 % 60);
    if hours > 0 {
        format!("{sign}{hours}h{minutes}m{seconds}s")
    } else if minutes > 0 {
        format!("{sign}{minutes}m{seconds}s")
    } else {
        format!("{sign}{seconds}s")
    }
}

/// Parses a duration in Go's spelling (`72h`, `1h30m`, `1.5s`), in nanoseconds.
///
/// # Errors
/// Go's text for a spelling that is none.
pub fn parse_go_duration(text: &str) -> Result<i64, String> {
    let invalid = || format!("time: invalid duration \"{text}\"");
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut total: i64 = 0;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(|| format!("time: missing unit in duration \"{text}\""))?;
        let (number, after) = rest.split_at(digits);
        let unit_len = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, next) = after.split_at(unit_len);
        let unit_ns: i64 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return Err(format!("time: unknown unit \"{unit}\" in duration \"{text}\"")),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() {
            return Err(invalid());
        }
        let whole: i64 = if whole.is_empty() {
            0
        } else {
            whole.parse().map_err(|_| invalid())?
        };
        let mut piece = whole.checked_mul(unit_ns).ok_or_else(invalid)?;
        let mut scale = unit_ns;
        for digit in fraction.chars() {
            scale /= 10;
            piece += i64::from(digit.to_digit(10).ok_or_else(invalid)?) * scale;
        }
        total = total.checked_add(piece).ok_or_else(invalid)?;
        rest = next;
    }
    Ok(if negative { -total } else { total })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_instants() {
        let at = Instant {
            unix_ns: 1_763_717_293_120_000_000,
        };
        assert_eq!(at.rfc3339_nano(), "2025-11-21T09:28:13.12Z");
        assert_eq!(at.rfc3339(), "2025-11-21T09:28:13Z");
        assert_eq!(at.go_string(), "2025-11-21 09:28:13.12 +0000 UTC");
        assert_eq!(
            Instant {
                unix_ns: 951_782_400_000_000_000
            }
            .rfc3339_nano(),
            "2000-02-29T00:00:00Z"
        );
        assert_eq!(
            Instant { unix_ns: -1 }.rfc3339_nano(),
            "1969-12-31T23:59:59.999999999Z"
        );
    }

    #[test]
    fn formats_durations() {
        assert_eq!(go_duration(0), "0s");
        assert_eq!(go_duration(48 * 3_600 * NS_PER_S), "48h0m0s");
        assert_eq!(go_duration(90 * NS_PER_S), "1m30s");
        assert_eq!(go_duration(1_500_000_000), "1.5s");
        assert_eq!(go_duration(20_000_000), "20ms");
        assert_eq!(go_duration(1_500), "1.5µs");
    }

    #[test]
    fn parses_durations() {
        assert_eq!(parse_go_duration("72h"), Ok(72 * 3_600 * NS_PER_S));
        assert_eq!(parse_go_duration("1h30m"), Ok(90 * 60 * NS_PER_S));
        assert_eq!(parse_go_duration("1.5s"), Ok(1_500_000_000));
        assert_eq!(parse_go_duration("-2ms"), Ok(-2_000_000));
        assert_eq!(parse_go_duration("0"), Ok(0));
        for bad in ["", "5", "x", "1y", ".s", "999999999999h"] {
            assert!(parse_go_duration(bad).is_err(), "{bad}");
        }
    }
}

//! `--shm-size` and `--ulimit`.

use super::SpecError;

/// Parses a size in bytes with an optional binary unit (`64m`, `1.5GiB`).
///
/// # Errors
/// For anything else.
pub fn memory_bytes(text: &str) -> Result<u64, SpecError> {
    let invalid = || SpecError::invalid(format!("invalid size: '{text}'"));
    let number_len = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(number_len);
    let unit = unit.trim().to_lowercase();
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(invalid()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let scale = 1u64 << shift;
    let bytes = whole
        .parse::<u64>()
        .map_err(|_| invalid())?
        .checked_mul(scale)
        .ok_or_else(invalid)?;
    if fraction.is_empty() {
        return Ok(bytes);
    }
    let digits = fraction.get(..fraction.len().min(18)).ok_or_else(invalid)?;
    let part = digits.parse::<u64>().map_err(|_| invalid())?;
    let divisor = (0..digits.len()).fold(1u128, |divisor, _| divisor * 10);
    let part = u64::try_from(u128::from(part) * u128::from(scale) / divisor).map_err(|_| invalid())?;
    bytes.checked_add(part).ok_or_else(invalid)
}

/// Checks a limit, `name=soft[:hard]`, and returns it with both parts.
///
/// # Errors
/// For an unknown name or numbers that make no sense.
pub fn ulimit(text: &str) -> Result<String, SpecError> {
    const NAMES: [&str; 15] = [
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "rttime",
        "sigpending",
        "stack",
    ];
    let invalid = || SpecError::invalid(format!("invalid ulimit argument: {text}"));
    let (name, limits) = text.split_once('=').ok_or_else(invalid)?;
    if !NAMES.contains(&name) {
        return Err(SpecError::invalid(format!("invalid ulimit type: {name}")));
    }
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let number = |text: &str| text.parse::<i64>().map_err(|_| invalid());
    let (soft, hard) = (number(soft)?, number(hard)?);
    if hard != -1 && (soft == -1 || soft > hard) {
        return Err(SpecError::invalid(format!(
            "ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}"
        )));
    }
    Ok(format!("{name}={soft}:{hard}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_sizes() {
        for (text, bytes) in [
            ("64m", 64 << 20),
            ("1KiB", 1024),
            ("1.5g", 3 << 29),
            ("7", 7),
            ("2MB", 2 << 20),
        ] {
            assert_eq!(memory_bytes(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "m", "1x", "-1", "99999999999p"] {
            assert!(memory_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn checks_limits() {
        assert_eq!(ulimit("nofile=1024").unwrap(), "nofile=1024:1024");
        assert_eq!(ulimit("nofile=1:2").unwrap(), "nofile=1:2");
        assert_eq!(ulimit("core=-1").unwrap(), "core=-1:-1");
        for bad in ["nofile", "x=1", "nofile=2:1", "nofile=a", "nofile=-1:5"] {
            assert!(ulimit(bad).is_err(), "{bad}");
        }
    }
}

//! Byte counts with decimal units, as in `12.34MB`.

const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];

fn scaled(bytes: i64) -> Option<(f64, &'static str)> {
    let mut value = bytes as f64;
    let mut unit = None;
    let mut left = bytes;
    for name in UNITS {
        if left.unsigned_abs() < 1000 {
            break;
        }
        left /= 1000;
        value /= 1000.0;
        unit = Some(name);
    }
    unit.map(|unit| (value, unit))
}

/// Formats with two decimals, or as whole bytes below 1 kB.
pub fn two_decimals(bytes: i64) -> String {
    match scaled(bytes) {
        Some((value, unit)) => format!("{value:.2}{unit}"),
        None => format!("{bytes}B"),
    }
}

/// Formats with as many decimals as are needed.
pub fn shortest(bytes: i64) -> String {
    match scaled(bytes) {
        Some((value, unit)) => format!("{value}{unit}"),
        None => format!("{bytes}B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picks_the_unit() {
        assert_eq!(two_decimals(0), "0B");
        assert_eq!(two_decimals(999), "999B");
        assert_eq!(two_decimals(1234), "1.23kB");
        assert_eq!(two_decimals(-1234), "-1.23kB");
        assert_eq!(two_decimals(12_345_678_901), "12.35GB");
        assert_eq!(shortest(512_000_000), "512MB");
        assert_eq!(shortest(1_500), "1.5kB");
    }
}

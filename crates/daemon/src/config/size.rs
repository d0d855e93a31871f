//! Amounts of disk space and of time, as the configuration spells them.

use std::str::FromStr;

use serde::{Deserialize, Deserializer, de};

/// An amount of disk space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSize {
    /// Bytes; 0: not set.
    Bytes(i64),
    /// A part of the file system.
    Percent(i64),
}

impl Default for DiskSize {
    fn default() -> Self {
        Self::Bytes(0)
    }
}

impl DiskSize {
    /// Returns whether anything is set.
    pub fn is_set(self) -> bool {
        self != Self::Bytes(0)
    }

    /// Returns the amount on a file system of `total_bytes`. A part is rounded up to whole gigabytes; of an unknown file
    /// system it is 2 GB.
    pub fn bytes_of(self, total_bytes: i64) -> i64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(0) => 0,
            Self::Percent(_) if total_bytes == 0 => 2_000_000_000,
            Self::Percent(percent) => {
                let part = i128::from(total_bytes) * i128::from(percent) / 100;
                let rounded = (part / (1 << 30) + 1) * 1_000_000_000;
                i64::try_from(rounded).unwrap_or(i64::MAX)
            }
        }
    }
}

/// Why an amount cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    /// No amount of disk space.
    #[error("invalid disk space {text}")]
    DiskSpace {
        /// What was written.
        text: String,
    },
    /// No amount of time.
    #[error("invalid duration {text}")]
    Duration {
        /// What was written.
        text: String,
    },
}

impl FromStr for DiskSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let invalid = || SizeError::DiskSpace {
            text: text.to_owned(),
        };
        if text.is_empty() {
            return Ok(Self::default());
        }
        if let Some(percent) = text.strip_suffix('%') {
            return percent.parse().map(Self::Percent).map_err(|_| invalid());
        }
        let number_len = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(number_len);
        let unit = unit.trim().to_ascii_lowercase();
        let shift = match unit.strip_suffix('b').unwrap_or(&unit).trim_end_matches('i') {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            "p" => 50,
            _ => return Err(invalid()),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let scale = 1i64 << shift;
        let mut bytes = whole
            .parse::<i64>()
            .ok()
            .and_then(|whole| whole.checked_mul(scale))
            .ok_or_else(invalid)?;
        if !fraction.is_empty() {
            let digits = fraction.get(..fraction.len().min(18)).ok_or_else(invalid)?;
            let part = digits.parse::<u64>().map_err(|_| invalid())?;
            let divisor = (0..digits.len()).fold(1i128, |divisor, _| divisor * 10);
            let part = i128::from(part) * i128::from(scale) / divisor;
            bytes = i64::try_from(part)
                .ok()
                .and_then(|part| bytes.checked_add(part))
                .ok_or_else(invalid)?;
        }
        Ok(Self::Bytes(bytes))
    }
}

impl<'de> Deserialize<'de> for DiskSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Number(bytes) => Ok(Self::Bytes(bytes)),
            NumberOrText::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

/// A span of time in whole seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seconds(pub u64);

impl FromStr for Seconds {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let invalid = || SizeError::Duration {
            text: text.to_owned(),
        };
        if text.is_empty() {
            return Ok(Self(0));
        }
        if let Ok(seconds) = text.parse() {
            return Ok(Self(seconds));
        }
        let mut nanoseconds: u128 = 0;
        let mut rest = text;
        while !rest.is_empty() {
            let number_len = rest
                .find(|c: char| !c.is_ascii_digit() && c != '.')
                .ok_or_else(invalid)?;
            let (number, after) = rest.split_at(number_len);
            let unit_len = after
                .find(|c: char| c.is_ascii_digit() || c == '.')
                .unwrap_or(after.len());
            let (unit, next) = after.split_at(unit_len);
            let scale: f64 = match unit {
                "ns" => 1.0,
                "us" | "µs" => 1e3,
                "ms" => 1e6,
                "s" => 1e9,
                "m" => 60e9,
                "h" => 3_600e9,
                _ => return Err(invalid()),
            };
            let amount = number.parse::<f64>().map_err(|_| invalid())?;
            let span = std::time::Duration::try_from_secs_f64(amount * scale / 1e9).map_err(|_| invalid())?;
            nanoseconds += span.as_nanos();
            rest = next;
        }
        u64::try_from(nanoseconds / 1_000_000_000)
            .map(Self)
            .map_err(|_| invalid())
    }
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Number(seconds) => u64::try_from(seconds)
                .map(Self)
                .map_err(|_| de::Error::custom("negative duration")),
            NumberOrText::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(i64),
    Text(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_sizes() {
        assert_eq!("10GB".parse(), Ok(DiskSize::Bytes(10 << 30)));
        assert_eq!("512".parse(), Ok(DiskSize::Bytes(512)));
        assert_eq!("1.5k".parse(), Ok(DiskSize::Bytes(1536)));
        assert_eq!("20%".parse(), Ok(DiskSize::Percent(20)));
        for bad in ["x", "1x", "-1", "%", "99999999999999999p", "1.xk"] {
            assert!(bad.parse::<DiskSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn parts_are_rounded_up() {
        assert_eq!(DiskSize::Percent(10).bytes_of(100 << 30), 11_000_000_000);
        assert_eq!(DiskSize::Percent(10).bytes_of(0), 2_000_000_000);
        assert_eq!(DiskSize::Bytes(7).bytes_of(0), 7);
    }

    #[test]
    fn reads_spans() {
        assert_eq!("24h".parse(), Ok(Seconds(86_400)));
        assert_eq!("1h30m".parse(), Ok(Seconds(5_400)));
        assert_eq!("90".parse(), Ok(Seconds(90)));
        assert_eq!("1500ms".parse(), Ok(Seconds(1)));
        assert!("soon".parse::<Seconds>().is_err());
    }
}

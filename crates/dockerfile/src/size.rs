//! Sizes and limits as people write them.

use crate::text;

/// Parses a size such as `64m` or `1.5 GiB` into bytes, with binary units; `None` if it is none.
pub(crate) fn parse_size(text: &str) -> Option<i64> {
    let last = text.rfind(|c: char| c.is_ascii_digit() || c == '.' || c == ' ')?;
    let (number, suffix) = if text.as_bytes()[last] == b' ' {
        (&text[..last], &text[last + 1..])
    } else {
        text.split_at(last + 1)
    };
    if !number
        .bytes()
        .all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'E' | b'+'))
    {
        return None;
    }
    let value: f64 = number.parse().ok()?;
    let suffix = suffix.to_lowercase();
    let power = match suffix.as_bytes() {
        [] | [b'b'] => 0,
        [unit] | [unit, b'b'] | [unit, b'i', b'b'] => b"kmgtp".iter().position(|known| known == unit)? + 1,
        _ => return None,
    };
    let scale = (0..power).fold(1.0, |scale, _| scale * 1024.0);
    float_to_int(value * scale)
}

/// Cuts the fraction off; `None` beyond what an `i64` holds.
fn float_to_int(value: f64) -> Option<i64> {
    if !(0.0..9.2e18).contains(&value) {
        return None;
    }
    format!("{:.0}", value.trunc()).parse().ok()
}

/// A resource limit of processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ulimit {
    pub(crate) name: String,
    pub(crate) soft: i64,
    pub(crate) hard: i64,
}

const ULIMITS: &[&str] = &[
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

/// Why a limit is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UlimitError {
    #[error("invalid ulimit argument: {0}")]
    Form(String),
    #[error("invalid ulimit type: {0}")]
    Name(String),
    #[error("too many limit value arguments - {0}, can only have up to two, `soft[:hard]`")]
    TooMany(String),
    #[error("{0}")]
    Number(String),
    #[error("ulimit soft limit must be less than or equal to hard limit: soft: -1 (unlimited), hard: {0}")]
    UnlimitedSoft(i64),
    #[error("ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}")]
    Order { soft: i64, hard: i64 },
}

/// Parses `name=soft[:hard]`.
pub(crate) fn parse_ulimit(limit: &str) -> Result<Ulimit, UlimitError> {
    let Some((name, values)) = limit.split_once('=') else {
        return Err(UlimitError::Form(limit.to_owned()));
    };
    if !ULIMITS.contains(&name) {
        return Err(UlimitError::Name(name.to_owned()));
    }
    let number = |value: &str| text::parse_int(value).map_err(UlimitError::Number);
    let (soft, hard) = match values.split(':').collect::<Vec<_>>()[..] {
        [soft] => (soft, None),
        [soft, hard] => (soft, Some(number(hard)?)),
        _ => return Err(UlimitError::TooMany(values.to_owned())),
    };
    let soft = number(soft)?;
    let hard = hard.unwrap_or(soft);
    if hard != -1 && soft == -1 {
        return Err(UlimitError::UnlimitedSoft(hard));
    }
    if hard != -1 && soft > hard {
        return Err(UlimitError::Order { soft, hard });
    }
    Ok(Ulimit {
        name: name.to_owned(),
        soft,
        hard,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_sizes() {
        for (text, wanted) in [
            ("64", 64),
            ("64b", 64),
            ("64k", 65536),
            ("1.5 GiB", 1_610_612_736),
            ("2MB", 2 << 20),
            ("1e3", 1000),
        ] {
            assert_eq!(parse_size(text), Some(wanted), "{text}");
        }
        for text in ["", "x", "1x", "1kx", "-1", "1bb", "99999999999p"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn parses_limits() {
        assert_eq!(
            parse_ulimit("nofile=1:2"),
            Ok(Ulimit {
                name: "nofile".into(),
                soft: 1,
                hard: 2
            })
        );
        assert_eq!(
            parse_ulimit("nofile=3:2"),
            Err(UlimitError::Order { soft: 3, hard: 2 })
        );
        assert_eq!(parse_ulimit("x=1"), Err(UlimitError::Name("x".into())));
    }
}

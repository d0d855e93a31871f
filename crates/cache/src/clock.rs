//! Times as they are stored: nanoseconds since 1970, negative before.

use std::time::{Duration, SystemTime};

/// Converts for storage; saturates at the ends of `i64`.
pub(crate) fn to_nanos(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanos| -nanos),
    }
}

/// Converts from storage.
pub(crate) fn from_nanos(nanos: i64) -> SystemTime {
    let span = Duration::from_nanos(nanos.unsigned_abs());
    if nanos < 0 {
        SystemTime::UNIX_EPOCH - span
    } else {
        SystemTime::UNIX_EPOCH + span
    }
}

/// Returns the present time for storage.
pub(crate) fn now_nanos() -> i64 {
    to_nanos(SystemTime::now())
}

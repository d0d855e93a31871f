//! Choosing builds of the history: `status==error`, `ref~=abc`, `repository==…`, `startedAt>24h`, `duration<=1m`.
//!
//! A filter is a list of conditions that must all hold; of several filters one has to match.

use std::time::{Duration, SystemTime};

use api::pb::control::BuildHistoryRecord;

use crate::config::Seconds;

/// A filter that does not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("failed to parse history filters {condition}")]
pub(super) struct HistoryFilterError {
    condition: String,
}

/// Which builds are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HistoryFilter(Vec<Vec<Condition>>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    Present(Field),
    Equal(Field, String),
    Unequal(Field, String),
    Contains(Field, String),
    Started(Order, SystemTime),
    Completed(Order, SystemTime),
    Duration(Order, Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Ref,
    Status,
    Repository,
    /// A field that no record has.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// Makes a condition of a field and a text.
type MakeComparison = fn(Field, String) -> Condition;

const ORDERS: [(&str, Order); 4] = [
    (">=", Order::GreaterOrEqual),
    ("<=", Order::LessOrEqual),
    (">", Order::Greater),
    ("<", Order::Less),
];

impl Order {
    fn holds<T: PartialOrd>(self, one: &T, other: &T) -> bool {
        match self {
            Self::Less => one < other,
            Self::LessOrEqual => one <= other,
            Self::Greater => one > other,
            Self::GreaterOrEqual => one >= other,
        }
    }
}

impl HistoryFilter {
    /// Reads filters. Spans of time count back from `now`.
    pub(super) fn parse(filters: &[String], now: SystemTime) -> Result<Self, HistoryFilterError> {
        let parsed = filters.iter().map(|filter| {
            let conditions = filter.split(',').filter(|condition| !condition.trim().is_empty());
            conditions
                .map(|condition| {
                    Condition::parse(condition.trim(), now).ok_or_else(|| HistoryFilterError {
                        condition: condition.to_owned(),
                    })
                })
                .collect()
        });
        parsed.collect::<Result<_, _>>().map(Self)
    }

    /// Returns whether a build is wanted; without filters, all are.
    pub(super) fn matches(&self, record: &BuildHistoryRecord) -> bool {
        let Self(filters) = self;
        filters.is_empty()
            || filters
                .iter()
                .any(|all| all.iter().all(|condition| condition.holds(record)))
    }
}

impl Condition {
    fn parse(text: &str, now: SystemTime) -> Option<Self> {
        let timed = ORDERS.iter().find_map(|(sign, order)| {
            text.split_once(sign)
                .map(|(key, value)| (key.trim(), *order, value.trim()))
        });
        match timed {
            Some(("startedAt", order, value)) => return Some(Self::Started(order, time(value, now)?)),
            Some(("completedAt", order, value)) => return Some(Self::Completed(order, time(value, now)?)),
            Some(("duration", order, value)) => return Some(Self::Duration(order, span(value)?)),
            _ => {}
        }
        let operators: [(&str, MakeComparison); 3] = [
            ("==", Condition::Equal),
            ("!=", Condition::Unequal),
            ("~=", Condition::Contains),
        ];
        for (sign, make) in operators {
            if let Some((field, value)) = text.split_once(sign) {
                let value = value.trim().trim_matches('"').to_owned();
                return Some(make(Field::parse(field.trim())?, value));
            }
        }
        Some(Self::Present(Field::parse(text)?))
    }

    fn holds(&self, record: &BuildHistoryRecord) -> bool {
        let at = |at: Option<&prost_types::Timestamp>| at.and_then(|at| SystemTime::try_from(*at).ok());
        let started = at(record.created_at.as_ref()).unwrap_or(SystemTime::UNIX_EPOCH);
        let completed = at(record.completed_at.as_ref());
        match self {
            Self::Present(field) => field.of(record).is_some(),
            Self::Equal(field, value) => field.of(record).is_some_and(|found| found == *value),
            Self::Unequal(field, value) => field.of(record).is_none_or(|found| found != *value),
            Self::Contains(field, value) => field
                .of(record)
                .is_some_and(|found| found.contains(value.as_str())),
            Self::Started(order, time) => order.holds(&started, time),
            Self::Completed(order, time) => order.holds(&completed.unwrap_or(SystemTime::UNIX_EPOCH), time),
            Self::Duration(order, wanted) => {
                let lasted = completed.and_then(|completed| completed.duration_since(started).ok());
                order.holds(&lasted.unwrap_or_default(), wanted)
            }
        }
    }
}

impl Field {
    fn parse(text: &str) -> Option<Self> {
        let is_name = !text.is_empty()
            && text
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || b"_-.\"".contains(&c));
        is_name.then_some(match text {
            "ref" => Self::Ref,
            "status" => Self::Status,
            "repository" => Self::Repository,
            _ => Self::Unknown,
        })
    }

    fn of(self, record: &BuildHistoryRecord) -> Option<String> {
        match self {
            Self::Ref => Some(record.r#ref.clone()).filter(|id| !id.is_empty()),
            Self::Status => Some(status(record).to_owned()),
            Self::Repository => repository(record),
            Self::Unknown => None,
        }
    }
}

fn status(record: &BuildHistoryRecord) -> &'static str {
    match (&record.completed_at, &record.error) {
        (None, _) => "running",
        (Some(_), None) => "completed",
        (Some(_), Some(error)) if error.message.contains("context canceled") => "canceled",
        (Some(_), Some(_)) => "error",
    }
}

/// The repository of the context: as the client names it, or the context's own address without what follows `#`.
fn repository(record: &BuildHistoryRecord) -> Option<String> {
    let attr = |key: &str| record.frontend_attrs.get(key).cloned();
    let context = || attr("context").filter(|context| context.contains("://") || context.starts_with("git@"));
    let address = |context: String| context.split('#').next().unwrap_or_default().to_owned();
    attr("vcs:source").or_else(|| context().map(address))
}

fn span(text: &str) -> Option<Duration> {
    text.parse::<Seconds>()
        .ok()
        .map(|Seconds(seconds)| Duration::from_secs(seconds))
}

/// A time as RFC 3339 has it, or how long ago it was.
fn time(text: &str, now: SystemTime) -> Option<SystemTime> {
    if let Some(span) = span(text).filter(|_| !text.contains('T')) {
        return now.checked_sub(span);
    }
    let (seconds, nanoseconds) = oci::timestamp::parse(text)?;
    let nanos = i32::try_from(nanoseconds).ok()?;
    SystemTime::try_from(prost_types::Timestamp { seconds, nanos }).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str, lasted_s: Option<i64>, error: &str) -> BuildHistoryRecord {
        let at = |seconds| prost_types::Timestamp { seconds, nanos: 0 };
        let failed = api::pb::rpc::Status {
            message: error.to_owned(),
            ..Default::default()
        };
        BuildHistoryRecord {
            r#ref: id.to_owned(),
            created_at: Some(at(1_000)),
            completed_at: lasted_s.map(|lasted| at(1_000 + lasted)),
            error: Some(failed).filter(|_| !error.is_empty()),
            frontend_attrs: [("vcs:source".to_owned(), "https://x/y.git".to_owned())].into(),
            ..Default::default()
        }
    }

    #[test]
    fn conditions_choose_builds() {
        let records = [
            record("run", None, ""),
            record("fine", Some(5), ""),
            record("bad", Some(50), "it failed"),
            record("left", Some(1), "context canceled"),
        ];
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000);
        for (filters, expected) in [
            (&[][..], "run fine bad left"),
            (&["status==running"], "run"),
            (&["status==completed"], "fine"),
            (&["status==error", "status==canceled"], "bad left"),
            (&["status!=running,ref~=e"], "fine left"),
            (&["ref==bad"], "bad"),
            (&["repository==https://x/y.git,ref==bad"], "bad"),
            (&["nosuch"], ""),
            (&["duration>10s"], "bad"),
            (&["startedAt>20m"], "run fine bad left"),
            (&["startedAt>10m"], ""),
            (
                &["completedAt<=1970-01-01T00:16:45Z,status!=running"],
                "fine left",
            ),
        ] {
            let filters: Vec<String> = filters.iter().map(|&filter| filter.to_owned()).collect();
            let filter = HistoryFilter::parse(&filters, now).unwrap();
            let found: Vec<&str> = records
                .iter()
                .filter(|record| filter.matches(record))
                .map(|record| record.r#ref.as_str())
                .collect();
            assert_eq!(found.join(" "), expected, "{filters:?}");
        }
        for bad in ["startedAt>soon", "duration<x", "=="] {
            assert!(HistoryFilter::parse(&[bad.to_owned()], now).is_err(), "{bad}");
        }
    }
}

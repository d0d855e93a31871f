//! What an export leaves out of what its mode asks for, and whom that is told to.
//!
//! There are two kinds. A result that should be there but cannot be had is told of one by one, as a warning, and fails an
//! export that is to be complete. A step that is known only as the way to a later one, because the cache it was imported
//! from leaves results of such steps out by design, is no failure of this export: such steps are counted and told of once.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use build::blocking::internal;
use build::cache_export::OMITTED_KEY;
use build::error::{BuildError, ErrorKind};
use build::progress::{LogStream, VertexProgress, VertexWarning};
use oci::Digest;
use serde::Serialize;

/// Steps without results that are listed in the response; all are counted.
const MAX_LISTED: usize = 1_000;
/// Why a step never had a result here.
const NEVER_HERE: &str = "no result was ever here: known only as the way to a later step, whose result came from a cache \
                          (one of mode=min leaves the results of intermediate steps out)";

/// A result that an export left out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Omitted {
    /// The step's vertex or record; absent: many.
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<Digest>,
    /// Why.
    reason: String,
}

/// Steps that have no results to export.
#[derive(Debug, Serialize)]
struct Without<'a> {
    /// How many.
    count: usize,
    /// Their vertices, at most [`MAX_LISTED`].
    records: Vec<&'a Digest>,
    /// Why.
    reason: &'static str,
}

#[derive(Debug, Default)]
struct Noted {
    omitted: BTreeSet<Omitted>,
    without: BTreeSet<Digest>,
    has_unreadable: bool,
}

/// What one export left out so far.
#[derive(Debug, Default)]
pub(super) struct Omissions(Mutex<Noted>);

impl Omissions {
    fn lock(&self) -> MutexGuard<'_, Noted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a result that should be there.
    pub(super) fn omit(&self, record: Option<Digest>, reason: String) {
        self.lock().omitted.insert(Omitted { record, reason });
    }

    /// Notes a result that is known but whose layers cannot be had.
    pub(super) fn unreadable(&self, record: Option<Digest>, reason: String) {
        self.omit(record, reason);
        self.lock().has_unreadable = true;
    }

    /// Whether there is a result whose layers cannot be had.
    pub(super) fn has_unreadable(&self) -> bool {
        self.lock().has_unreadable
    }

    /// Notes a step that never had a result here.
    pub(super) fn without(&self, record: Digest) {
        self.lock().without.insert(record);
    }

    /// Tells of all that was left out, in the log and on an exporter's vertex: as warnings, but once of all steps that
    /// never had a result here.
    pub(super) fn tell(&self, exporter: &str, progress: &VertexProgress) {
        let noted = self.lock();
        for omitted in &noted.omitted {
            let text = match &omitted.record {
                Some(record) => format!("result of step {record} is not exported: {}", omitted.reason),
                None => omitted.reason.clone(),
            };
            tracing::warn!(exporter, "{text}");
            progress.warn(VertexWarning::short(progress.digest(), text));
        }
        let count = noted.without.len();
        if count == 0 {
            return;
        }
        let steps = if count == 1 { "step" } else { "steps" };
        let text = format!("{count} {steps} exported without result: {NEVER_HERE}");
        tracing::info!(exporter, "{text}");
        progress.log(LogStream::Stderr, format!("{text}\n"));
    }

    /// Fails for what was left out although it should be there.
    ///
    /// # Errors
    /// A not-found error that names the first.
    pub(super) fn check_complete(&self) -> Result<(), BuildError> {
        let noted = self.lock();
        let Some(first) = noted.omitted.first() else {
            return Ok(());
        };
        let record = first
            .record
            .map(|record| format!("{record}: "))
            .unwrap_or_default();
        let count = noted.omitted.len();
        let results = if count == 1 { "result" } else { "results" };
        let text = format!(
            "cache export left out {count} {results}, and ignore-error=false was asked for: {record}{}",
            first.reason
        );
        Err(BuildError::new(ErrorKind::NotFound, text))
    }

    /// The entry of the build's response; `None`: nothing was left out.
    ///
    /// # Errors
    /// When it cannot be written as JSON.
    pub(super) fn response(&self) -> Result<Option<(String, String)>, BuildError> {
        let noted = self.lock();
        let mut listed = Vec::new();
        for omitted in &noted.omitted {
            listed.push(oci::json::to_string(omitted).map_err(internal)?);
        }
        if !noted.without.is_empty() {
            let without = Without {
                count: noted.without.len(),
                records: noted.without.iter().take(MAX_LISTED).collect(),
                reason: NEVER_HERE,
            };
            listed.push(oci::json::to_string(&without).map_err(internal)?);
        }
        if listed.is_empty() {
            return Ok(None);
        }
        Ok(Some((OMITTED_KEY.to_owned(), format!("[{}]", listed.join(",")))))
    }
}

#[cfg(test)]
mod tests {
    use build::progress::JobProgress;

    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::sha256(name)
    }

    /// Tells of what was left out; returns the number of warnings.
    fn warnings(omissions: &Omissions) -> usize {
        let (progress, job) = (
            VertexProgress::new(digest("export"), "export".to_owned(), Vec::new(), None),
            JobProgress::new(),
        );
        progress.attach(&job);
        omissions.tell("export", &progress);
        job.warnings()
    }

    #[test]
    fn steps_that_never_had_a_result_are_told_of_once() {
        let omissions = Omissions::default();
        for number in 0..MAX_LISTED + 5 {
            omissions.without(digest(&number.to_string()));
        }
        omissions.check_complete().unwrap();
        assert_eq!(warnings(&omissions), 0);
        assert!(!omissions.has_unreadable());
        let (key, json) = omissions.response().unwrap().unwrap();
        assert_eq!(key, OMITTED_KEY);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let entries = json.as_array().unwrap();
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0]["count"], MAX_LISTED + 5);
        assert_eq!(entries[0]["records"].as_array().unwrap().len(), MAX_LISTED);
        assert_eq!(entries[0]["reason"], NEVER_HERE);
    }

    #[test]
    fn results_that_should_be_there_are_told_of_one_by_one() {
        let omissions = Omissions::default();
        assert_eq!(warnings(&omissions), 0);
        omissions.check_complete().unwrap();
        assert_eq!(omissions.response().unwrap(), None);
        omissions.omit(Some(digest("a")), "a is gone".to_owned());
        assert!(!omissions.has_unreadable());
        omissions.unreadable(Some(digest("b")), "b is gone".to_owned());
        assert!(omissions.has_unreadable());
        omissions.without(digest("c"));
        assert_eq!(warnings(&omissions), 2);
        let error = omissions.check_complete().unwrap_err().to_string();
        assert!(error.contains("left out 2 results"), "{error}");
        let (_, json) = omissions.response().unwrap().unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json.as_array().unwrap().len(), 3);
    }
}
